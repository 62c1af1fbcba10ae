"""How a training run begins, and the checkpoints that it writes."""

import sys
from pathlib import Path

import torch

from . import checkpoint, cli, optim, parallel, runlog
from .errors import UserError, check_choice


def starting_point(config, Transformer, ModelConfig) -> tuple:
    """(config, loaded, resumes): how the run that `config` describes begins.

    `loaded` is None for a new run, or the checkpoint of training.init_from or of the run that
    training.resume continues, whose stored settings hold then, but for those that the command line
    names. A checkpoint decides the shape of the network and the tokenizer. Raises `UserError`.
    """
    wish, path = config.training.resume, Path(config.out_dir, "ckpt.pt")
    resumes = wish == "true" or (wish == "auto" and path.exists())
    path = path if resumes else config.training.init_from
    if not path:
        return config, None, False
    loaded = checkpoint.load_model(path, "cpu", Transformer, ModelConfig, resumes)
    if resumes:
        config = cli.resumed(loaded.config, config, whole=wish == "auto")
    shape = loaded.model.config
    decided = {f"model.{name}": getattr(shape, name) for name in vars(config.model)}
    del decided["model.dropout"]
    decided["data.tokenizer"] = loaded.tokenizer.state()["kind"]
    for key, value in decided.items():
        section, name = key.split(".")
        section = getattr(config, section)
        if key in config.explicit and getattr(section, name) != value:
            raise UserError(
                f"{key}={getattr(section, name)} is not what the checkpoint has ({value}): leave "
                "it out (or its experiment), or train from the beginning"
            )
        setattr(section, name, value)
    return config, loaded, resumes


def check(config) -> None:
    """Raise `UserError` for settings of training that would fail in the first step."""
    settings = config.training
    check_choice("training.lr_schedule", settings.lr_schedule, optim.SCHEDULES)
    parallel.world().check_batch(settings.batch_size, settings.grad_accum)


class Files:
    """The checkpoints that a run writes into its folder; `step` is that of ckpt.pt, 0 for none.

    In several processes all of them have to call its methods: the main one writes.
    """

    def __init__(self, folder: str | Path, step: int, device: torch.device):
        self.folder, self.step, self.device = Path(folder), step, device

    def save(self, name: str, state: dict) -> bool:
        """Returns whether it was written; if not, prints why, and the old file stays."""
        whole, failed = parallel.gather(state), False
        if parallel.world().is_main:
            try:
                checkpoint.save(self.folder / name, whole)
            except (OSError, UserError) as error:
                runlog.echo(f"{error}. The run continues, and saves again later", sys.stderr)
                failed = True
        failed = parallel.largest(failed, self.device)
        if name == "ckpt.pt" and not failed:
            self.step = state["step"]
        return not failed

    @property
    def last_good(self) -> str:
        path = self.folder / "ckpt.pt"
        return f"{path} holds step {self.step}" if self.step else "there is no checkpoint"

    def require(self, step: int) -> None:
        """Raise `OSError` if ckpt.pt is not that of `step`."""
        if self.step != step:
            raise OSError(f"the state after step {step} is lost: {self.last_good}")
