"""From gradients to better weights: parameter groups, schedule, moving average, skipped steps."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .errors import UserError

# Muon's update has a root mean square of 0.2 by construction (match_rms_adamw), AdamW's is a little
# higher; on the hidden matrices the best rate was about four times AdamW's (docs/LOG.md). One
# learning_rate scales both.
MUON_RATE = 4.0
AVERAGED = 50  # steps, about, in the running average of the training loss
MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "Muon": {"momentum"}}
STACKED = {"qkv": 3, "gate_up": 2}  # maps that one matrix of a block holds


class Optimizers:
    """Several optimizers behind the interface of one: a training loop need not know how many."""

    def __init__(self, *parts: torch.optim.Optimizer, like: Callable[[Tensor, Tensor], Tensor]):
        self.parts, self.like = parts, like
        for group in self.groups():
            group["base_lr"] = group["lr"]

    def groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    param_groups = property(groups)  # as torch.amp.GradScaler asks for them

    def set_learning_rate(self, factor: float) -> None:
        """Set every group to `factor` times the rate that it was built with."""
        for group in self.groups():
            group["lr"] = group["base_lr"] * factor

    def step(self, skip: Tensor | None = None) -> None:
        """One step, but none of it where `skip`, a number, is 1: weights and moments stay.

        A GPU decides that by itself, so that its queue of work does not run empty for it.
        """
        on_device = skip is not None and skip.device.type == "cuda"
        if skip is not None and not on_device and skip.item():
            return
        for part in self.parts:
            part.found_inf = skip if on_device else None  # PyTorch's name, of its fused AdamW
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Restore the moments; rates and decay stay as built, for a resumed run may change them.

        Raises `UserError` for moments that are not of these optimizers and parameters.
        """
        try:
            for part, state in zip(self.parts, states, strict=True):
                self._load_part(part, state)
        except Exception as error:  # a stranger's state can be anything
            raise UserError(
                f"the optimizer's state does not fit the network ({error!r}): start from the "
                "weights alone by training.init_from="
            ) from error

    def _load_part(self, part: torch.optim.Optimizer, state: dict) -> None:
        """PyTorch's fused kernels trust shapes and types: what does not fit breaks the memory."""
        parameters = [p for group in part.param_groups for p in group["params"]]
        moments = {}
        if not isinstance(state, dict):
            raise UserError("it is no dict")
        for i, values in dict(state["state"]).items():
            p = parameters[i]
            expected = {k: ((), p.dtype) for k in MOMENTS[type(part).__name__] & {"step"}}
            expected |= {k: (p.shape, p.dtype) for k in MOMENTS[type(part).__name__] - {"step"}}
            if i < 0 or {k: (v.shape, v.dtype) for k, v in values.items()} != expected:
                raise UserError(f"the moments of parameter {i} are of another")
            moments[i] = {k: self.like(v.contiguous(), p) for k, v in values.items()}
        part.load_state_dict(part.state_dict() | {"state": moments})


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal, for maps between hidden states (2502.16982).

    The update has a root mean square of 0.2, so that AdamW's rates and decay fit. `parts` of a
    group says how many maps are stacked in each of its matrices (queries, keys and values; gate and
    up): each is made orthogonal by itself. Maps of one shape are one batch. `whole` and `like`
    gather a sharded update and cut the result again. Where the number `found_inf` is 1, nothing
    changes.
    """

    found_inf = None

    def __init__(self, groups: list[dict], whole: Callable, like: Callable, **defaults):
        super().__init__(groups, defaults)
        self.whole, self.like = whole, like

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for shape in {p.shape for p in parameters}:
                self._step_batch([p for p in parameters if p.shape == shape], **group)

    def _step_batch(self, parameters, *, lr, weight_decay, momentum, parts, **rest) -> None:
        gradients = [p.grad for p in parameters]
        for p in parameters:
            self.state[p].setdefault("momentum", torch.zeros_like(p))
        momenta = [self.state[p]["momentum"] for p in parameters]
        keep = 1.0
        if self.found_inf is not None:  # a gradient that equals the momentum leaves it alone
            keep, skip = 1 - self.found_inf, self.found_inf.bool()
            gradients = [torch.where(skip, m, g) for m, g in zip(momenta, gradients, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, momenta, momentum)  # Nesterov's
        maps = torch.stack([self.whole(u) for u in updates]).unflatten(1, (parts, -1))
        flat = orthogonalise(maps.flatten(0, 1)) * (keep * 0.2 * math.sqrt(max(maps.shape[2:])))
        updates = flat.unflatten(0, maps.shape[:2]).flatten(1, 2).unbind()
        torch._foreach_mul_(parameters, 1 - lr * weight_decay * keep)
        updates = [self.like(u, p) for u, p in zip(updates, parameters, strict=True)]
        torch._foreach_add_(parameters, updates, alpha=-lr)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Each matrix of x (N, rows, columns) with its singular values brought near 1.

    Newton-Schulz with the coefficients of Muon (Jordan et al. 2024): to between 0.7 and 1.2. In
    bfloat16 on a GPU, float32 elsewhere.
    """
    y = x.mT if x.size(-2) > x.size(-1) else x
    y = y.bfloat16() if y.is_cuda else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(
            y, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445
        )
    return (y.mT if x.size(-2) > x.size(-1) else y).type_as(x)


def _as_it_is(tensor: Tensor, other: Tensor | None = None) -> Tensor:
    return tensor


def build_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float,
    whole: Callable[[Tensor], Tensor] = _as_it_is,
    like: Callable[[Tensor, Tensor], Tensor] = _as_it_is,
) -> Optimizers:
    """`adamw`, or `muon` for the hidden matrices with AdamW for everything else.

    Decay applies to matrices only, not to norms and convolutions. Muon orthogonalises, which has
    a meaning for maps between hidden states only: the embedding and the head stay with AdamW. Of a
    sharded model, `whole(tensor)` gathers a shard and `like(tensor, parameter)` cuts one. Raises
    `UserError` for another name.
    """
    if name not in ("adamw", "muon"):
        raise UserError(f"training.optimizer={name} is unknown: choose adamw or muon")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    hidden = [
        (n, p) for n, p in named if name == "muon" and p.ndim == 2 and n.startswith("blocks.")
    ]
    chosen = {n for n, _ in hidden}
    others = [p for n, p in named if n not in chosen]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim == 2], "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim != 2], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.95),
        fused=named[0][1].device.type in ("cpu", "cuda"),
    )
    if name == "adamw":
        return Optimizers(adamw, like=like)
    parts = {n: STACKED.get(n.split(".")[-2], 1) for n, _ in hidden}
    groups = [
        {"params": [p for n, p in hidden if parts[n] == count], "parts": count}
        for count in sorted(set(parts.values()))
    ]
    rate = MUON_RATE * learning_rate
    muon = Muon(groups, whole, like, lr=rate, weight_decay=weight_decay, momentum=0.95)
    return Optimizers(adamw, muon, like=like)


def learning_rate_factor(
    step: int, max_iters: int, warmup_iters: int, schedule: str, floor: float
) -> float:
    """The share of the peak rate in step 0 ... max_iters - 1: warm-up, then decay to `floor`.

    `cosine` decays along half a wave, `linear` along a line. Raises `UserError` for another
    schedule.
    """
    if schedule not in ("cosine", "linear"):
        raise UserError(f"training.lr_schedule={schedule} is unknown: choose cosine or linear")
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


# --- Numbers that go wrong ----------------------------------------------------------------------


class Meter:
    """Figures of a run's steps, kept on the device: no step waits for them.

    `skipped` counts the steps whose loss or gradient was not finite, `in_a_row` those since the
    last good one. Of the good ones: `loss_avg` is a running average, `loss_max` and `grad_norm_max`
    are the largest since the last `read`, so that a spike shows however seldom one looks.
    """

    NAMES = ("loss_avg", "loss_max", "grad_norm_max", "skipped", "in_a_row")

    def __init__(self, device: torch.device, state: dict[str, float] | None = None):
        values = [(state or {}).get(name, 0.0) for name in self.NAMES]
        self.values = torch.tensor(values, device=device)
        self.one_more = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], device=device)

    def add(self, loss: Tensor, grad_norm: Tensor, step: int) -> Tensor:
        """Count step number `step` (from 1); a 1.0 if it has to be skipped, else 0.0."""
        bad = ~torch.isfinite(loss + grad_norm)
        average, largest, norm, skipped, _ = self.values.unbind()
        weight = (1 / (step - skipped)).clamp(min=1 / AVERAGED)
        good = (
            *(torch.lerp(average, loss, weight), largest.maximum(loss), norm.maximum(grad_norm)),
            *(skipped, torch.zeros_like(skipped)),
        )
        self.values = torch.where(bad, self.values + self.one_more, torch.stack(good))
        return bad.float()

    @property
    def failing(self) -> bool:
        """Whether the last step was skipped: the weights may be about to break."""
        return self.state()["in_a_row"] > 0

    def require_progress(self, limit: int, where: str) -> None:
        """Raise `FloatingPointError` with `where` to go on after `limit` failures (0: never)."""
        if 0 < limit <= (count := int(self.state()["in_a_row"])):
            raise FloatingPointError(
                f"loss or gradient of {count} steps in a row was not finite, training.max_skipped="
                f"{limit} at most: stopped; {where}: go on from there with a lower "
                "training.learning_rate"
            )

    def read(self) -> dict[str, float]:
        """The figures to log, by name; the largest are from here on of what follows."""
        figures = self.state()
        self.values[1:3] = 0
        return {name: figures[name] for name in self.NAMES[:-1]}

    def state(self) -> dict[str, float]:
        return dict(zip(self.NAMES, self.values.tolist(), strict=True))
