"""Masked diffusion: forward masking, training loss and reverse process.

`model` is any callable from ids (B, L) to logits (B, L, V); V is the vocabulary without the mask.
Everything random is a function of (seed, row, position): a function that takes a `generator` draws
one seed from it and hashes the rest, so that row i of a batch gets the same draws whatever the
batch, the device or the number of processes.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Model = Callable[[Tensor], Tensor]
PHI = (math.sqrt(5) - 1) / 2
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


# --- Likelihood bounds ---------------------------------------------------------------------------
# A value with its standard error over the masks (nan for one draw) is a tuple. All noise of a pass
# is drawn at once, on the CPU and in float64, so that no number depends on the batch size.


def any_order(u: Tensor, noise: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """l ~ U{1..M} random tokens are masked, at weight M / l (ARDM, arXiv 2110.02037).

    Needs no epsilon and has finite variance. The bound of the sampler that reveals one uniformly
    random position at a time. An estimator: from u (B,), uniform on [0, 1) and stratified, and
    noise (B, L), uniform on [0, 1) where a token is to be predicted and 2 where it is given, to
    queries (hidden (B, L), scored (B, L), weight (B,)), whose summed cost is unbiased for each row.
    """
    counts = (noise < 1).sum(dim=1)
    masked = masked_counts(u, counts)
    hidden = _ranks(noise) < masked[:, None]
    yield hidden, hidden, counts.double() / masked


def masked_counts(u: Tensor, counts: Tensor) -> Tensor:
    """How many of a row's `counts` predicted tokens are masked: uniform on 1 ... counts."""
    return (u * counts).long() + 1


def _ranks(noise: Tensor) -> Tensor:
    return noise.argsort(dim=1).argsort(dim=1)


class NLLSamples(NamedTuple):
    """Monte Carlo samples of what the rows of a text cost."""

    nats: Tensor  # (draws, N) float64: the estimated cost of every row, summed over its tokens
    u: Tensor  # (draws, N) float64: the draw that decided how much of the row was masked
    counts: Tensor  # (N,) int64: the tokens of the row that were predicted

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    def bound(self) -> tuple[float, float]:
        """In nats per predicted token, with the standard error over the draws."""
        return self.mean_and_error(self.nats.sum(dim=1) / self.tokens)

    def part(self, rows: Sequence[int] | Tensor) -> "NLLSamples":
        """The samples of some of the rows."""
        return NLLSamples(self.nats[:, rows], self.u[:, rows], self.counts[rows])

    @staticmethod
    def mean_and_error(values: Tensor) -> tuple[float, float]:
        """The mean of independent values (n,) and its standard error (nan for one value)."""
        n = len(values)
        error = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
        return float(values.mean()), error


@torch.no_grad()
def estimate(
    estimator: Callable[[Tensor, Tensor], Iterator[tuple[Tensor, Tensor, Tensor]]],
    model: Model,
    x0: Tensor | Sequence[Tensor],
    *,
    mask_id: int,
    predict: Sequence[Tensor] | None = None,
    generator: Generator | None = None,
    draws: int = 8,
    batch_size: int = 64,
    nll: Callable | None = None,
    progress: Callable[[int], None] | None = None,
) -> NLLSamples:
    """The costs of x0 in `draws` independent passes by an `estimator`.

    x0 is (N, L), or a sequence of N rows (L_i,) that may differ in length. `predict` are as many
    rows of booleans, True for a token to be predicted (all, by default); the others are given:
    always visible, never scored, not counted. The u of a pass are stratified over all N rows, in
    antithetic pairs (u, 1 - u). The result depends on neither `batch_size` nor device, but for
    rounding. `nll(xt, targets, where)` gives cross-entropies (B, L). `progress` is told the tokens
    of every network call.
    """
    nll = nll or functools.partial(nll_from_logits, model)
    predict = predict or [torch.ones(len(row), dtype=torch.bool) for row in x0]
    lengths, counts = (torch.tensor([f(row) for row in predict]) for f in (len, torch.sum))
    if draws < 1:
        raise ValueError(f"eval.draws={draws} must be at least 1")
    if not len(counts) or counts.min() < 1:
        raise ValueError("there is nothing to evaluate: a text or one of its rows is empty")
    given, nats, us = ~torch.cat(list(predict)), [], []
    for _ in range(draws):
        u = stratified_pairs(len(counts), generator)  # (N,)
        noise = torch.rand(len(given), dtype=torch.float64, generator=generator)
        noise = noise.masked_fill(given, 2.0).split(lengths.tolist())
        cost = torch.zeros(len(counts), dtype=torch.float64)
        for rows in _batches_of_equal_length(lengths, batch_size):
            batch = torch.stack([x0[i] for i in rows])  # (B, L)
            for hidden, scored, weight in estimator(u[rows], torch.stack([noise[i] for i in rows])):
                if scored.any():
                    hidden, scored = hidden.to(batch.device), scored.to(batch.device)
                    costs = nll(batch.masked_fill(hidden, mask_id), batch, scored)  # (B, L)
                    cost[rows] += costs.cpu().sum(dim=1, dtype=torch.float64) * weight
                if progress:
                    progress(batch.numel())
        nats.append(cost)
        us.append(u)
    return NLLSamples(torch.stack(nats), torch.stack(us), counts)


def nelbo(model: Model, x0: Tensor | Sequence[Tensor], **options) -> tuple[float, float]:
    """The negative evidence lower bound of x0, an upper bound on -log p(x0) per token, in nats.

    By the estimator `any_order`; the `options` are those of `estimate`.
    """
    return estimate(any_order, model, x0, **options).bound()


def _batches_of_equal_length(lengths: Tensor, batch_size: int) -> Iterator[Tensor]:
    for length in lengths.unique():
        yield from (lengths == length).nonzero().squeeze(1).split(batch_size)


def stratified_pairs(n: int, generator: Generator | None = None) -> Tensor:
    """n uniform float64 draws in [0, 1): stratified, in pairs (u, 1 - u), in random order."""
    pairs = (n + 1) // 2
    jitter = torch.rand(pairs, dtype=torch.float64, generator=generator)
    u = (torch.arange(pairs) + jitter) / (2 * pairs)  # in [0, 1/2)
    slots = torch.cat((u, (1 - u).clamp(max=1 - 2**-53)))
    return slots[torch.randperm(2 * pairs, generator=generator)[:n]]


# --- Reverse process: settings and results -------------------------------------------------------

ANY_ORDER, LEFT_TO_RIGHT = "any-order exact", "left-to-right exact"  # docs/sampling.md
K_STEP, OWN_ORDER, HEURISTIC = "K-step", "K-step, in an order of its own", "heuristic"


@dataclass(frozen=True)
class Sampling:
    """The settings of `sample`; configs/config.yaml explains them. Raises `ValueError`."""

    strategy: str = "spread"
    steps: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 0.0
    block_length: int = 0
    threshold: float = 0.9
    gamma: float = 0.1
    remask_rate: float = 0.05
    remask_unsure: bool = False

    def __post_init__(self):
        checks = {
            "strategy": (self.strategy in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
            "steps": (self.steps >= 1, "at least 1"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]; 1 keeps every token"),
        }
        for name in ("temperature", "top_k", "guidance", "block_length", "gamma"):
            checks[name] = (0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("threshold", "remask_rate"):
            checks[name] = (0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise ValueError(f"sampling.{name}={getattr(self, name)} must be {wanted}")

    @property
    def label(self) -> str:
        """Of what law a sample is a draw, if it is a draw from a known one at all."""
        label = STRATEGIES[self.strategy].label
        unsure = self.strategy == "remask" and self.remask_unsure
        if label == HEURISTIC or self.guidance or self.block_length or unsure:
            return HEURISTIC
        filtered = self.temperature != 1 or self.top_k or self.top_p < 1
        return f"{label}, of filtered predictions" if filtered else label


class Event(NamedTuple):
    """N tokens that a step (1 ...) revealed, or N positions that it masked again.

    Probabilities are the network's, before temperature and filters.
    """

    step: int
    where: Tensor  # (N, 2): rows and positions
    tokens: Tensor | None = None  # (N,); None: masked again
    confidence: Tensor | None = None  # (N,): the tokens' probabilities
    likeliest: Tensor | None = None  # (N, 5): the best tokens there, or all V
    probabilities: Tensor | None = None  # (N, 5): theirs


class Sampled(NamedTuple):
    """The filled canvas (B, L), the number of network calls and, if asked, what each step did."""

    ids: Tensor
    calls: int
    history: list[Event] | None = None


# --- Reverse process: one step -------------------------------------------------------------------


@dataclass
class Reverse:
    """A reverse process on its way, and what a strategy may ask it. Tensors are (B, L)."""

    model: Model
    xt: Tensor
    given: Tensor  # the tokens that never change
    mask_id: int
    settings: Sampling
    seed: int
    rows: Tensor  # (B,)
    history: list[Event] | None
    calls: int = 0
    step: int = 0  # 1 ..., over all blocks

    def __post_init__(self):
        self.columns = torch.arange(L := self.xt.size(1), device=self.xt.device)
        self.noise = uniform(self.seed, self.rows, L, 0)  # when to reveal
        self.token_noise = uniform(self.seed, self.rows, L, 1)  # what
        self.confidence = torch.ones_like(self.noise)  # of what was revealed
        self.guided = self.settings.guidance > 0 and bool(self.given.any())

    def begin(self, is_hole: Tensor) -> None:
        """Go to t = 1, with these holes to fill."""
        self.is_hole, self.is_masked, self.level = is_hole, is_hole.clone(), 1.0
        self.holes = is_hole.sum(dim=1, keepdim=True).cpu()  # (B, 1)
        paced = STRATEGIES[self.settings.strategy].paced
        self.steps = self.settings.steps if paced else int(self.holes.amax())

    def advance(self, index: int) -> None:
        """Go to step `index`, from time t to s; a revealed token has the chance sigma of a mask."""
        vars(self).pop("logits", None)
        self.index, self.step = index, self.step + 1
        self.t, self.s, self.sigma = 1 - index / self.steps, 1 - (index + 1) / self.steps, 0.0
        if self.settings.strategy == "remask" and index:
            self.sigma = min(self.settings.remask_rate, self.s / (1 - self.t))

    @functools.cached_property
    def logits(self) -> Tensor:
        """The network's answer (B, L, V): called for when a step first looks at it, if at all."""
        self.calls += 1 + self.guided
        logits = _at_least_float32(self.model(self.xt))
        if self.guided:  # unsupervised, SMDM (arXiv 2410.18514)
            blind = _at_least_float32(self.model(self.xt.masked_fill(self.given, self.mask_id)))
            logits = logits + self.settings.guidance * (logits - blind)
        return logits

    def score(self, name: str) -> Tensor:
        """One of SCORES at the masked positions, before temperature and filters."""
        scores = SCORES[name](self.logits[self.is_masked].softmax(dim=-1))
        return scores.new_zeros(self.xt.shape).masked_scatter(self.is_masked, scores)

    def best(self, score: Tensor, count: Tensor | int) -> Tensor:
        """The `count` (B, 1) masked positions of the highest score; the leftmost of equal ones."""
        score = torch.where(self.is_masked, score, -math.inf)
        order = score.argsort(dim=1, descending=True, stable=True)
        first = self.columns.expand_as(order) < count
        return torch.zeros_like(self.is_masked).scatter(1, order, first) & self.is_masked

    def fill(self, revealed: Tensor) -> int:
        """Draw the tokens of the N positions `revealed`; returns N."""
        where, settings = revealed.nonzero(as_tuple=True), self.settings
        if not (N := len(where[0])):
            return 0
        logits, u = self.logits[where], self.token_noise[where]  # (N, V), (N,)
        tokens = draw_tokens(logits, u, settings.temperature, settings.top_k, settings.top_p)
        self.xt[where] = tokens
        if self.history is not None or settings.remask_unsure:
            probabilities = logits.softmax(dim=-1)
            confidence = probabilities.gather(1, tokens[:, None]).squeeze(1)
            self.confidence[where] = confidence.to(self.confidence.dtype)
        if self.history is not None:
            best, places = probabilities.topk(min(5, logits.size(-1))), torch.stack(where, dim=1)
            event = Event(self.step, places, tokens, confidence, best.indices, best.values)
            self.history.append(event)
        return N

    def mask_again(self) -> None:
        """Mask each token revealed before this step with probability sigma; it then waits anew.

        With `remask_unsure`, n revealed tokens share n sigma by the softmax of -confidence
        (ReMDM-conf, arXiv 2503.00307, where they share sigma: less than one token a step).
        """
        revealed, rate = self.is_hole & ~self.is_masked, self.sigma
        if self.settings.remask_unsure:
            shares = (-self.confidence).masked_fill(~revealed, -math.inf).softmax(dim=1)
            rate = rate * revealed.sum(dim=1, keepdim=True) * shares
        draws = uniform(self.seed, self.rows, 3 * self.xt.size(1), 2, self.index)
        u, noise, token_noise = draws.chunk(3, dim=1)
        again = revealed & (u < rate)
        self.noise = torch.where(again, noise * self.level, self.noise)
        self.token_noise = torch.where(again, token_noise, self.token_noise)
        self.xt.masked_fill_(again, self.mask_id)
        self.is_masked |= again
        if self.history is not None and again.any():
            self.history.append(Event(self.step, again.nonzero()))


# --- Reverse process: strategies, and which masked positions (B, L) each reveals in a step --------

SCORES = {  # (N,) of probabilities (N, V)
    # MaskGIT (arXiv 2202.04200) and LLaDA (2502.09992) score the token that was drawn.
    "confidence": lambda p: p.amax(dim=-1),
    # The best minus the second best: Kim et al., arXiv 2502.06768.
    "margin": lambda p: p.amax(dim=-1) - p.topk(min(2, p.size(-1))).values[:, 1:].sum(dim=-1),
    "entropy": lambda p: -torch.special.entr(p).sum(dim=-1),
}


def ancestral(step: Reverse) -> Tensor:
    """Each by itself with probability 1 - s/t (MDLM, arXiv 2406.07524).

    With remasking (t - s + sigma (1 - t)) / t, so that at time s the share s is masked as before.
    """
    step.level *= max(0.0, (step.s - step.sigma * (1 - step.t)) / step.t)
    return step.is_masked & (step.noise >= step.level)


def spread(step: Reverse) -> Tensor:
    """As many as `ancestral`, but far apart, since neighbours depend on each other most.

    A low-discrepancy order, as in the Halton scheduler for images (arXiv 2503.17076).
    """
    return step.is_masked & ((step.noise[:, :1] + step.columns * PHI) % 1 >= step.s)


def in_order(step: Reverse) -> Tensor:
    """The highest scores, so that floor(holes j / K) are filled after step j."""
    before, after = (step.holes * j // step.steps for j in (step.index, step.index + 1))
    if torch.equal(before, after):
        return torch.zeros_like(step.is_masked)
    return step.best(step.score(step.settings.strategy), (after - before).to(step.xt.device))


def above_threshold(step: Reverse) -> Tensor:
    """All whose top probability exceeds the threshold, and the best (Fast-dLLM, 2505.22618)."""
    score = step.score("confidence")
    return step.best(score, 1) | step.is_masked & (score > step.settings.threshold)


def entropy_bounded(step: Reverse) -> Tensor:
    """By rising entropy H, as many as keep sum H - max H <= gamma (EB-sampler, 2505.24857)."""
    score = step.score("entropy")
    entropies = (-score).masked_fill(~step.is_masked, math.inf).sort(dim=1).values
    costs = entropies.cumsum(dim=1) - entropies  # nan where none is masked
    return step.best(score, (costs <= step.settings.gamma).sum(dim=1, keepdim=True))


class Strategy(NamedTuple):
    reveal: Callable[[Reverse], Tensor]
    label: str
    paced: bool = True  # takes `steps` steps; others reveal in every step until no hole is left


STRATEGIES = {
    "stochastic": Strategy(ancestral, K_STEP),
    "remask": Strategy(ancestral, K_STEP),  # and Reverse.mask_again (ReMDM, arXiv 2503.00307)
    "spread": Strategy(spread, OWN_ORDER),
    # One of each row, uniformly: the first-hitting sampler (Zheng et al., arXiv 2409.02908).
    "first_hitting": Strategy(lambda step: step.best(step.noise, 1), ANY_ORDER, paced=False),
    # How an autoregressive network is sampled exactly.
    "left_to_right": Strategy(lambda step: step.best(-step.columns, 1), LEFT_TO_RIGHT, paced=False),
    "confidence": Strategy(in_order, HEURISTIC),
    "margin": Strategy(in_order, HEURISTIC),
    "entropy": Strategy(in_order, HEURISTIC),
    "threshold": Strategy(above_threshold, HEURISTIC, paced=False),
    "eb": Strategy(entropy_bounded, HEURISTIC, paced=False),
}


# --- Reverse process: all steps ------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: Model,
    canvas: Tensor,
    *,
    is_masked: Tensor,
    mask_id: int,
    generator: Generator | None = None,
    rows: Tensor | None = None,
    callback: Callable[[int, float, Tensor], None] | None = None,
    history: list[Event] | None = None,
    **settings,
) -> Sampled:
    """Fill the positions `is_masked` of `canvas` (B, L), and change no other.

    The other keywords are those of `Sampling`. Each step asks the network for all positions at once
    and reveals those that the strategy chooses; one that reveals nothing does not call it. Row i
    draws from (seed, rows[i]) alone (0 ... B - 1 by default). `callback(j, t, xt)` sees the state
    after step j = 1, 2, ... at time t (without a pace: the share of holes left), and copies what
    it keeps. A list given as `history` gets the events of each step. Raises `ValueError`.
    """
    settings = Sampling(**settings)
    strategy, xt = STRATEGIES[settings.strategy], canvas.masked_fill(is_masked, mask_id)
    seed, rows = draw_seed(generator), _rows(canvas, rows)
    state = Reverse(model, xt, ~is_masked, mask_id, settings, seed, rows, history)
    for is_hole in blocks(is_masked, settings.block_length):
        state.begin(is_hole)
        total = left = int(state.holes.sum())
        for index in range(state.steps):
            state.advance(index)
            revealed = strategy.reveal(state)
            left -= state.fill(revealed)
            if state.sigma:
                state.mask_again()
            state.is_masked ^= revealed
            if callback is not None:
                callback(state.step, state.s if strategy.paced else left / total, xt)
            if not left and not strategy.paced:
                break
    return Sampled(xt, state.calls, history)


def blocks(is_masked: Tensor, length: int) -> list[Tensor]:
    """The holes (B, L) of each row in portions of `length`, from left to right; 0: all at once."""
    if not length:
        return [is_masked]
    number = (is_masked.cumsum(dim=1) - 1) // length
    return [is_masked & (number == i) for i in range(int(number.amax()) + 1)]


def draw_tokens(
    logits: Tensor, u: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Tokens (N,) from logits (N, V) by inverting the distribution function at u (N,) in [0, 1).

    In float64: Gumbel noise from float32 uniforms cuts off the tail and so lowers the effective
    temperature (Zheng et al., arXiv 2409.02908). On the CPU where the device has no float64.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    device = "cpu" if logits.device.type == "mps" else logits.device
    logits64 = logits.to(device).double()
    below = logits64 - logits64.amax(dim=-1, keepdim=True)  # no overflow at tiny temperatures
    probabilities = keep_likeliest((below / temperature).softmax(dim=-1), top_k, top_p)
    cdf = probabilities.cumsum(dim=-1)
    u = u.to(device).double()[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, u, right=True).squeeze(1)
    return tokens.clamp(max=logits.size(-1) - 1).to(logits.device)


def keep_likeliest(probabilities: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Zero all of (N, V) but the `top_k` likeliest (0: all) and, of them, the fewest that reach
    `top_p` of what they have, the crossing one kept."""
    if not top_k and top_p == 1:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = 0
        ordered /= ordered.sum(dim=-1, keepdim=True)
    if top_p < 1:
        ordered *= ordered.cumsum(dim=-1) - ordered < top_p  # what is more probable than each
    return torch.zeros_like(probabilities).scatter(-1, order, ordered)
