"""Bounds on -log p besides diffusion.py's own, and the statistics of any of them.

An estimator maps u (B,) and noise (B, L) to queries (is_masked, scored, weight): what
is masked (B, L), which predictions count (B, L), and the weight (B,) of the sum of their
cross-entropies. The queries' summed cost is an unbiased estimate for every row. u is uniform on
[0, 1) and stratified over all rows; noise is uniform on [0, 1) where a token is predicted, and 2
where a token is context.

`diffusion.estimate` runs an estimator, and `NLLSamples` hold what it returns. A value with its
standard error is a tuple. The text is fixed and the masks are random: an error is that over the
masks, from independent passes over the whole text, unless said otherwise.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import UserError, as_user_error, check_choice
from .prompts import Canvas, batches, rows_at_once
from .random import generator
from .strategies import EXACT, NONE, STRATEGIES, Sampler, from_config, options_of

MaskedQuery = tuple[Tensor, Tensor, Tensor]
LEAST_ROWS = 64  # of a bound in training, each with a mask of its own
Estimate = tuple[float, float]  # a value and its standard error (nan from one draw)


# --- Estimators ----------------------------------------------------------------------------------


def continuous(u: Tensor, noise: Tensor, eps: float = 1e-3) -> Iterator[MaskedQuery]:
    """The training loss on [eps, 1], and what is left at eps: (1 - eps) loss + F(eps).

    The bound of the process that stops at masking probability `eps` and fills the rest in one step.
    Without F(eps) the value would be no bound.
    """
    p_mask = eps + (1 - eps) * u
    is_masked = noise < p_mask[:, None]
    yield is_masked, is_masked, (1 - eps) / p_mask
    is_masked = noise < eps
    yield is_masked, is_masked, torch.ones(len(u))


def discrete(u: Tensor, noise: Tensor, steps: int) -> Iterator[MaskedQuery]:
    """NELBO_K of the ancestral sampler with K = `steps`: sum over j of F(j / K) / j (D3PM)."""
    j = (u * steps).floor() + 1  # 1, 2, ... K, each with probability 1 / K
    is_masked = noise < (j / steps)[:, None]
    yield is_masked, is_masked, steps / j


def everything(u: Tensor, noise: Tensor) -> Iterator[MaskedQuery]:
    """All tokens in one call: the exact likelihood of an autoregressive network."""
    scored = noise < 1
    yield torch.zeros_like(scored), scored, torch.ones(len(u))


# --- Bounds by name ------------------------------------------------------------------------------


class Bound(NamedTuple):
    """An entry of BOUNDS: an estimator or a strategy, and what is known about its values."""

    estimator: Callable[..., Iterator[MaskedQuery]] | None  # None: diffusion.any_order
    sampler: str  # whose -log p it bounds: the end of "the sampler that ..."
    calls: int = 1  # of the network for each row
    relation: str = ""  # to `uniform`: "equal"; "above" if the cost never decreases; "": none
    exact: bool = False  # one pass gives -log p itself
    takes_steps: bool = False  # the estimator takes steps=, and `sampler` has {steps}
    strategy: str | Sampler = ""  # its score, and no estimator


# All that eval.py needs to know about a bound: one entry more is one bound more.
BOUNDS = {
    "uniform": Bound(None, "reveals one random position a call"),
    "continuous": Bound(
        continuous,
        "stops at a masking rate of 0.001 and fills the rest at once",
        calls=2,
        relation="above",
    ),
    "discrete": Bound(
        discrete, "takes {steps} ancestral steps", relation="above", takes_steps=True
    ),
    "chain": Bound(
        None,
        "reveals one random position a call: the same number",
        relation="equal",
        strategy="first_hitting",
    ),
    "left_to_right": Bound(
        None,
        "goes from left to right: exact, another model",
        exact=True,
        strategy="left_to_right",
    ),
}
AUTOREGRESSIVE = Bound(everything, "goes from left to right", exact=True)


def is_exact(shape) -> bool:
    """Whether one pass gives -log p itself: of a causal network, and of one with blocks of 1."""
    return shape.causal or shape.block_length == 1


def choose(names: Sequence[str], steps: int, sample: Callable) -> dict[str, Bound]:
    """`uniform` and the bounds of these names; `sample` is `diffusion.sample`.

    Raises `UserError` for an unknown name.
    """
    chosen = {}
    for name in ("uniform", *names):
        check_choice("eval.bounds", name, BOUNDS)
        bound = BOUNDS[name]
        if bound.takes_steps:
            bound = bound._replace(
                estimator=partial(bound.estimator, steps=steps),
                sampler=bound.sampler.format(steps=steps),
            )
        if bound.strategy:
            sampler = Sampler(sample, bound.strategy, {"strategy": STRATEGIES[bound.strategy]})
            bound = bound._replace(strategy=sampler)
        chosen[name] = bound
    return chosen


def greedy(config, sample: Callable, causal: bool) -> list[tuple[str, Bound]]:
    """The scores of the strategies that eval.samplers names, or of `confidence` in 32 steps.

    At temperature 0: a sampler that chooses by the state then writes one text, and -log p of any
    other is inf.
    """
    names, section = config.eval.samplers, SimpleNamespace(**vars(config.sampling))
    if not names:
        names, section.steps, section.options = ["confidence"], 32, {}
    if causal:
        names = ["left_to_right"]
    section.temperature = 0.0
    return list(samplers(names, section, sample).items())


def samplers(
    names: Sequence[str], section, sample: Callable, model_blocks: int = 0
) -> dict[str, Bound]:
    """The scores of strategies, each with those options of a `sampling` section that it takes.

    Raises `UserError`.
    """
    for name in names:
        check_choice("eval.samplers", name, STRATEGIES)
    taken = {option for name in names for option in options_of(name)}
    chosen = {}
    for name in names:
        options = {  # what no strategy takes is left to each, and refused by `from_config`
            option: value
            for option, value in section.options.items()
            if option in options_of(name) or option not in taken
        }
        settings = vars(section) | {"strategy": name, "options": options}
        with as_user_error():
            sampler = from_config(SimpleNamespace(**settings), sample, model_blocks=model_blocks)
        if sampler.label == NONE:
            raise UserError(
                f"eval.samplers={name} masks tokens again: many paths lead to a text, and no one "
                "gives its -log p: leave it out"
            )
        chosen[name] = Bound(None, sampler.label, exact=sampler.label == EXACT, strategy=sampler)
    return chosen


def score(
    sampler: Sampler, model, texts, *, draws: int, seed: int, advance: Callable
) -> "NLLSamples":
    """What `texts` cost under a sampler. `advance(n)` is called after n tokens, context included.

    Row i depends on (seed, i) alone. Raises `UserError` where `diffusion.score` is no likelihood.
    """
    rows = list(map(Canvas, texts.rows, texts.predict))
    longest = max(len(row.ids) for row in rows)
    size = rows_at_once(longest, model.config.vocab_size)
    nats = torch.zeros(draws, len(rows), dtype=torch.float64)
    calls, impossible = torch.zeros_like(nats), torch.zeros_like(nats)
    for draw in range(draws):
        for numbers, x0, is_masked, _ in batches(rows, size):
            with as_user_error(f"{sampler.name}: "):
                scored = sampler.fill(
                    model,
                    x0,
                    is_masked,
                    x0=x0,
                    rows=torch.tensor(numbers),
                    generator=generator(seed, "score", draw),
                )
            costs = scored.costs.cpu()
            nats[draw, numbers] = costs.sum(dim=1)
            impossible[draw, numbers] = costs.isinf().double().sum(dim=1)
            steps = [len(set(row) - {0}) for row in scored.order.tolist()]  # that reveal something
            calls[draw, numbers] = torch.tensor(steps).double() * sampler.calls_a_step(is_masked)
            advance(x0.numel())
    return NLLSamples(
        nats,
        torch.full_like(nats, math.nan),
        torch.stack([row.is_masked.sum() for row in rows]),
        float(calls.mean()),
        int(impossible.amax(dim=0).sum()),
    )


# --- Samples -------------------------------------------------------------------------------------


class NLLSamples(NamedTuple):
    """Monte Carlo samples of what rows of text cost, from `diffusion.estimate` or `score`."""

    nats: Tensor  # (draws, N) float64: the estimated cost of every row, summed over its tokens
    u: Tensor  # (draws, N) float64: the draw that decided how much of the row was masked
    counts: Tensor  # (N,) int64: the tokens of the row that were predicted
    calls: float = 1.0  # of the network, that a row of a score takes by itself, on average
    impossible: int = 0  # tokens that a sampler cannot draw (at most, in one draw): they cost inf
    predicted: Tensor | None = None  # (N,) where they are more than `counts`, which figures go by

    def counting(self, counts: Sequence[int] | Tensor) -> "NLLSamples":
        """Divided by these counts (N,): filling a row with end tokens would flatter a figure."""
        return self._replace(counts=torch.as_tensor(counts), predicted=self.counts)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    def bound(self) -> Estimate:
        """In nats per predicted token, with the standard error over the draws."""
        return mean_and_error(self.nats.sum(dim=1) / self.tokens)

    def mixture(self) -> float:
        """-log of the mean of p(x | noise) over the draws of a score, in nats per token.

        A bound, too, and the tighter the more draws there are (arXiv 1509.00519): the law of a
        sampler with noise is a mixture.
        """
        nats = math.log(len(self.nats)) - (-self.nats).logsumexp(dim=0)  # (N,)
        return float(nats.sum()) / self.tokens

    def part(self, rows: Sequence[int] | Tensor) -> "NLLSamples":
        """The samples of some of the rows."""
        return self._replace(
            nats=self.nats[:, rows],
            u=self.u[:, rows],
            counts=self.counts[rows],
            predicted=None if self.predicted is None else self.predicted[rows],
        )

    def summary(self, exact: bool = False) -> dict[str, float]:
        """The figures that a training log has: loss, ppl and error (of the masks)."""
        loss, error = self.bound()
        figures = {"loss": loss, "ppl": math.exp(min(loss, 700.0))}  # beyond 700 it overflows
        if not exact:
            figures["error"] = error if len(self.nats) >= 8 else error_within(self)
        return figures


def mean_and_error(values: Tensor) -> Estimate:
    """The mean of independent values (n,) and its standard error (nan for one value)."""
    return ratio(values, torch.ones_like(values))


# --- Standard errors -----------------------------------------------------------------------------


def error_within(samples: NLLSamples) -> float:
    """The standard error of the bound, from as little as one pass; nan for one row.

    Rows that are neighbours in u are masked alike: their costs differ by the random masks and by
    the text. The latter makes the error a little too wide, by 7% to 9% on the shipped plays, where
    an error from the deviation of all rows would be 2.6 times the right one.
    """
    nats, u, counts, *_ = samples
    rest = nats - samples.bound()[0] * counts  # (draws, N)
    steps = rest.gather(1, u.argsort(dim=1)).diff(dim=1)
    variance = float(steps.square().mean()) / 2
    return math.sqrt(variance / rest.numel()) / float(counts.double().mean())


def student_t(df: int, coverage: float = 0.95) -> float:
    """The t with P(|T| < t) = `coverage` for Student's T with `df` degrees of freedom.

    To 1e-6, up to 1,000 degrees of freedom.

    With T = sqrt(df) tan(angle), the density of the angle is proportional to cos^(df - 1).
    """
    angles = np.linspace(0, math.pi / 2, 2**16 + 1)
    density = np.cos(angles) ** (df - 1)
    shares = np.append(0, np.cumsum(density[1:] + density[:-1]))  # the trapezoidal rule
    return math.sqrt(df) * math.tan(np.interp(coverage * shares[-1], shares, angles))


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a probability of which n trials showed this share (Wilson 1927)."""
    z = 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio(values: Tensor, sizes: Tensor) -> Estimate:
    """The sum of values (n,) over the sum of sizes (n,); the error is over the n pairs.

    By linearisation (the delta method); nan for one pair.
    """
    n, total = len(values), sizes.sum()
    rate = values.sum() / total
    deviation = (values - rate * sizes).std() if n > 1 else math.nan
    return float(rate), float(math.sqrt(n) * deviation / total)


def difference(one: NLLSamples, other: NLLSamples) -> tuple[Estimate, Estimate]:
    """How much more one model pays than another for the same text, in nats per token.

    From the samples of both on the same rows and, as far as both are masked, the same masks. Twice,
    with the error over the masks (on this very text) and over the rows (on texts of this kind).
    Unpaired, the error would hold twice what easy and hard rows differ by. Exact samples, of one
    pass, are paired with every pass of the other's.
    """
    nats = one.nats - other.nats  # (draws, N)
    over_masks = mean_and_error(nats.sum(dim=1) / one.tokens)
    return over_masks, ratio(nats.mean(dim=0), one.counts)


# --- By masking rate -----------------------------------------------------------------------------


def curve(samples: NLLSamples, bins: int = 20) -> list[Estimate]:
    """The cost of a masked token in nats, by the share of tokens masked: where the loss comes from.

    Bin b has the shares in (b / bins, (b + 1) / bins]; nan where it has no row. From the samples of
    the bound `uniform`, without further network calls; the bins, weighted by their rows, average to
    that bound. The error is over the passes, and includes which texts were masked how much.
    """
    return [mean_and_error(cost[~cost.isnan()]) for cost in _cost_by_rate(samples, bins)]


def decreases(samples: NLLSamples, bins: int = 20) -> list[tuple[int, Estimate]]:
    """The bins whose cost is below that of the bin before, beyond chance, with the difference.

    Which bounds must be ordered depends on whether c_l, the cost of a masked token when l are
    masked, ever decreases with l. All comparisons together cover 95% (Bonferroni).
    """
    df = len(samples.nats) - 1
    if not df:
        return []
    limit = student_t(df, 1 - 0.05 / (bins - 1))
    steps = [mean_and_error(step) for step in _cost_by_rate(samples, bins).diff(dim=0)]
    return [(b, step) for b, step in enumerate(steps, start=1) if step[0] < -limit * step[1]]


def _cost_by_rate(samples: NLLSamples, bins: int) -> Tensor:
    """The mean cost of a masked token (bins, draws); nan where no row has such a masking rate."""
    nats, u, counts, *_, predicted = samples
    predicted = counts if predicted is None else predicted
    masked = (u * predicted).long() + 1  # (draws, N), as diffusion.any_order draws them
    inside = (masked * bins - 1) // predicted == torch.arange(bins)[
        :, None, None
    ]  # (bins, draws, N)
    return (inside * nats).sum(dim=-1) / (inside * predicted).sum(dim=-1)
