"""Text -> tokens -> .bin files -> batches.

A corpus is two memory-mapped splits of token ids in nanoGPT's format: train.bin and val.bin, or any
number of shards train_*.bin and val_*.bin. nanomdm/text.py finds the text, a tokenizer of the table
TOKENIZERS in nanomdm/tokenizers.py turns it into tokens, nanomdm/bins.py opens and checks .bin
files and what a meta file says of them.

The layout of a corpus says what a row of the network's input is:
    stream     any window of one text
    documents  any window of documents joined, an end token after each
    rows       one line: all lines have one length (grids, molecules, games)
    pairs      a prompt and its answer, an end token after each; the prompt is not predicted
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from nanomdm import folders, text
from nanomdm.bins import (
    Shards,
    check_hash,
    check_ids,
    find,
    open_split,
    read_meta,
    sha256_of,
    write_bins,
)
from nanomdm.errors import UserError
from nanomdm.texts import tokenize
from nanomdm.tokenizers import load_tokenizer

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Corpus:
    """Token ids of two splits, and what is needed to name and reproduce them."""

    name: str
    sha256: str  # of the text; of val.bin where it was prepared elsewhere
    tokenizer: object
    train: np.ndarray | Shards
    val: np.ndarray | Shards
    layout: str = "stream"
    row_length: int = 0  # of the layout `rows`, where it is known

    def rows(self, split: str, block_size: int, overlap: bool = False) -> "Rows":
        """The rows of a split: with `overlap`, for training, every window; else side by side."""
        tokens, length = getattr(self, split), self.row_length or block_size
        if self.layout == "rows" and (length != block_size or len(tokens) % length):
            raise UserError(
                f"{self.name} is not made of rows of model.block_size={block_size} tokens: set "
                "it to their length, or start from a checkpoint that has it"
            )
        return Rows(tokens, block_size, self.layout, self.tokenizer, overlap)


class Row(NamedTuple):
    ids: Tensor  # (L,)
    predict: Tensor  # (L,) bool: the tokens that are predicted; the rest is context
    count: int  # of tokens, by which figures are divided: of a pair, its answer and one end token


class Rows:
    """The rows of a split, L = `length` tokens each; the last window of a stream may be shorter.

    Pairs are filled up with end tokens, which are predicted, too: so a network learns where to end
    (LLaDA, arXiv 2502.09992). Pairs longer than L are left out.
    """

    def __init__(self, tokens, length: int, layout: str, tokenizer, overlap: bool = False):
        self.tokens, self.length, self.tokenizer = tokens, length, tokenizer
        self.left_out, self.has_pairs = 0, layout == "pairs"
        self.turn = 0.618 if layout in ("rows", "pairs") else 0  # see `evenly`
        if self.has_pairs:
            ends = find(tokens, tokenizer.eos)[1::2] + 1
            starts = np.append(0, ends)[:-1]
            self.starts = starts[ends - starts <= length]
            self.left_out = len(starts) - len(self.starts)
        elif overlap and layout != "rows":
            self.starts = range(len(tokens) - length + 1)
        else:
            self.starts = range(0, len(tokens), length)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> Row:
        ids, predict = (tensor[0] for tensor in self.read([i]))
        # Of the end tokens of a pair, one is its prompt's, one its answer's, and the rest filling.
        filling = (ids == self.tokenizer.eos).sum() - 2 if self.has_pairs else 0
        return Row(ids, predict, int(predict.sum() - filling))

    def read(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """The ids of rows, and which of their tokens are predicted, both (B, L)."""
        L = self.length
        rows = [self.tokens[start : start + L] for start in (self.starts[n] for n in numbers)]
        if self.has_pairs:  # the last ones of the split may have fewer than L tokens
            rows = [np.pad(row, (0, L - len(row))) for row in rows]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        if not self.has_pairs:
            return ids, torch.ones_like(ids, dtype=torch.bool)
        eos = self.tokenizer.eos
        is_end = ids == eos
        ends = is_end.cumsum(dim=1)  # 1 from the end of the prompt on, 2 from that of the answer
        # After the answer come tokens of the next pair, or zeros: they become end tokens.
        return ids.masked_fill(ends > 1, eos), ends - is_end.int() > 0

    def batch(
        self, batch_size: int, generator: Generator, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Random rows and which tokens to predict, both (B, L); `rows` picks some of the batch."""
        chosen = torch.randint(len(self), (batch_size,), generator=generator)
        chosen = chosen if rows is None else chosen[rows]
        x0, predict = self.read(chosen.tolist())
        check_ids(x0.numpy(), self.tokenizer.vocab_size, "the train split")
        return x0, predict

    def evenly(self, limit: int = 0) -> list[Row]:
        """All rows or, with a `limit`, ones spread evenly that hold about `limit` tokens in all."""
        keep, size = len(self), self.length
        if self.has_pairs and keep:
            size = len(self.tokens) / (keep + self.left_out)
        if 0 < limit < len(self.tokens):
            keep = min(keep, max(1, int(limit // size)))
        # Lines of two kinds may take turns: steps of one size could meet a single kind.
        return [self[int((i + i * self.turn % 1) * len(self) / keep)] for i in range(keep)]


# --- From text to a corpus -----------------------------------------------------------------------


def load(settings, tokenizer: object | None = None, sha256: str = "") -> Corpus:
    """The corpus that the `data` section names: the bins in `dir`, else `path`, else `dataset`.

    A `tokenizer`, that of a checkpoint, is used instead of one of the kind `settings.tokenizer`.
    Sets `settings.dataset` to the one that was found. Raises `UserError`, also if the hash of the
    text is not `sha256`: then nothing of it is written but a download.
    """
    if settings.dir:
        kind = {"kind": settings.tokenizer}
        if settings.tokenizer == "ids":
            kind["vocab_size"] = settings.vocab_size
        corpus = open_bins(Path(settings.dir), kind, tokenizer, settings.rows)
        check_hash(corpus.name, corpus.sha256, sha256)
        return corpus
    cache = Path(os.environ.get("NANOMDM_CACHE", "prepared"))
    content = text.find(settings.dataset, settings.path, cache, settings.rows)
    content = content.for_tokenizer(tokenizer, sha256)
    if not settings.path:
        settings.dataset = content.name  # `plays` if `shakespeare` could not be downloaded
    check_hash(content.name, content.sha256, sha256)
    return prepare(content, settings.tokenizer, settings.vocab_size, cache, tokenizer)


def prepare(
    content: text.Content, kind: str, vocab_size: int, cache: Path, tokenizer: object | None = None
) -> Corpus:
    """Tokenize `content` into a folder of `cache`, once for each text and recipe of a tokenizer.

    A recipe is a kind and a size, or the tokenizer of a checkpoint. The first 90% are train, the
    rest is val: of the characters of a stream, as in nanoGPT, or whole documents, pairs or rows.
    Raises `UserError` for an unknown `kind` of tokenizer, and for text that a given `tokenizer`
    cannot encode.
    """
    recipe = tokenizer.state() if tokenizer else [kind, vocab_size]
    with folders.writable(cache, "NANOMDM_CACHE"):
        cache.mkdir(parents=True, exist_ok=True)
    key = sha256_of(json.dumps([content.sha256, content.layout, recipe]).encode())
    folder = cache / f"{content.name}-{key[:12]}"
    if not (folder / "meta.json").is_file():
        tokenizer, ids, about = tokenize(content, kind, vocab_size, tokenizer)
        write_bins(folder, ids, tokenizer, about)
    return open_bins(folder)


def open_bins(
    folder: Path,
    without_meta: dict | None = None,
    tokenizer: object | None = None,
    rows: bool = False,
) -> Corpus:
    """The corpus in a folder of bins.

    `without_meta` is the state of their tokenizer, for a folder that has no meta file. `rows` takes
    a stream as rows of model.block_size tokens. Raises `UserError`, also for bins of another
    tokenizer than the `tokenizer` of a checkpoint.
    """
    state = tokenizer.state() if tokenizer else without_meta or {"kind": "char"}
    meta = read_meta(folder, state, rows)
    try:
        own = load_tokenizer(meta["tokenizer"])
    except UserError as error:
        raise UserError(f"{folder}: {error}: prepare the data again") from error
    if meta["layout"] in ("documents", "pairs") and own.eos is None:
        raise UserError(f"{folder} holds {meta['layout']}; its tokenizer has no end: prepare again")
    if tokenizer is not None and own.state() != tokenizer.state():
        raise UserError(f"{folder} was made with another tokenizer than the checkpoint has")
    train, val = (open_split(folder, split, meta, own.vocab_size) for split in SPLITS)
    sha256 = meta["sha256"] or sha256_of(val[:].tobytes())
    name = meta["corpus"] or folder.name
    return Corpus(name, sha256, own, train, val, meta["layout"], meta["row_length"])
