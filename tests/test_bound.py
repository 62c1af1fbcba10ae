"""diffusion.py: the likelihood bound, its value by enumeration, and how its times are drawn."""

import functools
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
    chain,
    chi_square_z,
    cost_over_orders,
    costs_per_token,
    exact_denoiser,
    expected_costs,
    mask_costs,
    place_of,
    seeded,
    unigram,
    zero_logits,
)

import diffusion
from nanomdm import bounds


def expect_nelbo(expected: float, model, x0, mask_id: int, draws: int = 40) -> None:
    """Assert that the bound is what it should be within four of its standard errors."""
    settings = {"mask_id": mask_id, "generator": seeded(0), "draws": draws}
    value, error = diffusion.nelbo(model, x0, **settings, batch_size=1000)
    assert abs(value - expected) < 4 * error < 0.05 * expected


def masks_drawn(x0: torch.Tensor, draws: int) -> torch.Tensor:
    """is_masked (draws, N, L) in the passes over x0 (N, L), whose mask id is 1."""
    seen = []
    diffusion.nelbo(
        None,
        x0,
        mask_id=1,
        generator=seeded(0),
        draws=draws,
        nll=lambda xt, x0, is_masked: seen.append(is_masked) or x0.double(),
    )
    return torch.stack(seen)


def cost_of_share(xt, x0, is_masked):
    """A synthetic network: a masked token of id k costs k (1 + share masked) nats."""
    share = is_masked.double().mean(dim=1, keepdim=True)
    return torch.where(is_masked, x0 * (1 + share), 0.0)


# --- Its value -----------------------------------------------------------------------------------


def test_the_bound_of_an_exact_denoiser_is_the_entropy_of_the_data():
    expect_nelbo(CHAIN_ENTROPY / 3, exact_denoiser(CHAIN), CHAIN_TEXT.repeat(5, 1), CHAIN.V)


def test_the_costs_per_masked_token_of_the_chain_are_those_of_the_table():
    costs = expected_costs(exact_denoiser(CHAIN), CHAIN, diffusion.nll_from_logits)
    assert costs_per_token(costs).tolist() == pytest.approx(
        [0.3593046256, 0.4661807714, 0.6931471806], abs=1e-10
    )


@pytest.mark.parametrize("n", [1, 7, 32])
def test_the_bound_of_a_network_that_knows_nothing_is_ln_v_without_any_variance(n):
    bound = diffusion.nelbo(zero_logits(LOOP.V), LOOP.draw(n, 0), mask_id=LOOP.V)
    assert bound == pytest.approx((math.log(LOOP.V), 0.0), abs=1e-14)


def test_the_bound_of_a_unigram_network_is_its_cross_entropy_with_the_text():
    probabilities = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    x0 = LOOP.draw(200, 0)
    counts = x0.flatten().bincount(minlength=3).double()
    expected = -(counts / x0.numel() * probabilities.log()).sum().item()
    expect_nelbo(expected, unigram(probabilities), x0, LOOP.V)


def test_the_bound_of_any_network_is_the_chain_rule_averaged_over_all_orders():
    model, x0 = arbitrary_network(LOOP), LOOP.draw(5, 0)
    orders = sum(cost_over_orders(model, row.tolist(), LOOP.V) for row in x0)
    expect_nelbo(orders / x0.numel(), model, x0.repeat(40, 1), LOOP.V)


def test_the_mean_costs_of_all_masks_add_up_to_the_chain_rule_averaged_over_all_orders():
    model, x0 = arbitrary_network(LOOP), LOOP.draw(5, 0)
    costs = costs_per_token(mask_costs(model, x0, LOOP.V, diffusion.nll_from_logits))
    orders = [cost_over_orders(model, row.tolist(), LOOP.V) for row in x0]
    assert costs.sum(dim=1).tolist() == pytest.approx(orders, abs=1e-12)


def test_rows_of_different_lengths_count_by_their_tokens():
    text = [torch.full((L,), k) for L, k in ((3, 0), (1, 1), (7, 2), (3, 3), (12, 5))]
    bound = diffusion.nelbo(
        None,
        text,
        mask_id=9,
        nll=lambda xt, x0, is_masked: torch.where(is_masked, x0.double(), 0.0),
    )
    expected = (3 * 0 + 1 * 1 + 7 * 2 + 3 * 3 + 12 * 5) / (3 + 1 + 7 + 3 + 12)
    assert bound == pytest.approx((expected, 0.0), abs=1e-14)


def test_the_bound_of_rows_of_different_lengths_is_the_enumerated_one():
    problems = {len(flips) + 1: chain(*flips) for flips in ((), (0.1,), (0.1, 0.2))}
    networks = {L: arbitrary_network(problem) for L, problem in problems.items()}
    text = [problems[L].draw(1, L)[0] for L in (1, 3, 2, 3, 3, 2)]
    costs = [costs_per_token(mask_costs(networks[len(x)], x[None], 2)).sum().item() for x in text]
    expect_nelbo(sum(costs) / 14, lambda xt: networks[xt.size(1)](xt), text * 80, 2)


def test_two_masked_tokens_of_four_are_every_pair_equally_often():
    masks = masks_drawn(torch.zeros(20, 4).long(), 500).flatten(0, 1)
    counts = place_of(masks[masks.sum(dim=1) == 2].long(), 2).bincount(minlength=16)
    is_pair = all_ids(2, 4).sum(dim=1) == 2
    assert chi_square_z(counts, is_pair.double() / 6) < 4


def test_a_text_that_holds_the_mask_id_is_masked_as_any_other():
    text = torch.zeros(8, 5).long()
    assert torch.equal(masks_drawn(text + 1, 3), masks_drawn(text, 3))


# --- What it depends on --------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_does_not_change_the_bound(batch_size):
    text = [torch.arange(1 + i % 5) for i in range(17)]
    one, other = (
        diffusion.nelbo(
            None, text, mask_id=9, generator=seeded(0), batch_size=size, nll=cost_of_share
        )
        for size in (batch_size, 64)
    )
    assert one == pytest.approx(other, abs=1e-13)


def test_a_list_of_rows_has_the_bound_of_their_tensor():
    x0, settings = LOOP.draw(20, 0), {"mask_id": LOOP.V, "draws": 2}
    model = arbitrary_network(LOOP)
    tensor = diffusion.nelbo(model, x0, generator=seeded(0), **settings)
    assert diffusion.nelbo(model, list(x0), generator=seeded(0), **settings) == tensor


def test_the_bound_follows_from_the_seed_of_its_generator():
    def bound(seed: int) -> tuple[float, float]:
        return diffusion.nelbo(
            arbitrary_network(LOOP), LOOP.draw(20, 0), mask_id=LOOP.V, generator=seeded(seed)
        )

    assert bound(0) == bound(0) != bound(1)


def test_the_network_sees_every_token_once_in_every_pass():
    text, seen = [torch.zeros(L).long() for L in (3, 5, 5, 2)], []

    def nll(xt, targets, where):
        seen.append(xt.numel())
        return torch.zeros(xt.shape)

    diffusion.nelbo(None, text, mask_id=2, draws=3, batch_size=1, nll=nll)
    assert sum(seen) == 3 * 15 and len(seen) == 3 * 4


def test_an_estimate_keeps_no_graph_of_its_calls():
    weight = torch.zeros((), requires_grad=True)

    def nll(xt, targets, where):
        return weight.expand(xt.shape)

    settings = {"mask_id": 2, "draws": 2}
    nats, *_ = diffusion.estimate(diffusion.any_order, nll, torch.zeros(3, 4).long(), **settings)
    assert not nats.requires_grad


@pytest.mark.parametrize("draws", [1, 2])
def test_the_error_of_one_draw_is_not_known(draws):
    text = LOOP.draw(4, 0)
    _, error = diffusion.nelbo(zero_logits(LOOP.V), text, mask_id=LOOP.V, draws=draws)
    assert math.isnan(error) == (draws == 1)


@pytest.mark.parametrize(
    "rows, draws, said",
    [([3, 2], 0, "draws=0 must be"), ([], 8, "x0 needs rows"), ([3, 0], 8, "x0 needs rows")],
)
def test_no_draws_no_rows_and_an_empty_row_are_refused(rows, draws, said):
    text = [torch.zeros(L).long() for L in rows]
    with pytest.raises(ValueError, match=said):
        diffusion.nelbo(zero_logits(2), text, mask_id=2, draws=draws)


# --- Stratified pairs ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_every_entry_of_the_pairs_is_uniform(n):
    draws = torch.stack([diffusion.stratified_pairs(n, seeded(seed)) for seed in range(1000)])
    for entry in draws.T:
        counts = (entry * 16).long().bincount(minlength=16)
        assert chi_square_z(counts, torch.full((16,), 1 / 16).double()) < 4


def test_the_pairs_lie_in_the_unit_interval():
    draws = torch.cat([diffusion.stratified_pairs(2, seeded(seed)) for seed in range(1000)])
    assert draws.dtype == torch.float64 and 0 <= draws.min() and draws.max() < 1


def test_every_stratum_holds_two_entries_of_the_pairs():
    for seed in range(50):
        strata = (diffusion.stratified_pairs(12, seeded(seed)) * 6).long()
        assert strata.sort().values.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_no_two_pairs_lie_at_the_same_place_within_their_strata():
    place = (diffusion.stratified_pairs(12, seeded(0)) * 12).frac()
    assert len(torch.minimum(place, 1 - place).round(decimals=9).unique()) == 6


@pytest.mark.parametrize("n, alone", [(12, 0), (7, 1), (1, 1)])
def test_all_entries_but_an_odd_one_have_an_antithetic_partner(n, alone):
    u = diffusion.stratified_pairs(n, seeded(0))
    has_partner = ((u[:, None] + u - 1).abs() < 1e-12).any(dim=1)
    assert (~has_partner).sum() == alone


def test_the_masked_counts_come_in_pairs_of_l_and_length_plus_1_minus_l():
    counts = masks_drawn(torch.zeros(64, 37).long(), 1)[0].sum(dim=1).sort().values
    assert torch.equal(counts + counts.flip(0), torch.full((64,), 38))


def test_the_masked_count_of_a_row_is_uniform_on_1_to_the_length():
    counts = masks_drawn(torch.zeros(3, 5).long(), 1000)[:, 0].sum(dim=1).bincount(minlength=6)
    assert chi_square_z(counts, torch.tensor([0, 1, 1, 1, 1, 1]).double() / 5) < 4


# --- Its variance and its error ------------------------------------------------------------------


def profile(is_masked: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A synthetic network: at masked share r a masked token costs 0.55 + 1.9 r^1.3 + N(0, 1)."""
    share = is_masked.double().mean(dim=1, keepdim=True)
    noise = torch.randn(is_masked.shape, generator=generator)
    return torch.where(is_masked, 0.55 + 1.9 * share**1.3 + noise, 0.0)


@functools.cache
def deviation_of_the_bound(B: int, L: int) -> float:
    """Standard deviation of one pass over B rows of L tokens, from 400 passes."""
    noise = seeded(1)
    _, error = diffusion.nelbo(
        None,
        torch.zeros(B, L).long(),
        mask_id=1,
        generator=seeded(0),
        draws=400,
        nll=lambda xt, x0, is_masked: profile(is_masked, noise),
    )
    return error * math.sqrt(400)


def deviation_of_independent_times(B: int, L: int) -> float:
    """The same for times that know nothing of each other, each mask a coin, each cost over p."""
    generator = seeded(0)
    p = 1e-3 + (1 - 1e-3) * torch.rand(400 * B, 1, dtype=torch.float64, generator=generator)
    is_masked = torch.rand(400 * B, L, generator=generator) < p
    return (profile(is_masked, generator) / p).view(400, -1).mean(dim=1).std().item()


def test_stratified_pairs_have_at_most_a_quarter_of_the_variance_of_independent_times():
    ratio = deviation_of_the_bound(64, 256) / deviation_of_independent_times(64, 256)
    assert ratio**2 < 0.25


@pytest.mark.parametrize("L, deviation", [(256, 0.0209), (64, 0.0342)])
def test_the_deviation_of_one_pass_is_that_of_the_table(L, deviation):
    relative_error = 1 / math.sqrt(2 * 399)  # of a standard deviation out of 400 normal draws
    assert deviation_of_the_bound(64, L) == pytest.approx(deviation, rel=4 * relative_error)


def test_the_95_percent_interval_covers_the_bound_in_93_to_97_percent_of_2000_seeds():
    L = 6
    x0 = torch.randint(5, (24, L), generator=seeded(0))
    truth = x0.double().mean().item() * sum(1 + count / L for count in range(1, L + 1)) / L
    half, covered, settings = bounds.student_t(3), 0, {"draws": 4, "nll": cost_of_share}
    for seed in range(2000):
        value, error = diffusion.nelbo(None, x0, mask_id=5, generator=seeded(seed), **settings)
        covered += abs(value - truth) < half * error
    assert 0.93 < covered / 2000 < 0.97


def test_a_single_draw_has_no_error():
    value, error = diffusion.nelbo(zero_logits(2), CHAIN_TEXT, mask_id=CHAIN.V, draws=1)
    assert math.isnan(error) and value == pytest.approx(math.log(2))
