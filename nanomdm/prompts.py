"""Prompts: templates with blanks, as canvases, and what is shown of them when they are filled."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import strategies
from .errors import UserError, as_user_error

BLANK = re.compile(r"(?<!\\)(\\*)\[MASK(?:\*(\d{1,18}))?\]")
LIKE_BLANK = re.compile(r"[\[<{]\W*mask\b[^\]>}]{0,9}[\]>}]?", re.IGNORECASE)
MOST = 2**26  # tokens of all samples
LOGITS = 2**28  # at once, in a batch that is filled: 1 GiB


class Canvas(NamedTuple):
    """A text with masked positions: ids (N,), and which of them are to be filled (N,)."""

    ids: Tensor
    is_masked: Tensor
    start: Tensor = torch.tensor(0)  # the first token that is shown


def read(config, tokenizer, shape, layout: str = "stream") -> tuple[list[str], list[Canvas]]:
    """The prompts of a configuration, `num_samples` times each, and their canvases.

    The one `prompt`, or the lines of `prompt_file` that are not blank, for a network of this
    `shape` (its config). Raises `UserError`.
    """
    lines = [config.prompt]
    if config.prompt_file:
        if config.prompt:
            raise UserError("prompt and prompt_file are both given: leave one of them out")
        lines = read_lines(Path(config.prompt_file))
    length = config.sampling.length
    canvases = [
        make_canvas(line, length, tokenizer, shape.block_size, layout)
        for line in with_blanks(lines, config.blank)
    ]
    for canvas in canvases:
        require_order(shape, canvas.is_masked)
    check_size(config.num_samples * sum(len(canvas.ids) for canvas in canvases))
    times = range(config.num_samples)
    return [line for line in lines for _ in times], [each for each in canvases for _ in times]


def require_order(shape, is_masked: Tensor) -> None:
    """Raise `UserError` for a canvas that a network of this shape with blocks cannot fill."""
    if shape.block_length:
        with as_user_error("prompt: "):
            strategies.require_order(is_masked[None], shape.block_length)


def check_size(tokens: int) -> None:
    if tokens > MOST:
        raise UserError(
            f"{tokens:,} tokens are more than one command samples ({MOST:,}): lower "
            "sampling.length, the blanks of the prompt or num_samples"
        )


def read_lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompt_file={path} ({error}): name a UTF-8 text") from error
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"prompt_file={path} holds no prompt: write one a line")
    return lines


def with_blanks(lines: list[str], blank: str) -> list[str]:
    """The lines with [MASK*n] in the place of n characters of `blank`; a backslash keeps one.

    Says so where no prompt has any of them.
    """
    if not blank:
        return lines
    if any(lines) and not set(blank) & set("".join(lines)):
        print(f"blank has no effect: no prompt has {blank}", file=sys.stderr)
    characters = f"[{re.escape(blank)}]"
    pattern = rf"{BLANK.pattern}|\\(?P<kept>{characters})|(?P<run>{characters}+)"

    def written(match: re.Match) -> str:
        if match[0].startswith("[MASK") or not match["run"]:
            return match["kept"] or match[0]
        return f"[MASK*{len(match['run'])}]"

    return [re.sub(pattern, written, line) for line in lines]


def parse(prompt: str) -> list[str | int]:
    r"""The texts of a prompt and, between them, its blanks as their numbers of tokens.

    [MASK] is a blank of one token, [MASK*n] one of n. A backslash before it makes it text, and two
    are one backslash before a blank.
    """
    pieces, text, end = [], "", 0
    for match in BLANK.finditer(prompt):
        slashes, count = match[1], int(match[2] or 1)
        text += prompt[end : match.start()] + slashes[: len(slashes) // 2]
        end = match.end()
        if len(slashes) % 2:
            text += match[0].lstrip("\\")
        elif count:
            pieces, text = [*pieces, text, count], ""
        else:
            raise UserError(f"prompt holds {match[0]}: a blank has at least one token")
    return [*pieces, text + prompt[end:]]


def make_canvas(
    prompt: str, length: int, tokenizer, context: int, layout: str = "stream"
) -> Canvas:
    """The canvas of a template with blanks, or of a prompt that a text begins with.

    It is continued up to `length` tokens; by 0 a template ends where it ends, and a prompt without
    blanks at the model's `context`. The `layout` that the model was trained on adds an end token:
    before a document, or after a prompt that gets an answer, and that has no blanks. Raises
    `UserError` where it does not fit.
    """
    pieces, start = parse(prompt), 0
    has_blanks = len(pieces) > 1
    check_size(length + sum(pieces[1::2]))
    parts = [np.full(p, -1) if isinstance(p, int) else encode(p, tokenizer) for p in pieces]
    if layout in ("pairs", "rows") and length not in (0, context):
        raise UserError(
            f"sampling.length={length}: the checkpoint's {layout} have {context} tokens: leave it "
            "out"
        )
    if layout == "documents":
        parts, start = [[tokenizer.eos], *parts], 1
    if layout == "pairs":
        if has_blanks:
            raise UserError("the checkpoint answers prompts, which have no blanks: leave them out")
        parts.append([tokenizer.eos])
        start = len(parts[0]) + 1
    ids = np.concatenate(parts)  # -1 where it is masked
    size = len(ids)
    if layout == "rows" and (size > context or has_blanks and size < context):
        raise UserError(f"prompt has {size} tokens, and the checkpoint's rows have {context}")
    if layout in ("documents", "pairs") and size >= context and not (has_blanks or length):
        raise UserError(
            f"prompt has {size} tokens with its end token, and the checkpoint's context {context}: "
            "nothing is left to fill, shorten the prompt"
        )
    if length or not has_blanks:
        own = layout == "documents" and length > 0  # an end token, which a length does not count
        limit = length + own if length else context
        if size > limit:
            name = "sampling.length" if length else "model.block_size"
            raise UserError(
                f"prompt has {size - own} tokens but {name} is {limit - own}: shorten the prompt "
                "or set a larger sampling.length"
            )
        ids = np.pad(ids, (0, limit - size), constant_values=-1)
    ids = torch.from_numpy(ids)
    return Canvas(ids.clamp(min=0), ids < 0, torch.tensor(start))


def lengths(ids: Tensor, is_masked: Tensor, eos: int | None) -> Tensor:
    """(B,): how long the texts in filled canvases (B, N) are.

    A text ends at its first end token after which no token was given (all are in `is_masked`).
    """
    is_tail = is_masked.flip(1).cummin(dim=1).values.flip(1)
    ends = is_tail & (ids == (-1 if eos is None else eos))
    return (ends.cumsum(dim=1) == 0).sum(dim=1)


def encode(text: str, tokenizer):
    """The ids of a text of a prompt; says where it may be meant to hold a blank."""
    found, hint = LIKE_BLANK.search(text), ""
    if found and not BLANK.fullmatch(found[0]):  # which somebody has written with a backslash
        hint = f"{found[0]} is no blank, which is written [MASK] or [MASK*n]"
    with as_user_error(hint and f"{hint}: "):  # also of a tokenizer of the user's own
        ids = tokenizer.encode(text)
    if hint:
        print(hint, file=sys.stderr)
    return ids


def rows_at_once(length: int, vocab_size: int) -> int:
    """How many rows of that length a batch has: as many as keep to `LOGITS`, and 64 at most."""
    return max(1, min(64, LOGITS // (length * vocab_size)))


def batches(canvases: list[Canvas], size: int) -> Iterator[tuple]:
    """(numbers of the canvases, ids, is_masked (B, N), start (B,)), each for those of one length.

    Attention goes both ways and would see padding.
    """
    by_length = defaultdict(list)
    for number, canvas in enumerate(canvases):
        by_length[len(canvas.ids)].append(number)
    for numbers in by_length.values():
        for i in range(0, len(numbers), size):
            rows = numbers[i : i + size]
            yield rows, *map(torch.stack, zip(*(canvases[row] for row in rows), strict=True))
