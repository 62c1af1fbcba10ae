"""Masked diffusion: forward masking, training loss and reverse process.

`model` is any callable from ids (B, L) to logits (B, L, V); V is the vocabulary without the mask.
Everything random is a function of (seed, row, position): a function that takes a `generator` draws
one seed from it and hashes the rest, so that row i of a batch gets the same draws whatever the
batch, the device or the number of processes.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Model = Callable[[Tensor], Tensor]
GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, odd, as int64: SplitMix64's increment


# --- Randomness ----------------------------------------------------------------------------------


def _mix(x):
    """SplitMix64's finaliser on int64 (products wrap, and a mask makes the shifts logical)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def draw_seed(generator: Generator | None) -> int:
    """A base seed from `generator` (PyTorch's global one if None), best one on the CPU."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def uniform(seed: int, rows: Tensor, columns: int, *salt: int) -> Tensor:
    """Uniform float64 draws in [0, 1) of shape (len(rows), columns), on the device of `rows`.

    A counter-based generator (SplitMix64, Steele et al. 2014): entry (i, j) depends on (seed, salt,
    rows[i], j) alone. Devices without float64 (MPS) get the draws by way of the CPU.
    """
    if rows.device.type == "mps":
        draws = uniform(seed, rows.cpu(), columns, *salt).float()
        return draws.clamp(max=1 - 2**-24).to(rows.device)  # rounding must not give 1
    key = torch.tensor((seed, *salt))
    key = int(functools.reduce(lambda key, value: _mix(key + value * GOLDEN), key))
    row_keys = _mix(_mix(key + rows * GOLDEN))  # (B,)
    columns = torch.arange(1, columns + 1, device=rows.device)
    bits = _mix(row_keys[:, None] + columns * GOLDEN)  # (B, columns)
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


# --- Forward process -----------------------------------------------------------------------------


def mask_probability(t: Tensor | float, eps: float = 1e-3) -> Tensor | float:
    """The share of tokens masked at time t in [0, 1]: p_mask(t) = (1 - eps) t + eps.

    `eps` keeps the training loss's weight 1 / p_mask finite; sampling and evaluation do not know
    it (SMDM, arXiv 2410.18514).
    """
    return (1 - eps) * t + eps


def mask_tokens(
    x0: Tensor,
    p_mask: Tensor | float,
    mask_id: int,
    generator: Generator | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask each token of x0 (B, L) independently with probability `p_mask`, a number or (B, 1).

    `rows` (B,) are the rows' numbers in a larger batch, if x0 is a part of one. Returns (xt,
    is_masked), both (B, L). Carry `is_masked` along: `xt == mask_id` is no substitute where the
    data may hold that id.
    """
    is_masked = uniform(draw_seed(generator), _rows(x0, rows), x0.size(1)) < p_mask
    return x0.masked_fill(is_masked, mask_id), is_masked


def mask_count(
    x0: Tensor,
    count: Tensor,
    mask_id: int,
    generator: Generator | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Like `mask_tokens`, but exactly `count` (B, 1) tokens of a row, a uniformly random subset."""
    noise = uniform(draw_seed(generator), _rows(x0, rows), x0.size(1))
    is_masked = noise.argsort(dim=1) < count  # a random permutation
    return x0.masked_fill(is_masked, mask_id), is_masked


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return torch.arange(x.size(0), device=x.device) if rows is None else rows


# --- Training loss -------------------------------------------------------------------------------


def nll_from_logits(model: Model, xt: Tensor, x0: Tensor, is_masked: Tensor) -> Tensor:
    """Cross-entropies (B, L) in nats, 0 where nothing is masked, from a model's logits (B, L, V).

    At least float32, float64 for a float64 model. The default `nll` of `masked_diffusion_loss`; a
    model that computes its own (`Transformer` with targets=, where=) is passed in by a function of
    the same form.
    """
    logits = _at_least_float32(model(xt)[is_masked])  # (masked, V)
    nll = F.cross_entropy(logits, x0[is_masked], reduction="none")
    return nll.new_zeros(x0.shape).masked_scatter(is_masked, nll)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked_diffusion_loss(
    model: Model,
    x0: Tensor,
    *,
    mask_id: int,
    generator: Generator | None = None,
    eps: float = 1e-3,
    weighting: float = 1.0,
    masking: str = "bernoulli",
    rows: Tensor | None = None,
    global_batch_size: int | None = None,
    nll: Callable = nll_from_logits,
) -> Tensor:
    """The training loss E_t[ sum of CE over the masked / p_mask(t) ] / L, in nats per token.

    As in SMDM (arXiv 2410.18514) and LLaDA. x0 (B, L) are clean ids. The times are stratified over
    the global batch: row i has t uniform in [i / n, (i + 1) / n), n = `global_batch_size` (B by
    default) and i = `rows` (0 ... B - 1 by default), so that a part of a batch gets its share of
    them. Divided by B L, and not by the number of masked tokens: that would be no bound.

    `masking` count masks exactly l of L tokens with the weight L / l instead: l uniform in 1 ... L,
    stratified, and L + 1 - l in the row that mirrors it, i and n - 1 - i. It has the same
    expectation but for eps. A `weighting` g below 1 is another objective, easier to learn from: it
    weighs by (2 - g) / p_mask^g, so that the steep end of few masks counts less; the factor keeps
    the scale, a loss of c nats at every masked token being c.
    """
    check_loss(eps, masking, weighting)
    if (rows is None) != (global_batch_size is None):
        raise ValueError("rows and global_batch_size go together: give both or neither")
    rows = _rows(x0, rows)
    n, L = global_batch_size or len(rows), x0.size(1)
    if masking == "count":
        count = mirrored_counts(draw_seed(generator), rows, n, L)[:, None]  # (B, 1)
        p_mask = count / L
        xt, is_masked = mask_count(x0, count, mask_id, generator, rows)
    else:
        t = (rows[:, None] + uniform(draw_seed(generator), rows, 1)) / n  # (B, 1)
        p_mask = mask_probability(t, eps)
        xt, is_masked = mask_tokens(x0, p_mask, mask_id, generator, rows)
    loss = nll(model, xt, x0, is_masked)
    return (loss * ((2 - weighting) * p_mask**-weighting).to(loss.dtype)).mean()


def check_loss(eps: float, masking: str, weighting: float) -> None:
    """Raise `ValueError` for a setting of `masked_diffusion_loss` that is out of its range."""
    if not 0 < eps < 1:
        raise ValueError(f"diffusion.eps={eps} must lie between 0 and 1")
    if masking not in ("bernoulli", "count"):
        raise ValueError(f"diffusion.masking={masking} is unknown: choose bernoulli or count")
    if not 0 <= weighting <= 1:
        raise ValueError(
            f"diffusion.weighting={weighting} must lie in [0, 1]; 1 is the weight of the bound"
        )


def mirrored_counts(seed: int, rows: Tensor, n: int, L: int) -> Tensor:
    """Masked counts (B,) in 1 ... L of some rows of n: stratified, l + l' = L + 1 in mirror rows.

    Row i has u uniform in its stratum, the i-th of n, in the first half, and l = floor(u L) + 1;
    row n - 1 - i mirrors it. The middle row of an odd n has no mirror and needs none.
    """
    low = torch.minimum(rows, n - 1 - rows)
    count = ((low + uniform(seed, low, 1).squeeze(1)) / n * L).long() + 1
    return torch.where(rows > low, L + 1 - count, count)


def mask_capacity(rows: Tensor, length: int, n: int, eps: float, masking: str = "bernoulli") -> int:
    """How many tokens `masked_diffusion_loss` masks at most in these rows of a batch of n.

    Counts: those of the latest times. Bernoulli: the mean and six standard deviations, exceeded
    once in 1e9 batches; stratified times make the number nearly constant. The variance is that of
    the masks, L p (1 - p) a row, and that of the times within their strata.
    """
    if masking == "count":
        return int((-(-(rows + 1) * length // n)).sum())  # rounded up, in integers
    p = mask_probability((rows.double() + 0.5) / n, eps)
    variance = length * (p * (1 - p)).sum() + length**2 * len(rows) / (12 * n**2)
    return min(len(rows) * length, math.ceil(length * p.sum() + 6 * variance.sqrt()))


# --- Reverse process -----------------------------------------------------------------------------


class Sampled(NamedTuple):
    """The filled canvas (B, L), and how many times the network was called."""

    ids: Tensor
    calls: int


@dataclass
class Step:
    """What a strategy may look at in one step; `logits` calls the network, only if looked at.

    The step goes from time t = 1 - index / steps to s = 1 - (index + 1) / steps.
    """

    model: Model
    xt: Tensor  # (B, L)
    is_masked: Tensor  # (B, L)
    holes: Tensor  # (B,) masks at the start
    index: int
    steps: int
    seed: int
    rows: Tensor  # (B,)

    @functools.cached_property
    def logits(self) -> Tensor:
        return self.model(self.xt)  # (B, L, V)

    @property
    def calls(self) -> int:
        return int("logits" in vars(self))

    def uniform(self, purpose: int) -> Tensor:
        """This step's draws (B, L) in [0, 1): purpose 0 chooses positions, 1 tokens."""
        return uniform(self.seed, self.rows, self.xt.size(1), self.index, purpose)


def stochastic(step: Step) -> Tensor:
    """Random positions: each mask by itself with probability 1 - s/t = 1 / (steps left).

    *K-step*: the law of the result is that of K ancestral steps (MDLM, arXiv 2406.07524).
    """
    return step.is_masked & (step.uniform(0) < 1 / (step.steps - step.index))


def confidence(step: Step) -> Tensor:
    """The positions whose best token is most probable: floor(holes j / steps) after step j.

    *Heuristic*: no draw from the model's distribution, and prone to repetition. As in MaskGIT
    (arXiv 2202.04200) and LLaDA (arXiv 2502.09992), except that the score is the model's top
    probability, before temperature and top_p, and not that of the token drawn; at temperature 0 the
    two agree.
    """
    before, after = (step.holes * j // step.steps for j in (step.index, step.index + 1))
    budget = after - before  # (B,)
    if not budget.any():
        return torch.zeros_like(step.is_masked)
    score = _at_least_float32(step.logits).softmax(dim=-1).amax(dim=-1)  # (B, L)
    score = score.masked_fill(~step.is_masked, -1.0)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < budget[:, None]


def left_to_right(step: Step) -> Tensor:
    """The leftmost positions, floor(holes j / steps) after step j.

    One position a step is the exact sampler of an autoregressive network, and of a masked one an
    exact sampler, too, whose likelihood is the chain rule from left to right.
    """
    before, after = (step.holes * j // step.steps for j in (step.index, step.index + 1))
    return step.is_masked & (step.is_masked.cumsum(dim=1) <= (after - before)[:, None])


STRATEGIES = {
    "stochastic": stochastic,
    "confidence": confidence,
    "left_to_right": left_to_right,
}


@torch.no_grad()
def sample(
    model: Model,
    canvas: Tensor,
    *,
    is_masked: Tensor,
    mask_id: int,
    steps: int = 128,
    strategy: str = "stochastic",
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: Generator | None = None,
    rows: Tensor | None = None,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Sampled:
    """Fill the positions `is_masked` of `canvas` (B, L) in `steps` steps; no other ever changes.

    Each step predicts all positions at once and reveals those that the strategy (a key of
    `STRATEGIES`) chooses; after the last none is masked. A step that reveals nothing does not call
    the network. Row i draws from (seed, rows[i]) alone (0 ... B - 1 by default). `callback(j, t,
    xt)` sees the state after step j = 1 ... steps, at time t = 1 - j / steps. Temperature 0 takes
    the most probable token; `top_p`, applied after the temperature, keeps the smallest set of
    tokens whose probability reaches it. Raises `ValueError` for a setting out of its range.
    """
    check_sampling(steps, strategy, temperature, top_p)
    xt, is_masked = canvas.masked_fill(is_masked, mask_id), is_masked.clone()
    seed, rows, holes = draw_seed(generator), _rows(canvas, rows), is_masked.sum(dim=1)
    calls = 0
    for index in range(steps):
        step = Step(model, xt, is_masked, holes, index, steps, seed, rows)
        revealed = STRATEGIES[strategy](step)
        if revealed.any():
            tokens = draw_tokens(
                step.logits[revealed], step.uniform(1)[revealed], temperature, top_p
            )
            xt = xt.masked_scatter(revealed, tokens)
            is_masked = is_masked & ~revealed
        calls += step.calls
        if callback is not None:
            callback(index + 1, 1 - (index + 1) / steps, xt)
    return Sampled(xt, calls)


def check_sampling(steps: int, strategy: str, temperature: float, top_p: float) -> None:
    """Raise `ValueError` for a setting of `sample` that is out of its range."""
    if steps < 1:
        raise ValueError(f"sampling.steps={steps} must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(
            f"sampling.temperature={temperature} must be 0 (the most probable token) or more"
        )
    if not 0 < top_p <= 1:
        raise ValueError(f"sampling.top_p={top_p} must lie in (0, 1]; 1 keeps every token")
    if strategy not in STRATEGIES:
        raise ValueError(
            f"sampling.strategy={strategy} is unknown: choose one of {', '.join(STRATEGIES)}"
        )


def draw_tokens(logits: Tensor, u: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Tokens (N,) from logits (N, V) by inverting the distribution function at u (N,) in [0, 1).

    In float64: Gumbel noise from float32 uniforms cuts off the tail and so lowers the effective
    temperature (Zheng et al., arXiv 2409.02908). On the CPU where the device has no float64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    device = "cpu" if logits.device.type == "mps" else logits.device
    probabilities = (logits.to(device).double() / temperature).softmax(dim=-1)
    if top_p < 1:
        probabilities = keep_top_p(probabilities, top_p)
    cdf = probabilities.cumsum(dim=-1)
    u = u.to(device).double()[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, u, right=True).squeeze(1)
    return tokens.clamp(max=logits.size(-1) - 1).to(logits.device)


def keep_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the likeliest of (N, V) that together reach `top_p`, the crossing one kept."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    above = ordered.cumsum(dim=-1) - ordered  # what is more probable than each
    return torch.zeros_like(probabilities).scatter(-1, order, ordered * (above < top_p))
