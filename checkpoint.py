"""Checkpoints: one file that holds everything, written atomically, read without executing it."""

import io
import math
import os
import pickle
import pickletools
import shutil
import sys
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

FORMAT = "nanomdm"
VERSION = 1


def save(path: str | Path, state: dict, keep: int = 0) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) to `path`.

    First to a temporary file beside it, synced to disk and renamed: whenever the power fails,
    `path` is either the old checkpoint or the new one. The `keep` newest of before stay as
    NAME.STEP.pt. Raises `OSError`, which says how much room it takes, where it cannot be written,
    and `ValueError` for a tensor that is not finite.
    """
    path = Path(path)
    if not all(t.isfinite().all() for t in tensors(state)):
        raise ValueError(f"{path} is not written: numbers in it are not finite")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state | {"format": FORMAT, "version": VERSION}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
        if keep:
            _keep(path, state["step"], keep)
    except (OSError, RuntimeError) as error:  # PyTorch makes a RuntimeError of a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        size = sum(tensor.nbytes for tensor in tensors(state))
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise OSError(
            f"cannot write {path} ({reason}): it takes about {size:,} bytes, and "
            f"{_room(path.parent)} are free there: free some space, or let it be written to"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _keep(path: Path, step: int, count: int) -> None:
    """Keep the checkpoint at `path` as NAME.STEP.pt, too, and the `count` newest of before.

    A link where the file system has them: it takes no room before `path` is replaced.
    """
    kept = path.with_suffix(f".{step}{path.suffix}")
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:
        shutil.copy2(path, kept)
    for old in sorted(kept_files(path), key=lambda file: file.stat().st_mtime_ns)[: -count - 1]:
        old.unlink()


def kept_files(path: Path) -> list[Path]:
    """The older checkpoints that `save` has kept beside `path`."""
    found = path.parent.glob(f"{path.stem}.*{path.suffix}")
    return [file for file in found if file.stem.removeprefix(f"{path.stem}.").isdigit()]


def tensors(state):
    """The tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors(value)


def _room(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


def _sync_folder(folder: Path) -> None:
    """Make the rename survive a power failure, where the system can sync folders (not Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: str | Path) -> dict:
    """The state that `save` wrote, on the CPU, in plain containers. Nothing in it is executed.

    Raises `ValueError`, in one line that names the remedy, for a file that is missing, cut, altered
    in any byte that matters, larger in memory than on the disk or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"no checkpoint at {path}: train one with `python train.py`, or check the name"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            state = Reader(archive, path.stat().st_size).read()
    except Exception as error:  # a damaged or foreign file can fail anywhere in the two readers
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is damaged or no checkpoint ({reason}): take an older one or train again"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint of this project: train one with `python train.py`"
        )
    version = state.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(
            f"{path} has format version {version}, this code reads {VERSION}: use the "
            "code that wrote it"
        )
    return state


# --- Reading ------------------------------------------------------------------------------------
# torch.load(weights_only=True) reads these files, too. It runs no code either, but looks at no
# checksum, and builds whatever size a stranger's file claims: a bytearray, an inflated entry, a
# tensor of 2^40 elements out of one.

DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16},
        **{"BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32},
        **{"Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool},
    }.items()
}
OPCODES = {  # of plain values and their containers, as torch.save writes them
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
    *("LONG1", "BINFLOAT", "BINUNICODE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE"),
    *("TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT"),
    *("LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
}
DEPTH, VALUES = 50, 2 * 10**5  # of nested containers and what they hold, at most


class Stored(NamedTuple):
    """A tensor as the file describes it."""

    entry: tuple  # "storage", dtype, its key in the archive, device, number of elements
    offset: int
    size: tuple
    stride: tuple

    @classmethod
    def rebuild(cls, entry, offset, size, stride, *others) -> "Stored":
        return cls(entry, offset, size, stride)


class Reader(pickle.Unpickler):
    """What torch.save wrote into an archive: tensors, plain values, dicts, lists and tuples."""

    def __init__(self, archive: zipfile.ZipFile, limit: int):
        self.archive, self.limit, self.entries, self.values, self.copied = archive, limit, {}, 0, 0
        infos = archive.infolist()
        if sum(info.file_size for info in infos) > limit or any(i.compress_type for i in infos):
            raise ValueError("it is larger in memory than on the disk")
        self.root = next(info.filename for info in infos)[: -len("data.pkl")]
        pickled = archive.read(f"{self.root}data.pkl")
        for opcode, value, _ in pickletools.genops(pickled):
            if opcode.name not in OPCODES:
                raise ValueError(f"it holds more than plain data: {opcode.name}")
            if "PUT" in opcode.name and value > len(pickled):  # pickle makes a table of this size
                raise ValueError("it counts more values than it has")
        super().__init__(io.BytesIO(pickled))

    def find_class(self, module: str, name: str):
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        known = {"torch._utils _rebuild_tensor_v2": Stored.rebuild}
        known |= {"collections OrderedDict": OrderedDict}
        if f"{module} {name}" not in known:
            raise ValueError(f"it holds more than plain data: {module}.{name}")
        return known[f"{module} {name}"]

    def persistent_load(self, saved: tuple) -> tuple:
        return saved

    def read(self) -> dict:
        if self.archive.read(f"{self.root}byteorder").decode() != sys.byteorder:
            raise ValueError("it comes from a machine with another order of bytes")
        return self.plain(self.load())

    def plain(self, value, depth: int = 0):
        """The value with its tensors, no part of it shared but they."""
        self.values += 1
        if depth > DEPTH or self.values > VALUES:
            raise ValueError("it nests or holds too many values")
        if isinstance(value, Stored):
            return self.tensor(value)
        if isinstance(value, dict):
            if not {type(key) for key in value} <= {str, int}:
                raise ValueError("a key is neither a text nor a number")
            return {self.plain(k, depth): self.plain(v, depth + 1) for k, v in dict.items(value)}
        if type(value) in (list, tuple):
            return type(value)(self.plain(part, depth + 1) for part in value)
        if type(value) not in (str, int, float, bool, NoneType):
            raise ValueError(f"it holds a {type(value).__name__}")
        if value != value:
            raise ValueError("it holds a number that is not one (NaN)")
        if isinstance(value, str):
            value.encode()  # raises for half a character
        return value

    def tensor(self, stored: Stored) -> Tensor:
        content = self.content(stored.entry)
        size, stride = stored.size, stored.stride
        if not all(type(n) is int and n >= 0 for n in (stored.offset, *size, *stride)):
            raise ValueError("a tensor has an impossible shape")
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + stored.offset
        count = math.prod(size)
        if count > len(content) or (count and last >= len(content)):
            raise ValueError("a tensor is larger than what is stored of it")
        tensor = content.as_strided(size, stride, stored.offset)
        if not tensor.is_contiguous():
            self.copied += tensor.nbytes
            if self.copied > self.limit:
                raise ValueError("it is larger in memory than on the disk")
        return tensor.contiguous()

    def content(self, entry: tuple) -> Tensor:
        """The elements (N,) of an entry of the archive, read once, finite, their checksum right."""
        kind, dtype, key, _, count = entry
        if key not in self.entries:
            info = self.archive.getinfo(f"{self.root}data/{key}")
            if kind != "storage" or info.file_size != count * dtype.itemsize:
                raise ValueError(f"a tensor has another size than its entry {info.filename}")
            read = torch.empty(info.file_size, dtype=torch.uint8)
            fill(memoryview(read.numpy()), self.archive, info)
            self.entries[key] = read.view(dtype)
            limits = self.entries[key].aminmax() if count and dtype.is_floating_point else ()
            if not all(map(torch.isfinite, limits)):
                raise ValueError("it holds weights that are infinite or not numbers (NaN)")
        if self.entries[key].dtype != dtype:
            raise ValueError("an entry has two types")
        return self.entries[key]


def fill(buffer: memoryview, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Read an entry of an archive. Raises `ValueError` where its checksum is wrong."""
    try:
        with archive.open(info) as file:
            for start in range(0, len(buffer), 2**20):
                file.readinto(buffer[start : start + 2**20])
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"the checksum or the entry of {info.filename} is wrong") from error
