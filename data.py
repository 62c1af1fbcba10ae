"""Token ids in files, batches out: nanoGPT's .bin files, and what a meta file says of them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from nanomdm.errors import UserError, write_atomically
from nanomdm.meta import digest

SPLITS = ("train", "val")
SCANNED = 2**27  # tokens of train that are checked when it is opened; batches are, when drawn


class Shards:
    """Arrays of token ids, one after the other, behind the interface of one: length and slices."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, piece: slice) -> np.ndarray:
        start, stop, _ = piece.indices(len(self))
        first = min(int(np.searchsorted(self.ends, start, side="right")), len(self.parts) - 1)
        found = []
        for part, end in zip(self.parts[first:], self.ends[first:].tolist(), strict=True):
            offset = end - len(part)
            found.append(part[max(0, start - offset) : max(0, stop - offset)])
            if stop <= end:
                break
        return found[0] if len(found) == 1 else np.concatenate(found)


@dataclass(frozen=True)
class Corpus:
    """Token ids of two splits, memory-mapped, and what is needed to name and reproduce them."""

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

    def require(self, block_size: int) -> None:
        """Raise `UserError` if the train split is shorter than one block."""
        if len(self.train) < block_size:
            raise UserError(
                f"the train split of {self.name} has {len(self.train)} tokens, fewer than "
                f"model.block_size={block_size}: take a longer text or a smaller block"
            )


def blocks(tokens: np.ndarray | Shards, block_size: int, limit: int = 0) -> list[Tensor]:
    """The whole of `tokens` as rows (L,), int64, without overlap; the last may be shorter.

    With a `limit`, as many rows as hold so many tokens, spread evenly.
    """
    starts = range(0, len(tokens), block_size)
    if 0 < limit < len(tokens):
        keep = max(1, limit // block_size)
        starts = [starts[i * len(starts) // keep] for i in range(keep)]
    return [torch.from_numpy(tokens[i : i + block_size].astype(np.int64)) for i in starts]


def check_ids(tokens: np.ndarray, vocab_size: int, source: str) -> None:
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise UserError(
            f"{source} holds the token {int(tokens.max())}, beyond its vocabulary of {vocab_size}: "
            "it is damaged, or was made with another tokenizer"
        )


def write_bins(folder: Path, splits: dict[str, np.ndarray], tokenizer, about: dict) -> None:
    """Write split.bin for each split, uint16 or, for a large vocabulary, uint32; meta.json last."""
    dtype = dtype_of(tokenizer.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    for split, ids in splits.items():
        write_atomically(folder / f"{split}.bin", ids.astype(dtype).tobytes())
    counts = {split: len(ids) for split, ids in splits.items()}
    meta = about | {"dtype": dtype, "tokens": counts, "tokenizer": tokenizer.state()}
    meta["shards"] = {f"{k}.bin": sha256_of(ids.astype(dtype)) for k, ids in splits.items()}
    meta["check"] = digest(meta)
    write_atomically(folder / "meta.json", json.dumps(meta, indent=1).encode())


def dtype_of(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 2**16 else "uint32"


def open_bins(folder: Path, meta: dict, tokenizer) -> Corpus:
    """The corpus of a folder of train.bin and val.bin, of which `read_meta` says `meta`.

    Instead of train.bin there may be any number of shards train_*.bin, in the order of their names;
    so of val.bin. Raises `UserError`.
    """
    train, val = (_open_split(folder, split, meta, tokenizer.vocab_size) for split in SPLITS)
    sha256 = meta.get("sha256") or sha256_of(val[:].tobytes())
    return Corpus(meta.get("corpus", folder.name), sha256, tokenizer, train, val)


def _open_split(folder: Path, split: str, meta: dict, vocab_size: int) -> np.ndarray | Shards:
    whole, shards = folder / f"{split}.bin", sorted(folder.glob(f"{split}_*.bin"))
    if whole.is_file() and shards:
        raise UserError(f"{folder} has both {whole.name} and {shards[0].name}: remove one of them")
    paths = shards or [whole]
    scanned = SCANNED // len(paths) if split == "train" else None  # all of val, which is read whole
    parts = [_open_bin(path, meta["dtype"], vocab_size, scanned) for path in paths]
    tokens = Shards(parts) if shards else parts[0]
    if len(tokens) != meta.get("tokens", {}).get(split, len(tokens)):
        name = f"{split}_*.bin" if shards else whole.name
        raise UserError(
            f"{folder / name} is cut: {len(tokens)} tokens, not the {meta['tokens'][split]} of the "
            "meta file: prepare the data again"
        )
    hashes = meta.get("shards", {}) if len(tokens) <= SCANNED else {}
    for path, part in zip(paths, parts, strict=True):
        if path.name in hashes and hashes[path.name] != sha256_of(part):
            raise UserError(f"the checksum of {path} is wrong: prepare the data again")
    return tokens


def _open_bin(path: Path, dtype: str, vocab_size: int, scanned: int | None) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} is missing: prepare the data again, or check data.dir")
    tokens, rest = divmod(path.stat().st_size, np.dtype(dtype).itemsize)
    if not tokens or rest:
        raise UserError(f"{path} is empty or cut ({tokens} tokens): prepare the data again")
    ids = np.memmap(path, dtype=dtype, mode="r")
    check_ids(ids[:scanned], vocab_size, str(path))
    return ids


def sha256_of(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content).hexdigest()
