"""Sampling strategies: which masked positions a step of the reverse process reveals.

A strategy is a function from a `diffusion.State` to the positions (B, L) to reveal in this step.
Its own settings are further arguments, which `sampling.options` sets by name. To add one, write the
function and its entries in STRATEGIES and LIKELIHOODS; `diffusion.sample(strategy=f)` takes any
function, too. A strategy that is `adaptive` ignores `steps`: it reveals at least one position in
each step, and goes on until none is masked.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2


def adaptive(strategy: Callable) -> Callable:
    """Mark a strategy that takes as many steps as it needs."""
    strategy.adaptive = True
    return strategy


# --- Positions in random order -------------------------------------------------------------------


def spread(state) -> Tensor:
    """Every K-th position in each of K steps: far apart, as neighbours depend on each other most.

    The K classes of positions follow each other like the multiples of the golden ratio, mod 1, from
    a random one on, which leaves no large gap at any time. (For images: the Halton scheduler, arXiv
    2503.17076.)
    """
    K = state.steps
    turns = (torch.arange(K).double() * (GOLDEN_RATIO - 1) % 1).argsort().to(state.xt.device)
    start = (state.noise[:, :1] * K).long()
    return state.is_masked & (turns[(state.block.cumsum(dim=1) + start) % K] == state.index)


@adaptive
def first_hitting(state) -> Tensor:
    """One uniformly random position (Zheng et al., arXiv 2409.02908)."""
    return state.best(state.noise, 1)


def remask(state, remask_rate: float = 0.05) -> Tensor:
    """As `stochastic`, but each revealed token is masked again with probability sigma.

    sigma = min(remask_rate, s / (1 - t)). A masked position stays masked with probability
    (s - sigma (1 - t)) / t, so that at time s the share s is masked (ReMDM, arXiv 2503.00307).
    """
    t, s = 1 - state.index / state.steps, state.s
    sigma = min(remask_rate, s / (1 - t)) if state.index else 0.0
    stays = max(0.0, (s - sigma * (1 - t)) / t)
    revealed = state.is_masked & (state.noise >= stays)
    # What waits has noise below `stays`: divided by it, it is uniform in [0, 1) for the next step.
    state.noise.copy_(torch.where(state.is_masked, state.noise / stays, state.noise))
    if sigma:
        u, noise, token_noise = state.more_noise(3 * state.xt.size(1), 2, state.index).chunk(3, 1)
        state.again = again = state.block & ~state.is_masked & (u < sigma)
        state.noise.copy_(torch.where(again, noise, state.noise))
        state.token_noise.copy_(torch.where(again, token_noise, state.token_noise))
    return revealed


# --- Positions by what the network predicts, or from left to right -------------------------------


@adaptive
def left_to_right(state) -> Tensor:
    """The leftmost position: how an autoregressive network is sampled."""
    return state.best(torch.zeros_like(state.noise), 1)


def margin(state) -> Tensor:
    """The largest gap between the two most probable tokens (Kim et al., arXiv 2502.06768)."""
    return _in_quota(state, _gap)


def entropy(state) -> Tensor:
    """The lowest entropy of the prediction (Dream, arXiv 2508.15487)."""
    return _in_quota(state, _negative_entropy)


@adaptive
def threshold(state, threshold: float = 0.9) -> Tensor:
    """All whose top probability exceeds the threshold, and the best (Fast-dLLM, 2505.22618)."""
    top = state.logits.softmax(dim=-1).amax(dim=-1)
    return state.best(top, 1) | state.is_masked & (top > threshold)


@adaptive
def eb(state, gamma: float = 0.1) -> Tensor:
    """By rising entropy H, as many as keep sum H - max H <= gamma (EB-sampler, 2505.24857)."""
    score = _negative_entropy(state.logits.softmax(dim=-1))
    entropies = (-score).masked_fill(~state.is_masked, math.inf).sort(dim=1).values
    costs = entropies.cumsum(dim=1) - entropies  # nan where none is masked
    return state.best(score, (costs <= gamma).sum(dim=1, keepdim=True))


def _in_quota(state, score: Callable[[Tensor], Tensor]) -> Tensor:
    """The best by `score`(probabilities (B, L, V)) -> (B, L), M / K of M in each of K steps."""
    if not state.quota.any():
        return torch.zeros_like(state.is_masked)
    return state.best(score(state.logits.softmax(dim=-1)), state.quota)


def _gap(p: Tensor) -> Tensor:
    return p.amax(dim=-1) - p.topk(min(2, p.size(-1))).values[..., 1:].sum(dim=-1)


def _negative_entropy(p: Tensor) -> Tensor:
    return -torch.special.entr(p).sum(dim=-1)


STRATEGIES = {
    "stochastic": "stochastic",  # these two are diffusion.py's own
    "confidence": "confidence",
    "spread": spread,
    "first_hitting": first_hitting,
    "remask": remask,
    "left_to_right": left_to_right,
    "margin": margin,
    "entropy": entropy,
    "threshold": threshold,
    "eb": eb,
}
# What `diffusion.score` is: -log p of a text where the choice of positions is a function of the
# state; where noise decides, too, its mean over seeds is an upper bound (DUEL, arXiv 2603.01367).
EXACT, BOUND, NONE = "exact likelihood", "bound on the likelihood", "no likelihood"
UNKNOWN = "likelihood not stated"  # of a strategy that is not in the table
LIKELIHOODS = {
    "stochastic": BOUND,
    "confidence": EXACT,
    "spread": BOUND,
    "first_hitting": BOUND,
    "remask": NONE,
    "left_to_right": EXACT,
    "margin": EXACT,
    "entropy": EXACT,
    "threshold": EXACT,
    "eb": EXACT,
}


# --- Predictions changed -------------------------------------------------------------------------


def keep_likeliest(probabilities: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Zero all of (N, V) but the `top_k` likeliest (0: all) and, of them, the fewest that reach
    `top_p` of what they have, the crossing one kept."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = 0
        ordered /= ordered.sum(dim=-1, keepdim=True)
    if top_p < 1:
        ordered *= ordered.cumsum(dim=-1) - ordered < top_p  # what is more probable than each
    return torch.zeros_like(probabilities).scatter(-1, order, ordered)


def guided(model: Callable, is_masked: Tensor, mask_id: int, guidance: float) -> Callable:
    """(1 + w) logits(canvas) - w logits(canvas without its context), w = `guidance`.

    Away from what is predicted without the prompt: unsupervised guidance (SMDM, arXiv 2410.18514).
    """

    def logits(xt: Tensor) -> Tensor:
        prediction, blind = model(xt).float(), model(xt.masked_fill(~is_masked, mask_id)).float()
        return prediction + guidance * (prediction - blind)

    return logits


# --- Block after block, for a network that sees the blocks before its own ------------------------

NO_GUIDANCE = (
    "sampling.options.guidance compares with a text whose prompt is masked, and a network with "
    "blocks has never seen a mask before its block: leave it out"
)


class Cache:
    """What later blocks need of finished ones: keys, values and inputs of convolutions.

    It is exact: a block sees nothing after it, so that what it leaves stays as it is. `length` of
    at most `size` positions are finished; entries of later ones are overwritten.
    """

    def __init__(self, size: int):
        self.size, self.length, self.entries = size, 0, {}

    def extend(self, name, x: Tensor) -> Tensor:
        """(..., length + N, K): the entries of this name, then x (..., N, K), kept as well."""
        stop = self.length + x.size(-2)
        if name not in self.entries:
            self.entries[name] = x.new_empty(*x.shape[:-2], self.size, x.size(-1))
        self.entries[name][..., self.length : stop, :] = x
        return self.entries[name][..., :stop, :]


def require_order(is_masked: Tensor, size: int) -> None:
    """Raise `ValueError` if a token is given in a block after one with a masked position (B, L).

    A network with blocks of `size` positions would fill the mask without having seen it.
    """
    block = torch.arange(is_masked.size(1), device=is_masked.device) // size
    first = torch.where(is_masked, block, len(block)).amin(dim=1, keepdim=True)
    if not (is_masked | (block <= first)).all():
        raise ValueError(
            f"a token is given after the block of a [MASK], where a network with blocks of {size} "
            "tokens cannot see it: leave it out, or take a network with model.block_length=0"
        )


class NextBlock:
    """The network as one of the next block, given the finished ones: ids (B, n) to logits."""

    def __init__(self, model: Callable, size: int, cached: bool):
        self.model, self.cache = model, Cache(size) if cached else None
        self.finished = None  # ids (B, N) of the blocks before

    def __call__(self, block: Tensor) -> Tensor:
        start = self.finished.size(1)
        if self.cache is None:
            return self.model(torch.cat((self.finished, block), dim=1))[:, start:]
        known = self.cache.length  # the last of the finished blocks is computed with this one
        ids = torch.cat((self.finished[:, known:], block), dim=1)
        logits = self.model(ids, cache=self.cache)
        self.cache.length = start
        return logits[:, start - known :]


class Steps:
    """The steps of each block, as steps of the whole canvas xt (B, L)."""

    def __init__(self, xt: Tensor, callback: Callable | None, history: list | None):
        self.xt, self.callback, self.history = xt, callback, history
        self.events = None if history is None else []
        self.here, self.before, self.done = slice(0), 0, 0  # this block; steps before it, and done

    def __call__(self, step: int, s: float, block: Tensor) -> None:
        self.done = self.before + step
        if self.history is not None:
            event = self.events.pop()
            whole = {name: self.widened(getattr(event, name)) for name in ("revealed", "again")}
            self.history.append(event._replace(step=self.done, **whole))
        if self.callback:
            xt = self.xt.clone()
            xt[:, self.here] = block
            self.callback(self.done, s, xt)

    def widened(self, where: Tensor | None) -> Tensor | None:
        if where is not None:
            start, L = self.here.start, self.xt.size(1)
            return F.pad(where, (start, L - start - where.size(1)))


def fill_blocks(
    sample: Callable,
    model: Callable,
    canvas: Tensor,
    is_masked: Tensor,
    size: int,
    *,
    mask_id: int,
    cached: bool = True,
    ended: Callable | None = None,
    callback: Callable | None = None,
    history: list | None = None,
    x0: Tensor | None = None,
    **options,
):
    """`sample` of one block of `size` positions after the other, each given those before it.

    `cached` takes what finished blocks left from a `Cache`: the same tokens, sooner. After each
    block `ended(xt)` (B,) may name rows that are filled no further. Raises `ValueError` as
    `require_order` does.
    """
    require_order(is_masked, size)
    xt, L, calls = canvas.masked_fill(is_masked, mask_id), canvas.size(1), 0
    order, costs = torch.zeros_like(xt), torch.zeros_like(xt, dtype=torch.float64)
    network, steps = NextBlock(model, L, cached), Steps(xt, callback, history)
    for start in range(0, L, size):
        here = slice(start, start + size)
        network.finished = xt[:, :start]
        steps.here, steps.before = here, steps.done
        filled = sample(
            network,
            xt[:, here],
            is_masked=is_masked[:, here],
            mask_id=mask_id,
            callback=steps,
            history=steps.events,
            x0=None if x0 is None else x0[:, here],
            **options,
        )
        xt[:, here], costs[:, here], calls = filled.ids, filled.costs, calls + filled.calls
        order[:, here] = filled.order + steps.before * (filled.order > 0)
        if ended:
            is_masked = is_masked & ~ended(xt).to(xt.device)[:, None]
    return filled._replace(ids=xt, calls=calls, costs=costs, order=order, history=history)


# --- Settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """`diffusion.sample` with the settings of a run."""

    sample: Callable
    name: str  # of the strategy
    settings: dict  # arguments of `sample`
    guidance: float = 0.0

    @property
    def label(self) -> str:
        """What the score of a text is."""
        return LIKELIHOODS.get(self.name, UNKNOWN)

    def calls_a_step(self, is_masked: Tensor) -> int:
        """Guidance takes two network calls for one, where there is something to be guided by."""
        return 2 if self.guidance and not is_masked.all() else 1

    def fill(self, model, canvas: Tensor, is_masked: Tensor, ended=None, **options):
        """`sample` of a canvas (B, L) on the model's device; with `x0`, its score.

        For a network with blocks of its own by `fill_blocks`, which heeds `ended`.
        """
        network, device, mask_id = model, model.device, model.config.mask_id
        if device.type == "mps":  # it has no float64: only the network runs there
            device = torch.device("cpu")

            def network(xt, **options):
                return model(xt.to(model.device), **options).cpu()

        canvas, is_masked = canvas.to(device), is_masked.to(device)
        options = self.settings | {"mask_id": mask_id} | options
        options |= {k: v.to(device) for k, v in options.items() if torch.is_tensor(v)}
        if size := getattr(model.config, "block_length", 0):
            options["block_length"] = 0  # LLaDA's, for networks that have no blocks of their own
            if self.guidance:
                raise ValueError(NO_GUIDANCE)
            return fill_blocks(
                self.sample, network, canvas, is_masked, size, ended=ended, **options
            )
        calls = self.calls_a_step(is_masked)
        if calls > 1:
            network = guided(network, is_masked, mask_id, self.guidance)
        sampled = self.sample(network, canvas, is_masked=is_masked, **options)
        return sampled._replace(calls=sampled.calls * calls)


GENERAL = {"top_k": 0, "top_p": 1.0, "guidance": 0.0, "block_length": 0}  # of any strategy


def is_adaptive(name: str) -> bool:
    """Whether a strategy takes as many steps as it needs, so that `steps` has no effect."""
    return getattr(STRATEGIES.get(name), "adaptive", False)


def options_of(name: str) -> dict[str, float]:
    """The options of a strategy, its own arguments and those of any, with their defaults."""
    strategy = STRATEGIES[name]
    own = inspect.signature(strategy).parameters if callable(strategy) else {}
    return {option: p.default for option, p in own.items() if p.default is not p.empty} | GENERAL


def from_config(section, sample: Callable, causal: bool = False, model_blocks: int = 0) -> Sampler:
    """The `Sampler` of a `sampling` section; an autoregressive network goes from left to right.

    `sample` is `diffusion.sample`, `model_blocks` the block_length of the network (0 for none).
    Raises `ValueError` for a strategy or an option that is unknown or out of its range.
    """
    name = "left_to_right" if causal or model_blocks == 1 else section.strategy
    if name not in STRATEGIES:
        raise ValueError(f"sampling.strategy={name} is unknown: choose {', '.join(STRATEGIES)}")
    known = options_of(name)
    for option, value in section.options.items():
        if option not in known:
            others = [f"of {other}" for other in STRATEGIES if option in options_of(other)]
            but = f" but {' and '.join(others)}" if others else ""
            raise ValueError(
                f"sampling.options.{option} is no option of {name}{but}: choose {', '.join(known)}"
            )
        kind = type(known[option])
        kinds = (kind, int) if kind is float else kind
        if type(value) is bool or not isinstance(value, kinds):
            raise ValueError(f"sampling.options.{option}={value} is not of type {kind.__name__}")
    strategy, options = STRATEGIES[name], GENERAL | section.options
    top_k, top_p, guidance, block_length = (options.pop(option) for option in GENERAL)
    if options:  # what is left are the strategy's own
        strategy = partial(strategy, **options)
    settings = {
        "strategy": strategy,
        "steps": section.steps,
        "temperature": section.temperature,
        "block_length": block_length,
    }
    if top_k or top_p < 1:
        settings["truncate"] = partial(keep_likeliest, top_k=top_k, top_p=top_p)
    if model_blocks and guidance:
        raise ValueError(NO_GUIDANCE)
    return Sampler(sample, name, settings, guidance)
