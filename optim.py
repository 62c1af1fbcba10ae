"""From gradients to better weights: parameter groups, learning-rate schedule, moving average."""

import math

import torch
from torch import Tensor, nn

# Muon's update has a root mean square of 0.2 by construction (match_rms_adamw), AdamW's is a little
# higher; on the hidden matrices the best rate was about four times AdamW's (docs/LOG.md). One
# learning_rate scales both.
MUON_RATE = 4.0


class Optimizers:
    """Several optimizers behind the interface of one: a training loop need not know how many."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        for group in self.groups():
            group["base_lr"] = group["lr"]

    def groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def set_learning_rate(self, factor: float) -> None:
        """Set every group to `factor` times the rate that it was built with."""
        for group in self.groups():
            group["lr"] = group["base_lr"] * factor

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore the moments; rates and decay stay as built, for a resumed run may change them."""
        for part, state in zip(self.parts, states, strict=True):
            groups = [{k: v for k, v in g.items() if k != "params"} for g in part.param_groups]
            part.load_state_dict(state)
            for group, built in zip(part.param_groups, groups, strict=True):
                group.update(built)


def build_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
) -> Optimizers:
    """`adamw`, or `muon` (arXiv 2502.16982) for the hidden matrices with AdamW for everything else.

    Decay applies to matrices only, never to norm gains. Muon orthogonalises its updates, which has
    a meaning for maps between hidden states only: the embedding and the head stay with AdamW.
    Raises `ValueError` for another name.
    """
    if name not in ("adamw", "muon"):
        raise ValueError(f"training.optimizer={name} is unknown: choose adamw or muon")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gains = [p for _, p in named if p.ndim < 2]
    hidden = [p for n, p in named if p.ndim == 2 and n.startswith("blocks.")]
    tables = [p for n, p in named if p.ndim == 2 and not n.startswith("blocks.")]
    matrices = tables + (hidden if name == "adamw" else [])
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=learning_rate, betas=betas, fused=_can_fuse(named[0][1].device)
    )
    if name == "adamw":
        return Optimizers(adamw)
    muon = torch.optim.Muon(
        hidden,
        lr=MUON_RATE * learning_rate,
        weight_decay=weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return Optimizers(adamw, muon)


def _can_fuse(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")


def learning_rate_factor(
    step: int, max_iters: int, warmup_iters: int, schedule: str, floor: float
) -> float:
    """The share of the peak rate in step 0 ... max_iters - 1: warm-up, then decay to `floor`.

    `cosine` decays along half a wave, `linear` along a line. Raises `ValueError` for another
    schedule.
    """
    if schedule not in ("cosine", "linear"):
        raise ValueError(f"training.lr_schedule={schedule} is unknown: choose cosine or linear")
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    done = min(1.0, (step - warmup_iters) / max(1, max_iters - 1 - warmup_iters))
    left = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return floor + (1 - floor) * left


@torch.no_grad()
def update_ema(average: list[Tensor], current: list[Tensor], decay: float, step: int) -> None:
    """In place, average <- d average + (1 - d) current, d = min(decay, (1 + step) / (10 + step)).

    The rise of d keeps the random initial weights out of the average of a short run.
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, current, 1 - d)
