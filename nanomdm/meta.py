"""What a folder of .bin files says of itself: our meta.json, or nanoGPT's meta.pkl."""

import hashlib
import io
import json
import pickle
import pickletools
from pathlib import Path

from .errors import UserError

META = {  # of meta.json; the first two are in each
    "dtype": str,  # uint16 or uint32
    "tokenizer": dict,  # its state()
    "tokens": dict,  # of each split
    "corpus": str,  # name of the text
    "sha256": str,  # of the text
    "shards": dict,  # file name: its SHA-256
    "check": str,  # `digest` of the rest
}


def digest(meta: dict) -> str:
    """A hash of a meta.json but for its own `check`, whatever the order of the keys."""
    rest = {key: value for key, value in meta.items() if key != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_meta(folder: Path, tokenizer_kind: str) -> dict:
    """The values of `META` that the folder's meta file has: at least dtype and tokenizer.

    Without a meta file the bins are uint16, of the tokenizer gpt2 or byte, whose tokens have the
    same ids everywhere. Raises `UserError`.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: check data.dir")
    try:
        if (folder / "meta.json").is_file():
            return _checked(json.loads((folder / "meta.json").read_bytes()))
        if (folder / "meta.pkl").is_file():
            itos = read_plain_pickle((folder / "meta.pkl").read_bytes())["itos"]
            characters = "".join(itos[i] for i in range(len(itos)))
            return {"dtype": "uint16", "tokenizer": {"kind": "char", "characters": characters}}
    except Exception as error:  # a damaged pickle or JSON can fail in any way
        raise UserError(f"the meta file in {folder} is damaged ({error}): prepare again") from error
    if tokenizer_kind not in ("gpt2", "byte"):
        raise UserError(
            f"{folder} has no meta.json or meta.pkl, and data.tokenizer={tokenizer_kind}: say "
            "data.tokenizer=gpt2 or data.tokenizer=byte"
        )
    return {"dtype": "uint16", "tokenizer": {"kind": tokenizer_kind}}


def _checked(meta: dict) -> dict:
    for key in ("dtype", "tokenizer"):
        if key not in meta:
            raise UserError(f"it has no {key}")
    for key, kind in META.items():
        if not isinstance(meta.get(key, kind()), kind):
            raise UserError(f"expected {key} to be a {kind.__name__}")
    if meta["dtype"] not in ("uint16", "uint32"):
        raise UserError(f"dtype={meta['dtype']} is not uint16 or uint32")
    if "check" in meta and meta["check"] != digest(meta):
        raise UserError("its checksum is wrong")
    if not (meta.get("corpus", "") + meta.get("sha256", "")).isprintable():
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
