"""Masked diffusion: masking, training loss, likelihood bound and reverse process.

`model` is any callable from ids (B, L) to logits (B, L, V); V is the vocabulary without the mask.
Masking and sampling draw a seed from their `generator` and hash the rest: the random numbers are
functions of (seed, row, position), so that row i of a batch gets the same ones whatever the other
rows, the device or the number of processes. `estimate` draws its noise on the CPU, for all rows at
once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, odd, as int64: SplitMix64's increment


# --- Forward process -----------------------------------------------------------------------------


def mask_probability(t: Tensor, eps: float = 1e-3) -> Tensor:
    """The probability that a token is masked at time t in [0, 1]: p_mask(t) = (1 - eps) t + eps.

    `eps` keeps the weight 1 / p_mask of the training loss finite (SMDM, arXiv 2410.18514). Sampling
    and the bound of `any_order` do without it.
    """
    return (1 - eps) * t + eps


def mask_tokens(
    x0: Tensor,
    p_mask: Tensor | float,
    mask_id: int,
    generator: Generator | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mask each token of x0 (B, L) independently, with probability `p_mask`.

    `p_mask` is a number or a tensor (B, 1) or (B, L). If x0 is a part of a larger batch, `rows`
    (B,) are the numbers of its rows there. Returns (xt, is_masked), both (B, L). Carry `is_masked`
    along: `xt == mask_id` is no substitute where the data may hold a caller's mask id.
    """
    noise = hash_noise(draw_seed(generator), _rows(x0, rows), x0.size(1))
    is_masked = (noise < p_mask).to(x0.device)  # (B, L)
    return x0.masked_fill(is_masked, mask_id), is_masked


# --- Training loss -------------------------------------------------------------------------------


def masked_diffusion_loss(
    model: Callable,
    x0: Tensor,
    *,
    mask_id: int,
    generator: Generator | None = None,
    eps: float = 1e-3,
    weighting: float = 1.0,
    predict: Tensor | None = None,
    block_length: int = 0,
    share: tuple[Tensor, int] | None = None,
    nll: Callable | None = None,
) -> Tensor:
    """The training loss E_t[ sum of CE over the masked tokens / p_mask(t) ] / L, nats per token.

    Dividing by p_mask makes up for the tokens that are not masked: but for `eps`, the expectation
    is the likelihood bound of `any_order`. A mean over the masked tokens alone would bound nothing
    (SMDM, arXiv 2410.18514; LLaDA, 2502.09992). Returns the mean over the rows.

    x0 (B, L) are clean ids. The times are stratified over the batch: row i of n has t uniform in
    [i / n, (i + 1) / n). If x0 is a part of a larger batch of n rows, `share` is (rows, n), where
    rows (B,) are the numbers of its rows there. Tokens outside `predict` (B, L) are context: never
    masked, and not counted in L.

    A `weighting` g below 1 is another objective, which bounds nothing but trains faster: the weight
    is (2 - g) / p_mask^g, so that rows with few masks count less. train.py has 0.5 by default, and
    reports the bound beside the loss. The factor 2 - g makes the expected loss c where each masked
    token costs c. Raises `ValueError` for a weighting out of its range.

    `nll(xt, x0, is_masked)` -> (B, L) replaces `nll_from_logits` for a model that computes its own
    cross-entropies, as a `Transformer` does; `model` is then not called.

    With a `block_length`, each block of that many tokens has a time of its own, and is predicted
    from itself and the clean blocks before it (BD3-LM, arXiv 2503.09573). Of its M tokens, l are
    masked as in the bound (`any_order`), with the weight (M / l)^g, scaled as in `weighted_masks`;
    `eps` is not used. (A Bernoulli draw for each token would often leave a small block without any
    mask.) The default is the block_length of the model, if it has one.
    """
    if not 0 <= weighting <= 1:
        raise ValueError(f"{weighting=} must lie in [0, 1]; 1 is the weight of the bound")
    block_length = block_length or _block_length_of(model)
    nll = nll or partial(nll_from_logits, model, block_length=block_length)
    rows, n = share or (_rows(x0, None), len(x0))
    t = (rows[:, None] + hash_noise(draw_seed(generator), rows, 1)) / n  # (B, 1)
    predict = torch.ones_like(x0, dtype=torch.bool) if predict is None else predict
    if not block_length:
        p_mask = mask_probability(t, eps)
        p_token = p_mask * predict.to(p_mask.device)  # (B, L): 0 for context
        xt, is_masked = mask_tokens(x0, p_token, mask_id, generator, rows)
        weight = (2 - weighting) * p_mask**-weighting  # (B, 1)
    else:  # the masks of the bound, for each block by itself
        noise = hash_noise(draw_seed(generator), rows, x0.size(1))
        noise = noise.masked_fill(~predict.to(noise.device), 2.0)
        masks = partial(weighted_masks, weighting=weighting)
        is_masked, _, weight = next(in_blocks(masks, t[:, 0], noise, block_length))  # (B, L)
        is_masked = is_masked.to(x0.device)
        xt = x0.masked_fill(is_masked, mask_id)
    costs = nll(xt, x0, is_masked)  # (B, L), 0 where a token is not masked
    return ((costs * weight.to(costs)).sum(dim=1) / predict.sum(dim=1)).mean()


def nll_from_logits(
    model: Callable, xt: Tensor, x0: Tensor, where: Tensor, block_length: int = 0
) -> Tensor:
    """Cross-entropies (B, L) in nats, 0 outside `where` (B, L), from a model's logits (B, L, V).

    In float32 at least, in float64 for a float64 model. With a `block_length`, one call a block:
    it sees itself as it is in xt and the blocks before it as they are in x0.
    """
    L = x0.size(1)
    size = block_length or L  # without blocks one call: model(xt)
    logits = [
        model(torch.cat((x0[:, :i], xt[:, i : i + size]), dim=1))[:, i:] for i in range(0, L, size)
    ]
    logits = _at_least_float32(torch.cat(logits, dim=1)[where])  # (N, V)
    nll = F.cross_entropy(logits, x0[where], reduction="none")
    return nll.new_zeros(x0.shape).masked_scatter(where, nll)


def _block_length_of(model: Callable) -> int:
    return getattr(getattr(model, "config", None), "block_length", 0)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# --- Likelihood bound ----------------------------------------------------------------------------


def any_order(u: Tensor, noise: Tensor) -> Iterator:
    """The estimator of `nelbo`: l ~ U{1 ... M} random tokens masked, weight M / l (2110.02037).

    The expectation of the summed CE, so weighted, is the mean of -log p(x0 | order) over all orders
    in which the tokens can be revealed, one a call. By Jensen's inequality it is at least -log
    p(x0) of the sampler that reveals one uniformly random position a call. It equals the integral
    of F(p) / p over p in [0, 1], where F(p) is the expected sum of CE when each token is masked
    with probability p; but it needs no eps, and its variance is finite. eval.py calls it `uniform`.

    What an estimator is: it turns u (B,), uniform in [0, 1), and noise (B, L), uniform in [0, 1)
    where a token is to be predicted and 2 where it is context, into queries (is_masked, scored,
    weight). A query says: mask `is_masked` (B, L), sum the cross-entropies over `scored` (B, L),
    multiply the sum by `weight` (B,).
    """
    M = (noise < 1).sum(dim=1)
    count = (u * M).long() + 1
    is_masked = (noise.argsort().argsort() < count[:, None]) & (noise < 1)  # count is 1 if M is 0
    yield is_masked, is_masked, M.double() / count


def nelbo(
    model: Callable, x0: Tensor, *, nll: Callable | None = None, block_length: int = 0, **options
) -> tuple[float, float]:
    """(value, standard error) of an upper bound on -log p(x0), in nats per token.

    A short form of `estimate` with `any_order`; train.py and eval.py call `estimate` itself. The
    text is given and the masks are random: the error is that over the masks (nan for one draw).
    `options` are those of `estimate`; the default `block_length` is that of the model, if it has
    one.
    """
    block_length = block_length or _block_length_of(model)
    nll = nll or partial(nll_from_logits, model, block_length=block_length)
    nats, _, counts = estimate(any_order, nll, x0, block_length=block_length, **options)
    values = nats.sum(dim=1) / counts.sum()  # (draws,)
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


@torch.no_grad()
def estimate(
    estimator: Callable,
    nll: Callable,
    x0: Sequence[Tensor],
    *,
    mask_id: int,
    predict: Sequence[Tensor] | None = None,
    block_length: int = 0,
    generator: Generator | None = None,
    draws: int = 8,
    batch_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """`draws` estimates of a bound on -log p of each row of x0, by an `estimator` as `any_order`.

    x0 is (N, L), or N rows (L_i,) that may differ in length. `nll` as in `masked_diffusion_loss`.
    `predict` are N rows of booleans, True for a token to be predicted (default: all); the others
    are context: always visible, never scored, not counted. All noise of a pass is drawn at once, on
    the CPU, and u is stratified over the N rows, so that the result does not depend on
    `batch_size` or the device, but for rounding.

    The costs of an estimator's queries, summed, are an unbiased estimate of its bound. With a
    `block_length` the estimator gets one row for each block, and `nll` predicts a block from itself
    and the clean ones before it.

    Returns, on the CPU: nats (draws, N) float64, the estimates, summed over the tokens of a row; u
    (draws, N) float64; counts (N,) int64, the tokens of each row that are predicted.
    """
    if predict is None:
        predict = [torch.ones(len(row), dtype=torch.bool) for row in x0]
    lengths = torch.tensor([len(row) for row in predict])
    counts = torch.tensor([int(row.sum()) for row in predict])
    if min([draws, len(counts), *counts]) < 1:
        raise ValueError(f"{draws=} must be at least 1, and x0 needs rows with tokens to predict")
    nats = torch.zeros(draws, len(counts), dtype=torch.float64)
    u = torch.zeros_like(nats)
    for draw in range(draws):
        u[draw] = stratified_pairs(len(counts), generator)
        noise = [
            torch.rand(len(row), dtype=u.dtype, generator=generator).masked_fill(~row, 2.0)
            for row in predict
        ]
        for length in lengths.unique():
            for rows in (lengths == length).nonzero().squeeze(1).split(batch_size):
                batch = torch.stack([x0[i] for i in rows])  # (B, L)
                row_noise = torch.stack([noise[i] for i in rows])
                queries = in_blocks(estimator, u[draw, rows], row_noise, block_length)
                for is_masked, scored, weight in queries:
                    xt = batch.masked_fill(is_masked.to(batch.device), mask_id)
                    costs = nll(xt, batch, scored.to(batch.device)).cpu()  # (B, L)
                    nats[draw, rows] += (costs.to(u) * weight).sum(dim=1)
    return nats, u, counts


def stratified_pairs(n: int, generator: Generator | None = None) -> Tensor:
    """n uniform float64 draws in [0, 1): stratified, in pairs (u, 1 - u), in random order."""
    pairs = (n + 1) // 2
    jitter = torch.rand(pairs, dtype=torch.float64, generator=generator)
    u = (torch.arange(pairs) + jitter) / (2 * pairs)  # in [0, 1/2)
    slots = torch.cat((u, (1 - u).clamp(max=1 - 2**-53)))
    return slots[torch.randperm(2 * pairs, generator=generator)[:n]]


def in_blocks(
    estimator: Callable, u: Tensor, noise: Tensor, block_length: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Run an estimator with every block as a row of its own: queries of tensors (B, L).

    Block b of a row has the time (u + b phi) mod 1, phi the golden ratio: each is as uniform as
    u (B,), and those of a row are spread evenly. With a `block_length` of 0 a row is one block.
    """
    L = noise.size(1)
    size = block_length or L
    block_noise = F.pad(noise, (0, -L % size), value=2.0).view(-1, size)
    turns = torch.arange(len(block_noise) // len(u), device=u.device) * (GOLDEN / 2**64)
    times = ((u[:, None] + turns) % 1).flatten()  # (B blocks,)
    for is_masked, scored, weight in estimator(times, block_noise):
        query = is_masked, scored, weight[:, None].expand_as(block_noise)
        yield tuple(part.reshape(len(u), -1)[:, :L] for part in query)


def weighted_masks(u: Tensor, noise: Tensor, weighting: float) -> Iterator:
    """`any_order` with the weight (M / l)^g / scale, where g is `weighting`.

    The scale is the mean of (l / M)^(1 - g) over l = 1 ... M: a network whose masked tokens cost c
    each then has the expected loss c.
    """
    for is_masked, scored, ratio in any_order(u, noise):
        M = (noise < 1).sum(dim=1, keepdim=True).clamp(min=1)
        shares = torch.arange(1, noise.size(1) + 1, device=M.device) / M  # l / M, and above 1
        scale = (shares ** (1 - weighting) * (shares <= 1)).sum(dim=1) / M[:, 0]
        yield is_masked, scored, ratio**weighting / scale


# --- Reverse process -----------------------------------------------------------------------------


@dataclass
class State:
    """What a strategy sees: the reverse process before one of its steps. Tensors are (B, L)."""

    model: Callable
    xt: Tensor  # ids: the mask's where is_masked, and in blocks that come later
    block: Tensor  # the positions, masked at first, that these steps fill: all, or those of a block
    is_masked: Tensor  # those of them that are still masked
    noise: Tensor  # uniform in [0, 1), kept unless a strategy writes to it: when to reveal
    token_noise: Tensor  # uniform in [0, 1), kept likewise: which token a position gets
    more_noise: Callable  # more_noise(columns, salt, ...): more draws (B, columns), salt 2 or more
    index: int  # of the step: 0, 1, ... steps - 1
    steps: int  # if adaptive, the most that a row of the batch can need: not to be gone by, nor s
    calls: int = 0  # of the network, in this step
    again: Tensor | None = None  # a strategy may set it: what to mask again after the step

    @property
    def s(self) -> float:
        """The time after the step, 1 - 1 / steps ... 0; the time before it is t = s + 1 / steps."""
        return 1 - (self.index + 1) / self.steps

    @property
    def quota(self) -> Tensor:
        """(B, 1): how many to reveal now. Of M, floor(M j / steps) are filled after step j."""
        M = self.block.sum(1, keepdim=True)
        return M * (self.index + 1) // self.steps - M * self.index // self.steps

    @cached_property
    def logits(self) -> Tensor:
        """(B, L, V). A step that neither reads them nor reveals anything costs no call."""
        self.calls += 1
        return _at_least_float32(self.model(self.xt))

    def best(self, score: Tensor, count: Tensor | int) -> Tensor:
        """The `count` (B, 1) masked positions of the highest `score`; of equals, the leftmost."""
        score = score.masked_fill(~self.is_masked, -math.inf)
        ranks = score.argsort(descending=True, stable=True).argsort()
        return self.is_masked & (ranks < count)


def stochastic(state: State) -> Tensor:
    """Each masked position independently with probability 1 - s/t (MDLM, arXiv 2406.07524).

    What is masked at time t has noise below t. In the last step s is 0: no mask is left.
    """
    return state.is_masked & (state.noise >= state.s)


def confidence(state: State) -> Tensor:
    """The positions with the highest top probability, as many as the quota.

    MaskGIT (arXiv 2202.04200) and LLaDA (2502.09992) go by the probability of the token that was
    drawn instead; `score` would then not be exact.
    """
    if not state.quota.any():
        return torch.zeros_like(state.is_masked)
    return state.best(state.logits.softmax(dim=-1).amax(dim=-1), state.quota)


class Event(NamedTuple):
    """What step 1, 2, ... did: N positions were revealed, others were masked again."""

    step: int
    revealed: Tensor  # (B, L)
    tokens: Tensor | None  # (N,), in the order of the rows; None if N is 0
    logits: Tensor | None  # (N, V) of the network, before temperature and truncation
    again: Tensor | None  # (B, L)


class Sampled(NamedTuple):
    """The filled canvas, and what its filling took."""

    ids: Tensor  # (B, L)
    calls: int  # of the network
    costs: Tensor  # (B, L) float64: -log p of each token as it was revealed; 0 for a given one
    order: Tensor  # (B, L): the step that revealed each token, 1, 2, ...; 0 for a given one
    history: list[Event] | None = None  # if asked for


@torch.no_grad()
def sample(
    model: Callable,
    canvas: Tensor,
    *,
    is_masked: Tensor,
    mask_id: int,
    strategy: Callable | str = "stochastic",
    steps: int = 32,
    temperature: float = 1.0,
    truncate: Callable | None = None,
    block_length: int = 0,
    generator: Generator | None = None,
    rows: Tensor | None = None,
    callback: Callable | None = None,
    history: list[Event] | None = None,
    x0: Tensor | None = None,
) -> Sampled:
    """Fill the positions `is_masked` of `canvas` (B, L) in `steps` steps, and change no other.

    A `strategy` (`stochastic`, `confidence` or any function, such as those in the table STRATEGIES
    of nanomdm/strategies.py, which the command line knows by name) maps a `State` to the
    positions (B, L) to reveal in this step, and has to reveal all in the last. Their tokens are
    drawn independently from the network's prediction, at `temperature` (0: the most probable one),
    after `truncate` has mapped probabilities (N, V) to those that may be drawn (top-k, top-p). A
    strategy with the attribute `adaptive` has no fixed number of steps: it goes on until no mask is
    left, and has to reveal something in each step. With a `block_length`, that many masked
    positions at a time are filled, from left to right, in `steps` steps each (semi-autoregressive,
    LLaDA): for networks that have no blocks of their own.

    The draws of row i depend on (seed, rows[i]) alone; `rows` is 0 ... B - 1 by default.
    `callback(j, s, xt)` sees the state after step j = 1, 2, ... at time s, and copies what it
    keeps. A list given as `history` gets an `Event` for each step, logits included. With `x0`
    (B, L) its tokens are revealed instead of drawn ones: see `score`. Raises `ValueError` for a
    setting out of its range, and for a strategy that leaves a mask.
    """
    strategy = {"stochastic": stochastic, "confidence": confidence}.get(strategy, strategy)
    if not callable(strategy) or steps < 1 or min(temperature, block_length) < 0:
        raise ValueError(
            f"{strategy=} must be stochastic, confidence or a function, {steps=} at least 1, "
            f"{temperature=} and {block_length=} not negative"
        )
    if 0 < _block_length_of(model) < canvas.size(1):
        raise ValueError("the network has blocks: fill the canvas by nanomdm.strategies.Sampler")
    adaptive = getattr(getattr(strategy, "func", strategy), "adaptive", False)  # of a partial, too
    xt = canvas.masked_fill(is_masked, mask_id)
    order, costs = torch.zeros_like(xt), torch.zeros_like(xt, dtype=torch.float64)
    L = canvas.size(1)
    uniform = partial(hash_noise, draw_seed(generator), _rows(canvas, rows))
    noise = uniform(L, 0)  # (B, L): when to reveal
    token_noise = uniform(L, 1)  # (B, L): which token
    calls = step = 0
    block_of = (is_masked.cumsum(dim=1) - 1) // (block_length or L)  # counts masked positions
    for b in range(int(block_of.amax()) + 1):
        block = left = is_masked & (block_of == b)
        steps_here = int(block.sum(dim=1).amax()) if adaptive else steps
        for index in range(steps_here):
            state = State(model, xt, block, left, noise, token_noise, uniform, index, steps_here)
            revealed = strategy(state) & left
            tokens = logits = None
            where = revealed.nonzero(as_tuple=True)  # once: indexing by a mask waits for a GPU
            if len(where[0]):
                logits = state.logits[where]  # (N, V)
                log_p = log_probabilities(logits, temperature, truncate)
                tokens = draw_tokens(log_p, token_noise[where]) if x0 is None else x0[where]
                costs[where] = -log_p.gather(1, tokens[:, None]).squeeze(1)
                order[where] = step + 1
                xt[where] = tokens
                left = left & ~revealed
            if state.again is not None:
                if x0 is not None:
                    raise ValueError("no score for masking again: many paths lead to a text")
                xt[state.again] = mask_id
                left = left | state.again
            step += 1
            calls += state.calls
            if history is not None:
                history.append(Event(step, revealed, tokens, logits, state.again))
            if callback:
                callback(step, state.s, xt)
            if adaptive and not left.any():
                break
        if left.any():
            raise ValueError(f"the strategy left {int(left.sum())} masks after its last step")
    return Sampled(xt, calls, costs, order, history)


def score(model: Callable, x0: Tensor, *, is_masked: Tensor | None = None, **options) -> Tensor:
    """-log p (B,) in nats of the tokens `is_masked` (default: all) of x0 (B, L) under a sampler.

    Sampling, with the text in the place of the draws: `options` are those of `sample`, mask_id,
    strategy, steps and so on (DUEL, arXiv 2603.01367). A strategy that goes by predictions and
    positions alone, as `confidence`, gives each text one path, and -log p exactly. One that reads
    `State.noise`, as `stochastic`, gives -log p(x0 | noise), whose mean over seeds is an upper
    bound on -log p(x0); one that reads the draws (`token_noise`) gives neither. The cost is inf if
    a token cannot be drawn: `truncate` cuts it or, at temperature 0, another is more probable.
    Raises `ValueError` for a strategy that masks tokens again: many paths lead to a text.
    """
    is_masked = torch.ones_like(x0, dtype=torch.bool) if is_masked is None else is_masked
    return sample(model, x0, is_masked=is_masked, x0=x0, **options).costs.sum(dim=1)


def log_probabilities(
    logits: Tensor, temperature: float = 1.0, truncate: Callable | None = None
) -> Tensor:
    """Log-probabilities (N, V) to draw tokens from, float64: -inf for one that is never drawn."""
    if temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).double().log()
    logits = logits.double() - logits.amax(dim=-1, keepdim=True)  # no overflow if divided
    log_p = (logits / temperature).log_softmax(dim=-1)
    if truncate:
        p = truncate(log_p.exp())
        log_p = (p / p.sum(dim=-1, keepdim=True)).log()
    return log_p


def draw_tokens(log_p: Tensor, u: Tensor) -> Tensor:
    """Tokens (N,) by inverting the distribution functions of log p (N, V) at u (N,) in [0, 1).

    In float64: Gumbel noise from float32 uniforms cuts off the tail and so lowers the effective
    temperature (Zheng et al., arXiv 2409.02908).
    """
    cdf = log_p.exp().cumsum(dim=-1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1)


# --- Randomness ----------------------------------------------------------------------------------


def hash_noise(seed: int, rows: Tensor, columns: int, *salt: int) -> Tensor:
    """Uniform float64 draws in [0, 1) of shape (len(rows), columns), on the device of `rows`.

    A counter-based generator (SplitMix64, Steele et al. 2014): entry (i, j) depends on (seed, salt,
    rows[i], j) alone.
    """
    key = torch.tensor(seed)
    for value in salt:
        key = _mix(key + torch.tensor(value) * GOLDEN)
    row_keys = _mix(_mix(key + rows * GOLDEN))  # (B,)
    bits = _mix(row_keys[:, None] + torch.arange(1, columns + 1, device=rows.device) * GOLDEN)
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53  # (B, columns)


def _mix(x):
    """SplitMix64's finaliser on int64 (products wrap, and a mask makes the shifts logical)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def draw_seed(generator: Generator | None) -> int:
    """A seed for `hash_noise` from `generator` (PyTorch's global one if None)."""
    return int(
        torch.randint(2**62, (), generator=generator, device=getattr(generator, "device", None))
    )


def _rows(x: Tensor, rows: Tensor | None) -> Tensor:
    return torch.arange(len(x), device=x.device) if rows is None else rows
