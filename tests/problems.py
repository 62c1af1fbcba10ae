"""Problems small enough to enumerate, and what the theory says of them, in code of its own.

Nothing here imports diffusion.py: the tests hold it against these numbers. A state is a sequence
over V tokens and the mask (id V); a network is a table of logits, one entry for every state.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Model = Callable[[Tensor], Tensor]


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


# --- Laws over short sequences -------------------------------------------------------------------


def all_ids(choices: int, L: int) -> Tensor:
    """Every sequence (choices ** L, L), in lexicographic order."""
    return torch.cartesian_prod(*[torch.arange(choices)] * L).view(-1, L)


def place_of(ids: Tensor, choices: int) -> Tensor:
    """The places (B,) of ids (B, L) in that order."""
    return (ids * choices ** torch.arange(ids.size(1) - 1, -1, -1)).sum(dim=1)


@dataclass(frozen=True)
class Problem:
    """A law (V ** L,) in float64 over the sequences of L tokens, in lexicographic order."""

    V: int
    L: int
    law: Tensor

    @property
    def data(self) -> Tensor:
        return all_ids(self.V, self.L)  # (V ** L, L)

    @property
    def states(self) -> Tensor:
        return all_ids(self.V + 1, self.L)  # ((V + 1) ** L, L)

    def draw(self, rows: int, seed: int) -> Tensor:
        """Sequences (rows, L) of the law."""
        return self.data[self.law.multinomial(rows, replacement=True, generator=seeded(seed))]

    def blank(self, rows: int) -> tuple[Tensor, Tensor]:
        """A canvas (rows, L) that is all masks, and where it is masked."""
        canvas = torch.full((rows, self.L), self.V)
        return canvas, canvas == self.V

    def counts(self, ids: Tensor) -> Tensor:
        """How often each sequence occurs in ids (rows, L)."""
        return place_of(ids, self.V).bincount(minlength=len(self.law))


def chain(*flips: float) -> Problem:
    """Binary tokens: a fair coin, then its left neighbour every time, flipped with this chance."""
    x = all_ids(2, len(flips) + 1)
    flipped, chance = x[:, 1:] != x[:, :-1], torch.tensor(flips, dtype=torch.float64)
    return Problem(2, x.size(1), 0.5 * torch.where(flipped, chance, 1 - chance).prod(dim=1))


def loop() -> Problem:
    """Four tokens out of three: 2 never follows 2, and the ends agree more often than not."""
    follows = torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.0, 0.5], [2.0, 1.0, 0.0]], dtype=torch.float64)
    x = all_ids(3, 4)
    weight = follows[x[:, :-1], x[:, 1:]].prod(dim=1) * torch.where(x[:, 0] == x[:, 3], 5.0, 1.0)
    return Problem(3, 4, weight / weight.sum())


CHAIN = chain(0.1, 0.2)
CHAIN_TEXT = CHAIN.data.repeat_interleave(  # (100, L), every sequence as often as its law says
    torch.tensor((36, 9, 1, 4, 4, 1, 9, 36)), dim=0
)
CHAIN_ENTROPY = -sum(p * math.log(p) for p in (0.5, 0.5, 0.1, 0.9, 0.2, 0.8))
LOOP = loop()


# --- Networks ------------------------------------------------------------------------------------


def table_model(table: Tensor) -> Model:
    """The network whose logits are the table (states, L, V)."""
    return lambda xt: table[place_of(xt, table.size(-1) + 1)]


def exact_denoiser(problem: Problem) -> Model:
    """log p(x_i = v | the visible tokens), float64; uniform where the visible is impossible."""
    states, data = problem.states[:, None], problem.data
    fits = ((states == data) | (states == problem.V)).all(dim=-1).double()  # (states, data)
    one_hot = F.one_hot(data, problem.V).double()
    joint = torch.einsum("sn,n,nlv->slv", fits, problem.law, one_hot)
    evidence = joint.sum(dim=-1, keepdim=True)
    return table_model(torch.where(evidence > 0, joint / evidence, 1 / problem.V).log())


def arbitrary_network(problem: Problem, seed: int = 0) -> Model:
    """A network that has learnt nothing, and whose answers do not agree with each other."""
    shape = (*problem.states.shape, problem.V)
    return table_model(torch.randn(shape, dtype=torch.float64, generator=seeded(seed)))


def zero_logits(V: int) -> Model:
    return lambda xt: torch.zeros(*xt.shape, V, dtype=torch.float64)


def unigram(probabilities: Tensor) -> Model:
    """The network that ignores its input."""
    return lambda xt: probabilities.double().log().expand(*xt.shape, -1)


class Counting:
    """A network that counts its calls."""

    def __init__(self, model: Model):
        self.model, self.calls = model, 0

    def __call__(self, xt: Tensor) -> Tensor:
        self.calls += 1
        return self.model(xt)


# --- The bound, by enumeration -------------------------------------------------------------------


def cross_entropies(model: Model, xt: Tensor, x0: Tensor, is_masked: Tensor) -> Tensor:
    """-log q(x0_i | xt) (B, L) where masked, else 0."""
    nll = -model(xt).log_softmax(dim=-1).gather(-1, x0[..., None]).squeeze(-1)
    return torch.where(is_masked, nll, 0.0)


def mask_costs(model: Model, x0: Tensor, mask_id: int, nll: Callable = cross_entropies) -> Tensor:
    """Summed cross-entropies (B, 2 ** L) of every row of x0 (B, L) under every mask."""
    masks = all_ids(2, x0.size(1)).bool()
    masks, x0 = torch.broadcast_tensors(masks, x0[:, None])  # each (B, 2 ** L, L)
    shape, masks, x0 = masks.shape, masks.flatten(0, 1), x0.flatten(0, 1)
    return nll(model, x0.masked_fill(masks, mask_id), x0, masks).view(shape).sum(dim=-1)


def expected_costs(model: Model, problem: Problem, nll: Callable = cross_entropies) -> Tensor:
    """The same, (2 ** L,), in expectation over the problem's law."""
    possible = problem.law > 0
    return problem.law[possible] @ mask_costs(model, problem.data[possible], problem.V, nll)


def cost_at(p: float, costs: Tensor) -> Tensor:
    """F(p) (...): the expected cost when each token is masked with probability p."""
    L = int(math.log2(costs.size(-1)))
    masked = all_ids(2, L).sum(dim=1).double()
    return costs @ (p**masked * (1 - p) ** (L - masked))


def costs_per_token(costs: Tensor) -> Tensor:
    """c_1 ... c_L (..., L): the mean cost of a masked token when a random l of L are masked."""
    L = int(math.log2(costs.size(-1)))
    masked = all_ids(2, L).sum(dim=1)
    each = [costs[..., masked == count].mean(dim=-1) / count for count in range(1, L + 1)]
    return torch.stack(each, dim=-1)


def bound_with_steps(steps: int, costs: Tensor) -> Tensor:
    """NELBO_K, the bound of K ancestral steps."""
    return sum(cost_at(j / steps, costs) / j for j in range(1, steps + 1))


def cost_over_orders(model: Model, row: list[int], mask_id: int) -> float:
    """The chain rule of one row, token by token, averaged over every order."""
    orders = list(itertools.permutations(range(len(row))))
    total = 0.0
    for order in orders:
        xt = torch.full((1, len(row)), mask_id)
        for i in order:
            total -= model(xt)[0, i].log_softmax(dim=-1)[row[i]].item()
            xt[0, i] = row[i]
    return total / len(orders)


# --- The reverse process, by enumeration ---------------------------------------------------------


def sampler_law(
    model: Model,
    problem: Problem,
    steps: int,
    start: Tensor | None = None,
    change: Callable[[Tensor], Tensor] = lambda probabilities: probabilities,
    remask: float = 0.0,
) -> Tensor:
    """The law (V ** L,) after K ancestral steps from `start` (L,), all masks by default.

    In each step a masked token is revealed with probability 1 - s/t, and then drawn from
    change(the network's probabilities). With `remask`, a revealed one is masked again with
    probability sigma = min(remask, s / (1 - t)), and a masked one revealed with probability
    (t - s + sigma (1 - t)) / t (ReMDM).
    """
    V, states = problem.V, problem.states
    start = torch.full((problem.L,), V) if start is None else start
    probabilities = change(model(states).softmax(dim=-1))  # (states, L, V)
    is_masked, is_hole = (states == V)[..., None], (start == V)[:, None].double()
    law = torch.zeros(len(states), dtype=torch.float64)
    law[place_of(start[None], V + 1)] = 1.0
    for j in range(steps):
        t, s = 1 - j / steps, 1 - (j + 1) / steps
        sigma = min(remask, s / (1 - t)) if j else 0.0
        reveal = (t - s + sigma * (1 - t)) / t
        waits = torch.full((*states.shape, 1), 1 - reveal, dtype=torch.float64)
        moves = torch.cat((probabilities * reveal, waits), dim=-1)  # (states, L, V + 1)
        again = F.one_hot(torch.tensor(V), V + 1) * sigma * is_hole  # (L, V + 1)
        keeps = F.one_hot(states, V + 1) * (1 - sigma * is_hole) + again
        moves = torch.where(is_masked, moves, keeps)
        each = [moves[:, i, states[:, i]] for i in range(problem.L)]
        law = law @ torch.stack(each).prod(dim=0)  # (states,)
    return law[(states < V).all(dim=1)]


def schedule_law(model: Model, problem: Problem, when: list[int]) -> Tensor:
    """The law (V ** L,) of revealing position i in step when[i], those of a step independently."""
    x, law = problem.data, torch.ones(len(problem.law), dtype=torch.float64)
    xt = torch.full_like(x, problem.V)
    for j in sorted(set(when)):
        now = torch.tensor(when) == j
        each = model(xt).softmax(dim=-1).gather(-1, x[..., None]).squeeze(-1)  # (V ** L, L)
        law, xt = law * each[:, now].prod(dim=1), torch.where(now, x, xt)
    return law


def any_order_law(model: Model, problem: Problem) -> Tensor:
    """The law (V ** L,) of revealing one uniformly random position at a time."""
    orders = list(itertools.permutations(range(problem.L)))
    return sum(schedule_law(model, problem, order) for order in orders) / len(orders)


def total_variation(p: Tensor, q: Tensor) -> float:
    return (p - q).abs().sum().item() / 2


def divergence(p: Tensor, q: Tensor) -> float:
    """KL(p || q) in nats."""
    return torch.special.xlogy(p, p / q).sum().item()


# --- Statistics ----------------------------------------------------------------------------------


def z_score(values: Tensor, expected: float) -> float:
    """How many standard errors the mean of `values` lies away from what it should be."""
    return abs(values.mean().item() - expected) / (values.std().item() / math.sqrt(len(values)))


def chi_square_z(counts: Tensor, law: Tensor) -> float:
    """Pearson's statistic of counts (n,) against a law (n,), as a standard normal deviate.

    By the cube root of Wilson and Hilferty (1931). What is expected less than five times is taken
    together; infinite if something impossible was counted.
    """
    if counts[law == 0].any():
        return math.inf
    counts, expected, rare = counts.double(), law * counts.sum(), law * counts.sum() < 5
    if rare.any():
        counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
        expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
