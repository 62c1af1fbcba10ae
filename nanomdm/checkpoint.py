"""Checkpoints: one file that holds everything, written atomically, read without executing it.

A checkpoint is a dict with `PARTS`: all that sampling and evaluation need. ckpt.pt of train.py has
besides what a run needs to go on: `RUN_PARTS`, "optimizer" and "scaler".
"""

import math
import pickletools
import re
import shutil
import warnings
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UserError, as_user_error, write_atomically
from .tokenizers import load_tokenizer

FORMAT, VERSION = "nanomdm", 1
PARTS = {
    "model_config": dict,  # the fields of ModelConfig
    "tokenizer": dict,  # its state()
    "ema": dict,  # the weights to use, by name
    "config": dict,  # the settings of the training run
    "corpus": dict,  # name and sha256 of its text
    "step": int,  # optimizer steps so far
    "origin": str,  # where imported weights come from; of a run of train.py it is missing
}
RUN_PARTS = {  # what a run needs besides to go on; its optimizer looks at its own state
    "model": dict,  # the weights that are trained
    "stats": dict,  # of the steps
    "best": float,  # the lowest bound so far; best.pt has it, too
}
UNKNOWN = {  # what a part means that is missing: `nanomdm.save` need not be given these
    "config": {},
    "corpus": {"name": "unknown", "sha256": ""},
    "step": 0,
    "origin": "",
}
VALUES = 2 * 10**5  # in a checkpoint, at most; a large one has thousands
PLAIN = re.compile(r"torch._utils _rebuild_tensor_v2|torch \w+Storage|collections OrderedDict")


# --- Saving -------------------------------------------------------------------------------------


def save(path: str | Path, state: dict) -> None:
    """Write `state` (tensors, numbers, strings and containers of them) to `path`.

    Whenever the power fails, `path` is either the old checkpoint or the new one. Raises `OSError`,
    which says how much room it takes, where it cannot be written, and `UserError` for a tensor that
    is not finite.
    """
    path = Path(path)
    if not all(tensor.isfinite().all() for tensor in tensors(state)):
        raise UserError(f"{path} is not written: numbers in it are not finite")
    try:
        write_atomically(path, partial(torch.save, state | {"format": FORMAT, "version": VERSION}))
    except (OSError, RuntimeError) as error:  # PyTorch makes a RuntimeError of a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or _one_line(cause)
        size, room = sum(tensor.nbytes for tensor in tensors(state)), ""
        with suppress(OSError):  # the folder may be gone
            free = shutil.disk_usage(path.parent).free
            room = f": it takes about {size:,} bytes, and {free:,} are free there"
        raise OSError(
            f"cannot write {path} ({reason}){room}: free some space, or make it writable"
        ) from error


def tensors(state):
    """The tensors in a nested state."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors(value)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- A network and its tokenizer ----------------------------------------------------------------


class Loaded(NamedTuple):
    """A checkpoint, ready for use."""

    model: torch.nn.Module  # with its averaged weights, in evaluation mode
    tokenizer: object
    config: dict  # the settings of the training run; empty if they are not known
    state: dict  # the whole checkpoint, with all `PARTS`

    @property
    def layout(self) -> str:
        """What its rows were: see data.py."""
        return self.state["corpus"].get("layout", "stream")

    @property
    def weights(self) -> str:
        """Which weights these are, in words."""
        if self.state["origin"]:
            return f"weights imported from {self.state['origin']}"
        steps = self.state["step"]
        return f"EMA weights after {steps} steps" if steps else "weights of an unknown run"


def load_model(
    path: str | Path, device: torch.device | str, Transformer, ModelConfig, resume: bool = False
) -> Loaded:
    """The network and the tokenizer of a checkpoint; to `resume`, one that a run can go on from.

    `Transformer(ModelConfig(...))` makes the network, without memory of its own, so that a size
    that is claimed costs nothing and the weights exist once: buffers that are not saved have to be
    made on the CPU. Raises `UserError` for a file that is none, or whose parts contradict each
    other.
    """
    state = UNKNOWN | load(path)
    state.setdefault("stats", state.get("meter", {}))  # as older checkpoints call them
    if resume and "optimizer" not in state:
        raise UserError(
            f"{path} holds averaged weights only and cannot be resumed: start from them by "
            "training.init_from="
        )
    with as_user_error(f"{path} holds no model of this version or class, train again: "):
        validate(state)
        model = build(state["model_config"], state["ema"], Transformer, ModelConfig)
        if resume:
            check_types(state, RUN_PARTS)
            check_types(state["stats"], dict.fromkeys(state["stats"], float))
            build(state["model_config"], state["model"], Transformer, ModelConfig)
    with as_user_error(f"{path} cannot be used: "):
        tokenizer = load_tokenizer(state["tokenizer"])
        if tokenizer.vocab_size != (size := model.config.vocab_size):
            raise UserError(f"its tokenizer has {tokenizer.vocab_size} tokens, its model {size}")
        loaded = Loaded(model.to(device).eval(), tokenizer, state["config"], state)
        if loaded.layout in ("documents", "pairs") and tokenizer.eos is None:
            raise UserError(
                f"its tokenizer has no end token, and it was trained on {loaded.layout}"
            )
    return loaded


def validate(state: dict) -> None:
    """Raise `UserError` for a part that is missing or of another type.

    What is inside of model_config, tokenizer and ema shows when they are built.
    """
    check_types(state, PARTS)
    for text in (state["origin"], state["corpus"].get("name"), state["corpus"].get("sha256")):
        if type(text) is not str or not text.isprintable():
            raise UserError("expected its origin, corpus.name and corpus.sha256 to be printable")
    if state["corpus"].get("layout", "stream") not in ("stream", "documents", "pairs", "rows"):
        raise UserError("its corpus.layout is unknown")
    if type(state["config"].get("data", {})) is not dict:
        raise UserError("expected config.data to be of type dict")


def check_types(values: dict, kinds: dict[str, type]) -> None:
    for name, kind in kinds.items():
        found = type(values.get(name))
        if found is not kind:
            raise UserError(f"expected {name} to be of type {kind.__name__}, not {found.__name__}")


def build(fields: dict, weights: dict[str, Tensor], Transformer, ModelConfig) -> torch.nn.Module:
    """The network of these fields, on the CPU, in float32, whose memory is that of `weights`."""
    try:
        config = ModelConfig(**fields)
        if fields.get("n_layer", 0) > len(weights):
            raise UserError(f"it has no weights for model.n_layer={fields['n_layer']}")
        with torch.device("meta"):
            model = Transformer(config)
        model.load_state_dict(weights, assign=True)
    except (AttributeError, TypeError, RuntimeError) as error:  # of other names, types or sizes
        raise UserError(_one_line(error)[:200]) from error
    return model.float()


# --- Reading what may come from anywhere --------------------------------------------------------


def load(path: str | Path) -> dict:
    """The state that `save` wrote, on the CPU, in plain containers. Nothing in it is executed.

    Raises `UserError`, in one line that names the remedy, for a file that is missing, cut, altered
    in any byte that matters, larger in memory than on the disk or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        remedy = "train one with `python train.py`, or check the name"
        if (path / "config.json").is_file():
            remedy = f"import it first, `python -m tools.import_weights from={path} to=imported.pt`"
        elif (path / "ckpt.pt").is_file():
            remedy = f"it is a folder, name a file in it, such as {path / 'ckpt.pt'}"
        raise UserError(f"no checkpoint at {path}: {remedy}")
    try:
        check_archive(path)
        with warnings.catch_warnings(action="ignore"):  # about what is refused in one line below
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = plain(state)
    except Exception as error:  # a damaged or foreign file can fail anywhere in the two readers
        raise UserError(
            f"{path} is damaged or no checkpoint ({_one_line(error)[:80]}): check the name, take "
            "an older one or train again"
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
        if damaged := archive.testzip():
            raise UserError(f"the checksum of {damaged} is wrong")
        if any(entry.external_attr & 0x10 for entry in entries):
            raise UserError("an entry of it is marked as a folder")
        names = {entry.filename.lower() for entry in entries}  # as PyTorch compares them
        if len(names) < len(entries):
            raise UserError("it has two entries of one name")
        pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    for opcode, value, _ in pickletools.genops(pickled):  # a bytearray(10**10) is built at once
        if opcode.name == "GLOBAL" and not PLAIN.fullmatch(value):
            raise UserError(f"it holds more than plain data: {value}")


def plain(state):
    """What torch.load built, in plain containers; tensors may share their memory.

    Raises `UserError` for what no run saves: values that are not finite, other types, and sizes
    that a hostile file may claim out of few bytes (a list of lists of lists, a tensor that repeats
    one number).
    """
    count = 0

    def checked(value):
        nonlocal count
        count += 1
        repeats = type(value) is Tensor and value.nbytes > value.untyped_storage().nbytes()
        if repeats or count > VALUES:
            raise UserError("it is larger in memory than on the disk")
        if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
            return {checked(key): checked(part) for key, part in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(checked, value))
        if type(value) not in (Tensor, str, int, float, bool, NoneType):
            raise UserError(f"it holds a {type(value).__name__}, which no run saves")
        if type(value) is str:
            value.encode()  # raises for a lone surrogate
        if type(value) is float and math.isnan(value):
            raise UserError("it holds a number that is not one (NaN)")
        if type(value) is Tensor and not value.isfinite().all():
            raise UserError("it holds weights that are infinite or not numbers (NaN)")
        return value

    return checked(state)
