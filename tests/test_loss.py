"""diffusion.py: the forward process and the training loss, against three enumerable tokens."""

import math

import numpy as np
import pytest
import torch
from problems import (
    CHAIN,
    CHAIN_ENTROPY,
    CHAIN_TEXT,
    LOOP,
    arbitrary_network,
    cost_at,
    cross_entropies,
    exact_denoiser,
    expected_costs,
    seeded,
    z_score,
    zero_logits,
)

import diffusion

# eps, training loss (sum over L), (1 - eps) loss + F(eps), for the chain and its exact denoiser
EPSILONS = [
    (1e-3, 1.5190734163, 1.5186328984),
    (1e-2, 1.5230517735, 1.5186648805),
    (1e-1, 1.5639053502, 1.5220790424),
]


def training_weights(B: int, L: int, seed: int = 0, **settings) -> torch.Tensor:
    """What one nat at each position (B, L) adds to B L times the loss: 1 / p_mask of its row."""
    nll = torch.ones(B, L, dtype=torch.float64, requires_grad=True)
    loss = diffusion.masked_diffusion_loss(
        None,
        torch.zeros(B, L, dtype=torch.long),
        mask_id=1,
        generator=seeded(seed),
        nll=lambda *given: nll,
        **settings,
    )
    loss.backward()
    return nll.grad * B * L


def times(B: int, eps: float = 0.01, **settings) -> torch.Tensor:
    """The times (B,) of the rows of a batch."""
    return (1 / training_weights(B, 1, eps=eps, **settings)[:, 0] - eps) / (1 - eps)


def masks(B: int, L: int, seed: int, **settings) -> torch.Tensor:
    """Where the loss masks one batch (B, L)."""
    seen = []
    diffusion.masked_diffusion_loss(
        None,
        torch.zeros(B, L, dtype=torch.long),
        mask_id=1,
        generator=seeded(seed),
        nll=lambda xt, x0, is_masked: seen.append(is_masked) or x0.float(),
        **settings,
    )
    return seen[0]


# --- Forward process -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "t, eps, p", [(0.0, 0.01, 0.01), (1.0, 0.01, 1.0), (0.5, 0.1, 0.55), (0.3, 0.0, 0.3)]
)
def test_the_mask_probability_runs_in_a_line_from_eps_to_1(t, eps, p):
    assert diffusion.mask_probability(t, eps) == pytest.approx(p, abs=1e-15)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9])
def test_the_share_of_masked_tokens_is_p(p):
    _, is_masked = diffusion.mask_tokens(LOOP.draw(20_000, 0), p, LOOP.V, seeded(0))
    assert z_score(is_masked.double().flatten(), p) < 4


def test_each_row_is_masked_at_its_own_p():
    p = torch.tensor([[0.1], [0.8]], dtype=torch.float64)
    _, is_masked = diffusion.mask_tokens(torch.zeros(2, 20_000).long(), p, 1, seeded(0))
    assert all(z_score(is_masked[i].double(), p[i].item()) < 4 for i in range(2))


def test_the_tokens_of_a_row_are_masked_independently_of_each_other():
    B, L, p = 20_000, 16, 0.3
    _, is_masked = diffusion.mask_tokens(torch.zeros(B, L).long(), p, 1, seeded(0))
    squares = (is_masked.sum(dim=1).double() - L * p) ** 2
    assert z_score(squares, L * p * (1 - p)) < 4


@pytest.mark.parametrize("p, masked", [(0.0, 0), (1.0, 4000)])
def test_p_of_0_masks_nothing_and_p_of_1_everything(p, masked):
    _, is_masked = diffusion.mask_tokens(LOOP.draw(1000, 0), p, LOOP.V, seeded(0))
    assert is_masked.sum() == masked


def test_the_mask_is_where_is_masked_and_the_data_elsewhere():
    x0 = LOOP.draw(1000, 0)
    xt, is_masked = diffusion.mask_tokens(x0, 0.5, LOOP.V, seeded(0))
    assert torch.equal(xt == LOOP.V, is_masked) and torch.equal(xt[~is_masked], x0[~is_masked])


def test_is_masked_is_right_where_the_data_itself_holds_the_mask_id():
    x0 = torch.full((1000, 4), LOOP.V)
    _, is_masked = diffusion.mask_tokens(x0, 0.5, LOOP.V, seeded(0))
    assert z_score(is_masked.double().flatten(), 0.5) < 4


def test_masking_leaves_the_clean_ids_as_they_are():
    x0 = LOOP.draw(100, 0)
    before = x0.clone()
    diffusion.mask_tokens(x0, 0.5, LOOP.V, seeded(0))
    assert torch.equal(x0, before)


def test_rows_of_a_batch_are_masked_as_they_are_in_the_whole():
    x0, rows = LOOP.draw(100, 0), torch.tensor([3, 97, 40])
    whole, _ = diffusion.mask_tokens(x0, 0.5, LOOP.V, seeded(0))
    part, _ = diffusion.mask_tokens(x0[rows], 0.5, LOOP.V, seeded(0), rows)
    assert torch.equal(part, whole[rows])


# --- Cross-entropy -------------------------------------------------------------------------------


def test_the_cross_entropies_are_minus_log_q_where_masked_and_0_elsewhere():
    x0, model = LOOP.draw(500, 0), arbitrary_network(LOOP)
    xt, is_masked = diffusion.mask_tokens(x0, 0.5, LOOP.V, seeded(0))
    nll = diffusion.nll_from_logits(model, xt, x0, is_masked)
    torch.testing.assert_close(nll, cross_entropies(model, xt, x0, is_masked), rtol=0, atol=1e-13)


def test_a_batch_in_which_nothing_is_masked_has_a_gradient_of_zero():
    x0, is_masked = torch.zeros(2, 4).long(), torch.zeros(2, 4).bool()
    logits = torch.randn(2, 4, 3, generator=seeded(0), requires_grad=True)
    diffusion.nll_from_logits(lambda xt: logits, x0, x0, is_masked).sum().backward()
    assert torch.equal(logits.grad, torch.zeros(2, 4, 3))


@pytest.mark.parametrize(
    "given, returned",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_the_loss_has_the_precision_of_the_logits_and_at_least_float32(given, returned):
    loss = diffusion.masked_diffusion_loss(
        lambda xt: zero_logits(LOOP.V)(xt).to(given), LOOP.draw(8, 0), mask_id=LOOP.V
    )
    assert loss.dtype == returned


# --- Times ---------------------------------------------------------------------------------------


def test_every_row_of_a_batch_has_a_time_in_its_own_stratum():
    strata = torch.cat([(times(8, seed=seed) * 8).floor() for seed in range(50)])
    assert torch.equal(strata, torch.arange(8.0).double().repeat(50))


def test_the_times_are_uniform_within_their_strata():
    n = 4000
    within = times(n) * n - torch.arange(n)
    assert z_score(within, 0.5) < 4 and z_score((within - 0.5) ** 2, 1 / 12) < 4


def test_all_tokens_of_a_row_have_the_weight_of_one_time():
    weights = training_weights(16, 5)
    assert torch.equal(weights, weights[:, :1].expand(16, 5))


def test_a_part_of_a_batch_has_the_times_that_its_rows_have_in_the_whole():
    rows = torch.arange(1, 12, 3)
    part = times(4, share=(rows, 12))
    torch.testing.assert_close(part, times(12)[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_the_mean_over_the_interleaved_parts_of_a_batch_is_the_loss_of_the_whole(parts):
    x0, model = LOOP.draw(12, 0), arbitrary_network(LOOP)

    def loss(rows: torch.Tensor) -> float:
        return diffusion.masked_diffusion_loss(
            model,
            x0[rows],
            mask_id=LOOP.V,
            generator=seeded(5),
            share=(rows, 12),
        ).item()

    mean = sum(loss(torch.arange(part, 12, parts)) for part in range(parts)) / parts
    whole = diffusion.masked_diffusion_loss(model, x0, mask_id=LOOP.V, generator=seeded(5))
    assert mean == pytest.approx(whole.item(), abs=1e-12)


def test_the_same_seed_gives_the_same_loss_and_another_seed_another():
    def loss(seed: int) -> float:
        x0, model = CHAIN_TEXT, arbitrary_network(CHAIN)
        return diffusion.masked_diffusion_loss(
            model, x0, mask_id=CHAIN.V, generator=seeded(seed)
        ).item()

    assert loss(0) == loss(0) != loss(1)


# --- What the loss amounts to --------------------------------------------------------------------


def expected_loss(eps: float) -> float:
    """E_t[F(p_mask(t)) / p_mask(t)] of the chain's exact denoiser, over every mask, by quadrature.

    Eight nodes are exact: F(p) / p is a polynomial of degree L - 1.
    """
    costs = expected_costs(exact_denoiser(CHAIN), CHAIN, diffusion.nll_from_logits)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    probabilities = [diffusion.mask_probability((node + 1) / 2, eps) for node in nodes]
    return sum(
        weight / 2 * cost_at(p, costs).item() / p
        for weight, p in zip(weights, probabilities, strict=True)
    )


@pytest.mark.parametrize("eps, loss, bound", EPSILONS)
def test_the_expected_training_loss_is_that_of_the_table(eps, loss, bound):
    assert expected_loss(eps) == pytest.approx(loss, abs=1e-8)


@pytest.mark.parametrize("eps, loss, bound", EPSILONS)
def test_adding_the_cost_at_eps_makes_the_training_loss_a_bound(eps, loss, bound):
    costs = expected_costs(exact_denoiser(CHAIN), CHAIN, diffusion.nll_from_logits)
    stopped = (1 - eps) * expected_loss(eps) + cost_at(eps, costs).item()
    assert stopped == pytest.approx(bound, abs=1e-8) and stopped >= CHAIN_ENTROPY


@pytest.mark.parametrize("eps, loss, bound", EPSILONS)
def test_the_training_loss_averages_to_that_of_the_table_in_nats_per_token(eps, loss, bound):
    model = exact_denoiser(CHAIN)
    losses = [
        diffusion.masked_diffusion_loss(
            model,
            CHAIN_TEXT.repeat(50, 1)[torch.randperm(5000, generator=seeded(seed))],
            mask_id=CHAIN.V,
            generator=seeded(seed),
            eps=eps,
        )
        for seed in range(50)
    ]
    assert z_score(torch.stack(losses), loss / CHAIN.L) < 4


@pytest.mark.parametrize("B, batches", [(1, 400), (1000, 100)])
def test_the_loss_of_a_network_that_knows_nothing_averages_to_ln_v(B, batches):
    """In batches of one row, too, where masks that knew their time's jitter would show."""
    model, x0 = zero_logits(5), torch.zeros(B, 4).long()
    losses = [
        diffusion.masked_diffusion_loss(model, x0, mask_id=5, generator=seeded(seed), eps=0.1)
        for seed in range(batches)
    ]
    assert z_score(torch.stack(losses), math.log(5)) < 4


def test_the_loss_is_the_sum_over_the_masked_divided_by_p_and_by_all_tokens():
    x0, model, seen = LOOP.draw(32, 0), arbitrary_network(LOOP), []

    def nll(xt, x0, is_masked):
        seen.append(cross_entropies(model, xt, x0, is_masked))
        return seen[0]

    loss = diffusion.masked_diffusion_loss(model, x0, mask_id=LOOP.V, generator=seeded(3), nll=nll)
    p = 1 / training_weights(32, LOOP.L, seed=3)
    assert loss.item() == pytest.approx((seen[0] / p).sum().item() / (32 * LOOP.L), abs=1e-12)


def test_the_logits_at_visible_positions_have_a_gradient_of_exactly_zero():
    logits = torch.randn(32, 8, 5, generator=seeded(0), requires_grad=True)
    seen = []
    x0 = torch.zeros(32, 8).long()
    diffusion.masked_diffusion_loss(
        lambda xt: seen.append(xt) or logits, x0, mask_id=5, generator=seeded(0)
    ).backward()
    assert torch.equal((logits.grad != 0).any(dim=-1), seen[0] == 5)


# --- Other weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("g", [0.0, 0.3, 1.0])
def test_a_weighting_weighs_a_row_by_its_formula(g):
    p = 1 / training_weights(16, 5)
    weights = training_weights(16, 5, weighting=g)
    torch.testing.assert_close(weights, (2 - g) / p**g, rtol=1e-6, atol=0)


@pytest.mark.parametrize("g", [0.0, 0.5])
def test_a_weighting_keeps_the_scale_of_a_loss_that_is_the_same_at_every_token(g):
    x0, model = torch.zeros(100, 16).long(), zero_logits(5)
    losses = [
        diffusion.masked_diffusion_loss(
            model, x0, mask_id=5, generator=seeded(seed), eps=1e-6, weighting=g
        )
        for seed in range(100)
    ]
    assert z_score(torch.stack(losses), math.log(5)) < 4


def test_a_weighting_that_is_out_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"weighting=1.5 must lie in \[0, 1\]"):
        masks(2, 4, 0, weighting=1.5)
