"""The bounds in their several forms: unbiased where enumeration can say so, their errors right."""

import itertools
import math

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
    cost_at,
    cost_over_orders,
    costs_per_token,
    exact_denoiser,
    mask_costs,
    seeded,
    z_score,
)

from nanomdm import bounds
from nanomdm.bounds import estimate

EPS, STEPS = 0.1, 3
FORMS = {
    "uniform": bounds.uniform,
    "continuous": lambda u, noise: bounds.continuous(u, noise, EPS),
    "discrete": lambda u, noise: bounds.discrete(u, noise, STEPS),
    "chain": bounds.chain,
    "left_to_right": bounds.left_to_right,
}
TEXT = LOOP.draw(6, 0)
NETWORK = arbitrary_network(LOOP)


def enumerated(name: str) -> float:
    """The exact value of a form on TEXT under NETWORK, summed over the text, in nats."""
    costs = mask_costs(NETWORK, TEXT, LOOP.V).sum(dim=0)  # (2 ** L,)
    if name == "continuous":  # Simpson's rule on [eps, 1], and what is left at eps
        p = torch.linspace(EPS, 1, 2001, dtype=torch.float64)
        F = torch.stack([cost_at(float(x), costs) / x for x in p])
        weight = torch.tensor([1.0, *[4.0, 2.0] * 999, 4.0, 1.0]).double() * (1 - EPS) / 2000 / 3
        return float((F * weight).sum() + cost_at(EPS, costs))
    if name == "discrete":
        return float(bound_with_steps(STEPS, costs))
    if name == "left_to_right":
        return sum(left_to_right_cost(row.tolist()) for row in TEXT)
    return sum(cost_over_orders(NETWORK, row.tolist(), LOOP.V) for row in TEXT)


def left_to_right_cost(row: list[int]) -> float:
    """The chain rule of one row from left to right, in a loop of its own."""
    xt, total = torch.full((1, len(row)), LOOP.V), 0.0
    for i, token in enumerate(row):
        total -= NETWORK(xt)[0, i].log_softmax(dim=-1)[token].item()
        xt[0, i] = token
    return total


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_unbiased(name):
    """The mean of 500 passes lies within three standard errors of the enumerated value."""
    passes = estimate(FORMS[name], NETWORK, TEXT, mask_id=LOOP.V, generator=seeded(1), draws=500)
    totals = passes.nats.sum(dim=1)
    if name == "left_to_right":  # no chance in it
        assert totals[0].item() == pytest.approx(enumerated(name), abs=1e-9)
        assert totals.std() < 1e-9
    else:
        assert z_score(totals, enumerated(name)) < 3


@pytest.mark.parametrize("name", FORMS)
def test_a_form_gives_the_entropy_for_an_exact_network_or_what_it_says_above_it(name):
    """At eps = 0.1 the process that stops there costs 1.5220790424, and the rest the entropy."""
    passes = estimate(
        FORMS[name], exact_denoiser(CHAIN), CHAIN_TEXT, mask_id=CHAIN.V, generator=seeded(0)
    )
    expected = dict.fromkeys(FORMS, CHAIN_ENTROPY) | {"continuous": 1.5220790424}
    costs = mask_costs(exact_denoiser(CHAIN), CHAIN_TEXT, CHAIN.V).mean(dim=0)
    expected["discrete"] = float(bound_with_steps(STEPS, costs))
    bound = passes.bound()
    assert abs(bound.value - expected[name] / 3) < 4 * bound.standard_error + 1e-12


@pytest.mark.parametrize("name", ["uniform", "continuous", "discrete", "chain"])
def test_the_95_percent_interval_of_a_form_covers_its_value_in_93_to_97_percent_of_2000(name):
    """2,000 evaluations of four passes over 24 rows, all of them in one batch."""
    text, generator = TEXT.repeat(4, 1), seeded(2)
    u = torch.cat([bounds.stratified_pairs(len(text), generator) for _ in range(8000)])
    noise = torch.rand(len(u), LOOP.L, dtype=torch.float64, generator=generator)
    x0, cost = text.repeat(8000, 1), torch.zeros(len(u)).double()
    for hidden, scored, weight in FORMS[name](u, noise):
        xt = x0.masked_fill(hidden, LOOP.V)
        cost += bounds.nll_from_logits(NETWORK, xt, x0, scored).sum(dim=1) * weight
    totals = cost.view(2000, 4, len(text)).sum(dim=2) / text.numel()
    half = bounds.student_t(3) * totals.std(dim=1) / 2
    covered = (totals.mean(dim=1) - enumerated(name) / TEXT.numel()).abs() < half
    assert 0.93 < covered.double().mean() < 0.97


def test_without_what_is_left_at_eps_the_continuous_form_would_be_no_bound():
    """Even the exact network would seem to cost less than the entropy, which is impossible."""
    cut = estimate(
        lambda u, noise: itertools.islice(FORMS["continuous"](u, noise), 1),
        exact_denoiser(CHAIN),
        CHAIN_TEXT,
        mask_id=CHAIN.V,
        generator=seeded(3),
        draws=300,
    ).bound()
    assert cut.value + 4 * cut.standard_error < CHAIN_ENTROPY / 3


# --- Given tokens --------------------------------------------------------------------------------


def test_a_given_token_is_never_hidden_and_never_scored():
    given = torch.tensor([True, False, False, True])
    seen = []

    def nll(model, xt, x0, where):
        assert not where[:, given].any() and (xt == x0)[:, given].all()
        seen.append(where)
        return where.double()

    for form in FORMS.values():
        estimate(form, None, TEXT, mask_id=9, predict=[~given] * 6, nll=nll, draws=3)
    assert torch.cat(seen)[:, ~given].any(dim=0).all()


@pytest.mark.parametrize("name", ["uniform", "chain"])
def test_the_conditional_bound_is_the_chain_rule_over_orders_of_what_is_missing(name):
    """x1 and x3 of four given x0 and x2: both orders, by hand."""
    predict = torch.tensor([False, True, False, True])

    def cost(row, order):
        xt, total = row.masked_fill(predict, LOOP.V)[None], 0.0
        for i in order:
            total -= NETWORK(xt)[0, i].log_softmax(dim=-1)[row[i]].item()
            xt = xt.index_fill(1, torch.tensor([i]), int(row[i]))
        return total

    expected = sum(cost(row, (1, 3)) + cost(row, (3, 1)) for row in TEXT) / 2
    passes = estimate(
        FORMS[name],
        NETWORK,
        TEXT,
        mask_id=LOOP.V,
        predict=[predict] * 6,
        generator=seeded(0),
        draws=500,
    )
    assert z_score(passes.nats.sum(dim=1), expected) < 3
    assert passes.tokens == 12


def test_conditional_costs_left_to_right_add_up_to_that_of_the_whole():
    """-log p(a, b) = -log p(a) - log p(b | a), exactly, where the order is fixed."""
    first = torch.tensor([True, True, False, False])
    settings = {"mask_id": LOOP.V, "draws": 1}
    whole = estimate(bounds.left_to_right, NETWORK, TEXT, **settings).nats

    def short(ids):  # the network on the first two alone: what follows is masked
        xt = torch.cat((ids, torch.full_like(ids, LOOP.V)), dim=1)
        return NETWORK(xt)[:, :2]

    begin = estimate(bounds.left_to_right, short, TEXT[:, :2], **settings).nats
    rest = estimate(bounds.left_to_right, NETWORK, TEXT, predict=[~first] * 6, **settings).nats
    assert torch.allclose(begin + rest, whole)


# --- By masking rate -----------------------------------------------------------------------------


def cost_of_rate(model, xt, x0, where):
    """A synthetic network: a masked token costs 1 + (share masked)^2 nats."""
    return torch.where(where, 1 + where.double().mean(dim=1, keepdim=True) ** 2, 0.0)


def passes_over(L: int, rows: int, nll=cost_of_rate, draws: int = 8) -> bounds.Passes:
    text = [torch.zeros(L).long()] * rows
    return estimate(
        bounds.uniform, None, text, mask_id=1, nll=nll, generator=seeded(0), draws=draws
    )


def test_the_curve_is_the_cost_of_a_masked_token_at_that_rate():
    for low, high, cost in bounds.curve(passes_over(100, 2000), bins=20):
        shares = torch.arange(round(low * 100) + 1, round(high * 100) + 1) / 100
        expected = (1 + shares.double() ** 2).mean().item()
        assert abs(cost.value - expected) < 4 * cost.standard_error + 1e-4, low


def test_every_count_of_masked_tokens_falls_into_the_bin_of_its_share():
    counts = torch.arange(1, 41)
    u = (counts - 0.5).double() / 40
    passes = bounds.Passes(torch.ones(1, 40).double() * 40, u[None], torch.full((40,), 40))
    means = bounds._means_by_rate(passes, 20)
    assert torch.equal(means, torch.ones(20, 1).double())  # two counts in each


def test_the_curve_weighted_by_its_rows_averages_to_the_bound():
    passes = passes_over(60, 40)
    bins = bounds.curve(passes, bins=5)  # 40 rows in 20 pairs of strata: eight in each of five
    assert sum(b.cost.value for b in bins) / 5 == pytest.approx(passes.bound().value, rel=1e-3)


def test_the_curve_needs_no_call_of_the_network():
    calls = []
    passes = passes_over(20, 50, lambda *a: calls.append(1) or cost_of_rate(*a))
    before = len(calls)
    bounds.curve(passes), bounds.falls(passes)
    assert len(calls) == before


def test_a_bin_without_a_row_is_nan():
    curve = bounds.curve(passes_over(4, 50), bins=20)  # shares of a quarter, a half, ...
    filled = [i for i, b in enumerate(curve) if not math.isnan(b.cost.value)]
    assert filled == [4, 9, 14, 19]


def noisy(shape):
    """A network whose cost by share masked is `shape`, with noise of one nat a token."""
    generator = seeded(5)

    def nll(model, xt, x0, where):
        share = where.double().mean(dim=1, keepdim=True)
        return torch.where(where, shape(share) + torch.randn(where.shape, generator=generator), 0.0)

    return nll


def test_a_cost_that_falls_with_the_share_masked_is_found():
    dip = noisy(lambda share: 2 - 1.0 * ((share > 0.5) & (share <= 0.55)))
    assert [b for b, _ in bounds.falls(passes_over(128, 400, dip))] == [10]


def test_a_cost_that_is_flat_is_said_to_fall_in_at_most_a_few_of_60_evaluations():
    flat, alarms = noisy(lambda share: torch.full_like(share, 2.0)), 0
    for _ in range(60):
        alarms += bool(bounds.falls(passes_over(32, 60, flat)))
    assert alarms <= 9  # 3 expected at the most; more than 9 has a chance of 0.1%


# --- Two models ----------------------------------------------------------------------------------


def test_the_difference_of_a_model_to_itself_is_zero_without_any_error():
    passes = passes_over(20, 30)
    masks, rows = bounds.difference(passes, passes)
    assert masks == (0.0, 0.0) and rows == (0.0, 0.0)


def test_a_paired_difference_has_a_smaller_error_than_two_figures_apart():
    settings = {"mask_id": LOOP.V, "draws": 50}
    text = LOOP.draw(40, 0)
    better = lambda xt: NETWORK(xt) * 0.9  # noqa: E731
    one, other = (
        estimate(bounds.uniform, model, text, generator=seeded(0), **settings)
        for model in (NETWORK, better)
    )
    paired, _ = bounds.difference(one, other)
    apart = math.hypot(one.bound().standard_error, other.bound().standard_error)
    assert paired.value == pytest.approx(one.bound().value - other.bound().value)
    assert paired.standard_error < apart / 3


def test_the_error_over_rows_covers_the_mean_of_texts_in_93_to_97_percent_of_2000():
    """Rows of random lengths from a law whose mean difference per token is known to be 0.3."""
    generator, covered, n = seeded(0), 0, 60
    half = bounds.student_t(n - 1)
    for _ in range(2000):
        sizes = torch.randint(5, 15, (n,), generator=generator)
        per_row = torch.randn(n, generator=generator, dtype=torch.float64) * sizes.sqrt()
        bound = bounds.ratio(0.3 * sizes + per_row, sizes)
        covered += abs(bound.value - 0.3) < half * bound.standard_error
    assert 0.93 < covered / 2000 < 0.97


def test_an_exact_model_is_compared_by_row_with_every_pass_of_a_bounded_one():
    passes = passes_over(20, 30)
    exact = bounds.Passes(torch.full((1, 30), 20.0).double(), passes.u[:1], passes.holes)
    masks, rows = bounds.difference(passes, exact)
    assert masks.value == pytest.approx(passes.bound().value - 1)
    assert masks.standard_error == pytest.approx(passes.bound().standard_error)
    assert rows.standard_error > 0


# --- Windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 23, 64])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_score_every_token_once(length, stride):
    scored = [i for _, stop, first in bounds.windows(length, 8, stride) for i in range(first, stop)]
    assert scored == list(range(length))


@pytest.mark.parametrize("stride", [1, 3, 5])
def test_a_window_after_the_first_sees_a_whole_context(stride):
    for start, stop, first in bounds.windows(30, 8, stride)[1:]:
        assert stop - start == 8 and first - start >= 8 - stride


def test_windows_that_move_by_the_context_do_not_overlap():
    assert bounds.windows(20, 8, 8) == [(0, 8, 0), (8, 16, 8), (16, 20, 16)]


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_beyond_the_context_is_refused(stride):
    with pytest.raises(ValueError, match="eval.stride"):
        bounds.windows(20, 8, stride)


def test_every_mask_of_a_row_is_as_likely_as_its_count_says():
    """The law of what the uniform form hides: 1 / L over counts, equal among masks of a count."""
    seen = []
    estimate(
        bounds.uniform,
        None,
        torch.zeros(200, 3).long(),
        mask_id=1,
        generator=seeded(0),
        draws=100,
        nll=lambda model, xt, x0, where: seen.append(where) or x0.double(),
    )
    ids = torch.cat(seen).long() @ torch.tensor([4, 2, 1])
    counts = all_ids(2, 3).sum(dim=1)
    expected = torch.tensor([0, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 3])
    assert counts.tolist() == [0, 1, 1, 2, 1, 2, 2, 3]
    torch.testing.assert_close(ids.bincount(minlength=8) / len(ids), expected, atol=0.012, rtol=0.0)


def test_costs_per_token_are_those_of_the_enumeration():
    """c_l of an arbitrary network, from the passes: the bins of a row of four are its counts."""
    passes = estimate(bounds.uniform, NETWORK, TEXT, mask_id=LOOP.V, generator=seeded(0), draws=500)
    expected = costs_per_token(mask_costs(NETWORK, TEXT, LOOP.V)).mean(dim=0)
    for b, value in enumerate(expected.tolist()):
        means = bounds._means_by_rate(passes, 4)[b]
        assert z_score(means[~means.isnan()], value) < 3.5
