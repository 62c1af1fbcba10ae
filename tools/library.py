"""nanoMDM as a library: the leaves of the repository, unchanged, as `nanomdm.model` and so on.

In the wheel this file is nanomdm/__init__.py; docs/library.md shows how it is used.
"""

from nanomdm import bounds, checkpoint, data, diffusion, model, optim, text, tokenizer
from nanomdm.bounds import nelbo
from nanomdm.diffusion import masked_diffusion_loss, sample
from nanomdm.model import ModelConfig, Transformer
from nanomdm.tokenizer import load_tokenizer

__all__ = [
    "ModelConfig",
    "Transformer",
    "bounds",
    "checkpoint",
    "data",
    "diffusion",
    "load",
    "masked_diffusion_loss",
    "model",
    "nelbo",
    "optim",
    "sample",
    "save",
    "text",
    "tokenizer",
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
