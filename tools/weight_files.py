"""Weights and tokenizers of other projects: downloaded, memory-mapped, and never executed."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nanomdm.errors import UserError, optional
from nanomdm.tokenizers import load_tokenizer

# Steps of a tokenizer.json, and the name of each within a sequence.
PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


class Tensors(NamedTuple):
    """Tensors of memory-mapped files: their shapes, and functions that read them."""

    source: str
    shapes: dict[str, tuple[int, ...]]
    read: dict[str, Callable[[], Tensor]]


def fetch(source: str, patterns: tuple[str, ...]) -> Path:
    """The file or folder `source`, downloaded if it is the name of a repository."""
    if Path(source).exists():
        return Path(source)
    parts = source.split("/")
    if len(parts) < 2 or not all(parts):
        raise UserError(f"no file or folder {source}: check the name")
    hub, repository, inside = optional("huggingface_hub"), "/".join(parts[:2]), parts[2:]
    try:
        if inside:
            return Path(hub.hf_hub_download(repository, "/".join(inside)))
        return Path(hub.snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # of the network, the hub or the name
        reason = str(error).splitlines()[0][:80]
        raise UserError(f"{source} is not a local file, and the hub answered: {reason}") from error


def open_tensors(source: str, path: Path) -> tuple[Path, Tensors]:
    """The folder, and the tensors of the file or of all files in it. Raises `UserError`."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    files = files or sorted([*path.glob("*.pth"), *path.glob("*.bin")])
    if not files:
        raise UserError(f"no .safetensors, .pth or .bin in {source}: name a folder with weights")
    tensors, found = Tensors(source, {}, {}), {}
    for file in files:
        for name, (shape, read) in tensors_of(file).items():
            if name in found:
                raise UserError(f"{file.name} and {found[name]} both contain {name}: name one file")
            found[name], tensors.shapes[name], tensors.read[name] = file.name, shape, read
    return (path if path.is_dir() else path.parent), tensors


def open_safetensors(file: Path):
    library = optional("safetensors")
    try:
        return library.safe_open(file, framework="pt")
    except Exception as error:  # the library raises its own class
        raise UserError(f"{file} is damaged ({error}): fetch it again") from error


def open_torch(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, mmap=True, map_location="cpu", weights_only=True)
        state = state.get("model", state)
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise UserError("not only tensors")
    except Exception as error:  # a damaged or hostile pickle can fail in any way
        reason = str(error).splitlines()[0][:80]
        raise UserError(f"{file} is damaged or holds more than plain data ({reason})") from error
    return state


def tensors_of(file: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    """The shape of each tensor, and a function that reads it.

    Each opens the file again: a map that stays open keeps all that was read in memory.
    """
    if file.suffix == ".safetensors":
        opened = open_safetensors(file)
        names, shape_of, read = opened.keys(), lambda n: opened.get_slice(n).get_shape(), read_one
    else:
        opened = open_torch(file)
        names, shape_of, read = opened, lambda n: opened[n].shape, lambda f, n: open_torch(f)[n]
    return {name: (tuple(shape_of(name)), partial(read, file, name)) for name in names}


def read_one(file: Path, name: str) -> Tensor:
    return open_safetensors(file).get_tensor(name)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): fetch the weights again") from error


# --- Tokenizers ---------------------------------------------------------------------------------


def read_tokenizer(path: Path, vocab_size: int, mask: int) -> dict:
    """The state of the tokenizer.json in a folder, for a network of `vocab_size` tokens.

    `mask` is the file's id of the mask. Llama's tokenizer puts a space before every text. Here it
    does not, so that pieces of a text can be joined and decoding gives back the text.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"no tokenizer.json in {path}: name a folder that has one by tokenizer=")
    spec, beside = read_json(file), file.with_name("tokenizer_config.json")
    for key, inner in PARTS.items():
        whole = spec.get(key)
        parts = whole.get(inner, [whole]) if whole else []
        parts = [part for part in parts if part["type"] not in ("Prepend", "Strip")]
        for part in parts:
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
        spec[key] = {"type": "Sequence", inner: parts} if parts else None
    eos = (read_json(beside) if beside.is_file() else {}).get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    values = {"serialized": json.dumps(spec), "vocab_size": vocab_size, "mask": mask}
    tokenizer = load_tokenizer({"kind": "hf"} | values)
    found = None if eos is None else tokenizer.tokenizer.token_to_id(eos)
    return tokenizer.state() | {"eos": mask if found == vocab_size else found}
