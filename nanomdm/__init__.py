"""nanoMDM as a library: the network, diffusion, and the rooms around them (docs/library.md).

`nanomdm.model` and `nanomdm.diffusion` are model.py and diffusion.py of the root: in a checkout the
modules that the scripts import, one class each; in a wheel, copies of the two files.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from . import bounds, checkpoint, optim, strategies, text, tokenizers
from .tokenizers import load_tokenizer


def _load_root_module(name: str) -> None:
    """Make the root's `name`.py also nanomdm.`name`: the module that `import name` gives.

    A file of that name that belongs to somebody else, and goes before ours, keeps the name.
    """
    path, found = Path(__file__).resolve().parents[1] / f"{name}.py", find_spec(name)
    ours = f"{__name__}.{name}"
    if found and Path(found.origin or "").resolve() == path:
        sys.modules[ours] = import_module(name)
        return
    spec = spec_from_file_location(ours, path)
    sys.modules[ours] = module = module_from_spec(spec)
    if not found:
        sys.modules[name] = module
    spec.loader.exec_module(module)


if not Path(__file__).with_name("model.py").exists():  # a checkout, not a wheel
    _load_root_module("model")
    _load_root_module("diffusion")

from . import diffusion, model  # noqa: E402
from .diffusion import masked_diffusion_loss, nelbo, sample, score  # noqa: E402
from .model import ModelConfig, Transformer  # noqa: E402

__all__ = [
    "ModelConfig",
    "Transformer",
    "bounds",
    "checkpoint",
    "diffusion",
    "load",
    "load_tokenizer",
    "masked_diffusion_loss",
    "model",
    "nelbo",
    "optim",
    "sample",
    "save",
    "score",
    "strategies",
    "text",
    "tokenizers",
]


def load(path: str | Path, device: str = "cpu") -> tuple[Transformer, object]:
    """The network of a checkpoint, with its averaged weights, and its tokenizer.

    Raises `UserError`, a `ValueError`, for a file that is none.
    """
    loaded = checkpoint.load_model(path, device, Transformer, ModelConfig)
    return loaded.model, loaded.tokenizer


def save(path: str | Path, network: Transformer, tokenizer, **about) -> None:
    """Write a checkpoint for `load`, sample.py, eval.py and training.init_from.

    `about` may name further parts of it: step, corpus, origin (`checkpoint.PARTS`).
    """
    parts = {
        "model_config": vars(network.config),
        "tokenizer": tokenizer.state(),
        "ema": network.state_dict(),
    }
    checkpoint.save(path, parts | about)
