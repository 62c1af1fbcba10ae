"""The size of the core in tokens: python tests/budgets.py, as `make lint` does.

Tokens are counted because packing lines does not change their number: those of Python's tokenize
without comments and docstrings, an f-string being one.
"""

import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIX = ("model", "diffusion", "data", "train", "sample", "eval")  # the files at the root
EACH, ALL_SIX = 3_220, 12_050
CORE = 43_350  # the six files and nanomdm/; docs/LOG.md has the aims
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
F_START, F_END = (getattr(tokenize, f"FSTRING_{part}", None) for part in ("START", "END"))


def count(path: Path) -> int:
    total = depth = 0  # of f-strings, which Python 3.12 takes apart
    with path.open(encoding="utf-8") as file:
        for token in tokenize.generate_tokens(file.readline):
            depth -= token.type == F_END
            is_docstring = token.type == tokenize.STRING and token.line.lstrip().startswith(
                ('"""', 'r"""')
            )
            if not (depth or token.type in LAYOUT or token.type == F_END or is_docstring):
                total += 1
            depth += token.type == F_START
    return total


def problem(sizes: dict[str, int], rooms: dict[str, int]) -> str:
    """What is over its budget, in one line; empty if nothing is."""
    if sizes.keys() != set(SIX):
        return f"the root has {', '.join(sorted(sizes))}: the six are {', '.join(SIX)}"
    for name, size in sizes.items():
        if size > EACH:
            return f"{name}.py has {size:,} tokens, more than {EACH:,}"
    six = sum(sizes.values())
    if six > ALL_SIX:
        return f"the six files have {six:,} tokens, more than {ALL_SIX:,}"
    core = six + sum(rooms.values())
    return f"the core has {core:,} tokens, more than {CORE:,}" if core > CORE else ""


def main() -> None:
    sizes = {path.stem: count(path) for path in ROOT.glob("*.py")}
    rooms = {path.stem: count(path) for path in (ROOT / "nanomdm").glob("*.py")}
    for files in (sizes, rooms):
        for name, size in sorted(files.items(), key=lambda item: -item[1]):
            print(f"{size:7,} {name}")
        print(f"{sum(files.values()):7,} together\n")
    if line := problem(sizes, rooms):
        sys.exit(f"error: {line}")


if __name__ == "__main__":
    main()
