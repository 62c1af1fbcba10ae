"""Every strategy against enumerated laws and definitions in plain Python."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from problems import (
    CHAIN,
    LOOP,
    Counting,
    any_order_law,
    arbitrary_network,
    chi_square_z,
    exact_denoiser,
    sampler_law,
    schedule_law,
    seeded,
    total_variation,
    z_score,
)
from test_sampling import L, V, draw_tokens, linear_network, prompts, sampled

import diffusion
from nanomdm import strategies
from nanomdm.strategies import STRATEGIES

PROBLEMS = {"chain": CHAIN, "loop": LOOP}
NETWORKS = {"exact": exact_denoiser, "arbitrary": arbitrary_network}
GREEDY = ["confidence", "margin", "entropy", "threshold", "eb"]


def counts(model, problem, **settings) -> torch.Tensor:
    """How often each sequence is among 40,000 samples."""
    return problem.counts(sampled(model, *problem.blank(40_000), problem.V, **settings).ids)


def ids_of(**settings) -> torch.Tensor:
    """Samples (6, L) of `linear_network`, in a canvas with given tokens."""
    return sampled(linear_network, *prompts(6), V, **settings).ids


# --- Laws ----------------------------------------------------------------------------------------


def test_the_any_order_law_of_an_exact_denoiser_is_that_of_the_data():
    assert total_variation(any_order_law(exact_denoiser(LOOP), LOOP), LOOP.law) < 1e-12


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_first_hitting_follows_the_any_order_law(name, network):
    problem = PROBLEMS[name]
    model = NETWORKS[network](problem)
    drawn = counts(model, problem, strategy="first_hitting")
    assert chi_square_z(drawn, any_order_law(model, problem)) < 4


@pytest.mark.parametrize("name", PROBLEMS)
def test_left_to_right_follows_the_chain_rule_from_the_left(name):
    problem = PROBLEMS[name]
    model = arbitrary_network(problem)
    law = schedule_law(model, problem, when=list(range(problem.L)))
    assert chi_square_z(counts(model, problem, strategy="left_to_right"), law) < 4


def spread_law(model, problem, steps: int) -> torch.Tensor:
    """Every K-th position a step; the mean over the K positions to begin with."""
    turns = sorted(range(steps), key=lambda turn: turn * (math.sqrt(5) - 1) / 2 % 1)
    laws = [
        schedule_law(model, problem, [turns[(i + start) % steps] for i in range(problem.L)])
        for start in range(steps)
    ]
    return sum(laws) / steps


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", PROBLEMS)
def test_spread_follows_the_law_of_its_order(name, steps):
    problem = PROBLEMS[name]
    model = arbitrary_network(problem)
    drawn = counts(model, problem, strategy="spread", steps=steps)
    assert chi_square_z(drawn, spread_law(model, problem, steps)) < 4


@pytest.mark.parametrize("steps", [4, 16, 40])
def test_what_spread_reveals_together_is_as_many_positions_apart_as_there_are_steps(steps):
    events, canvas = [], torch.full((20, 300), 2)
    network = lambda xt: torch.zeros(*xt.shape, 2)  # noqa: E731
    sampled(network, canvas, canvas == 2, 2, strategy="spread", steps=steps, history=events)
    for rows, columns in (event.revealed.nonzero(as_tuple=True) for event in events):
        same_row = rows[1:] == rows[:-1]
        assert ((columns[1:] - columns[:-1])[same_row] == steps).all()


@pytest.mark.parametrize("steps", [5, 16, 90, 1024])
def test_no_large_gap_is_left_between_the_classes_that_spread_has_revealed(steps):
    """After n classes the largest gap is less than twice the smallest there could be, 1 / n."""
    events, canvas = [], torch.zeros(1, steps).long()
    network = lambda xt: torch.zeros(*xt.shape, 2)  # noqa: E731
    is_masked = torch.ones(1, steps, dtype=torch.bool)
    sampled(network, canvas, is_masked, 2, strategy="spread", steps=steps, history=events)
    seen = []
    for event in events:
        seen = sorted([*seen, int(event.revealed[0].nonzero())])
        gaps = [
            after - before for before, after in zip(seen, [*seen[1:], seen[0] + steps], strict=True)
        ]
        assert max(gaps) <= 2 * steps / len(seen) + 1


def test_spread_fills_blanks_in_equal_parts_wherever_they_are():
    """Positions that are all K apart in the text are not one class: their ranks count."""
    events, canvas = [], torch.zeros(3, 64).long()
    is_masked = (torch.arange(64) % 8 == 3).expand(3, 64)
    network = lambda xt: torch.zeros(*xt.shape, 2)  # noqa: E731
    sampled(network, canvas, is_masked, 2, strategy="spread", steps=8, history=events)
    assert [int(event.revealed.sum()) for event in events] == [3] * 8


@pytest.mark.parametrize("steps, distance", [(32, 0.031972), (128, 0.016847)])
def test_the_enumerated_law_of_remasking_is_as_far_from_the_data_as_the_table_says(steps, distance):
    law = sampler_law(exact_denoiser(CHAIN), CHAIN, steps, remask=0.2)
    assert total_variation(CHAIN.law, law) == pytest.approx(distance, abs=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("steps, rate", [(2, 0.2), (5, 0.2), (4, 1.0), (32, 0.2)])
def test_remasking_follows_its_enumerated_law(name, network, steps, rate):
    problem = PROBLEMS[name]
    model = NETWORKS[network](problem)
    drawn = counts(model, problem, strategy="remask", steps=steps, remask_rate=rate)
    assert chi_square_z(drawn, sampler_law(model, problem, steps, remask=rate)) < 4


def test_remasking_never_masks_a_given_token():
    start, model = torch.tensor([LOOP.V, 1, LOOP.V, 0]), arbitrary_network(LOOP)
    canvas = start.expand(40_000, 4)
    settings = {"strategy": "remask", "steps": 6, "remask_rate": 0.5}
    ids = sampled(model, canvas, canvas == LOOP.V, LOOP.V, **settings).ids
    law = sampler_law(model, LOOP, 6, start, remask=0.5)
    assert chi_square_z(LOOP.counts(ids), law) < 4


def test_two_rows_that_share_a_seed_are_independent():
    """Joint counts of the first tokens of rows 2 i and 2 i + 1."""
    settings = {"strategy": "remask", "steps": 4, "remask_rate": 0.2}
    ids = sampled(exact_denoiser(CHAIN), *CHAIN.blank(40_000), 2, **settings).ids
    pairs = ids[::2, 0] * 2 + ids[1::2, 0]
    assert chi_square_z(pairs.bincount(minlength=4), torch.full((4,), 0.25).double()) < 4


def test_remasking_leaves_the_share_of_masks_at_time_s_at_s():
    left = []
    sampled(
        arbitrary_network(LOOP),
        *LOOP.blank(20_000),
        LOOP.V,
        strategy="remask",
        steps=10,
        remask_rate=0.3,
        callback=lambda j, t, xt: left.append((t, (xt == LOOP.V).double().mean(dim=1))),
    )
    assert all(z_score(share, t) < 4 for t, share in left[:-1])


# --- Strategies that agree -----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_remasking_at_rate_0_is_ancestral_sampling_token_for_token(steps):
    remasked = ids_of(strategy="remask", steps=steps, remask_rate=0.0)
    assert torch.equal(remasked, ids_of(strategy="stochastic", steps=steps))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_settings_that_say_nothing_change_nothing(strategy):
    neutral = {"guidance": 0.0, "temperature": 1.0, "top_k": V, "top_p": 1.0, "block_length": L}
    plain = ids_of(strategy=strategy, steps=5)
    for name, value in neutral.items():
        assert torch.equal(ids_of(strategy=strategy, steps=5, **{name: value}), plain), name


def test_threshold_0_is_one_call():
    canvas, is_masked = prompts(6)
    assert (
        sampled(linear_network, canvas, is_masked, V, strategy="threshold", threshold=0).calls == 1
    )


@pytest.mark.parametrize("settings", [
    {"strategy": "threshold", "threshold": 1.0},
    {"strategy": "eb", "gamma": 0.0},
    {"strategy": "first_hitting"},
])  # fmt: skip
def test_one_position_at_a_time_is_as_many_calls_as_holes(settings):
    holes = prompts(6)[1].sum(dim=1).max().item()
    filled = []
    result = sampled(
        linear_network, *prompts(6), V, **settings,
        callback=lambda j, t, xt: filled.append((xt == V).sum(dim=1)),
    )  # fmt: skip
    assert result.calls == holes
    assert all(((a - b) == (a > 0).long()).all() for a, b in zip(filled, filled[1:], strict=False))


@pytest.mark.parametrize(
    "other, order",
    [
        ({"strategy": "threshold", "threshold": 1.0}, "confidence"),
        ({"strategy": "eb", "gamma": 0.0}, "entropy"),
    ],
)
def test_one_position_at_a_time_is_the_order_that_its_score_gives(other, order):
    canvas, is_masked = torch.full((6, L), V), torch.ones(6, L, dtype=torch.bool)
    first = sampled(linear_network, canvas, is_masked, V, **other)
    assert torch.equal(
        first.ids, sampled(linear_network, canvas, is_masked, V, strategy=order, steps=L).ids
    )


def test_eb_with_a_boundless_gamma_is_one_call():
    assert sampled(linear_network, *prompts(6), V, strategy="eb", gamma=1e9).calls == 1


# --- Greedy strategies, from their definitions ---------------------------------------------------


def plain_entropy(p: list[float]) -> float:
    return -sum(q * math.log(q) for q in p)


PLAIN_SCORES = {
    "confidence": max,
    "margin": lambda p: sorted(p)[-1] - sorted(p)[-2],
    "entropy": lambda p: -plain_entropy(p),
    "threshold": max,
    "eb": lambda p: -plain_entropy(p),
}


def plain_number(strategy: str, scores: list[float], holes: int, j: int, steps: int) -> int:
    """How many of the masked positions to fill in step j; scores from the best to the worst."""
    if strategy == "threshold":
        return max(1, sum(score > 0.5 for score in scores))
    if strategy == "eb":
        fits = [k for k in range(1, len(scores) + 1) if sum(-s for s in scores[: k - 1]) <= 1.2]
        return max(fits)
    return holes * j // steps - (holes - len(scores))


def plain_decoding(strategy: str, canvas: list, is_masked: list, steps: int, block: int) -> list:
    """The states of one row after each step at temperature 0; blocks of so many holes."""
    every = [i for i in range(L) if is_masked[i]]
    xt = [V if is_masked[i] else canvas[i] for i in range(L)]
    states = []
    for start in range(0, len(every), block):
        holes = every[start : start + block]
        left, j = list(holes), 0
        while left if strategy in ("threshold", "eb") else j < steps:
            j += 1
            table = linear_network(torch.tensor([xt]))[0].softmax(dim=-1).tolist()
            ranked = sorted(left, key=lambda i: PLAIN_SCORES[strategy](table[i]), reverse=True)
            scores = [PLAIN_SCORES[strategy](table[i]) for i in ranked]
            for i in ranked[: plain_number(strategy, scores, len(holes), j, steps)]:
                xt[i] = max(range(V), key=table[i].__getitem__)
                left.remove(i)
            if not states or xt != states[-1]:
                states.append(list(xt))
    return states


@pytest.mark.parametrize("block", [L, 4])
@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("strategy", GREEDY)
def test_a_greedy_strategy_is_its_definition_token_for_token(strategy, steps, block):
    canvas, is_masked = prompts(6)
    for i in range(6):
        states, row = [], slice(i, i + 1)
        sampled(
            linear_network, canvas[row], is_masked[row], V, temperature=0.0,
            **{"strategy": strategy, "steps": steps, "block_length": block},
            **{"threshold": 0.5, "gamma": 1.2},
            callback=lambda j, t, xt, states=states: states.append(xt[0].tolist()),
        )  # fmt: skip
        changed = [s for s, before in zip(states, [None, *states], strict=False) if s != before]
        expected = plain_decoding(strategy, canvas[i].tolist(), is_masked[i].tolist(), steps, block)
        assert changed[-len(expected) :] == expected


# --- Filters -------------------------------------------------------------------------------------


def test_top_k_keeps_the_k_likeliest_in_their_proportions():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log().expand(700, -1)
    u = (torch.arange(700, dtype=torch.float64) + 0.5) / 700
    drawn = draw_tokens(logits, u, truncate=partial(strategies.keep_likeliest, top_k=2)).bincount(
        minlength=4
    )
    assert drawn.tolist() == pytest.approx([0, 400, 0, 300], abs=1)


def test_top_p_counts_what_top_k_has_left():
    """Of 0.4 and 0.3, the first has 0.57."""
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    kept = [(strategies.keep_likeliest(p, top_k=2, top_p=x) > 0).tolist()[0] for x in (0.55, 0.6)]
    assert kept == [[False, True, False, False], [False, True, False, True]]


def test_of_equal_tokens_top_k_keeps_k():
    assert (strategies.keep_likeliest(torch.full((1, 8), 1 / 8), top_k=3) > 0).sum() == 3


@pytest.mark.parametrize("temperature", [1e-300, 1e-3])
def test_a_tiny_temperature_takes_the_most_probable_token(temperature):
    logits = 10 * torch.randn(500, 9, generator=seeded(0))
    u = torch.rand(500, dtype=torch.float64, generator=seeded(1))
    assert torch.equal(draw_tokens(logits, u, temperature), logits.argmax(dim=-1))


# --- Guidance ------------------------------------------------------------------------------------


def test_guided_samples_follow_the_guided_law():
    """The network of the definition, (1 + w) logits(given) - w logits(given masked), enumerated."""
    w, start, network = 1.5, torch.tensor([LOOP.V, 1, LOOP.V, 0]), arbitrary_network(LOOP)

    def guided(xt: torch.Tensor) -> torch.Tensor:
        blind = torch.where(start < LOOP.V, LOOP.V, xt)
        return (1 + w) * network(xt) - w * network(blind)

    canvas = start.expand(40_000, 4)
    ids = sampled(network, canvas, canvas == LOOP.V, LOOP.V, steps=3, guidance=w).ids
    assert chi_square_z(LOOP.counts(ids), sampler_law(guided, LOOP, 3, start)) < 4


def test_guidance_costs_two_calls_a_step():
    model = Counting(linear_network)
    result = sampled(model, *prompts(6), V, strategy="confidence", steps=3, guidance=1.0)
    assert 2 * result.calls == model.calls == 6


def test_guidance_sees_as_prompt_what_was_given_and_not_the_blocks_before():
    seen = []

    def model(xt):
        seen.append(xt.clone())
        return linear_network(xt)

    canvas, is_masked = prompts(6)
    sampled(model, canvas, is_masked, V, strategy="threshold", block_length=3, guidance=1.0)
    assert all((blind[~is_masked] == V).all() for blind in seen[1::2])
    assert all(
        torch.equal(a[is_masked], b[is_masked]) for a, b in zip(seen[::2], seen[1::2], strict=True)
    )


# --- Blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_are_filled_from_left_to_right(strategy):
    canvas, is_masked = prompts(6)
    block = (is_masked.cumsum(dim=1) - 1) // 3

    def callback(j, t, xt):
        left = (xt == V) & is_masked
        for i in range(6):
            done = block[i, is_masked[i] & ~left[i]].tolist()
            waiting = block[i, left[i]].tolist()
            assert not done or not waiting or max(done) <= min(waiting)

    ids = sampled(
        linear_network,
        canvas,
        is_masked,
        V,
        strategy=strategy,
        steps=4,
        block_length=3,
        callback=callback,
    ).ids
    assert (ids < V).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_of_a_batch_is_what_it_is_alone_with_everything_switched_on(strategy):
    canvas, is_masked = prompts(6)
    settings = {"strategy": strategy, "steps": 4, "block_length": 3, "guidance": 0.5}
    settings |= {"temperature": 1.0, "top_k": 4, "top_p": 0.95}
    batch = sampled(linear_network, canvas, is_masked, V, **settings).ids
    for i in range(6):
        row = torch.tensor([i])
        alone = sampled(linear_network, canvas[row], is_masked[row], V, rows=row, **settings).ids
        assert torch.equal(alone[0], batch[i])


# --- Calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["confidence", "margin", "entropy"])
def test_an_order_makes_no_call_for_a_step_without_a_budget(strategy):
    canvas = torch.full((4, L), V)
    result = sampled(linear_network, canvas, canvas == V, V, strategy=strategy, steps=5 * L)
    assert result.calls == L


def test_a_step_that_only_masks_again_makes_no_call():
    canvas, model, changes = torch.full((1, L), V), Counting(linear_network), []
    events = []
    sampled(
        model, canvas, canvas == V, V, strategy="remask", steps=60, remask_rate=0.2, history=events,
        callback=lambda j, t, xt: changes.append(model.calls),
    )  # fmt: skip
    revealing = {event.step for event in events if event.tokens is not None}
    masking = {event.step for event in events if event.again is not None and event.again.any()}
    assert masking - revealing and len(revealing) == model.calls


# --- History -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_history_replays_every_state(strategy):
    canvas, is_masked = prompts(6)
    states, events = [], []
    result = sampled(
        linear_network, canvas, is_masked, V, strategy=strategy, steps=20, block_length=4,
        history=events, callback=lambda j, t, xt: states.append(xt.clone()),
    )  # fmt: skip
    xt = canvas.masked_fill(is_masked, V)
    assert [event.step for event in events] == list(range(1, len(states) + 1))
    for event, state in zip(events, states, strict=True):
        if event.tokens is not None:
            xt[event.revealed] = event.tokens
        if event.again is not None:
            xt[event.again] = V
        assert torch.equal(xt, state)
    assert result.history is events and torch.equal(xt, result.ids)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_history_has_the_logits_before_temperature_and_truncation(strategy):
    canvas, is_masked = prompts(6)
    events, states = [], [canvas.masked_fill(is_masked, V)]
    sampled(
        linear_network, canvas, is_masked, V, strategy=strategy, temperature=0.5, top_k=2,
        history=events, steps=20, callback=lambda j, t, xt: states.append(xt.clone()),
    )  # fmt: skip
    for event in (event for event in events if event.tokens is not None):
        table = linear_network(states[event.step - 1])[event.revealed]
        assert torch.equal(event.logits, table) and len(event.tokens) == len(table)


def test_a_history_changes_no_sample():
    assert torch.equal(
        ids_of(strategy="remask", steps=9), ids_of(strategy="remask", steps=9, history=[])
    )


def test_a_vocabulary_of_one_token_can_be_sampled_by_every_strategy():
    canvas = torch.full((2, 5), 1)
    for strategy in STRATEGIES:
        network = lambda xt: torch.zeros(*xt.shape, 1)  # noqa: E731
        result = sampled(network, canvas, canvas == 1, 1, strategy=strategy, history=[])
        assert (result.ids == 0).all()


# --- Settings and labels -------------------------------------------------------------------------


def section(**settings) -> SimpleNamespace:
    """The `sampling` section of a configuration."""
    defaults = {"strategy": "stochastic", "steps": 4, "temperature": 1.0}
    return SimpleNamespace(**defaults | {"options": {}} | settings)


class Network(torch.nn.Module):
    """`linear_network` as what `Sampler.fill` takes."""

    device, config = torch.device("cpu"), SimpleNamespace(mask_id=V, block_size=L)

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, xt):
        self.calls += 1
        return linear_network(xt)


def from_config(**settings) -> strategies.Sampler:
    return strategies.from_config(section(**settings), diffusion.sample)


def filled(**settings) -> torch.Tensor:
    canvas, is_masked = prompts(6)
    sampler = from_config(**settings)
    return sampler.fill(Network(), canvas, is_masked, generator=seeded(0)).ids


@pytest.mark.parametrize(
    "settings, options",
    [
        ({"strategy": "threshold"}, {"threshold": 0.5}),
        ({"strategy": "eb"}, {"gamma": 1.2}),
        ({"strategy": "remask"}, {"remask_rate": 0.4}),
        ({"strategy": "margin"}, {"top_k": 3, "top_p": 0.8}),
        ({"strategy": "entropy", "temperature": 0.5}, {"block_length": 3, "guidance": 0.5}),
    ],
)
def test_the_settings_of_a_run_reach_the_sampler(settings, options):
    expected = ids_of(**{"steps": 4} | settings | options)
    assert torch.equal(filled(**settings, options=options), expected)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"strategy": "greedy"}, "greedy is unknown: choose stochastic, confidence, spread"),
        (
            {"options": {"gamma": 1}},
            "options.gamma is no option of stochastic but of eb: choose top_k",
        ),
        (
            {"strategy": "eb", "options": {"threshold": 1}},
            "options.threshold is no option of eb but of threshold: choose gamma",
        ),
    ],
)
def test_a_setting_that_no_strategy_has_is_answered_with_those_that_there_are(settings, message):
    with pytest.raises(ValueError, match=message):
        from_config(**settings)


def test_an_autoregressive_network_is_sampled_from_left_to_right():
    sampler = strategies.from_config(section(), diffusion.sample, causal=True)
    assert sampler.name == "left_to_right"


def test_guidance_costs_two_calls_a_step_and_none_without_a_given_token():
    sampler, model = from_config(strategy="confidence", options={"guidance": 2.0}), Network()
    assert sampler.fill(model, *prompts(6), generator=seeded(0)).calls == model.calls == 8
    blank = torch.full((6, L), V), torch.ones(6, L, dtype=torch.bool)
    model = Network()
    assert sampler.fill(model, *blank, generator=seeded(0)).calls == model.calls == 4


EXACT = ["confidence", "margin", "entropy", "threshold", "eb", "left_to_right"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_label_says_what_is_known_of_the_likelihood_of_a_sample(strategy):
    """Exact where the positions are a function of the state (DUEL, arXiv 2603.01367)."""
    label = from_config(strategy=strategy).label
    random = {"remask": "no likelihood"}.get(strategy, "bound on the likelihood")
    assert label == ("exact likelihood" if strategy in EXACT else random)
