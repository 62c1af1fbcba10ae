"""Folders of .bin files, written, opened and checked: the meta file, and the ids of a split."""

import hashlib
import io
import json
import pickle
import pickletools
from bisect import bisect
from itertools import accumulate
from pathlib import Path

import numpy as np

from .errors import UserError, write_atomically

META = {  # the keys of a meta.json, each with what it is where it is left out
    "dtype": "",  # uint16 or uint32; required
    "tokenizer": {},  # its state(); required
    "tokens": {},  # of each split
    "layout": "stream",  # how rows lie in it: see data.Rows
    "row_length": 0,  # of the layout `rows`, in tokens; 0 for model.block_size
    "corpus": "",  # name of the text
    "sha256": "",  # of the text
    "shards": {},  # file name: its SHA-256
    "check": "",  # `digest` of the rest
}
SCANNED = 2**27  # tokens of train that are checked when it is opened; batches are, when drawn


# --- The meta file: our meta.json, or nanoGPT's meta.pkl -----------------------------------------


def digest(meta: dict) -> str:
    """A hash of a meta.json but for its own `check`, whatever the order of the keys."""
    rest = {key: value for key, value in meta.items() if key != "check"}
    return sha256_of(json.dumps(rest, sort_keys=True).encode())


def read_meta(folder: Path, tokenizer: dict, rows: bool = False) -> dict:
    """What the folder's meta file says, with all keys of `META`.

    Without a meta file the bins are uint16, of the `tokenizer` (its state) gpt2 or byte, whose
    tokens have the same ids everywhere, or ids, which has no text. A stream may be one of `rows`.
    Raises `UserError`.
    """
    meta = _read_meta(folder, tokenizer)
    if rows and meta["layout"] not in ("stream", "rows"):
        raise UserError(f"{folder} holds {meta['layout']}, not rows: leave out data.rows")
    return meta | {"layout": "rows"} if rows else meta


def _read_meta(folder: Path, tokenizer: dict) -> dict:
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: check data.dir")
    ours, nanogpts = folder / "meta.json", folder / "meta.pkl"
    kind = tokenizer["kind"]
    try:
        if ours.is_file():
            return _checked(json.loads(ours.read_bytes()))
        if nanogpts.is_file():
            itos = read_plain_pickle(nanogpts.read_bytes())["itos"]
            characters = "".join(itos[i] for i in range(len(itos)))
            tokenizer = {"kind": "char", "characters": characters}
    except Exception as error:  # a damaged pickle or JSON can fail in any way
        raise UserError(f"the meta file in {folder} is damaged ({error}): prepare again") from error
    if not any(folder.glob("*.bin")):
        raise UserError(f"no .bin file in data.dir={folder}: texts go by data.path={folder}")
    if not nanogpts.is_file() and kind not in ("gpt2", "byte", "ids"):
        raise UserError(
            f"{folder} has no meta.json or meta.pkl, and data.tokenizer={kind}: say "
            "data.tokenizer=gpt2, data.tokenizer=byte or, for ids of your own below V, "
            "data.tokenizer=ids data.vocab_size=V"
        )
    return META | {"dtype": "uint16", "tokenizer": tokenizer}


def _checked(found: dict) -> dict:
    meta = META | found
    for key, empty in META.items():
        if type(meta[key]) is not type(empty):
            raise UserError(f"expected {key} to be a {type(empty).__name__}")
    if meta["dtype"] not in ("uint16", "uint32") or not meta["tokenizer"]:
        raise UserError("expected a tokenizer, and dtype to be uint16 or uint32")
    if meta["check"] not in ("", digest(found)):
        raise UserError("its checksum is wrong")
    if meta["layout"] not in ("stream", "documents", "pairs", "rows"):
        raise UserError("its layout is unknown")
    if meta["row_length"] and (meta["row_length"] < 0 or meta["layout"] != "rows"):
        raise UserError("its row_length cannot be")
    if not (meta["corpus"] + meta["sha256"]).isprintable():
        raise UserError("its names hold control characters")
    return meta


def read_plain_pickle(content: bytes):
    """What nanoGPT's meta.pkl holds: dicts, strings and numbers. Raises for anything else."""
    for opcode, value, _ in pickletools.genops(content):
        if "PUT" in opcode.name and value > len(content):  # pickle makes a table of this size
            raise pickle.UnpicklingError("it counts more values than it has")
    return PlainUnpickler(io.BytesIO(content)).load()


class PlainUnpickler(pickle.Unpickler):
    """Refuses whatever could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


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


def sha256_of(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def check_hash(name: str, found: str, expected: str) -> None:
    if expected and found != expected:
        raise UserError(
            f"{name} is not the text that the checkpoint was trained on, or has changed since: "
            "restore it, name that text by data.path=, or start a new run in another out_dir"
        )


# --- The ids of a split --------------------------------------------------------------------------


def open_split(folder: Path, split: str, meta: dict, vocab_size: int) -> "np.ndarray | Shards":
    """The ids of SPLIT.bin or of the shards SPLIT_*.bin, memory-mapped and checked.

    `meta` is what `read_meta` returns. Raises `UserError` for what is missing, cut or damaged.
    """
    whole, shards = folder / f"{split}.bin", sorted(folder.glob(f"{split}_*.bin"))
    if whole.is_file() and shards:
        raise UserError(f"{folder} has both {whole.name} and {shards[0].name}: remove one of them")
    paths = shards or [whole]
    parts = [_open_bin(path, meta["dtype"]) for path in paths]
    total = sum(map(len, parts))
    expected = meta["tokens"].get(split, total)
    if total != expected:
        name = folder / f"{split}_*.bin" if shards else whole
        raise UserError(
            f"{name} has {total} tokens, the meta file says {expected}: "
            "it is cut, prepare the data again"
        )
    hashes = meta["shards"] if total <= SCANNED else {}
    scanned = SCANNED // len(paths) if split == "train" else None  # val is read as a whole anyway
    for path, part in zip(paths, parts, strict=True):
        check_ids(part[:scanned], vocab_size, str(path))
        if path.name in hashes and hashes[path.name] != sha256_of(part):
            raise UserError(f"the checksum of {path} is wrong: prepare the data again")
    return Shards(parts) if shards else parts[0]


def _open_bin(path: Path, dtype: str) -> np.ndarray:
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is missing, empty or cut ({error}): prepare the data again, or check data.dir"
        ) from error


class Shards:
    """Arrays of token ids, one after the other, behind the interface of one: length and slices."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts = parts
        *self.starts, self.length = accumulate(map(len, parts), initial=0)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, piece: slice) -> np.ndarray:
        start, stop, _ = piece.indices(self.length)
        first, last = bisect(self.starts, start) - 1, bisect(self.starts, stop)
        parts = zip(self.parts[first:last], self.starts[first:last], strict=True)
        return np.concatenate([part[max(0, start - i) : stop - i] for part, i in parts])


def find(tokens: "np.ndarray | Shards", wanted: int) -> np.ndarray:
    """The positions of one id, in parts that fit the memory."""
    starts = range(0, len(tokens), SCANNED)
    return np.concatenate([np.flatnonzero(tokens[i : i + SCANNED] == wanted) + i for i in starts])


def check_ids(tokens: np.ndarray, vocab_size: int, source: str) -> None:
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise UserError(
            f"{source} holds the token {int(tokens.max())}, beyond its vocabulary of {vocab_size}: "
            "it is damaged, or was made with another tokenizer or data.vocab_size"
        )
