"""The texts that are scored, in rows that fit the model's context."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import text
from .errors import UserError, as_user_error

Document = tuple[str, np.ndarray]  # a name and its ids (n,)


class Texts(NamedTuple):
    """Rows of ids, and which of their tokens are predicted; the rest is context."""

    source: str
    names: list[str]  # of the documents
    rows: list[Tensor]  # each (L,)
    predict: list[Tensor]  # each (L,) bool
    document: Tensor  # (N,): the number of each row's document
    sizes: Tensor  # (N,): bytes of what is predicted; 0 where the ids stand for no text

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return sum(int(where.sum()) for where in self.predict)


def read(path: str, tokenizer) -> list[Document]:
    """A text file, or all of a folder. Raises `UserError`, with the name of the file."""
    documents = []
    for name, content in text.documents(path):
        with as_user_error(f"{name}: "):
            documents.append((name, tokenizer.encode(content)))
    return documents


def windows(length: int, context: int, stride: int = 0) -> list[tuple[int, int, int]]:
    """(start, stop, first) of the windows over a text: its tokens, and the first that is predicted.

    Each token is predicted once. A window moves by `stride` tokens and has up to `context`, those
    before `first` being context; with `stride` = `context` there are none, and the windows do not
    overlap. 0 is half the context: so sample.py fills a long text, and so its score is exact.
    Raises `UserError` for a stride outside 1 ... context.
    """
    stride = stride or max(1, context // 2)
    if not 1 <= stride <= context:
        raise UserError(f"stride={stride} must lie in 1 ... {context}, the model's context")
    found = []
    for first, stop in pairwise([0, *range(context, length, stride), length]):
        start = first if stride == context else max(0, stop - context)
        found.append((start, stop, first))
    return found


def cut(
    source: str,
    documents: Sequence[Document],
    tokenizer,
    context: int,
    stride: int = 0,
    limit: int = 0,
) -> Texts:
    """The windows over all documents; with a `limit`, as many as predict about `limit` tokens.

    The windows of a limit are spread evenly. They move by `stride` tokens; 0 is the context for one
    document and half of it for several.
    """
    stride = stride or (context if len(documents) == 1 else max(1, context // 2))
    found = [
        (number, *window)
        for number, (_, ids) in enumerate(documents)
        for window in windows(len(ids), context, stride)
    ]
    keep = max(1, limit // stride)
    if limit and keep < len(found):
        found = [found[i * len(found) // keep] for i in range(keep)]
    rows, predict, sizes = [], [], []
    for number, start, stop, first in found:
        ids = documents[number][1]
        rows.append(torch.from_numpy(ids[start:stop].astype(np.int64)))
        predict.append(torch.arange(start, stop) >= first)
        size = len(tokenizer.decode_bytes(ids[first:stop].tolist())) if tokenizer.has_text else 0
        sizes.append(size)
    return Texts(
        source=source,
        names=[name for name, _ in documents],
        rows=rows,
        predict=predict,
        document=torch.tensor([number for number, *_ in found]),
        sizes=torch.tensor(sizes),
    )
