"""Prompts: templates with blanks, as canvases."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UserError

BLANK = re.compile(r"(?<!\\)(\\*)\[MASK(?:\*(\d+))?\]")
LIKE_BLANK = re.compile(r"[\[<{]\W*mask\b[^\]>}]{0,9}[\]>}]?", re.IGNORECASE)
MOST = 2**26  # tokens of all samples
LOGITS = 2**28  # at once, in a batch that is filled: 1 GiB


class Canvas(NamedTuple):
    """A text with masked positions: ids (N,), and which of them are to be filled (N,)."""

    ids: Tensor
    is_masked: Tensor


def read(config, tokenizer, context: int) -> tuple[list[str], list[Canvas]]:
    """The prompts of a configuration, `num_samples` times each, and their canvases.

    The one `prompt`, or the lines of `prompt_file` that are not blank. Raises `UserError`.
    """
    lines = [config.prompt]
    if config.prompt_file:
        if config.prompt:
            raise UserError("prompt and prompt_file are both given: leave one of them out")
        lines = read_lines(Path(config.prompt_file))
    canvases = [make_canvas(line, config.sampling.length, tokenizer, context) for line in lines]
    check_size(config.num_samples * sum(len(canvas.ids) for canvas in canvases))
    times = range(config.num_samples)
    return [line for line in lines for _ in times], [each for each in canvases for _ in times]


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


def make_canvas(prompt: str, length: int, tokenizer, context: int) -> Canvas:
    """The canvas of a template with blanks, or of a prompt that a text begins with.

    It is continued up to `length` tokens; by 0 a template ends where it ends, and a prompt without
    blanks at the model's `context`. Raises `UserError` where it does not fit.
    """
    pieces, ids, is_masked = parse(prompt), [], []
    pieces[::2] = (encode(text, tokenizer) for text in pieces[::2])
    size = sum(piece if isinstance(piece, int) else len(piece) for piece in pieces)
    if length or len(pieces) == 1:
        limit = length or context
        if size > limit:
            name = "sampling.length" if length else "model.block_size"
            raise UserError(
                f"prompt has {size} tokens but {name} is {limit}: shorten the prompt or set a "
                "larger sampling.length"
            )
        pieces.append(limit - size)
        size = limit
    check_size(size)
    for piece in pieces:
        is_blank = isinstance(piece, int)
        new = torch.zeros(piece, dtype=torch.long) if is_blank else torch.as_tensor(piece)
        ids.append(new)
        is_masked.append(torch.full((len(new),), is_blank))
    return Canvas(torch.cat(ids), torch.cat(is_masked))


def encode(text: str, tokenizer):
    """The ids of a text of a prompt; says where it may be meant to hold a blank."""
    found, hint = LIKE_BLANK.search(text), ""
    if found and not BLANK.fullmatch(found[0]):  # which somebody has written with a backslash
        hint = f"{found[0]} is no blank, which is written [MASK] or [MASK*n]"
    try:
        ids = tokenizer.encode(text)
    except ValueError as error:  # also of a tokenizer of the user's own
        raise UserError(f"{hint}: {error}" if hint else str(error)) from error
    if hint:
        print(hint, file=sys.stderr)
    return ids


def rows_at_once(length: int, vocab_size: int) -> int:
    """How many rows of that length a batch has: as many as keep to `LOGITS`, and 64 at most."""
    return max(1, min(64, LOGITS // (length * vocab_size)))


def batches(canvases: list[Canvas], size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(numbers of the canvases, ids (B, N), is_masked (B, N)), each of canvases of one length.

    Attention goes both ways and would see padding.
    """
    by_length = defaultdict(list)
    for number, canvas in enumerate(canvases):
        by_length[len(canvas.ids)].append(number)
    for numbers in by_length.values():
        for i in range(0, len(numbers), size):
            rows = numbers[i : i + size]
            yield rows, *map(torch.stack, zip(*(canvases[row] for row in rows), strict=True))
