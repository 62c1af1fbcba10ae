"""From gradients to better weights: optimizers, schedules, moving average, step statistics."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from .errors import UserError, check_choice
from .parallel import full_tensor, shard_like

# learning_rate is that of AdamW on the embedding, the head and the norms. Hidden matrices under
# Muon, whose update has a root mean square of 0.2, and convolutions, which start as 0 and have few
# weights, learn best at so many times that rate (docs/LOG.md).
MUON_RATE = 2.0
TAPS_RATE = 4.0
STACKED = {"qkv": 3, "gate_up": 2}  # maps that one matrix of a block holds
AVERAGED = 50  # steps, about, in the running average of the training loss
MAX_SKIPPED = 50  # consecutive skipped steps after which training stops


# --- Optimizers and schedules by name -----------------------------------------------------------


def adamw(parameters: dict[str, Tensor], learning_rate: float, weight_decay: float):
    """AdamW. Decay applies to matrices only, not to norms and convolutions."""
    weights = parameters.values()
    groups = [
        {"params": [p for p in weights if p.ndim == 2], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.ndim not in (2, 3)]},
        {"params": [p for p in weights if p.ndim == 3], "lr": TAPS_RATE * learning_rate},
    ]
    return [AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def muon(parameters: dict[str, Tensor], learning_rate: float, weight_decay: float):
    """Muon for the matrices of the blocks, AdamW for everything else.

    Orthogonal updates have a meaning for maps between hidden states only: the embedding and the
    head stay with AdamW.
    """
    hidden, others = {1: [], 2: [], 3: []}, {}  # hidden matrices by the number of stacked maps
    for name, p in parameters.items():
        if name.startswith("blocks.") and p.ndim == 2:
            hidden[STACKED.get(name.split(".")[-2], 1)].append(p)
        else:
            others[name] = p
    groups = [{"params": matrices, "stacked": count} for count, matrices in hidden.items()]
    defaults = {"lr": MUON_RATE * learning_rate, "weight_decay": weight_decay, "momentum": 0.7}
    return [*adamw(others, learning_rate, weight_decay), Muon(groups, defaults)]


# An optimizer is a function of the trained parameters by name, the peak learning rate and the
# weight decay. It returns a list of PyTorch's optimizers, or of others with their interface, of
# which training expects:
# - What changes from step to step is in `optimizer.state`: tensors and numbers of each parameter,
#   under any names, on the device where `step` has created them.
# - A step whose gradients and `lr` are 0 creates that state and leaves the weights as they are.
#   A resumed run does this, and copies the stored values of the same names, shapes and types.
# - `dtype` is set: that of the run's matrix products. Muon's are in it.
# - A step that is skipped is not taken. An optimizer that has `_step_supports_amp_scaling = True`,
#   as PyTorch's fused ones have, decides that by itself, so that nothing waits for the GPU: its
#   `step` changes nothing where the scalar `optimizer.found_inf` is 1.
# - Under FSDP parameters, gradients and state are shards: see `full_tensor` and `shard_like`.
OPTIMIZERS = {"muon": muon, "adamw": adamw}

# A schedule is a function from the share of the decay that is done, 0 to 1, to the share of the
# peak learning rate that is left.
SCHEDULES = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def build_optimizer(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float, dtype=torch.float32
):
    """`Optimizers` for the parameters of a model that require gradients.

    `dtype` is that of their matrix products, as in the forward pass of mixed precision.
    Raises `UserError` for a name that `OPTIMIZERS` does not have.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    check_choice("training.optimizer", name, OPTIMIZERS)
    parts = OPTIMIZERS[name](parameters, learning_rate, weight_decay)
    for part in parts:
        part.dtype = dtype
    return Optimizers(parts)


def warmup(max_iters: int, wanted: int) -> int:
    """The steps of the warm-up: at most half of the run."""
    return min(wanted, max_iters // 2)


def learning_rate_factor(step: int, max_iters: int, warmup_iters: int, schedule: str) -> float:
    """The share of the peak rate in step 0 ... max_iters - 1: linear warm-up, then a schedule.

    Raises `UserError` for a name that `SCHEDULES` does not have.
    """
    check_choice("training.lr_schedule", schedule, SCHEDULES)
    warmup_iters = warmup(max_iters, warmup_iters)
    if step < warmup_iters:
        return (step + 1) / (warmup_iters + 1)
    return SCHEDULES[schedule]((step - warmup_iters) / max(1, max_iters - 1 - warmup_iters))


# --- One step -----------------------------------------------------------------------------------


class Optimizers:
    """Several optimizers behind the interface of one: a training loop need not know how many."""

    def __init__(self, parts: list[Optimizer]):
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        for group in self.param_groups:
            group["base_lr"] = group["lr"]

    def set_learning_rate(self, factor: float) -> None:
        """Set every group to `factor` times the rate that it was built with."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * factor

    def step(self, skip: Tensor | None = None) -> None:
        """One step; where the scalar `skip` is 1, weights and state stay as they are."""
        for part in self.parts:
            if skip is not None and skip.is_cuda and hasattr(part, "_step_supports_amp_scaling"):
                part.found_inf = skip  # so that a GPU's queue of work does not run empty
                part.step()
                del part.found_inf
            elif not skip:
                part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, stored: list[dict]) -> None:
        """Restore the state; rates and decay stay as built, for a resumed run may change them.

        Raises `UserError` for a state that is not of these optimizers and parameters.
        """
        self.set_learning_rate(0.0)
        try:
            for part, its_own in zip(self.parts, stored, strict=True):
                if len(its_own["param_groups"]) not in (0, len(part.param_groups)):
                    raise ValueError("it is of an earlier version, which had other rates")
                restore(part, its_own["state"])
        except Exception as error:  # a file may hold anything
            raise UserError(
                f"the optimizer's state does not fit the network ({error!r}): start from the "
                "weights alone by training.init_from="
            ) from error
        self.zero_grad()
        self.set_learning_rate(1.0)


def restore(optimizer: Optimizer, stored: dict) -> None:
    """Let a step create the state, at a rate of 0, and copy the `stored` one of each parameter.

    PyTorch's fused kernels trust names and shapes: others would corrupt the memory.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i in stored:
        parameters[i].grad = torch.zeros_like(parameters[i])
    optimizer.step()
    for i, values in stored.items():
        state = optimizer.state[parameters[i]]
        for name, own in state.items():
            if isinstance(own, Tensor):
                own.copy_(shard_like(values[name], own))
            else:
                state[name] = values[name]


class Muon(Optimizer):
    """Momentum whose updates are made orthogonal, for maps between hidden states (2502.16982).

    Then each neuron gets a step of the same size (as in NorMuon, 2510.05491, but without a running
    mean): each row of a map, or column if it has more columns, has a root mean square of 0.2, so
    that AdamW's rates and decay fit. `stacked` of a group says how many maps each of its matrices
    holds (queries, keys and values; gate and up): each is made orthogonal by itself. Matrices of
    one shape are one batch.
    """

    _step_supports_amp_scaling = True
    dtype = torch.float32

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            for shape in {p.shape for p in weights}:
                self._step_batch([p for p in weights if p.shape == shape], **group)

    def _step_batch(self, weights, lr, weight_decay, momentum, stacked, **rest):
        for p in weights:
            if "momentum" not in self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum"] for p in weights]
        targets = [p.grad for p in weights]
        if hasattr(self, "found_inf"):
            # A step to be skipped has its momenta as targets, and a rate of 0.
            skip, lr = self.found_inf > 0, lr * (1 - self.found_inf)
            targets = list(map(partial(torch.where, skip), momenta, targets))
        torch._foreach_lerp_(momenta, targets, 1 - momentum)
        # Nesterov's; one by one, as PyTorch 2.11 has no _foreach_lerp of shards
        updates = list(map(partial(torch.lerp, weight=momentum), targets, momenta))
        maps = torch.cat([full_tensor(u).unflatten(0, (stacked, -1)) for u in updates])
        maps = orthogonalise(maps, self.dtype)  # (N, rows, columns)
        shorter = 1 if maps.size(1) < maps.size(2) else 2
        norms = maps.norm(dim=shorter, keepdim=True, dtype=torch.float32).clamp(1e-12)
        maps = maps * (-0.2 * lr * math.sqrt(maps.size(shorter)) / norms)
        updates = maps.flatten(0, 1).chunk(len(weights))
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        torch._foreach_add_(weights, list(map(shard_like, updates, weights)))


def orthogonalise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of each matrix of x (N, rows, columns) near 1, computed in `dtype`.

    Newton-Schulz iterations with the coefficients of Muon (Jordan et al. 2024): to between 0.7 and
    1.2.
    """
    if x.size(1) > x.size(2):
        return orthogonalise(x.mT, dtype).mT
    y = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        gram = y @ y.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.baddbmm(y, polynomial, y, beta=3.4445)
    return y


# --- Beside the steps ---------------------------------------------------------------------------


@torch.no_grad()
def update_ema(average: list[Tensor], current: list[Tensor], decay: float, step: int) -> None:
    """In place, average <- d average + (1 - d) current, d = min(decay, (1 + step) / (10 + step)).

    The rise of d keeps the random initial weights out of the average of a short run.
    """
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(average, current, 1 - d)


class StepStats:
    """Statistics of a run's steps, kept on the device: no step waits for them.

    `skipped` counts the steps whose loss or gradient was not finite, `consecutive` those since the
    last good one. Of the good ones: `loss_avg` is a running average, `loss_max` and `grad_norm_max`
    are the largest since the last `read`, so that every spike shows.
    """

    def __init__(self, device: torch.device, stored: dict[str, float]):
        for name in ("loss_avg", "loss_max", "grad_norm_max", "skipped", "consecutive"):
            setattr(self, name, torch.tensor(float(stored.get(name, 0.0)), device=device))

    def add(self, loss: Tensor, grad_norm: Tensor, step: int) -> Tensor:
        """Count step number `step` (from 1). Returns 1.0 if it has to be skipped, else 0.0."""
        skip = ~torch.isfinite(loss + grad_norm)
        weight = (1 / (step - self.skipped)).clamp(min=1 / AVERAGED)
        self.loss_avg = torch.where(skip, self.loss_avg, self.loss_avg.lerp(loss, weight))
        self.loss_max = self.loss_max.maximum(loss.masked_fill(skip, 0))
        self.grad_norm_max = self.grad_norm_max.maximum(grad_norm.masked_fill(skip, 0))
        self.skipped += skip
        self.consecutive = (self.consecutive + 1) * skip
        return skip.float()

    def require_progress(self, where: str) -> None:
        """Raise `FloatingPointError` after `MAX_SKIPPED` consecutive skipped steps.

        `where` says what there is to resume from.
        """
        if self.consecutive >= MAX_SKIPPED:
            raise FloatingPointError(
                f"loss or gradient was not finite in {int(self.consecutive)} consecutive steps "
                f"(the limit is {MAX_SKIPPED}): stopped; {where}: try again with a lower "
                "training.learning_rate"
            )

    def require_result(self, steps: int) -> None:
        """Raise `FloatingPointError` if more than half of a run's `steps` were skipped."""
        if 2 * self.skipped > steps:
            raise FloatingPointError(
                f"loss or gradient was not finite in {int(self.skipped)} of {steps} steps, which "
                "were skipped: train again with a lower training.learning_rate"
            )

    def read(self) -> dict[str, float]:
        """The statistics to log, by name; the largest start anew."""
        stats = self.state()
        del stats["consecutive"]
        self.loss_max.zero_()
        self.grad_norm_max.zero_()
        return stats

    def state(self) -> dict[str, float]:
        return {name: value.item() for name, value in vars(self).items()}
