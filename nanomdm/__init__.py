"""nanoMDM as a library: `nanomdm.model`, `nanomdm.diffusion` and the rooms beside them.

In a checkout, the first two are the files of the root, the very modules that the scripts import; a
wheel holds copies of them. docs/library.md shows the use.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def _from_root(name: str):
    """The module model.py or diffusion.py of the checkout, whichever name it is imported by."""
    path, found = Path(__file__).resolve().parents[1] / f"{name}.py", sys.modules.get(name)
    if found is None or Path(found.__file__ or "").resolve() != path:
        spec = spec_from_file_location(name, path)
        found = module_from_spec(spec)
        sys.modules.setdefault(name, found)
        spec.loader.exec_module(found)
    sys.modules[f"{__name__}.{name}"] = found
    return found


if Path(__file__).with_name("model.py").exists():  # a wheel
    from . import diffusion, model
else:
    model, diffusion = _from_root("model"), _from_root("diffusion")

from . import bounds, checkpoint, optim, text, tokenizers  # noqa: E402
from .tokenizers import load_tokenizer  # noqa: E402

ModelConfig, Transformer = model.ModelConfig, model.Transformer
masked_diffusion_loss, sample = diffusion.masked_diffusion_loss, diffusion.sample
nelbo = diffusion.nelbo

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
    "text",
    "tokenizers",
]


def load(path: str) -> tuple[Transformer, object]:
    """The network, with its averaged weights, and the tokenizer of a checkpoint.

    Raises `ValueError` for a file that is none.
    """
    state = checkpoint.load(path)
    network = Transformer(ModelConfig(**state["model_config"]))
    network.load_state_dict(state["ema"])
    return network.eval(), load_tokenizer(state["tokenizer"])


def save(path: str, network: Transformer, tokenizer) -> None:
    """Write a checkpoint that `load` reads."""
    state = {"model_config": vars(network.config), "ema": network.state_dict()}
    checkpoint.save(path, state | {"tokenizer": tokenizer.state()})
