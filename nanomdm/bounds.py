"""Likelihood bounds: what a text costs under a masked diffusion model, with an error bar.

`model` is any callable from ids (B, L) to logits (B, L, V). Each bound is an expectation over
masks, which a form draws. The text is given and the masks are random: a
reported error is that over the masks, from independent passes over the whole text. All noise of a
pass is drawn at once, on the CPU and in float64, so that no number depends on the batch size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .errors import UserError

Model = Callable[[Tensor], Tensor]


class Bound(NamedTuple):
    """A bound on -log p, nats per token, and its standard error over the masks (nan for 1 draw)."""

    value: float
    standard_error: float


class Query(NamedTuple):
    """What the network is asked once: to fill `hidden`, and which of its answers count.

    The rows' cost is `weight` (B,) times their cross-entropies summed over `scored` (B, L).
    """

    hidden: Tensor  # (B, L) bool: what is masked
    scored: Tensor  # (B, L) bool
    weight: Tensor  # (B,) float64


Form = Callable[[Tensor, Tensor], Iterator[Query]]


# --- Forms ---------------------------------------------------------------------------------------
# Each turns u (B,), uniform on [0, 1) and stratified, and noise (B, L), uniform on [0, 1) where a
# token is to be predicted and 2 where it is given, into queries whose summed cost is an unbiased
# estimate for every row. M is the number of tokens to predict.


def uniform(u: Tensor, noise: Tensor) -> Iterator[Query]:
    """l ~ U{1..M} random tokens are masked, at weight M / l (ARDM, arXiv 2110.02037).

    Needs no epsilon and has finite variance. The bound of the sampler that reveals one uniformly
    random position at a time.
    """
    holes = _holes(noise)
    masked = masked_counts(u, holes)
    hidden = _ranks(noise) < masked[:, None]
    yield Query(hidden, hidden, holes.double() / masked)


def continuous(u: Tensor, noise: Tensor, eps: float) -> Iterator[Query]:
    """The training loss's form on [eps, 1], and what is left at eps: (1 - eps) loss + F(eps).

    The bound of the process that stops at masking probability `eps` and fills what is left in one
    step. Without F(eps) it would be none.
    """
    p = eps + (1 - eps) * u
    for share, weight in ((p, (1 - eps) / p), (torch.full_like(p, eps), torch.ones_like(p))):
        hidden = noise < share[:, None]
        yield Query(hidden, hidden, weight)


def discrete(u: Tensor, noise: Tensor, steps: int) -> Iterator[Query]:
    """NELBO_K, of the ancestral sampler with K = `steps`: sum over j of F(j / K) / j (D3PM)."""
    j = (u * steps).long() + 1  # each at 1 / K
    hidden = noise < (j.double() / steps)[:, None]
    yield Query(hidden, hidden, steps / j.double())


def chain(u: Tensor, noise: Tensor) -> Iterator[Query]:
    """The chain rule in a random order: one call for each token, of which one answer counts."""
    return _one_by_one(_ranks(noise), _holes(noise))


def left_to_right(u: Tensor, noise: Tensor) -> Iterator[Query]:
    """The chain rule from left to right: the exact likelihood of the left-to-right sampler."""
    return _one_by_one((noise < 1).cumsum(dim=1).sub(1).masked_fill(noise > 1, -1), _holes(noise))


def _one_by_one(place: Tensor, holes: Tensor) -> Iterator[Query]:
    for i in range(int(holes.max())):
        yield Query((place >= i) & (place < holes[:, None]), place == i, torch.ones(len(place)))


def everything(u: Tensor, noise: Tensor) -> Iterator[Query]:
    """All tokens in one call: the exact likelihood of an autoregressive network."""
    scored = noise < 1
    yield Query(torch.zeros_like(scored), scored, torch.ones(len(u)))


def masked_counts(u: Tensor, holes: Tensor) -> Tensor:
    """How many tokens of a row with so many `holes` are masked: uniform on 1 ... holes."""
    return (u * holes).long() + 1


def _holes(noise: Tensor) -> Tensor:
    return (noise < 1).sum(dim=1)


def _ranks(noise: Tensor) -> Tensor:
    """The place of each entry in the order of its row; a given token comes after all others."""
    return noise.argsort(dim=1).argsort(dim=1)


# --- Estimation ----------------------------------------------------------------------------------


class Passes(NamedTuple):
    """What independent passes over a text found."""

    nats: Tensor  # (draws, N) float64: the estimated cost of every row, summed over its tokens
    u: Tensor  # (draws, N) float64: the draw that decided how much of the row was masked
    holes: Tensor  # (N,) int64: the tokens of the row that were predicted

    @property
    def tokens(self) -> int:
        return int(self.holes.sum())

    def bound(self) -> Bound:
        """In nats per predicted token, with the standard error over the passes."""
        return mean_and_error(self.nats.sum(dim=1) / self.tokens)

    def part(self, rows: Sequence[int] | Tensor) -> "Passes":
        """What the passes found in some of the rows."""
        return Passes(self.nats[:, rows], self.u[:, rows], self.holes[rows])


def mean_and_error(values: Tensor) -> Bound:
    """The mean of independent values (n,) and its standard error (nan for one value)."""
    n = len(values)
    error = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return Bound(float(values.mean()), error)


def error_within(passes: Passes) -> float:
    """The standard error of the bound over the masks, from as little as one pass; nan for one row.

    Rows next to each other in u are masked alike: what they differ by is the luck of the masks, and
    the text. The latter makes it too wide: by 7% on the shipped plays, where an error from the
    spread of all rows would be 2.6 times what it is.
    """
    rest = passes.nats - passes.bound().value * passes.holes  # (draws, N)
    steps = rest.gather(1, passes.u.argsort(dim=1)).diff(dim=1)
    return math.sqrt(float(steps.square().mean()) / 2 / rest.numel()) / float(
        passes.holes.double().mean()
    )


def nll_from_logits(model: Model, xt: Tensor, x0: Tensor, where: Tensor) -> Tensor:
    """Cross-entropies (B, L) in nats, 0 outside `where`, from a model's logits (B, L, V).

    At least float32, float64 for a float64 model. A model that computes its own (`Transformer`
    with targets=, where=) is passed in by a function of the same form.
    """
    logits = model(xt)[where]  # (scored, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits, x0[where], reduction="none")
    return nll.new_zeros(x0.shape).masked_scatter(where, nll)


@torch.no_grad()
def estimate(
    form: Form,
    model: Model,
    x0: Tensor | Sequence[Tensor],
    *,
    mask_id: int,
    predict: Sequence[Tensor] | None = None,
    generator: Generator | None = None,
    draws: int = 8,
    batch_size: int = 64,
    nll: Callable = nll_from_logits,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Passes:
    """The costs of x0 in `draws` independent passes by a `form` (`uniform`, `chain`, ...).

    x0 is (N, L), or a sequence of N rows (L_i,) that may differ in length. `predict` are as many
    rows of booleans, True for a token to be predicted (all, by default); the others are given:
    always visible, never scored, not counted. The u of a pass are stratified over all N rows, in
    antithetic pairs (u, 1 - u). The result depends on neither `batch_size` nor device, but for
    rounding. `progress` is told the tokens of every network call.
    """
    predict = predict or [torch.ones(len(row), dtype=torch.bool) for row in x0]
    lengths, holes = (torch.tensor([f(row) for row in predict]) for f in (len, torch.sum))
    if draws < 1:
        raise UserError(f"eval.draws={draws} must be at least 1")
    if not len(holes) or holes.min() < 1:
        raise UserError("there is nothing to evaluate: a text or one of its rows is empty")
    given, nats, us = ~torch.cat(list(predict)), [], []
    for _ in range(draws):
        u = stratified_pairs(len(holes), generator)  # (N,)
        noise = torch.rand(len(given), dtype=torch.float64, generator=generator)
        noise = noise.masked_fill(given, 2.0).split(lengths.tolist())
        cost = torch.zeros(len(holes), dtype=torch.float64)
        for rows in _batches_of_equal_length(lengths, batch_size):
            batch = torch.stack([x0[i] for i in rows])  # (B, L)
            for query in form(u[rows], torch.stack([noise[i] for i in rows])):
                cost[rows] += _cost(query, model, batch, mask_id, nll)
                progress(batch.numel())
        nats.append(cost)
        us.append(u)
    return Passes(torch.stack(nats), torch.stack(us), holes)


def nelbo(model: Model, x0: Tensor | Sequence[Tensor], **options) -> Bound:
    """The negative evidence lower bound of x0, an upper bound on -log p(x0) per token, in nats.

    By the form `uniform`; the `options` are those of `estimate`.
    """
    return estimate(uniform, model, x0, **options).bound()


def _batches_of_equal_length(lengths: Tensor, batch_size: int) -> Iterator[Tensor]:
    for length in lengths.unique():
        yield from (lengths == length).nonzero().squeeze(1).split(batch_size)


def _cost(query: Query, model: Model, x0: Tensor, mask_id: int, nll: Callable) -> Tensor:
    """The cost (B,) of a query in nats, on the CPU."""
    if not query.scored.any():
        return torch.zeros(len(x0), dtype=torch.float64)
    hidden, scored = query.hidden.to(x0.device), query.scored.to(x0.device)
    costs = nll(model, x0.masked_fill(hidden, mask_id), x0, scored)  # (B, L)
    return costs.cpu().sum(dim=1, dtype=torch.float64) * query.weight


def stratified_pairs(n: int, generator: Generator | None = None) -> Tensor:
    """n uniform float64 draws in [0, 1): stratified, in pairs (u, 1 - u), in random order."""
    pairs = (n + 1) // 2
    jitter = torch.rand(pairs, dtype=torch.float64, generator=generator)
    u = (torch.arange(pairs) + jitter) / (2 * pairs)  # in [0, 1/2)
    slots = torch.cat((u, (1 - u).clamp(max=1 - 2**-53)))
    return slots[torch.randperm(2 * pairs, generator=generator)[:n]]


# --- Error bars ----------------------------------------------------------------------------------


def student_t(freedom: int, coverage: float = 0.95) -> float:
    """The t with P(|T| < t) = `coverage` for Student's T with so many degrees of freedom.

    By bisection; for whole degrees the probability is a finite sum (Abramowitz and Stegun 26.7.3
    and 26.7.4).
    """

    def inside(t: float) -> float:
        theta = math.atan(t / math.sqrt(freedom))
        power = math.cos(theta) if freedom % 2 else 1.0
        total, term = 0.0, math.sin(theta) * power
        for k in range(2 + freedom % 2, freedom + 1, 2):
            total, term = total + term, term * math.cos(theta) ** 2 * (k - 1) / k
        return 2 / math.pi * (theta + total) if freedom % 2 else total

    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < coverage else (low, middle)
    return low


# --- What passes tell beside the bound -----------------------------------------------------------


class Bin(NamedTuple):
    """Masking rates in (low, high], and what a masked token costs at them, in nats."""

    low: float
    high: float
    cost: Bound  # nan where no row fell into the bin


def curve(passes: Passes, bins: int = 20) -> list[Bin]:
    """Where the loss comes from: the cost of a masked token by the share of tokens masked.

    From passes of the form `uniform`, at no network call of its own. The bins, weighted by the rows
    in them, average to the bound. The error is that over the passes; it holds the luck of which
    texts were masked how much.
    """
    return [
        Bin(b / bins, (b + 1) / bins, mean_and_error(means[~means.isnan()]))
        for b, means in enumerate(_means_by_rate(passes, bins))
    ]


def falls(passes: Passes, bins: int = 20, coverage: float = 0.95) -> list[tuple[int, Bound]]:
    """The bins whose cost lies below that of the bin before, beyond chance; and the difference.

    Whether c_l, the cost of a masked token when l are masked, ever falls with l decides which
    bounds must be ordered. `coverage` is that of all comparisons together (Bonferroni).
    """
    means = _means_by_rate(passes, bins)
    found, freedom = [], len(passes.nats) - 1
    for b in range(1, bins):
        step = mean_and_error(means[b] - means[b - 1])
        limit = student_t(freedom, 1 - (1 - coverage) / (bins - 1)) if freedom else math.inf
        if step.value < -limit * step.standard_error:
            found.append((b, step))
    return found


def _means_by_rate(passes: Passes, bins: int) -> Tensor:
    """The mean cost of a masked token (bins, draws) by masking rate; nan where there is no row."""
    holes = passes.holes.expand_as(passes.u)
    bin_of = (masked_counts(passes.u, holes) * bins + holes - 1) // holes - 1  # of the share
    inside = bin_of == torch.arange(bins)[:, None, None]  # (bins, draws, N)
    return (inside * passes.nats).sum(dim=-1) / (inside * holes).sum(dim=-1)


class Difference(NamedTuple):
    """How much more one model pays than another for the same text, nats per token."""

    masks: Bound  # the error over the masks: on this very text
    rows: Bound  # the error over the rows: on texts of this kind


def difference(one: Passes, other: Passes) -> Difference:
    """The paired difference of two models on the same rows, and, with masks, on the same masks.

    Without the pairing, the error would hold twice the difference between easy and hard rows. A
    model that is scored exactly has one pass, which counts for all of the other's.
    """
    nats = one.nats - other.nats  # (draws, N)
    over_masks = mean_and_error(nats.sum(dim=1) / one.tokens)
    return Difference(over_masks, ratio(nats.mean(dim=0), one.holes))


def ratio(values: Tensor, sizes: Tensor) -> Bound:
    """The sum of values (n,) over the sum of sizes (n,), with the standard error over the pairs.

    By the linearised (delta) method; nan for one pair.
    """
    n, rate = len(values), float(values.sum() / sizes.sum())
    spread = (values - rate * sizes).square().sum() / (n - 1) / n if n > 1 else math.nan
    return Bound(rate, math.sqrt(spread) / float(sizes.double().mean()))


# --- Long texts ----------------------------------------------------------------------------------


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, stop, first) of the windows over a text: what is seen, and from where it is scored.

    Each token is scored once. A window moves by `stride` tokens and sees up to `context`, what
    comes before `first` being given; with `stride` = `context` nothing is given, and the windows do
    not overlap. Raises `UserError` for a stride outside 1 ... context.
    """
    if not 1 <= stride <= context:
        raise UserError(f"eval.stride={stride} must lie in 1 ... {context}, the model's context")
    firsts = [0, *range(context, length, stride)]
    stops = [min(length, context), *(min(length, first + stride) for first in firsts[1:])]
    seen = context if stride < context else 0
    starts = [max(0, min(first, stop - seen)) for first, stop in zip(firsts, stops, strict=True)]
    return list(zip(starts, stops, firsts, strict=True))
