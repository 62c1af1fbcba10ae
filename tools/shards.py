"""Writes shards, with a journal of how far they are complete: a kill loses nothing."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

import data
from nanomdm.bins import digest
from nanomdm.errors import UserError, write_atomically

AGAIN = "give the same command again to continue from here"


class ShardWriter:
    """Writes one stream of tokens per split into files of `size` tokens; `tokens` counts them."""

    def __init__(self, folder: Path, dtype: str, size: int, tokens: dict[str, int], likely: int):
        self.folder, self.size, self.tokens, self.files = folder, size, dict(tokens), {}
        self.width = np.dtype(dtype).itemsize
        self.need = likely * self.width  # free bytes that a shard needs
        for split in data.SPLITS:
            self._cut_back(split)

    def _cut_back(self, split: str) -> None:
        """Keep `tokens` of a split, and remove what an interrupted process wrote after them."""
        full, rest = divmod(self.tokens[split], self.size)
        for path in self.folder.glob(f"{split}_*.bin"):
            if path.name >= shard_name(split, full + (rest > 0)):
                path.unlink()
        for number in range(full + (rest > 0)):
            path, length = (
                self.folder / shard_name(split, number),
                self.size if number < full else rest,
            )
            if not path.is_file() or path.stat().st_size < length * self.width:
                raise UserError(f"{path} is incomplete: remove {self.folder} and start again")
            os.truncate(path, length * self.width)

    def write(self, split: str, ids: np.ndarray) -> None:
        while len(ids):
            number, offset = divmod(self.tokens[split], self.size)
            part, ids = ids[: self.size - offset], ids[self.size - offset :]
            if not offset or split not in self.files:
                self._open(split, number)
            rest = memoryview(part).cast("B")
            while rest:  # a full disk takes a part and refuses the rest
                rest = rest[self.files[split].write(rest) :]
            self.tokens[split] += len(part)

    def _open(self, split: str, number: int) -> None:
        self.close(split)
        path, free = self.folder / shard_name(split, number), shutil.disk_usage(self.folder).free
        if free < self.need:
            raise UserError(
                f"{free / 1e6:,.0f} MB are free for {path}, which may need {self.need / 1e6:,.0f}: "
                f"free some space and {AGAIN}"
            )
        self.files[split] = path.open("ab", buffering=0)

    def sync(self) -> None:
        for file in self.files.values():
            os.fsync(file.fileno())

    def close(self, split: str) -> None:
        if split in self.files:
            self.sync()
            self.files.pop(split).close()


def shard_name(split: str, number: int) -> str:
    return f"{split}_{number:06d}.bin"


# --- The journal --------------------------------------------------------------------------------


class Job:
    """A preparation in out/unfinished: its journal, and its end, which moves the shards to out."""

    def __init__(self, out: Path, recipe: dict):
        self.out, self.folder = out, out / "unfinished"
        self.path, none = self.folder / "journal.json", dict.fromkeys(data.SPLITS, 0)
        self.journal = {"recipe": recipe, "tokens": none, "documents": none}
        if self.path.is_file():
            self.journal = read_json(self.path)
            refuse_other(recipe, self.journal, self.folder)
        elif any(out.glob("*.bin")):
            raise UserError(f"{out} holds other .bin files: choose another out")

    def save(self, **entries) -> None:
        self.journal |= entries
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.journal).encode())

    def finish(self) -> dict:
        """Move the shards to out, meta.json last: from then on data.dir can read the folder."""
        for path in self.folder.glob("*.bin"):
            os.replace(path, self.out / path.name)
        sha256 = data.sha256_of("".join(self.journal["shards"].values()).encode())
        names = ("dtype", "layout", "tokens", "documents", "shards", "recipe", "tokenizer")
        meta = {"corpus": Path(self.journal["recipe"]["dataset"]).resolve().name, "sha256": sha256}
        meta |= {name: self.journal[name] for name in names if name in self.journal}
        meta["check"] = digest(meta)
        write_atomically(self.out / "meta.json", json.dumps(meta, indent=1).encode())
        shutil.rmtree(self.folder)
        return meta


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: remove {path.parent} and start again") from error


def refuse_other(recipe: dict, found: dict, folder: Path) -> None:
    """Raise `UserError` if the folder's JSON records another preparation."""
    for key, value in recipe.items():
        if (found.get("recipe") or {}).get(key) != value:
            raise UserError(
                f"{folder} holds another preparation ({key} differs): choose another out, or "
                "remove it"
            )
