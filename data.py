"""Text -> tokens -> .bin files -> batches.

A corpus is two memory-mapped splits of token ids in nanoGPT's format: train.bin and val.bin, or any
number of shards train_*.bin and val_*.bin. nanomdm/text.py finds the text, nanomdm/tokenizers.py
turns it into tokens, nanomdm/bins.py opens and checks .bin files and what a meta file says of them.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from nanomdm import folders
from nanomdm.bins import Shards, check_ids, digest, open_split, read_meta
from nanomdm.errors import UserError, write_atomically
from nanomdm.text import find_text
from nanomdm.tokenizers import load_tokenizer, train_tokenizer

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Corpus:
    """Token ids of two splits, and what is needed to name and reproduce them."""

    name: str
    sha256: str  # of the text; of val.bin where it was prepared elsewhere
    tokenizer: object
    train: np.ndarray | Shards
    val: np.ndarray | Shards

    def batch(
        self, batch_size: int, block_size: int, generator: Generator, rows: Tensor | None = None
    ) -> Tensor:
        """Random blocks of the train split (B, L), int64; `rows` picks some of the `batch_size`."""
        starts = torch.randint(len(self.train) - block_size + 1, (batch_size,), generator=generator)
        starts = starts if rows is None else starts[rows]
        batch = np.stack([self.train[i : i + block_size] for i in starts.tolist()])
        check_ids(batch, self.tokenizer.vocab_size, "the train split")
        return torch.from_numpy(batch.astype(np.int64))


def blocks(tokens: np.ndarray | Shards, block_size: int, limit: int = 0) -> list[Tensor]:
    """All of `tokens` as rows (L,), int64, without overlap; the last may be shorter.

    With a `limit`, as many rows as hold that many tokens, spread evenly.
    """
    starts = range(0, len(tokens), block_size)
    if 0 < limit < len(tokens):
        keep = max(1, limit // block_size)
        starts = [starts[i * len(starts) // keep] for i in range(keep)]
    return [torch.from_numpy(tokens[i : i + block_size].astype(np.int64)) for i in starts]


# --- From text to a corpus -----------------------------------------------------------------------


def load(settings, tokenizer: object | None = None, sha256: str = "") -> Corpus:
    """The corpus that the `data` section names: the bins in `dir`, else `path`, else `dataset`.

    A `tokenizer`, that of a checkpoint, goes before one of the kind `settings.tokenizer`.
    Raises `UserError`, also for a text that has not the hash `sha256`, before anything is written.
    """
    if settings.dir:
        kind = {"kind": settings.tokenizer}
        if settings.tokenizer == "ids":
            kind["vocab_size"] = settings.vocab_size
        corpus = open_bins(Path(settings.dir), kind, tokenizer)
        check_hash(corpus.name, corpus.sha256, sha256)
        return corpus
    cache = Path(os.environ.get("NANOMDM_CACHE", "prepared"))
    name, text = find_text(settings.dataset, settings.path, cache)
    if not settings.path:
        settings.dataset = name  # without a network it is another one, and so after a resume
    if sha256:
        check_hash(name, sha256_of(text.encode()), sha256)
    return prepare(text, name, settings.tokenizer, settings.vocab_size, cache, tokenizer)


def check_hash(name: str, found: str, expected: str) -> None:
    if expected and found != expected:
        raise UserError(
            f"{name} is not the text that the checkpoint was trained on, or has changed since: "
            "restore it, name that text by data.path=, or start a new run in another out_dir"
        )


def prepare(
    text: str, name: str, kind: str, vocab_size: int, cache: Path, tokenizer: object | None = None
) -> Corpus:
    """Tokenize `text` into a folder of `cache`, once for each text and recipe of a tokenizer.

    A recipe is a kind and a size, or the tokenizer of a checkpoint.
    The first 90% of the characters are train, the rest is val, as in nanoGPT. Raises `UserError`
    for an unknown `kind` of tokenizer, and for text that a given `tokenizer` cannot encode.
    """
    sha256 = sha256_of(text.encode())
    recipe = tokenizer.state() if tokenizer else [kind, vocab_size]
    with folders.writable(cache, "NANOMDM_CACHE"):
        cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"{name}-{sha256_of(json.dumps([sha256, recipe]).encode())[:12]}"
    if not (folder / "meta.json").is_file():
        split = int(0.9 * len(text))
        if not split:
            raise UserError(f"{name} has {len(text)} characters: too few to train on")
        tokenizer = tokenizer or train_tokenizer(kind, text, split, vocab_size)
        ids = {"train": tokenizer.encode(text[:split]), "val": tokenizer.encode(text[split:])}
        write_bins(folder, ids, tokenizer, {"corpus": name, "sha256": sha256})
    return open_bins(folder)


# --- .bin files ----------------------------------------------------------------------------------


def write_bins(folder: Path, splits: dict[str, np.ndarray], tokenizer, about: dict) -> None:
    """Write split.bin for each split, uint16 or, for a large vocabulary, uint32; meta.json last."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype_of(tokenizer.vocab_size)
    meta = about | {"dtype": dtype, "tokenizer": tokenizer.state(), "tokens": {}, "shards": {}}
    for split, ids in splits.items():
        content = ids.astype(dtype).data
        write_atomically(folder / f"{split}.bin", content)
        meta["tokens"][split], meta["shards"][f"{split}.bin"] = len(ids), sha256_of(content)
    meta["check"] = digest(meta)
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1).encode())


def dtype_of(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


def open_bins(
    folder: Path, without_meta: dict | None = None, tokenizer: object | None = None
) -> Corpus:
    """The corpus in a folder of bins; `without_meta` is the state of their tokenizer if no file is.

    Raises `UserError`, also for bins of another tokenizer than the `tokenizer` of a checkpoint.
    """
    meta = read_meta(folder, tokenizer.state() if tokenizer else without_meta or {"kind": "char"})
    try:
        own = load_tokenizer(meta["tokenizer"])
    except UserError as error:
        raise UserError(f"{folder}: {error}: prepare the data again") from error
    if tokenizer is not None and own.state() != tokenizer.state():
        raise UserError(f"{folder} was made with another tokenizer than the checkpoint has")
    train, val = (open_split(folder, split, meta, own.vocab_size) for split in SPLITS)
    sha256 = meta["sha256"] or sha256_of(val[:].tobytes())
    return Corpus(meta["corpus"] or folder.name, sha256, own, train, val)


def sha256_of(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
