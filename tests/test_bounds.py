"""Estimators against enumeration, the table of bounds, and the statistics of samples."""

import itertools
import math
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from problems import (
    CHAIN,
    CHAIN_ENTROPY,
    CHAIN_TEXT,
    LOOP,
    all_ids,
    arbitrary_network,
    bound_with_steps,
    chain,
    cost_at,
    cost_over_orders,
    costs_per_token,
    exact_denoiser,
    expected_costs,
    mask_costs,
    place_of,
    seeded,
    z_score,
    zero_logits,
)
from test_strategies import spread_law

import diffusion
from diffusion import any_order, nll_from_logits, stratified_pairs
from nanomdm import bounds, prompts, strategies
from nanomdm.bounds import BOUNDS, NLLSamples
from nanomdm.errors import UserError
from nanomdm.random import generator
from nanomdm.strategies import STRATEGIES, left_to_right

EPS, STEPS = 0.1, 3
ESTIMATORS = {
    "uniform": any_order,
    "continuous": lambda u, noise: bounds.continuous(u, noise, EPS),
    "discrete": lambda u, noise: bounds.discrete(u, noise, STEPS),
}
TEXT = LOOP.draw(6, 0)
NETWORK = arbitrary_network(LOOP)


def estimate(estimator, model, x0, *, nll=None, **options) -> NLLSamples:
    nll = nll or partial(nll_from_logits, model)
    return NLLSamples(*diffusion.estimate(estimator, nll, x0, **options))


def enumerated(name: str) -> float:
    """The exact value of a bound of TEXT under NETWORK, summed over the text, in nats."""
    costs = mask_costs(NETWORK, TEXT, LOOP.V).sum(dim=0)  # (2 ** L,)
    if name == "continuous":  # Simpson's rule on [eps, 1], and what is left at eps
        p = torch.linspace(EPS, 1, 2001, dtype=torch.float64)
        F = torch.stack([cost_at(float(x), costs) / x for x in p])
        weight = torch.tensor([1.0, *[4.0, 2.0] * 999, 4.0, 1.0]).double() * (1 - EPS) / 2000 / 3
        return float((F * weight).sum() + cost_at(EPS, costs))
    if name == "discrete":
        return float(bound_with_steps(STEPS, costs))
    return sum(cost_over_orders(NETWORK, row.tolist(), LOOP.V) for row in TEXT)


# --- Estimators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_unbiased(name):
    """The mean of 500 passes is within three standard errors of the enumerated value."""
    samples = estimate(
        ESTIMATORS[name], NETWORK, TEXT, mask_id=LOOP.V, generator=seeded(1), draws=500
    )
    assert z_score(samples.nats.sum(dim=1), enumerated(name)) < 3


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_bound_of_an_exact_network_is_the_entropy_or_what_theory_says_above_it(name):
    """At eps = 0.1 the process that stops there costs 1.5220790424 (THEORY T5)."""
    samples = estimate(
        ESTIMATORS[name], exact_denoiser(CHAIN), CHAIN_TEXT, mask_id=CHAIN.V, generator=seeded(0)
    )
    expected = dict.fromkeys(ESTIMATORS, CHAIN_ENTROPY) | {"continuous": 1.5220790424}
    costs = mask_costs(exact_denoiser(CHAIN), CHAIN_TEXT, CHAIN.V).mean(dim=0)
    expected["discrete"] = float(bound_with_steps(STEPS, costs))
    value, error = samples.bound()
    assert abs(value - expected[name] / 3) < 4 * error + 1e-12


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_95_percent_interval_of_a_bound_covers_its_value_in_93_to_97_percent_of_2000(name):
    """2,000 evaluations of four passes over 24 rows, all of them in one batch."""
    text, generator = TEXT.repeat(4, 1), seeded(2)
    u = torch.cat([stratified_pairs(len(text), generator) for _ in range(8000)])
    noise = torch.rand(len(u), LOOP.L, dtype=torch.float64, generator=generator)
    x0, cost = text.repeat(8000, 1), torch.zeros(len(u)).double()
    for hidden, scored, weight in ESTIMATORS[name](u, noise):
        xt = x0.masked_fill(hidden, LOOP.V)
        cost += nll_from_logits(NETWORK, xt, x0, scored).sum(dim=1) * weight
    totals = cost.view(2000, 4, len(text)).sum(dim=2) / text.numel()
    half = bounds.student_t(3) * totals.std(dim=1) / 2
    covered = (totals.mean(dim=1) - enumerated(name) / TEXT.numel()).abs() < half
    assert 0.93 < covered.double().mean() < 0.97


def test_without_what_is_left_at_eps_the_continuous_estimator_would_be_no_bound():
    """Even the exact network would seem to cost less than the entropy, which is impossible."""
    value, error = estimate(
        lambda u, noise: itertools.islice(ESTIMATORS["continuous"](u, noise), 1),
        exact_denoiser(CHAIN),
        CHAIN_TEXT,
        mask_id=CHAIN.V,
        generator=seeded(3),
        draws=300,
    ).bound()
    assert value + 4 * error < CHAIN_ENTROPY / 3


def test_every_mask_of_a_row_is_as_likely_as_its_count_says():
    """What `uniform` masks: 1 / L for each count, and all masks of a count equally often."""
    seen = []
    estimate(
        any_order,
        None,
        torch.zeros(200, 3).long(),
        mask_id=1,
        generator=seeded(0),
        draws=100,
        nll=lambda xt, x0, where: seen.append(where) or x0.double(),
    )
    ids = torch.cat(seen).long() @ torch.tensor([4, 2, 1])
    counts = all_ids(2, 3).sum(dim=1)
    expected = torch.tensor([0, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 3])
    assert counts.tolist() == [0, 1, 1, 2, 1, 2, 2, 3]
    torch.testing.assert_close(ids.bincount(minlength=8) / len(ids), expected, atol=0.012, rtol=0.0)


@pytest.mark.parametrize("name", ["uniform", "discrete"])
def test_an_estimator_gives_the_same_for_any_batch_size(name):
    text = [LOOP.draw(1, i)[0] for i in range(9)]
    one, other = (
        estimate(
            ESTIMATORS[name],
            NETWORK,
            text,
            mask_id=LOOP.V,
            generator=seeded(0),
            batch_size=size,
        ).nats
        for size in (1, 4)
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


# --- Context -------------------------------------------------------------------------------------


def test_context_is_never_masked_and_never_scored():
    context = torch.tensor([True, False, False, True])
    seen = []

    def nll(xt, x0, where):
        assert not where[:, context].any() and (xt == x0)[:, context].all()
        seen.append(where)
        return where.double()

    for estimator in ESTIMATORS.values():
        estimate(estimator, None, TEXT, mask_id=9, predict=[~context] * 6, nll=nll, draws=3)
    assert torch.cat(seen)[:, ~context].any(dim=0).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_context_is_never_scored_where_rows_of_a_batch_have_more_of_it_than_others(name):
    predict = [torch.arange(4) >= 4 - count for count in (1, 4, 2, 3)]
    allowed, wrong = torch.stack(predict), []

    def nll(xt, x0, where):
        wrong.append((where & ~allowed).any())
        return where.double()

    samples = estimate(
        ESTIMATORS[name],
        None,
        torch.zeros(4, 4).long(),
        mask_id=9,
        predict=predict,
        nll=nll,
        draws=200,
    )
    assert not any(wrong) and samples.counts.tolist() == [1, 4, 2, 3]


def test_the_conditional_bound_is_the_chain_rule_over_orders_of_what_is_missing():
    """x1 and x3 of four, with x0 and x2 as context: both orders, by hand."""
    predict = torch.tensor([False, True, False, True])

    def cost(row, order):
        xt, total = row.masked_fill(predict, LOOP.V)[None], 0.0
        for i in order:
            total -= NETWORK(xt)[0, i].log_softmax(dim=-1)[row[i]].item()
            xt = xt.index_fill(1, torch.tensor([i]), int(row[i]))
        return total

    expected = sum(cost(row, (1, 3)) + cost(row, (3, 1)) for row in TEXT) / 2
    samples = estimate(
        any_order,
        NETWORK,
        TEXT,
        mask_id=LOOP.V,
        predict=[predict] * 6,
        generator=seeded(0),
        draws=500,
    )
    assert z_score(samples.nats.sum(dim=1), expected) < 3
    assert samples.tokens == 12


def test_what_is_seen_before_a_window_cannot_be_worse_for_an_exact_model():
    """The chain rule over windows of an exact network of a Markov chain needs one token before."""
    problem = chain(0.1, 0.1, 0.1, 0.1)
    row, model = problem.draw(40, 0), exact_denoiser(problem)

    def cost(given: int) -> float:
        options = {"mask_id": 2, "is_masked": (torch.arange(5) >= given).expand(40, 5)}
        nats = diffusion.score(model, row, strategy=left_to_right, **options)
        return nats.mean().item() / (5 - given)

    assert cost(1) < cost(0) < math.log(2)


# --- How the bounds relate -----------------------------------------------------------------------


def chain_costs() -> torch.Tensor:
    return expected_costs(exact_denoiser(CHAIN), CHAIN, nll_from_logits)


def test_more_steps_bring_the_bound_of_k_steps_down_to_the_entropy_and_never_below():
    values = [bound_with_steps(steps, chain_costs()).item() for steps in (1, 2, 4, 8, 32, 128)]
    assert values == sorted(values, reverse=True) and values[-1] > CHAIN_ENTROPY


def test_the_bound_of_k_steps_lies_above_the_entropy_by_what_the_theory_says():
    costs, K = chain_costs(), 128
    gap = (cost_at(1.0, costs) - CHAIN.L * costs_per_token(costs)[0]).item() / (2 * K)
    assert bound_with_steps(K, costs).item() - CHAIN_ENTROPY == pytest.approx(gap, rel=0.02)


# --- Bounds by name ------------------------------------------------------------------------------


def choose(names=(), samplers=(), **settings) -> dict[str, bounds.Bound]:
    section = SimpleNamespace(**{"steps": STEPS, "temperature": 1.0, "options": {}} | settings)
    return bounds.choose(names, section.steps, diffusion.sample) | bounds.samplers(
        samplers, section, diffusion.sample
    )


def test_the_chosen_bounds_follow_uniform_each_once():
    chosen = bounds.choose(["chain", "uniform", "discrete", "chain"], STEPS, diffusion.sample)
    assert list(chosen) == ["uniform", "chain", "discrete"]


def test_a_bound_that_takes_steps_gets_those_of_the_sampler_and_says_so():
    discrete = choose(["discrete"])["discrete"]
    assert discrete.sampler == "takes 3 ancestral steps"
    settings = {"mask_id": LOOP.V, "draws": 2}
    one, other = (
        estimate(estimator, NETWORK, TEXT, generator=seeded(0), **settings).nats
        for estimator in (discrete.estimator, ESTIMATORS["discrete"])
    )
    assert torch.equal(one, other)


def of_table(bound: bounds.Bound, draws: int = 8) -> NLLSamples:
    """What an entry of the table costs on TEXT."""
    if not bound.strategy:
        options = {"mask_id": LOOP.V, "generator": seeded(0), "draws": draws}
        return estimate(bound.estimator or any_order, NETWORK, TEXT, **options)
    return scored(bound.strategy, draws=draws)


class Model:
    """A network as what `bounds.score` takes."""

    device, config = torch.device("cpu"), SimpleNamespace(mask_id=LOOP.V, vocab_size=LOOP.V)

    def __init__(self, network):
        self.network = network

    def __call__(self, xt):
        return self.network(xt)


def scored(sampler, rows=TEXT, predict=None, draws=8, model=NETWORK, advance=bool) -> NLLSamples:
    predict = predict or [torch.ones(len(row), dtype=torch.bool) for row in rows]
    given = SimpleNamespace(rows=rows, predict=predict)
    options = {"draws": draws, "seed": 0, "advance": advance}
    return bounds.score(sampler, Model(model), given, **options)


def test_the_number_of_calls_in_the_table_is_how_many_queries_an_estimator_makes():
    u, noise = torch.rand(2).double(), torch.rand(2, 5).double()
    for name, bound in choose(BOUNDS).items():
        if bound.strategy:
            assert bound.calls == 1 and of_table(bound).calls == LOOP.L, name
        else:
            assert len(list((bound.estimator or any_order)(u, noise))) == bound.calls, name


def test_only_what_the_table_calls_exact_is_the_same_in_every_pass():
    for name, bound in choose(BOUNDS, ["spread", "margin", "eb"]).items():
        nats = of_table(bound).nats
        assert bool((nats.std(dim=0) < 1e-9).all()) == bound.exact, name


def test_chain_and_left_to_right_are_the_scores_of_samplers():
    chosen = choose(["chain", "left_to_right"])
    value, error = of_table(chosen["chain"], draws=300).bound()
    assert abs(value - enumerated("chain") / TEXT.numel()) < 4 * error
    value, _ = of_table(chosen["left_to_right"], draws=1).bound()
    options = {"mask_id": LOOP.V, "strategy": left_to_right}
    expected = diffusion.score(NETWORK, TEXT, **options).mean().item() / LOOP.L
    assert value == pytest.approx(expected, abs=1e-12)


def test_an_unknown_bound_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="eval.bounds=exact is unknown: choose one of uniform, "):
        choose(["exact"])


# --- Scores of strategies ------------------------------------------------------------------------


def test_every_strategy_gets_those_options_that_it_takes():
    options = {"threshold": 0.25, "gamma": 2.0, "top_k": 2}
    chosen = choose([], ["spread", "threshold", "eb"], options=options)
    spread, threshold, eb = (chosen[name].strategy for name in ("spread", "threshold", "eb"))
    assert threshold.settings["strategy"].keywords == {"threshold": 0.25}
    assert eb.settings["strategy"].keywords == {"gamma": 2.0}
    assert all(each.settings["truncate"].keywords["top_k"] == 2 for each in (spread, threshold, eb))


@pytest.mark.parametrize(
    "names, options, message",
    [
        (["best"], {}, "eval.samplers=best is unknown: choose one of stochastic, "),
        (["spread", "remask"], {}, "eval.samplers=remask masks tokens again: many paths"),
        (["spread", "eb"], {"threshold": 1}, "options.threshold is no option of spread"),
    ],
)
def test_a_strategy_without_a_score_and_an_option_that_none_takes_are_refused(
    names, options, message
):
    with pytest.raises(UserError, match=message):
        choose([], names, options=options)


def test_row_i_of_a_pass_has_the_noise_of_that_row_and_pass():
    spread = choose([], ["spread"], steps=2)["spread"].strategy
    together = scored(spread, draws=2)
    alone = diffusion.score(
        NETWORK,
        TEXT[4:5],
        mask_id=LOOP.V,
        strategy=strategies.spread,
        steps=2,
        rows=torch.tensor([4]),
        generator=generator(0, "score", 1),
    )
    torch.testing.assert_close(together.nats[1, 4:5], alone)
    assert together.counts.tolist() == [4] * 6 and together.tokens == 24


def test_texts_of_several_lengths_are_scored_without_their_context():
    rows, heard = [*TEXT, *(row[:3] for row in TEXT)], []
    spread = choose([], ["spread"], steps=2)["spread"].strategy
    predict = [torch.arange(len(row)) > 0 for row in rows]
    options = {"model": zero_logits(LOOP.V), "draws": 2, "advance": heard.append}
    found = scored(spread, rows, predict, **options)
    assert found.counts.tolist() == [3] * 6 + [2] * 6 and sum(heard) == 2 * 42
    torch.testing.assert_close(found.nats, (found.counts.double() * math.log(3)).expand(2, -1))


def test_calls_are_those_that_a_text_needs_by_itself():
    """A row with one token to predict takes one of the steps that its neighbours take."""
    predict = [torch.arange(4) < count for count in (1, 2, 4, 4, 4, 4)]
    one = choose([], ["left_to_right"])["left_to_right"].strategy
    assert scored(one, predict=predict).calls == pytest.approx((1 + 2 + 4 * 4) / 6)


def test_guidance_takes_two_calls_for_one_where_something_is_given():
    options = {"guidance": 1.0}
    guided = choose([], ["margin"], steps=2, options=options)["margin"].strategy
    predict = [torch.arange(4) > 0] * 6
    assert scored(guided, predict=predict).calls == 4 and scored(guided).calls == 2


def test_the_mixture_of_the_draws_comes_close_to_the_law_and_never_below_on_average():
    """Of `spread` with 3 steps, itself a mixture of three exact laws."""
    spread = choose([], ["spread"])["spread"].strategy
    draws = scored(spread, draws=400)
    exact = -spread_law(NETWORK, LOOP, STEPS)[place_of(TEXT, LOOP.V)].log().mean().item() / LOOP.L
    assert abs(draws.mixture() - exact) < 0.01 < draws.bound()[0] - exact
    few = [draws._replace(nats=draws.nats[i : i + 4]).mixture() for i in range(0, 400, 4)]
    assert exact < sum(few) / 100 < draws.bound()[0]  # the fewer draws, the looser
    one = draws._replace(nats=draws.nats[:1])
    assert one.mixture() == pytest.approx(one.bound()[0])


def test_more_rows_than_a_batch_has_are_numbered_through(monkeypatch):
    spread = choose([], ["spread"], steps=2)["spread"].strategy
    rows = list(LOOP.draw(150, 3))
    whole = scored(spread, rows, draws=2).nats
    monkeypatch.setattr(prompts, "LOGITS", 7 * LOOP.L * LOOP.V)  # seven rows at once
    torch.testing.assert_close(scored(spread, rows, draws=2).nats, whole, rtol=0, atol=1e-12)


def test_a_strategy_outside_the_table_that_masks_again_is_refused_by_its_name(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "mine", strategies.remask)
    with pytest.raises(UserError, match="mine: no score for masking again"):
        scored(choose([], ["mine"], steps=8)["mine"].strategy)


def test_tokens_that_cannot_be_drawn_are_counted():
    """In one call under top_k=1 a single text can be drawn."""
    margin = choose([], ["margin"], steps=1, options={"top_k": 1})["margin"].strategy
    likeliest = NETWORK(torch.full((1, LOOP.L), LOOP.V)).argmax(dim=-1)[0]
    found = scored(margin, draws=1)
    expected = (TEXT != likeliest).sum(dim=1)
    assert found.impossible == int(expected.sum()) > 0
    assert torch.equal(found.nats[0].isinf(), expected > 0)
    first = choose([], ["first_hitting"], options={"top_k": 1})["first_hitting"].strategy
    each = [scored(first, draws=draws).impossible for draws in (1, 2, 8)]
    assert each == sorted(each)  # the worst draw of each text counts


# --- By masking rate -----------------------------------------------------------------------------


def cost_of_rate(xt, x0, where):
    """A synthetic network: a masked token costs 1 + (share masked)^2 nats."""
    return torch.where(where, 1 + where.double().mean(dim=1, keepdim=True) ** 2, 0.0)


def samples_over(L: int, rows: int, nll=cost_of_rate, draws: int = 8) -> NLLSamples:
    text = [torch.zeros(L).long()] * rows
    return estimate(any_order, None, text, mask_id=1, nll=nll, generator=seeded(0), draws=draws)


def noisy(shape):
    """A network whose cost by share masked is `shape`, with noise of one nat a token."""
    generator = seeded(5)

    def nll(xt, x0, where):
        share = where.double().mean(dim=1, keepdim=True)
        return torch.where(where, shape(share) + torch.randn(where.shape, generator=generator), 0.0)

    return nll


def test_the_curve_is_the_cost_of_a_masked_token_at_that_rate():
    for b, (cost, error) in enumerate(bounds.curve(samples_over(100, 2000), bins=20)):
        shares = torch.arange(5 * b + 1, 5 * b + 6) / 100
        expected = (1 + shares.double() ** 2).mean().item()
        assert abs(cost - expected) < 4 * error + 1e-4, b


def test_every_count_of_masked_tokens_falls_into_the_bin_of_its_share():
    counts = torch.arange(1, 41)
    u = (counts - 0.5).double() / 40
    samples = NLLSamples(torch.ones(1, 40).double() * 40, u[None], torch.full((40,), 40))
    means = bounds._cost_by_rate(samples, 20)
    assert torch.equal(means, torch.ones(20, 1).double())  # two counts in each


def test_the_curve_weighted_by_its_rows_averages_to_the_bound():
    samples = samples_over(60, 40)
    bins = bounds.curve(samples, bins=5)  # 40 rows in 20 pairs of strata: eight in each of five
    assert sum(cost for cost, _ in bins) / 5 == pytest.approx(samples.bound()[0], rel=1e-3)


def test_the_curve_needs_no_call_of_the_network():
    calls = []
    samples = samples_over(20, 50, lambda *a: calls.append(1) or cost_of_rate(*a))
    before = len(calls)
    bounds.curve(samples), bounds.decreases(samples)
    assert len(calls) == before


def test_a_bin_without_a_row_is_nan():
    curve = bounds.curve(samples_over(4, 50), bins=20)  # shares of a quarter, a half, ...
    filled = [b for b, (cost, _) in enumerate(curve) if not math.isnan(cost)]
    assert filled == [4, 9, 14, 19]


def test_costs_per_token_are_those_of_the_enumeration():
    """c_l of an arbitrary network, from samples: the bins of a row of four are its counts."""
    samples = estimate(any_order, NETWORK, TEXT, mask_id=LOOP.V, generator=seeded(0), draws=500)
    expected = costs_per_token(mask_costs(NETWORK, TEXT, LOOP.V)).mean(dim=0)
    for b, value in enumerate(expected.tolist()):
        means = bounds._cost_by_rate(samples, 4)[b]
        assert z_score(means[~means.isnan()], value) < 3.5


def test_a_cost_that_decreases_with_the_share_masked_is_found():
    dip = noisy(lambda share: 2 - 1.0 * ((share > 0.5) & (share <= 0.55)))
    assert [b for b, _ in bounds.decreases(samples_over(128, 400, dip))] == [10]


def test_a_flat_cost_is_said_to_decrease_in_at_most_a_few_of_60_evaluations():
    flat, found = noisy(lambda share: torch.full_like(share, 2.0)), 0
    for _ in range(60):
        found += bool(bounds.decreases(samples_over(32, 60, flat)))
    assert found <= 9  # 3 expected at the most; more than 9 has a chance of 0.1%


def test_chance_alone_finds_a_decrease_in_few_evaluations(monkeypatch):
    """With three passes, and no cost that depends on the share masked: 2.5%, all steps together."""
    generator, found = seeded(0), 0
    samples = NLLSamples(torch.zeros(3, 1), torch.zeros(3, 1), torch.ones(1).long())
    monkeypatch.setattr(bounds, "student_t", cache(bounds.student_t))
    for _ in range(2000):
        cost = torch.randn(20, 3, generator=generator, dtype=torch.float64)
        monkeypatch.setattr(bounds, "_cost_by_rate", lambda samples, bins, cost=cost: cost)
        found += bool(bounds.decreases(samples))
    assert 0.01 < found / 2000 < 0.04


def test_one_pass_says_nothing_about_decreases():
    dip = noisy(lambda share: 2 - 1.0 * (share > 0.5))
    assert bounds.decreases(samples_over(128, 400, dip, draws=1)) == []


# --- Standard errors -----------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_the_error_within_a_pass_is_that_over_passes_and_what_the_rows_themselves_differ_by(spread):
    costs = noisy(lambda share: 0.55 + 1.9 * share**1.3)
    unlike = torch.randn(64, 1, generator=seeded(2)) * spread
    nats, u, counts, *_ = estimate(
        any_order,
        None,
        torch.zeros(64, 64).long(),
        mask_id=1,
        generator=seeded(0),
        draws=400,
        nll=lambda xt, x0, where: costs(xt, x0, where) + where * unlike,
    )
    within = [
        bounds.error_within(NLLSamples(*row, counts))
        for row in zip(nats[:, None], u[:, None], strict=True)
    ]
    over_passes = (nats.sum(dim=1) / counts.sum()).var().item()
    mean_square = sum(error**2 for error in within) / 400
    assert mean_square == pytest.approx(over_passes + unlike.var().item() / 64, rel=0.2)


@pytest.mark.parametrize("draws", [1, 7, 8])
def test_a_summary_has_the_loss_its_exponential_and_the_error_that_the_passes_allow(draws):
    samples = estimate(any_order, NETWORK, TEXT, mask_id=LOOP.V, generator=seeded(0), draws=draws)
    loss, error = samples.bound()
    error = error if draws == 8 else bounds.error_within(samples)
    expected = {"loss": loss, "ppl": math.exp(loss), "error": error}
    assert samples.summary() == pytest.approx(expected)
    assert samples.summary(exact=True) == {"loss": loss, "ppl": math.exp(loss)}
    far = samples._replace(nats=samples.nats + 1e6).summary()
    assert far["loss"] > 1e4 and math.isfinite(far["ppl"])


@pytest.mark.parametrize(("right", "n"), [(0, 7), (3, 7), (7, 7), (90, 100)])
def test_the_ends_of_wilsons_interval_are_probabilities_1_96_deviations_from_the_share(right, n):
    ends = bounds.wilson(right / n, n)
    assert ends[0] <= right / n <= ends[1] and min(ends) >= 0 and max(ends) <= 1
    for p in ends:
        deviations = 1.96 * math.sqrt(p * (1 - p) / n)
        assert abs(p - right / n) == pytest.approx(deviations, abs=1e-9)


def test_several_passes_divide_the_error_within_them_by_the_root_of_their_number():
    x0 = torch.randint(5, (200, 8), generator=seeded(0))

    def cost(xt, x0, where):  # a masked token of id k costs k (1 + share masked) nats
        return torch.where(where, x0 * (1 + where.double().mean(dim=1, keepdim=True)), 0.0)

    settings = {"mask_id": 5, "generator": seeded(0), "nll": cost}
    one, nine = (estimate(any_order, None, x0, draws=n, **settings) for n in (1, 9))
    assert bounds.error_within(nine) == pytest.approx(bounds.error_within(one) / 3, rel=0.15)


@pytest.mark.parametrize(
    "df, t",
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (7, 2.365), (8, 2.306), (100, 1.984)],
)
def test_students_t_is_that_of_the_tables_at_95_percent(df, t):
    assert bounds.student_t(df) == pytest.approx(t, abs=5e-4)


@pytest.mark.parametrize("df, t", [(1, 63.657), (2, 9.925), (7, 3.499), (10, 3.169)])
def test_students_t_is_that_of_the_tables_at_99_percent(df, t):
    assert bounds.student_t(df, 0.99) == pytest.approx(t, abs=5e-4)


def test_students_t_of_one_and_two_degrees_of_freedom_has_its_closed_form():
    for p in (0.5, 0.95, 0.999):
        assert bounds.student_t(1, p) == pytest.approx(math.tan(math.pi * p / 2), rel=1e-6)
        closed = p * math.sqrt(2 / (1 - p**2))
        assert bounds.student_t(2, p) == pytest.approx(closed, rel=1e-6)


def test_the_error_over_rows_covers_the_mean_of_texts_in_93_to_97_percent_of_2000():
    """Rows of random lengths from a law whose mean difference per token is known to be 0.3."""
    generator, covered, n = seeded(0), 0, 60
    half = bounds.student_t(n - 1)
    for _ in range(2000):
        sizes = torch.randint(5, 15, (n,), generator=generator)
        per_row = torch.randn(n, generator=generator, dtype=torch.float64) * sizes.sqrt()
        value, error = bounds.ratio(0.3 * sizes + per_row, sizes)
        covered += abs(value - 0.3) < half * error
    assert 0.93 < covered / 2000 < 0.97


# --- Two models ----------------------------------------------------------------------------------


def test_the_difference_of_a_model_to_itself_is_zero_without_any_error():
    samples = samples_over(20, 30)
    over_masks, over_rows = bounds.difference(samples, samples)
    assert over_masks == (0.0, 0.0) and over_rows == (0.0, 0.0)


def test_a_paired_difference_has_a_smaller_error_than_two_figures_apart():
    settings = {"mask_id": LOOP.V, "draws": 50}
    text = LOOP.draw(40, 0)
    better = lambda xt: NETWORK(xt) * 0.9  # noqa: E731
    one, other = (
        estimate(any_order, model, text, generator=seeded(0), **settings)
        for model in (NETWORK, better)
    )
    (value, error), _ = bounds.difference(one, other)
    assert value == pytest.approx(one.bound()[0] - other.bound()[0])
    assert error < math.hypot(one.bound()[1], other.bound()[1]) / 3


def test_an_exact_model_is_compared_by_row_with_every_pass_of_a_bounded_one():
    samples = samples_over(20, 30)
    exact = NLLSamples(torch.full((1, 30), 20.0).double(), samples.u[:1], samples.counts)
    over_masks, over_rows = bounds.difference(samples, exact)
    value, error = samples.bound()
    assert over_masks == pytest.approx((value - 1, error))
    assert over_rows[1] > 0
