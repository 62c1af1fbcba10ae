"""nanomdm/watch.py: how a text is shown on a terminal while it appears."""

import re
import sys

import pytest

from nanomdm import watch
from nanomdm.tokenizers import ByteTokenizer

STEPS = ("sampling.steps=6", "system.device=cpu")


@pytest.fixture
def sampled(run, trained):
    """sampled("key=value", ...): what sample.py prints for the tiny model."""

    def sampled(*words: str) -> str:
        result = run("sample.py", f"checkpoint={trained}/ckpt.pt", *STEPS, *words)
        assert result.code == 0, result.err
        return result.out

    return sampled


def screen(written: str) -> str:
    """What a terminal shows in the end, of text that moves up, clears and has colours."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[\d*(?:;\d+)*[A-Za-z]|\n|\r|[^\x1b\n\r]+", written):
        if part == "\n":
            row += 1
            lines[row:] = lines[row:] or [""]
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
        elif part == "\x1b[J":
            del lines[row + 1 :]
            lines[row] = ""
        elif part[0] not in "\x1b\r":
            lines[row] += part
    return "\n".join(lines)


@pytest.fixture
def watched(sampled, monkeypatch):
    """watched("key=value", ...): all that is written to a terminal of 20 columns and 9 lines."""

    def watched(*words: str) -> str:
        monkeypatch.setattr(watch, "FRAME", 0.0)
        monkeypatch.setenv("COLUMNS", "20")
        monkeypatch.setenv("LINES", "9")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return sampled("sampling.watch=true", *words)

    return watched


def test_a_watched_text_is_on_the_screen_once_in_the_end(watched, sampled):
    assert screen(watched("prompt=KING")) == sampled("prompt=KING")


def test_a_watched_text_shows_its_masks_and_what_is_new(watched):
    written = watched("prompt=KING 1", "sampling.strategy=confidence")
    frames = written.split("\x1b[J")
    masks = [frame.count("░") for frame in frames[:-1]]
    assert masks[0] > 0 and masks[-1] == 0 and masks == sorted(masks, reverse=True)
    assert all(watch.NEW in frame for frame in frames[:-1])


def test_a_tall_text_stays_within_the_screen(watched):
    frames = watched("sampling.length=400").split("\x1b[J")[:-1]
    assert max(frame.count("\n") for frame in frames) <= 9


def test_nothing_is_shown_when_piped(run, trained):
    words = (f"checkpoint={trained}/ckpt.pt", *STEPS)
    plain, piped = run("sample.py", *words), run("sample.py", *words, "sampling.watch=true")
    assert piped.out == plain.out and "no terminal" in piped.err


def test_control_characters_never_reach_the_terminal():
    tokenizer = ByteTokenizer()
    shown = watch.styled(tokenizer, list(b"a\x1b[2Jb\x07\nc"), set(), mask_id=256)
    assert "".join(character for character, _ in shown) == "a·[2Jb·\nc"


def test_a_frame_has_no_line_longer_than_the_terminal():
    characters = [(c, watch.PLAIN) for c in "abcdefgh\nij"]
    plain = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in watch.wrap(iter(characters), 3)]
    assert plain == ["abc", "def", "gh", "ij"]
