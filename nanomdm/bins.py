""".bin files of token ids, and shards of them, opened and checked."""

import hashlib
from pathlib import Path

import numpy as np

from .errors import UserError

SCANNED = 2**27  # tokens of train that are checked when it is opened; batches are, when drawn


def open_split(folder: Path, split: str, meta: dict, vocab_size: int) -> "np.ndarray | Shards":
    """The ids of SPLIT.bin or of the shards SPLIT_*.bin, memory-mapped and checked.

    `meta` is what the meta file says. Raises `UserError` for what is missing, cut or damaged.
    """
    whole, shards = folder / f"{split}.bin", sorted(folder.glob(f"{split}_*.bin"))
    if whole.is_file() and shards:
        raise UserError(f"{folder} has both {whole.name} and {shards[0].name}: remove one of them")
    paths = shards or [whole]
    parts = [_open_bin(path, meta["dtype"]) for path in paths]
    tokens = Shards(parts) if shards else parts[0]
    expected = meta.get("tokens", {}).get(split, len(tokens))
    if len(tokens) != expected:
        raise UserError(
            f"{folder / split}{'_*' if shards else ''}.bin has {len(tokens)} tokens, the meta file "
            f"says {expected}: it is cut, prepare the data again"
        )
    hashes = meta.get("shards", {}) if len(tokens) <= SCANNED else {}
    scanned = SCANNED // len(paths) if split == "train" else None  # val is read as a whole anyway
    for path, part in zip(paths, parts, strict=True):
        check_ids(part[:scanned], vocab_size, str(path))
        if path.name in hashes and hashes[path.name] != hashlib.sha256(part).hexdigest():
            raise UserError(f"the checksum of {path} is wrong: prepare the data again")
    return tokens


def _open_bin(path: Path, dtype: str) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} is missing: prepare the data again, or check data.dir")
    tokens, rest = divmod(path.stat().st_size, np.dtype(dtype).itemsize)
    if not tokens or rest:
        raise UserError(f"{path} is empty or cut ({tokens} tokens): prepare the data again")
    return np.memmap(path, dtype=dtype, mode="r")


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


def check_ids(tokens: np.ndarray, vocab_size: int, source: str) -> None:
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise UserError(
            f"{source} holds the token {int(tokens.max())}, beyond its vocabulary of {vocab_size}: "
            "it is damaged, or was made with another tokenizer"
        )
