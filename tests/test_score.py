"""diffusion.score: what a text costs under each sampler, against enumeration and against samples.

A score is -log p(x) where the positions are a function of the state, -log p(x | noise) otherwise:
probabilities of all texts add up to 1 in either case, if all of them see the same noise.
"""

import math
from functools import partial

import pytest
import torch
from problems import (
    CHAIN,
    CHAIN_ENTROPY,
    CHAIN_TEXT,
    LOOP,
    Problem,
    any_order_law,
    arbitrary_network,
    bound_with_steps,
    chi_square_z,
    cost_over_orders,
    exact_denoiser,
    mask_costs,
    sampler_law,
    schedule_law,
    seeded,
    z_score,
)
from test_sampling import OPTIONS, L, V, linear_network
from test_strategies import counts, prompts, spread_law

import diffusion
from model import ModelConfig, Transformer
from nanomdm import bounds, strategies, texts
from nanomdm.strategies import BOUND, EXACT, LIKELIHOODS, NONE, STRATEGIES

PROBLEMS = {"chain": CHAIN, "loop": LOOP}
SCORED = [name for name in STRATEGIES if LIKELIHOODS[name] != NONE]
CERTAIN = [name for name in SCORED if LIKELIHOODS[name] == EXACT]
RANDOM = [name for name in SCORED if LIKELIHOODS[name] == BOUND]


def score(model, x0, mask_id, seed=0, *, strategy, is_masked=None, **settings) -> torch.Tensor:
    """`diffusion.score` with a strategy by its name, its options, truncation and guidance."""
    if isinstance(strategy, str):
        own = {name: settings.pop(name) for name in OPTIONS & settings.keys()}
        strategy = STRATEGIES[strategy]
        if own:
            strategy = partial(strategy, **own)
    if guidance := settings.pop("guidance", 0):
        model = strategies.guided(model, is_masked, mask_id, guidance)
    kept = {name: settings.pop(name) for name in ("top_k", "top_p") if name in settings}
    if kept:
        settings["truncate"] = partial(strategies.keep_likeliest, **kept)
    settings |= {"is_masked": is_masked, "mask_id": mask_id, "generator": seeded(seed)}
    return diffusion.score(model, x0, strategy=strategy, **settings)


def law(model, problem: Problem, seed: int = 0, **settings) -> torch.Tensor:
    """p(x) (V ** L,) of every text; p(x | noise) if the strategy looks at its noise."""
    same = torch.zeros(len(problem.data), dtype=torch.long)  # one noise for all texts
    return score(model, problem.data, problem.V, seed, rows=same, **settings).neg().exp()


def costs_over_noise(model, x0, mask_id, draws: int, **settings) -> torch.Tensor:
    """The scores (draws, B) of x0 (B, L) in independent noise."""
    return score(model, x0.repeat(draws, 1), mask_id, **settings).view(draws, -1)


# --- Laws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1},
        {"steps": 2},
        {"steps": 3, "temperature": 0.6},
        {"steps": 2, "top_k": 1},
        {"steps": 2, "top_p": 0.7, "temperature": 2.0},
        {"steps": 2, "block_length": 2},
        {"steps": 2, "temperature": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", SCORED)
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_probabilities_of_all_texts_add_up_to_one(name, strategy, settings):
    problem = PROBLEMS[name]
    probabilities = law(arbitrary_network(problem), problem, strategy=strategy, **settings)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("options", [{"threshold": 0.4}, {"gamma": 1.0}], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_so_do_those_of_strategies_that_reveal_as_many_as_they_are_sure_of(name, options):
    problem = PROBLEMS[name]
    strategy = {"threshold": "threshold", "gamma": "eb"}[next(iter(options))]
    probabilities = law(arbitrary_network(problem), problem, strategy=strategy, **options)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("strategy", SCORED)
def test_given_tokens_are_context_and_cost_nothing(strategy, guidance):
    """The completions of 0 _ _ 1 add up to one, with guidance and without."""
    given = (LOOP.data[:, 0] == 0) & (LOOP.data[:, 3] == 1)
    x0, is_masked = LOOP.data[given], torch.tensor([False, True, True, False]).expand(9, 4)
    settings = {"strategy": strategy, "steps": 2, "guidance": guidance, "is_masked": is_masked}
    rows = torch.zeros(9, dtype=torch.long)
    nats = score(arbitrary_network(LOOP), x0, LOOP.V, rows=rows, **settings)
    assert nats.neg().exp().sum().item() == pytest.approx(1, abs=1e-12)
    none = torch.zeros_like(is_masked)
    assert (score(None, x0, LOOP.V, strategy=strategy, is_masked=none) == 0).all()


@pytest.mark.parametrize(
    "settings", [{"steps": 1}, {"steps": 2}, {"steps": 3, "temperature": 0.7, "top_k": 2}], ids=str
)
@pytest.mark.parametrize("strategy", CERTAIN)
@pytest.mark.parametrize("name", PROBLEMS)
def test_samples_follow_the_law_that_the_scores_say(name, strategy, settings):
    problem = PROBLEMS[name]
    model = arbitrary_network(problem)
    drawn = counts(model, problem, strategy=strategy, **settings)
    assert chi_square_z(drawn, law(model, problem, strategy=strategy, **settings)) < 4


@pytest.mark.parametrize("change", [{"temperature": 0.9}, {"steps": 3}, {"strategy": "entropy"}])
def test_samples_do_not_follow_the_scores_of_another_sampler(change):
    """So the test above would see a difference."""
    settings, model = {"strategy": "margin", "steps": 2}, arbitrary_network(LOOP)
    drawn = counts(model, LOOP, **settings)
    assert chi_square_z(drawn, law(model, LOOP, **settings | change)) > 10


@pytest.mark.parametrize("strategy", RANDOM)
@pytest.mark.parametrize("name", PROBLEMS)
def test_over_the_noise_the_probabilities_average_to_the_enumerated_law(name, strategy):
    problem, steps = PROBLEMS[name], 3
    model = arbitrary_network(problem)
    settings = {"strategy": strategy, "steps": steps}
    nats = costs_over_noise(model, problem.data, problem.V, 5000, **settings)
    expected = {
        "stochastic": lambda: sampler_law(model, problem, steps),
        "spread": lambda: spread_law(model, problem, steps),
        "first_hitting": lambda: any_order_law(model, problem),
    }[strategy]()
    p = nats.neg().exp()
    errors = p.std(dim=0) / len(p) ** 0.5
    assert ((p.mean(dim=0) - expected).abs() < 5 * errors + 1e-12).all()
    assert (nats.mean(dim=0) + 4 * nats.std(dim=0) / len(nats) ** 0.5 >= -expected.log()).all()


@pytest.mark.parametrize("strategy", SCORED)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "top_p": 0.8, "block_length": 5}])
def test_a_sample_costs_what_its_score_says_in_the_same_noise(strategy, settings):
    canvas, is_masked = prompts(6)
    options = {"strategy": STRATEGIES[strategy], "steps": 4, "mask_id": V, "is_masked": is_masked}
    if "top_p" in settings:
        settings = dict(settings)
        options["truncate"] = partial(strategies.keep_likeliest, top_p=settings.pop("top_p"))
    options |= settings
    drawn = diffusion.sample(linear_network, canvas, generator=seeded(3), **options)
    costs = diffusion.score(linear_network, drawn.ids, generator=seeded(3), **options)
    assert torch.equal(drawn.costs.sum(dim=1), costs) and costs.isfinite().all()


@pytest.mark.parametrize("strategy", SCORED)
def test_a_text_costs_the_same_alone_as_in_a_batch(strategy):
    x0 = torch.randint(V, (6, L), generator=seeded(1))
    _, is_masked = prompts(6)
    settings = {"strategy": strategy, "steps": 5}
    together = score(linear_network, x0, V, is_masked=is_masked, **settings)
    for i, row in enumerate(x0):
        rows = torch.tensor([i])
        alone = score(
            linear_network, row[None], V, is_masked=is_masked[i : i + 1], rows=rows, **settings
        )
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("strategy", SCORED)
def test_only_a_score_with_the_label_exact_is_the_same_in_all_noise(strategy):
    x0 = torch.randint(V, (6, L), generator=seeded(1))
    one, other = (score(linear_network, x0, V, seed, strategy=strategy, steps=4) for seed in (0, 1))
    assert torch.equal(one, other) == (LIKELIHOODS[strategy] == EXACT)


# --- What the theory says ------------------------------------------------------------------------


def mean_cost(strategy, **settings) -> float:
    """The expected score of the chain's texts under its exact denoiser."""
    settings |= {"strategy": strategy}
    return score(exact_denoiser(CHAIN), CHAIN_TEXT, CHAIN.V, **settings).mean().item()


@pytest.mark.parametrize("strategy", SCORED)
def test_one_position_a_call_costs_the_entropy_and_all_at_once_costs_every_token_alone(strategy):
    options = {"threshold": {"threshold": 1.0}, "eb": {"gamma": 0.0}}.get(strategy, {})
    if strategy not in ("stochastic", "spread"):
        assert mean_cost(strategy, steps=3, **options) == pytest.approx(CHAIN_ENTROPY, abs=1e-9)
    if not getattr(STRATEGIES[strategy], "adaptive", False):
        assert mean_cost(strategy, steps=1) == pytest.approx(3 * math.log(2), abs=1e-9)


@pytest.mark.parametrize(
    "first, cost", [((0, 2), 1.6387228409), ((0, 1), 1.8866967847), ((1, 2), 1.7113773345)]
)
def test_two_positions_at_once_cost_what_they_tell_of_each_other(first, cost):
    """T9: neighbours cost more than positions that are far apart."""

    def pair_first(state):
        chosen = torch.isin(torch.arange(3), torch.tensor(first))
        return state.is_masked & (chosen if state.index == 0 else ~chosen)

    assert mean_cost(pair_first, steps=2) == pytest.approx(cost, abs=1e-9)


@pytest.mark.parametrize(
    "steps, cost", [(2, 1.7840257768), (4, 1.6475763565), (8, 1.5821662618), (32, 1.5343400852)]
)
def test_k_steps_of_stochastic_cost_the_bound_of_k_steps(steps, cost):
    model = exact_denoiser(CHAIN)
    assert bound_with_steps(
        steps, mask_costs(model, CHAIN_TEXT, CHAIN.V).mean(dim=0)
    ).item() == pytest.approx(cost, abs=1e-9)
    settings = {"strategy": "stochastic", "steps": steps}
    nats = costs_over_noise(model, CHAIN_TEXT, CHAIN.V, 1000, **settings)
    assert z_score(nats.mean(dim=1), cost) < 4


def test_the_estimator_of_one_call_a_row_has_the_mean_of_k_calls():
    model, steps = arbitrary_network(LOOP), 3
    x0 = LOOP.draw(20, 0)
    options = {"mask_id": LOOP.V, "generator": seeded(1), "draws": 2000}
    nll = partial(diffusion.nll_from_logits, model)
    one_call, _, _ = diffusion.estimate(partial(bounds.discrete, steps=steps), nll, x0, **options)
    settings = {"strategy": "stochastic", "steps": steps}
    calls = costs_over_noise(model, x0, LOOP.V, 2000, **settings)
    for i in range(len(x0)):
        gap = one_call[:, i].mean() - calls[:, i].mean()
        error = math.hypot(one_call[:, i].std(), calls[:, i].std()) / 2000**0.5
        assert abs(gap) < 4 * error


def test_one_random_position_a_call_costs_the_chain_rule_over_all_orders():
    model, x0 = arbitrary_network(LOOP), LOOP.draw(6, 0)
    nats = costs_over_noise(model, x0, LOOP.V, 3000, strategy="first_hitting")
    for i, row in enumerate(x0.tolist()):
        assert z_score(nats[:, i], cost_over_orders(model, row, LOOP.V)) < 4


def test_left_to_right_costs_the_chain_rule_to_the_last_digit():
    expected = schedule_law(arbitrary_network(LOOP), LOOP, when=list(range(LOOP.L)))
    found = law(arbitrary_network(LOOP), LOOP, strategy="left_to_right")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_what_a_text_costs_from_left_to_right_is_the_sum_of_its_parts():
    """-log p(a, b) = -log p(a) - log p(b | a), exactly, where the order is fixed."""
    model, x0 = arbitrary_network(LOOP), LOOP.draw(6, 0)
    begins = torch.tensor([True, True, False, False])

    def short(ids):  # the network on the first two alone: what follows is masked
        return model(torch.cat((ids, torch.full_like(ids, LOOP.V)), dim=1))[:, :2]

    whole = score(model, x0, LOOP.V, strategy="left_to_right")
    begin = score(short, x0[:, :2], LOOP.V, strategy="left_to_right")
    rest = ~begins.expand(6, 4)
    end = score(model, x0, LOOP.V, strategy="left_to_right", is_masked=rest)
    torch.testing.assert_close(begin + end, whole)


# --- Beyond the context --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", SCORED)
def test_the_windows_of_a_long_text_add_up_to_its_cost(strategy):
    """All texts of five binary tokens in a context of three, as sample.py fills them."""
    model, data = arbitrary_network(CHAIN), Problem(2, 5, torch.ones(32) / 32).data
    total = torch.zeros(32, dtype=torch.float64)
    for number, (start, stop, first) in enumerate(texts.windows(5, 3, 1)):
        is_masked = (torch.arange(start, stop) >= first).expand(32, -1)
        rows = torch.zeros(32, dtype=torch.long)
        settings = {"strategy": strategy, "steps": 2, "is_masked": is_masked, "rows": rows}
        total += score(model, data[:, start:stop], CHAIN.V, number, **settings)
    assert total.neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


# --- What has no score ---------------------------------------------------------------------------


def test_remasking_has_no_score_and_says_why():
    with pytest.raises(ValueError, match="many paths lead to a text"):
        score(arbitrary_network(LOOP), LOOP.data, LOOP.V, strategy="remask", steps=8)


def test_a_strategy_that_leaves_a_mask_is_an_error_and_not_a_lower_cost():
    def half(state):
        return state.is_masked & (torch.arange(4) < 2)

    with pytest.raises(ValueError, match="left 162 masks"):
        score(arbitrary_network(LOOP), LOOP.data, LOOP.V, strategy=half, steps=2)

    def first(state):  # of the rows, that is
        return state.is_masked & (torch.arange(len(state.xt)) < 1)[:, None]

    with pytest.raises(ValueError, match="left 320 masks"):
        score(arbitrary_network(LOOP), LOOP.data, LOOP.V, strategy=first, steps=2)


def test_a_token_that_a_filter_cuts_makes_its_text_cost_infinity_and_no_other():
    nats = score(arbitrary_network(LOOP), LOOP.data, LOOP.V, strategy="margin", top_k=2, steps=2)
    assert nats.isinf().sum() == 81 - 16  # two tokens are left at each of four positions


def test_an_improbable_token_costs_much_and_not_infinity():
    """exp(-1000) is no float64; its logarithm is."""
    network = lambda xt: torch.tensor([0.0, -10.0]).expand(*xt.shape, 2)  # noqa: E731
    nats = score(network, torch.ones(1, 3).long(), 2, strategy="left_to_right", temperature=0.01)
    assert nats.item() == pytest.approx(3000)


def test_the_order_of_a_sample_says_which_step_revealed_each_token():
    canvas, is_masked = prompts(6)
    events = []
    options = {"strategy": "confidence", "steps": 4, "mask_id": V, "is_masked": is_masked}
    drawn = diffusion.sample(linear_network, canvas, generator=seeded(0), history=events, **options)
    expected = sum(event.step * event.revealed.long() for event in events)
    assert torch.equal(drawn.order, expected) and (drawn.order[~is_masked] == 0).all()
    assert (drawn.costs[~is_masked] == 0).all() and (drawn.costs[is_masked] > 0).all()


@pytest.mark.parametrize("strategy", SCORED)
def test_our_network_gives_a_text_the_same_cost_alone_and_in_a_batch(strategy):
    """In float32, but for rounding; with convolutions no two positions tie."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": L}
    network = Transformer(ModelConfig(V, conv_width=3, **shape)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x0 = torch.randint(V, (6, L), generator=seeded(1))
    settings = {"strategy": strategy, "steps": 4}
    together = score(network, x0, V, **settings)
    alone = [score(network, x0[i : i + 1], V, rows=torch.tensor([i]), **settings) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-4, atol=1e-4)
