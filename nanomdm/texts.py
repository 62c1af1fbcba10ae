"""The texts that are scored, in rows that fit the model's context."""

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import text
from .bins import dtype_of
from .errors import UserError, as_user_error
from .tokenizers import train_tokenizer

Document = tuple[str, np.ndarray]  # a name and its ids (n,)


class Texts(NamedTuple):
    """Rows of ids, and which of their tokens are predicted; the rest is context."""

    source: str
    names: list[str]  # of the documents
    rows: list[Tensor]  # each (L,)
    predict: list[Tensor]  # each (L,) bool
    document: Tensor  # (N,): the number of each row's document
    sizes: Tensor  # (N,): bytes of what is predicted; 0 where the ids stand for no text
    counts: Tensor  # (N,): the tokens that a figure is divided by, if not all that are predicted

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())


def split_texts(content: text.Content) -> tuple[list[str], list[str]]:
    """The first 90% and the rest, by characters: of a stream, or whole documents, pairs or rows.

    A document is cut at 90% where the border between two would leave less than 80% to train on.
    """
    texts, unit = content.texts, 2 if content.layout == "pairs" else 1
    ends = np.cumsum([len(each) for each in texts])[unit - 1 :: unit]
    border = int(0.9 * ends[-1])
    n = int((ends <= border).sum())  # whole ones that fit
    room = border - (int(ends[n - 1]) if n else 0)
    if content.layout in ("stream", "documents") and 10 * room > ends[-1]:
        return [*texts[:n], texts[n][:room]], [texts[n][room:], *texts[n + 1 :]]
    if len(ends) < 2:
        size = f"{ends[-1]} characters" if content.layout == "stream" else "one line or pair"
        raise UserError(f"{content.name} has {size}: too few to train on")
    n = unit * min(max(n, 1), len(ends) - 1)
    return texts[:n], texts[n:]


def encode(
    texts: list[str], layout: str, tokenizer, is_cut: bool = False, length: int = 0, start: int = 1
) -> np.ndarray:
    """The ids of texts, one after the other; an end token follows documents, prompts and answers.

    But not the last one, if it `is_cut`, and goes on elsewhere. Raises `UserError` for a text that
    the tokenizer cannot encode or that spells the end token, for a row that has not `length` tokens
    (0: those of the first; texts are counted from `start`), and for a tokenizer without an end.
    """
    eos, parts = tokenizer.eos, []
    has_ends, small = layout in ("documents", "pairs"), dtype_of(tokenizer.vocab_size)
    if has_ends and eos is None:
        raise UserError(f"data.tokenizer={tokenizer.kind} has no end token, which {layout} need")
    for number, each in enumerate(texts, start):
        with as_user_error():  # also of a tokenizer of the user's own
            ids = tokenizer.encode(each).astype(small)
        length = length or len(ids)
        if layout == "rows" and len(ids) != length:
            raise UserError(
                f"row {number} has {len(ids)} tokens, not {length}: one length is needed, in "
                "tokens, which are characters with data.tokenizer=char"
            )
        if has_ends and (ids == eos).any():
            raise UserError(f"text {number} spells the end token: take it out")
        parts += [ids, np.array([eos], small)] if has_ends else [ids]
    return np.concatenate(parts[:-1] if is_cut else parts)


def tokenize(content: text.Content, kind: str, vocab_size: int, tokenizer=None) -> tuple:
    """(tokenizer, ids of the splits, what a meta file says); `tokenizer`: that of a checkpoint."""
    splits = split_texts(content)
    is_rows = content.layout == "rows"
    between = "" if is_rows and kind == "char" else "\n"  # which is no character of any row
    whole, size = between.join(content.texts), len(between.join(splits[0]))
    if tokenizer is None:
        ends = content.layout in ("documents", "pairs")
        tokenizer = train_tokenizer(kind, whole, size, vocab_size, ends)
    is_cut = content.layout == "documents" and sum(map(len, splits)) > len(content.texts)
    length = len(tokenizer.encode(content.texts[0])) if is_rows else 0
    train, val = (
        encode(texts, content.layout, tokenizer, is_cut and texts is splits[0], length, start)
        for texts, start in zip(splits, (1, 1 + len(splits[0]) - is_cut), strict=True)
    )
    about = {"corpus": content.name, "sha256": content.sha256, "layout": content.layout}
    return tokenizer, {"train": train, "val": val}, about | {"row_length": length}


def check_layout(name: str, found: str, wanted: str) -> None:
    """Raise `UserError` for data of another layout than a checkpoint's; documents make a stream."""
    if found != wanted and {found, wanted} != {"stream", "documents"}:
        raise UserError(
            f"{name} holds {found}, and the checkpoint was trained on {wanted}: take another"
        )


def read(path: str, tokenizer, layout: str = "stream", length: int = 0) -> list[Document]:
    """Each file of `path`, as a corpus of that layout has it, with rows of `length` tokens.

    Raises `UserError`, with the name of the file.
    """
    content, documents = text.read(path, rows=layout == "rows"), []
    check_layout(path, content.layout, layout)
    for name, texts in content.files:
        with as_user_error(f"{name}: "):
            if "stream" in (content.layout, layout):
                ids = tokenizer.encode("\n".join(texts))
            else:
                ids = encode(texts, layout, tokenizer, length=length)
            documents.append((name, ids))
    return documents


def windows(
    length: int, context: int, stride: int = 0, unit: int = 1
) -> list[tuple[int, int, int]]:
    """(start, stop, first) of the windows over a text: its tokens, and the first that is predicted.

    Each token is predicted once. A window moves by `stride` tokens and has up to `context`, those
    before `first` being context; with `stride` = `context` there are none, and the windows do not
    overlap. 0 is half the context: so sample.py fills a long text, and so its score is exact.
    Windows begin at multiples of `unit`, the block of a network, if several fit into the context.
    """
    unit = unit if 0 < unit < context else 1
    stride = stride or max(unit, context // 2 // unit * unit)
    found = []
    for first, stop in pairwise([0, *range(context, length, stride), length]):
        start = first if stride == context else -(-max(0, stop - context) // unit) * unit
        found.append((start, stop, first))
    return found


def cut(
    source: str,
    documents: Sequence[Document],
    tokenizer,
    context: int,
    limit: int = 0,
) -> Texts:
    """The windows over all documents; with a `limit`, as many as predict about `limit` tokens.

    The windows of a limit are spread evenly. They move by the context for one document, and by half
    of it for several.
    """
    stride = context if len(documents) == 1 else max(1, context // 2)
    found = [
        (number, *window)
        for number, (_, ids) in enumerate(documents)
        for window in windows(len(ids), context, stride)
    ]
    keep = max(1, limit // stride)
    if limit and keep < len(found):
        found = [found[i * len(found) // keep] for i in range(keep)]
    rows = []
    for number, start, stop, first in found:
        ids = torch.from_numpy(documents[number][1][start:stop].astype(np.int64))
        rows.append((number, ids, torch.arange(start, stop) >= first, stop - first))
    return collect(source, [name for name, _ in documents], rows, tokenizer)


def whole(source: str, files: Sequence[tuple], tokenizer, limit: int = 0) -> Texts:
    """Pairs or rows as they are, of files (name, data.Rows): all, or about `limit` tokens."""
    if left_out := sum(rows.left_out for _, rows in files):
        print(f"{left_out:,} pairs are longer than the context, and are left out", file=sys.stderr)
    total, found = sum(len(rows.tokens) for _, rows in files), []
    for number, (_, rows) in enumerate(files):
        share = limit and max(1, limit * len(rows.tokens) // total)
        found += [(number, *row) for row in rows.evenly(share)]
    return collect(source, [name for name, _ in files], found, tokenizer)


def collect(source: str, names: list[str], rows: Sequence[tuple], tokenizer) -> Texts:
    """`Texts` of rows (number of the document, ids, predict, count)."""
    if not rows:
        raise UserError(f"{source}: no row of it fits the model's context")
    numbers, ids, predict, counts = zip(*rows, strict=True)

    def size(row: Tensor, where: Tensor) -> int:
        tokens = row[where]
        tokens = tokens if tokenizer.eos is None else tokens[tokens != tokenizer.eos]
        return len(tokenizer.decode_bytes(tokens.tolist())) if tokenizer.has_text else 0

    return Texts(
        source=source,
        names=names,
        rows=list(ids),
        predict=list(predict),
        document=torch.tensor(numbers),
        sizes=torch.tensor(list(map(size, ids, predict))),
        counts=torch.tensor(counts),
    )
