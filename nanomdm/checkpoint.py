"""Checkpoints: one file that holds everything, written atomically, read without executing it."""

import math
import os
import pickle
import pickletools
import re
import shutil
import warnings
import zipfile
from functools import partial
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor

from .errors import UserError, write_atomically

FORMAT = "nanomdm"
PLAIN = re.compile(r"torch._utils _rebuild_tensor_v2|torch \w+Storage|collections OrderedDict")
VERSION = 1
VALUES = 2 * 10**5  # in a checkpoint, at most; a large one has thousands


def save(path: str | Path, state: dict, keep: int = 0) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) to `path`.

    First to a temporary file beside it, synced to disk and renamed: whenever the power fails,
    `path` is either the old checkpoint or the new one. The `keep` newest of before stay as
    NAME.STEP.pt. Raises `OSError`, which says how much room it takes, where it cannot be written,
    and `UserError` for a tensor that is not finite.
    """
    path = Path(path)
    if not all(t.isfinite().all() for t in tensors(state)):
        raise UserError(f"{path} is not written: numbers in it are not finite")
    try:
        write_atomically(path, partial(torch.save, state | {"format": FORMAT, "version": VERSION}))
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


def load(path: str | Path) -> dict:
    """The state that `save` wrote, on the CPU, in plain containers. Nothing in it is executed.

    Raises `UserError`, in one line that names the remedy, for a file that is missing, cut, altered
    in any byte that matters, larger in memory than on the disk or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no checkpoint at {path}: train one with `python train.py`, or check the name"
        )
    try:
        check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # of what is refused in one line below
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = plain(state, [VALUES])
    except Exception as error:  # a damaged or foreign file can fail anywhere in the two readers
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than plain data"
        raise UserError(
            f"{path} is damaged or no checkpoint ({reason}): take an older one or train again"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this project: train one with `python train.py`"
        )
    version = state.get("version")
    if type(version) is not int or version != VERSION:
        raise UserError(
            f"{path} has format version {version}, this code reads {VERSION}: use the "
            "code that wrote it"
        )
    return state


def check_archive(path: Path) -> None:
    """Raise `UserError` for a zip that torch.load would trust: it looks at no checksum or size."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        inflated = any(entry.compress_type for entry in entries)
        if inflated or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError("it is larger in memory than on the disk")
        folders = [entry.filename for entry in entries if entry.external_attr & 0x10]
        if bad := archive.testzip() or next(iter(folders), None):
            raise UserError(f"the checksum or the entry of {bad} is wrong")
        names = [entry.filename.lower() for entry in entries]  # as PyTorch compares them
        if len(set(names)) < len(names):
            raise UserError("it has two entries of one name")
        pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    for opcode, value, _ in pickletools.genops(pickled):  # a bytearray(10**10) is built at once
        if opcode.name == "GLOBAL" and not PLAIN.fullmatch(value):
            raise UserError(f"it holds more than plain data: {value}")


def plain(value, room: list[int]):
    """What torch.load built, in plain containers, if that is no more values than `room` has left.

    Raises `UserError`: a hostile file may claim large tensors, or a list of lists of lists, out of
    few bytes, and hold what no run saves. Tensors may share what is stored of them.
    """
    room[0] -= 1
    repeats = type(value) is Tensor and value.nbytes > value.untyped_storage().nbytes()
    if repeats or room[0] < 0:
        raise UserError("it is larger in memory than on the disk")
    if isinstance(value, dict) and {type(key) for key in value} <= {str, int}:
        return {plain(key, room): plain(part, room) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(part, room) for part in value)
    if type(value) not in (Tensor, str, int, float, bool, NoneType):
        raise UserError(f"it holds a {type(value).__name__}, which no run saves")
    if isinstance(value, str):
        value.encode()  # raises for half a character
    if type(value) is float and math.isnan(value):
        raise UserError("it holds a number that is not one (NaN)")
    if type(value) is Tensor and not value.isfinite().all():
        raise UserError("it holds weights that are infinite or not numbers (NaN)")
    return value
