"""Block diffusion: training in two streams, the bound, sampling with a cache, from L' = 1 to L."""

import json
import math
import random
import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, load_model
from problems import (
    CHAIN,
    CHAIN_ENTROPY,
    CHAIN_TEXT,
    LOOP,
    all_ids,
    arbitrary_network,
    chi_square_z,
    exact_denoiser,
    seeded,
    z_score,
)
from torch.distributed.utils import _to_kwargs

import diffusion
import sample as sample_script
import train as train_script
from model import ModelConfig, Transformer, attend, block_mask
from nanomdm import bounds, cli, devices, strategies
from nanomdm.strategies import STRATEGIES, Sampler, fill_blocks

V, L = 11, 24
SIZES = (1, 2, 3, 4, 8, 24)


def network(block_length: int, seed: int = 0, **shape) -> Transformer:
    """A network whose weights, convolutions included, say something."""
    torch.manual_seed(seed)
    shape = {"n_layer": 3, "n_head": 2, "n_embd": 32, "conv_width": 5} | shape
    model = Transformer(ModelConfig(V, L, block_length=block_length, **shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def rows(length: int = L, count: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x0, xt and is_masked (count, length)."""
    x0 = torch.randint(V, (count, length), generator=seeded(seed))
    is_masked = torch.rand(count, length, generator=seeded(seed + 1)) < 0.5
    return x0, x0.masked_fill(is_masked, V), is_masked


# --- The network: two streams --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"conv_width": 0}, {"attention_gate": True}, {"learned_positions": True}],
    ids=str,
)
@pytest.mark.parametrize("length", [24, 21, 7])
@pytest.mark.parametrize("size", SIZES)
def test_each_block_is_predicted_as_from_itself_and_the_clean_ones_before(size, length, options):
    model, (x0, xt, is_masked) = network(size, **options), rows(length)
    together = model(xt, x0, is_masked)
    one_by_one = diffusion.nll_from_logits(model, xt, x0, is_masked, block_length=size)
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=2e-5)
    assert together[is_masked].min() > 0
    capacity = int(is_masked.sum()) + 3
    torch.testing.assert_close(model(xt, x0, is_masked, capacity), together)


@pytest.mark.parametrize("size", [1, 4, 8])
def test_so_are_the_gradients(size):
    model, (x0, xt, is_masked) = network(size), rows()
    gradients = []
    for recompute in (False, True):
        model.train().recompute = recompute
        loss = model(xt, x0, is_masked).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    loss = diffusion.nll_from_logits(model, xt, x0, is_masked, block_length=size).sum()
    gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for each in gradients[1:]:
        for ours, theirs in zip(gradients[0], each, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_one_block_is_the_network_without_blocks():
    blocks, plain = network(L), network(0)
    x0, xt, is_masked = rows()
    assert torch.equal(plain(xt), blocks(xt)) or torch.allclose(plain(xt), blocks(xt), atol=1e-5)
    torch.testing.assert_close(plain(xt, x0, is_masked), blocks(xt, x0, is_masked))


@pytest.mark.parametrize("size", [1, 3, 8])
def test_no_block_sees_its_own_clean_tokens_or_later_ones(size):
    """Nor do clean ones, and a masked block is seen by itself alone."""
    model, (x0, xt, _) = network(size), rows()
    block = torch.arange(L) // size
    before = model.hidden(xt, x0)
    for b in range(L // size):
        for which, streams in (("clean", (xt, (x0 + 1) % V)), ("masked", ((xt + 1) % V, x0))):
            changed = [
                torch.where(block == b, new, old)
                for new, old in zip(streams, (xt, x0), strict=True)
            ]
            after = model.hidden(*changed)
            moved = (after - before).abs().amax(dim=(0, 2)) > 1e-4  # (L,)
            assert torch.equal(moved, block > b if which == "clean" else block == b), (b, which)


def test_what_a_mask_lets_through_is_what_attention_sees():
    number = torch.arange(6) // 2
    expected = """
        ab.... ......
        ab.... ......
        ..cd.. AB....
        ..cd.. AB....
        ....ef ABCD..
        ....ef ABCD..
        ...... AB....
        ...... AB....
        ...... ABCD..
        ...... ABCD..
        ...... ABCDEF
        ...... ABCDEF
    """
    drawn = [
        [c != "." for c in line.replace(" ", "")] for line in expected.split("\n") if line.strip()
    ]
    assert block_mask(number, number, 2).tolist() == drawn
    assert block_mask(number, number, 1).tolist() == [row[6:] for row in drawn[6:]]
    q, k, v = torch.randn(3, 1, 1, 12, 8, generator=seeded(0))
    sees = block_mask(number, number, 2)
    weights = (q @ k.mT / 8**0.5).masked_fill(~sees, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(attend(q, k, v, sees), weights @ v)
    rough = attend(*(x.bfloat16() for x in (q, k, v)), sees)
    torch.testing.assert_close(rough.float(), weights @ v, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("size", [1, 3, 8])
def test_flex_attention_has_the_same_numbers(size):
    model, (x0, xt, is_masked) = network(size, n_embd=64), rows()
    with torch.no_grad():
        dense = model(xt, x0, is_masked)
        alone = model(xt)
        devices.use_flex_attention(model)
        torch.testing.assert_close(model(xt, x0, is_masked), dense, rtol=0, atol=2e-5)
        torch.testing.assert_close(model(xt), alone)
    attention = devices.tiled_attention(L, size, torch.device("cpu"))
    sees = attention.keywords["block_mask"].mask_mod
    i, j = torch.arange(2 * L)[:, None], torch.arange(2 * L)
    number = torch.arange(L) // size
    assert torch.equal(sees(0, 0, i, j), block_mask(number, number, 2))


def test_blocks_add_no_weights_and_start_from_any():
    shapes = [{k: v.shape for k, v in network(n).state_dict().items()} for n in (0, 4)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("shape", [{"block_length": 5}, {"block_length": 4, "causal": True}])
def test_blocks_divide_the_context_and_are_no_causal_mask(shape):
    with pytest.raises(ValueError, match="model.block_length=. (must divide|is for training)"):
        ModelConfig(V, L, **shape)


# --- Loss and bound ------------------------------------------------------------------------------


def padded(model, length: int, mask_id: int):
    """A table knows whole texts alone: what is not there yet is masked."""

    def answer(xt: torch.Tensor) -> torch.Tensor:
        whole = F.pad(xt, (0, length - xt.size(1)), value=mask_id)
        return model(whole)[:, : xt.size(1)]

    return answer


def exact_bound(model, x0: torch.Tensor, mask_id: int, size: int) -> torch.Tensor:
    """The bound (B,) of x0 (B, L), by enumeration of the masks of each block: T10."""
    total = torch.zeros(len(x0), dtype=torch.float64)
    for start in range(0, x0.size(1), size):
        here = x0[:, start : start + size]
        M = here.size(1)
        for hidden in all_ids(2, M)[1:].bool():
            count = int(hidden.sum())
            xt = torch.cat((x0[:, :start], here.masked_fill(hidden, mask_id)), dim=1)
            log_p = model(xt)[:, start:].log_softmax(dim=-1)
            costs = -log_p.gather(-1, here[..., None]).squeeze(-1)[:, hidden].sum(dim=1)
            total += costs * M / count / (M * math.comb(M, count))  # weight, and chance of the mask
    return total


@pytest.mark.parametrize("size", [1, 2, 3])
def test_with_an_exact_denoiser_the_bound_is_the_entropy_whatever_the_block(size):
    model = padded(exact_denoiser(CHAIN), CHAIN.L, CHAIN.V)
    exact = exact_bound(model, CHAIN_TEXT, CHAIN.V, size).mean().item()
    assert exact == pytest.approx(CHAIN_ENTROPY, abs=1e-9)
    options = {"mask_id": CHAIN.V, "block_length": size, "generator": seeded(0), "draws": 64}
    value, error = diffusion.nelbo(model, CHAIN_TEXT, **options)
    assert abs(CHAIN.L * value - CHAIN_ENTROPY) < max(4 * CHAIN.L * error, 1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_bound_of_any_network_is_that_of_the_enumeration(size):
    """A last block may be shorter."""
    model, x0 = padded(arbitrary_network(LOOP), LOOP.L, LOOP.V), LOOP.data[LOOP.law > 0]
    exact = exact_bound(model, x0, LOOP.V, size).sum().item() / x0.numel()
    options = {"mask_id": LOOP.V, "block_length": size, "generator": seeded(0), "draws": 64}
    value, error = diffusion.nelbo(model, x0, **options)
    assert abs(value - exact) < max(4 * error, 1e-9)
    assert (error < 1e-12) == (size == 1)


@pytest.mark.parametrize("blocks", [8, 13, 64])
def test_the_times_of_a_rows_blocks_are_uniform_and_spread_evenly(blocks):
    times = []

    def estimator(u, noise):
        times.append(u.view(-1, blocks))
        yield noise < 1, noise < 1, u

    u = diffusion.stratified_pairs(1000, seeded(0))
    next(diffusion.in_blocks(estimator, u, torch.zeros(1000, 2 * blocks), 2))
    (times,) = times
    assert torch.equal(times[:, 0], u)
    assert all((((t * 10).long().bincount(minlength=10)) - 100).abs().max() < 3 for t in times.T)
    points = times[0].sort().values
    gaps = torch.cat((points, points[:1] + 1)).diff()
    assert 0 < gaps.min() and gaps.max() < 2 / blocks  # at random some log(blocks) / blocks


@pytest.mark.parametrize("estimator", [bounds.continuous, partial(bounds.discrete, steps=3)])
def test_other_estimators_are_about_blocks_too(estimator):
    """Their bounds, of blocks of one token: masked with probability p, weight 1 / p."""
    x0 = LOOP.draw(2000, 0)
    nll = partial(diffusion.nll_from_logits, padded(arbitrary_network(LOOP), LOOP.L, LOOP.V))
    settings = {"mask_id": LOOP.V, "block_length": 1, "generator": seeded(0), "draws": 16}
    nats, *_ = diffusion.estimate(estimator, partial(nll, block_length=1), x0, **settings)
    exact = exact_bound(padded(arbitrary_network(LOOP), LOOP.L, LOOP.V), x0, LOOP.V, 1)
    assert z_score(nats.mean(dim=1), exact.mean().item()) < 4


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_loss_with_the_weight_of_the_bound_is_the_bound(size):
    network, x0 = arbitrary_network(LOOP), LOOP.draw(64, 0)
    model = padded(network, LOOP.L, LOOP.V)
    settings = {"mask_id": LOOP.V, "block_length": size}
    losses = torch.stack(
        [
            diffusion.masked_diffusion_loss(  # in random order: a row's number decides its times
                model,
                x0[torch.randperm(64, generator=seeded(seed))],
                generator=seeded(seed),
                **settings,
            )
            for seed in range(400)
        ]
    )
    exact = exact_bound(model, x0, LOOP.V, size).mean().item() / LOOP.L
    if size == 1:
        assert losses.sub(exact).abs().max() < 1e-9
    else:
        assert z_score(losses, exact) < 4


@pytest.mark.parametrize("context", [0, 6, 21])
@pytest.mark.parametrize("weighting", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_where_each_masked_token_costs_the_same_so_does_the_loss(size, weighting, context):
    """Also where a block is partly context."""
    x0, settings = rows(count=64)[0], {"mask_id": V, "block_length": size, "weighting": weighting}
    settings["predict"] = torch.arange(L).expand_as(x0) >= context
    losses = torch.stack(
        [
            diffusion.masked_diffusion_loss(
                None, x0, generator=seeded(i), nll=lambda xt, x0, where: 2.5 * where, **settings
            )
            for i in range(200)
        ]
    )
    assert losses.mean().item() == pytest.approx(2.5, abs=0.02)


def masks_of(size: int, x0: torch.Tensor, seed: int = 0, **options) -> torch.Tensor:
    seen = []

    def nll(xt, x0, is_masked):
        assert torch.equal(xt, x0.masked_fill(is_masked, V))
        seen.append(is_masked)
        return is_masked.float()

    options |= {"mask_id": V, "block_length": size, "generator": seeded(seed), "nll": nll}
    diffusion.masked_diffusion_loss(None, x0, **options)
    return seen[0]


@pytest.mark.parametrize("size", [1, 3, 4, 24])
def test_every_block_has_one_to_all_of_its_tokens_masked_equally_often(size):
    x0 = rows(count=96)[0]
    counts = masks_of(size, x0).view(-1, size).sum(dim=1).bincount(minlength=size + 1)
    assert counts[0] == 0
    expected = 96 * (L // size) / size
    assert ((counts[1:] - expected).abs() <= 3 + 0.05 * expected).all()  # by chance: 4 sqrt(n)
    by_block = masks_of(size, x0).view(96, -1, size).sum(dim=2).double().mean(dim=0)
    assert (by_block - (size + 1) / 2).abs().max() < 0.1 * size


def test_context_is_never_masked_and_does_not_count_in_its_block():
    x0 = rows(count=96)[0]
    predict = torch.arange(L).expand_as(x0) >= 6
    masks = masks_of(4, x0, predict=predict)
    assert not masks[:, :6].any()
    counts = masks[:, 4:8].sum(dim=1).bincount(minlength=3)
    assert counts[0] == 0 and (counts[1:] - 48).abs().max() <= 3


def test_parts_of_a_batch_have_the_masks_of_the_whole():
    x0 = rows(count=8)[0]
    whole, part = masks_of(4, x0), torch.tensor([1, 4, 7])
    assert torch.equal(masks_of(4, x0[part], share=(part, 8)), whole[part])


def test_no_batch_masks_more_than_there_is_room_for():
    for size in (1, 2, 8, 24):
        room = devices.block_capacity(16 * L // size, size)
        most = max(int(masks_of(size, rows(count=16)[0], seed).sum()) for seed in range(200))
        assert most <= room <= 16 * L
        assert size not in (2, 8) or room < 0.95 * 16 * L


@pytest.mark.parametrize("length", [24, 21])
def test_blocks_of_one_token_have_the_likelihood_of_going_from_left_to_right(length):
    """Exactly, in one call instead of one for each token."""
    model, x0 = network(1), rows(length, 8)[0]
    settings = {"mask_id": V, "block_length": 1, "generator": seeded(0)}
    value, error = diffusion.nelbo(model, x0, nll=model, draws=3, **settings)
    sampler = Sampler(diffusion.sample, "left_to_right", {"strategy": strategies.left_to_right})
    scored = sampler.fill(model, x0, torch.ones_like(x0, dtype=torch.bool), x0=x0)
    assert error < 1e-8 and scored.calls == length
    assert value == pytest.approx(scored.costs.sum().item() / x0.numel(), abs=1e-6)


def test_loss_and_bound_of_a_network_with_blocks_are_about_its_blocks_unless_told():
    model, x0 = network(4), rows(count=4)[0]
    for function in (diffusion.nelbo, diffusion.masked_diffusion_loss):
        with torch.no_grad():
            found = [
                function(model, x0, mask_id=V, generator=seeded(0), **options)
                for options in ({}, {"block_length": 4}, {"nll": model})
            ]
        values = [float(each[0] if isinstance(each, tuple) else each) for each in found]
        assert values == pytest.approx([values[0]] * 3, rel=1e-4)


# --- Sampling ------------------------------------------------------------------------------------


def fill(model, canvas, is_masked, size, seed=0, **settings):
    """`fill_blocks` of a model that is no Transformer."""
    settings = {"cached": False, "mask_id": LOOP.V, "generator": seeded(seed)} | settings
    settings["strategy"] = STRATEGIES[settings["strategy"]]
    return fill_blocks(diffusion.sample, model, canvas, is_masked, size, **settings)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "confidence", "steps": 1},
        {"strategy": "confidence", "steps": 2, "temperature": 0.7},
        {"strategy": "left_to_right"},
        {"strategy": "eb"},
    ],
    ids=str,
)
def test_samples_follow_the_law_that_the_scores_say(size, settings):
    """By enumeration of all texts: the product, block by block, of what each draw costs."""
    model = padded(arbitrary_network(LOOP), LOOP.L, LOOP.V)
    everywhere = torch.ones_like(LOOP.data, dtype=torch.bool)
    costs = fill(model, LOOP.data, everywhere, size, x0=LOOP.data, **settings).costs
    law = costs.sum(dim=1).neg().exp()
    assert law.sum().item() == pytest.approx(1, abs=1e-12)
    drawn = fill(model, *LOOP.blank(8000), size, **settings)
    assert chi_square_z(LOOP.counts(drawn.ids), law) < 4
    again = fill(model, drawn.ids, drawn.ids >= 0, size, x0=drawn.ids, **settings)
    torch.testing.assert_close(drawn.costs, again.costs)
    if settings == {"strategy": "confidence", "steps": 1}:  # all of a block at once: by hand
        by_hand = torch.ones(len(law), dtype=torch.float64)
        for start in range(0, LOOP.L, size):
            xt = F.pad(LOOP.data[:, :start], (0, min(size, LOOP.L - start)), value=LOOP.V)
            p = model(xt)[:, start:].softmax(dim=-1)
            here = LOOP.data[:, start : start + size, None]
            by_hand *= p.gather(-1, here).squeeze(-1).prod(dim=1)
        torch.testing.assert_close(law, by_hand)


def random_setting(seed: int) -> tuple[dict, dict]:
    """Any network, and any way to sample from it."""
    any_of = random.Random(seed).choice
    size = any_of((1, 2, 3, 4, 6, 8, 12, 24))
    shape = {"block_length": size, "seed": seed, "conv_width": any_of((0, 1, 3, 5, 7))}
    shape |= {"n_layer": any_of((1, 2)), "n_head": any_of((1, 2, 4))}
    for field in ("learned_positions", "qk_norm", "attention_gate"):
        shape[field] = any_of((False, True))
    name = any_of([*STRATEGIES])
    settings = {"strategy": STRATEGIES[name], "steps": any_of((1, 2, 3, 5, 40))}
    settings |= {"temperature": any_of((0.0, 0.7, 1.0)), "length": any_of((24, 24, 23, 9, 2))}
    settings |= {"rows": any_of((1, 3)), "prompts": any_of((0, 0, 1, 5, 12))}
    return shape, settings


@pytest.mark.parametrize("seed", range(200))
def test_with_the_cache_come_the_same_tokens_as_without(seed):
    shape, settings = random_setting(seed)
    length, count, most = (settings.pop(name) for name in ("length", "rows", "prompts"))
    model, canvas = network(**shape), rows(length, count, seed)[0]
    given = torch.randint(min(most, length - 1) + 1, (count, 1), generator=seeded(seed))
    is_masked = torch.arange(length) >= given  # prompts of unequal length
    found = []
    for cached in (True, False):
        sampler = Sampler(diffusion.sample, "", settings | {"cached": cached})
        found.append(sampler.fill(model, canvas, is_masked, generator=seeded(seed)))
    with_cache, without = found
    assert torch.equal(with_cache.ids, without.ids)
    assert torch.equal(with_cache.order, without.order) and with_cache.calls == without.calls
    torch.testing.assert_close(with_cache.costs, without.costs, rtol=1e-3, atol=1e-4)
    assert torch.equal(with_cache.ids[~is_masked], canvas[~is_masked])
    assert (with_cache.ids < V).all()


def test_a_cache_survives_what_fsdp_does_with_the_inputs_of_a_network():
    """It builds dictionaries anew, to move the tensors in them."""
    cache = strategies.Cache(8)
    cache.extend("k", torch.ones(2, 3))
    (_,), (kept,) = _to_kwargs((torch.ones(1),), {"cache": cache}, torch.device("cpu"), False)
    assert kept["cache"] is cache


class Measured:
    """A network that notes how many positions each call computes."""

    def __init__(self, model):
        self.model, self.sizes = model, []
        self.device, self.config = model.device, model.config

    def __call__(self, xt, cache=None):
        self.sizes.append(xt.size(1))
        return self.model(xt, cache=cache)


def test_a_finished_block_is_computed_once_more_and_a_prompt_once():
    measured, (canvas, _, _) = Measured(network(4)), rows(count=1)
    sampler = Sampler(diffusion.sample, "", {"strategy": strategies.left_to_right})
    sampler.fill(measured, canvas, torch.arange(L)[None] >= 10)
    assert measured.sizes == [12, 4] + [8, 4, 4, 4] * 3


@pytest.mark.parametrize("strategy", ["confidence", "stochastic", "eb", "left_to_right"])
def test_a_row_of_a_batch_is_filled_as_it_is_alone(strategy):
    model, canvas = network(4), rows(count=5)[0]
    is_masked = torch.arange(L) >= torch.tensor([[0], [3], [9], [16], [23]])
    sampler = Sampler(diffusion.sample, "", {"strategy": STRATEGIES[strategy], "steps": 2})
    together = sampler.fill(model, canvas, is_masked, generator=seeded(0)).ids
    for row in range(5):
        here, options = slice(row, row + 1), {"rows": torch.tensor([row]), "generator": seeded(0)}
        alone = sampler.fill(model, canvas[here], is_masked[here], **options).ids
        assert torch.equal(together[here], alone)


def test_rows_that_have_ended_are_filled_no_further():
    model, (canvas, _, _) = network(4), rows(count=3)
    everywhere, ends = torch.ones_like(canvas, dtype=torch.bool), torch.tensor([True, False, True])
    sampler = Sampler(diffusion.sample, "", {"strategy": "confidence", "steps": 2})
    whole = sampler.fill(model, canvas, everywhere, generator=seeded(0))
    some = sampler.fill(
        model, canvas, everywhere, generator=seeded(0), ended=lambda xt: ends & (xt[:, 7] < V)
    )
    assert (some.ids[ends, 8:] == V).all() and torch.equal(some.ids[:, :8], whole.ids[:, :8])
    assert torch.equal(some.ids[1], whole.ids[1])
    all_end = sampler.fill(model, canvas, everywhere, ended=lambda xt: xt[:, 7] < V)
    assert all_end.calls == 4 and whole.calls == 12


def test_history_and_callback_speak_of_the_whole_canvas():
    model, (canvas, _, _) = network(4), rows(count=2)
    history, seen = [], []
    sampler = Sampler(diffusion.sample, "", {"strategy": strategies.remask, "steps": 3})
    is_masked = torch.arange(L) >= torch.tensor([[2], [5]])
    filled = sampler.fill(
        model,
        canvas,
        is_masked,
        generator=seeded(0),
        history=history,
        callback=lambda step, s, xt: seen.append((step, xt.clone())),
    )
    steps = list(range(1, 19))
    assert filled.history is history
    assert [event.step for event in history] == steps == [step for step, _ in seen]
    xt = canvas.masked_fill(is_masked, V)
    for event, (_, after) in zip(history, seen, strict=True):
        assert event.revealed.shape == (2, L)
        if event.tokens is not None:
            xt[event.revealed] = event.tokens
        if event.again is not None:
            xt[event.again] = V
        assert torch.equal(xt, after)
    assert torch.equal(xt, filled.ids) and filled.order.max() <= 18
    assert torch.equal(filled.order > 0, is_masked)


def test_blanks_are_filled_within_their_block_and_no_further_back():
    model, (canvas, _, _) = network(4), rows(count=1)
    is_masked = torch.arange(L)[None] >= 8
    sampler = Sampler(diffusion.sample, "", {"strategy": "confidence"})
    is_masked[:, 5] = True  # 6 and 7 are given, in its block
    filled = sampler.fill(model, canvas, is_masked)
    assert torch.equal(filled.ids[~is_masked], canvas[~is_masked]) and (filled.ids < V).all()
    is_masked[:, 3] = True
    with pytest.raises(ValueError, match="after the block of a .MASK., where a network with block"):
        sampler.fill(model, canvas, is_masked)
    Sampler(diffusion.sample, "", {"strategy": "confidence"}).fill(network(24), canvas, is_masked)


def test_guidance_is_refused():
    model, (canvas, _, is_masked) = network(4), rows(count=1)
    with pytest.raises(ValueError, match="guidance compares with a text whose prompt is masked"):
        Sampler(diffusion.sample, "", {"strategy": "confidence"}, 1.0).fill(
            model, canvas, torch.ones_like(is_masked)
        )
    section = SimpleNamespace(
        strategy="spread", steps=4, temperature=1.0, options={"guidance": 1.0}
    )
    with pytest.raises(ValueError, match="guidance compares"):
        strategies.from_config(section, diffusion.sample, model_blocks=4)


# --- The three scripts ---------------------------------------------------------------------------

BLOCKS = "model.block_length=4"


@pytest.fixture(scope="module")
def in_blocks(tmp_path_factory, text_file):
    """The out_dir of a tiny run in blocks of four."""
    folder = tmp_path_factory.mktemp("blocks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *TINY, BLOCKS, f"data.path={text_file}"])
        cli.main(train_script.main)
    return folder / "out"


def test_a_run_in_blocks_learns_and_its_bound_is_that_of_eval(in_blocks, run):
    entries = [json.loads(line) for line in (in_blocks / "metrics.jsonl").open()]
    losses = [entry["train/loss"] for entry in entries if "train/loss" in entry]
    assert losses[-1] < losses[0]
    logged = [entry["eval/val_loss"] for entry in entries if "eval/val_loss" in entry]
    result = run(
        "eval.py", f"checkpoint={in_blocks}/ckpt.pt", "eval.draws=16", "eval.samplers=[eb]"
    )
    assert result.code == 0, result.err
    bound, error = re.search(r"^loss (\S+) ± (\S+) ", result.out, re.M).groups()
    assert abs(float(bound) - logged[-1]) < 0.1
    assert float(error) < 0.05
    assert "per masked token" not in result.out  # no rate is that of a whole row
    assert re.search(r"^eb +\d\.\d{4} ", result.out, re.M)


def test_bounds_of_blocks_stand_side_by_side(in_blocks, run):
    words = ("eval.bounds=[chain,discrete,left_to_right]", "sampling.steps=2", "eval.draws=8")
    result = run("eval.py", f"checkpoint={in_blocks}/ckpt.pt", *words)
    assert result.code == 0, result.err
    value = {
        name: float(re.search(rf"^{name} +([\d.]+)", result.out, re.M)[1])
        for name in ("uniform", "chain", "discrete", "left_to_right")
    }
    assert value["chain"] == pytest.approx(value["uniform"], abs=0.02)
    assert value["discrete"] > value["uniform"] - 0.02


def test_blocks_of_one_are_scored_exactly(run, text_file):
    assert run("train.py", *TINY, "model.block_length=1", f"data.path={text_file}").code == 0
    result = run("eval.py")
    assert "tokens, exactly" in result.out and "±" not in result.out
    refused = run("eval.py", "eval.samplers=[margin]")
    assert refused.code == 2 and "is autoregressive, scored exactly" in refused.err


def test_a_model_in_blocks_is_compared_with_a_plain_one(in_blocks, trained, run):
    result = run("eval.py", f"checkpoint={in_blocks}/ckpt.pt", f"eval.against={trained}/ckpt.pt")
    assert result.code == 0, result.err
    difference = float(re.search(r"difference ([+-][\d.]+) ± ", result.out)[1])
    ours, theirs = (float(value) for value in re.findall(r"loss ([\d.]+) ± ", result.out)[:2])
    assert difference == pytest.approx(ours - theirs, abs=2e-4)


@pytest.mark.parametrize("length", [0, 9, 70])
def test_texts_of_any_length_are_the_same_without_the_cache(in_blocks, run, monkeypatch, length):
    """Also beyond the context, where a window keeps the half that is finished."""
    words = (f"checkpoint={in_blocks}/ckpt.pt", "prompt=KING", "num_samples=3", "sampling.steps=2")
    words += (f"sampling.length={length}",) if length else ()
    texts = [run("sample.py", *words).out]
    monkeypatch.setattr(
        sample_script.strategies,
        "fill_blocks",
        lambda *given, **options: fill_blocks(*given, cached=False, **options),
    )
    texts.append(run("sample.py", *words).out)
    assert texts[0] == texts[1] and texts[0].count("--- sample") == 3
    parts = re.split(r"--- sample \d ---\n", texts[0])[1:]
    assert [len(part) - 1 for part in parts] == [length or 32] * 3


def test_a_text_ends_in_the_middle_of_a_window_and_of_a_batch(
    in_blocks, run, monkeypatch, tmp_path
):
    """Each row as alone, and no call is made for what nobody reads."""
    tokenizer = type(load_model(in_blocks / "ckpt.pt").tokenizer)
    eos = property(lambda self: int(self.encode("e")[0]), lambda self, value: None)
    monkeypatch.setattr(tokenizer, "eos", eos)
    words = [f"checkpoint={in_blocks}/ckpt.pt", "sampling.length=70", "sampling.steps=2"]
    run("sample.py", *words, "num_samples=6", "output=all.jsonl")
    samples = [json.loads(line) for line in (tmp_path / "all.jsonl").open()]
    assert len({len(each["tokens"]) for each in samples}) > 2
    longest = max(len(each["tokens"]) for each in samples)
    assert all(each["calls"] <= 2 * (longest // 4 + 2) for each in samples)
    assert all("e" not in each["text"] for each in samples)
    run("sample.py", *words, "num_samples=1", "output=one.jsonl")
    assert json.loads((tmp_path / "one.jsonl").read_text())["text"] == samples[0]["text"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prompt=The [MASK*3] of no"], "prompt: a token is given after the block of a [MASK]"),
        (
            ["prompt=The", "sampling.options={guidance: 1}"],
            "has never seen a mask before its block",
        ),
    ],
)
def test_what_blocks_cannot_do_is_refused(in_blocks, run, words, message):
    result = run("sample.py", f"checkpoint={in_blocks}/ckpt.pt", *words)
    assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1


def test_a_later_windows_blanks_are_allowed_in_the_block_where_the_prompt_ends(in_blocks, run):
    """Blocks are counted from the beginning of the text in every window."""
    words = [f"checkpoint={in_blocks}/ckpt.pt", "sampling.length=70", "sampling.steps=2"]
    given = ("The crown of no" * 5)[:65]
    result = run("sample.py", *words, f"prompt={given}[MASK]wn")
    assert result.code == 0, result.err
    assert result.out.startswith(given) and result.out[66:68] == "wn" and len(result.out) == 71
    refused = run("sample.py", *words, f"prompt={given[:62]}[MASK]wn")
    assert refused.code == 2 and "after the block" in refused.err


def test_tools_know_blocks(in_blocks, run, tmp_path):
    checkpoint = f"checkpoint={in_blocks}/ckpt.pt"
    view = run("tools.view", checkpoint, "prompt=The", "num_samples=2", "out=v.html")
    assert view.code == 0 and (tmp_path / "v.html").stat().st_size > 10_000, view.err
    refused = run("tools.view", checkpoint, "prompt=The [MASK*3] of no", "out=w.html")
    assert refused.code == 2 and "after the block" in refused.err
    words = ("tokens=96", "strategies=[spread,stochastic]", "calls=[2]", "output=f", "compile=auto")
    frontier = run("bench.frontier", checkpoint, *words)
    assert frontier.code == 0, frontier.err
    assert "| stochastic steps=2 | bound | 15.0 |" in frontier.out  # 8 blocks, 15 / 8 calls in each
    speed = run("bench.sampling", checkpoint, "strategies=[eb]", "batch_sizes=[2]")
    assert speed.code == 0 and "eb, no cache" in speed.out


@pytest.mark.parametrize("size", [1, 4])
def test_a_sampler_that_knows_no_blocks_is_refused(size):
    model, (x0, _, is_masked) = network(size), rows()
    for function in (diffusion.sample, diffusion.score):
        with pytest.raises(ValueError, match="has blocks: fill the canvas by nanomdm"):
            function(model, x0, is_masked=is_masked, mask_id=V)


def test_calls_that_go_on_from_a_cache_are_not_compiled_and_that_is_said(
    in_blocks, run, monkeypatch
):
    """Each layer and each size of the cache would be compiled anew."""
    words = (f"checkpoint={in_blocks}/ckpt.pt", "sampling.length=8", "sampling.steps=2")
    expected = run("sample.py", *words).out

    def stand_in(function):
        return lambda x, *rest: pytest.fail("compiled")

    monkeypatch.setattr(devices, "compiled", stand_in)
    result = run("sample.py", *words, "system.compile=true")
    assert result.out == expected and "system.compile has no effect" in result.err


def test_blocks_of_the_sampler_have_no_effect_and_that_is_said(in_blocks, run, text_file):
    word = "sampling.options={block_length: 8}"
    sampled = run("sample.py", f"checkpoint={in_blocks}/ckpt.pt", word)
    assert sampled.code == 0
    assert "sampling.options.block_length has no effect" in sampled.err
    assert "has blocks of its own, of 4 tokens" in sampled.err
    steps = "training.max_iters=1"
    trained = run("train.py", *TINY, BLOCKS, word, f"data.path={text_file}", "out_dir=o", steps)
    assert "sampling.options.block_length has no effect" in trained.err


def test_a_run_in_blocks_goes_on_as_if_never_interrupted(in_blocks, run, text_file, monkeypatch):
    words = [*TINY, BLOCKS, f"data.path={text_file}"]
    step = train_script.training_step

    def dies(training):
        if training.step == 9:
            raise KeyboardInterrupt
        return step(training)

    with monkeypatch.context() as patch:
        patch.setattr(train_script, "training_step", dies)
        assert run("train.py", *words).code == 130
    ended = run("train.py", *words, "training.resume=true")
    assert ended.code == 0 and "steps 6 to 12" in ended.out
    ours, theirs = (
        load_model(path).state["ema"] for path in ("out/ckpt.pt", in_blocks / "ckpt.pt")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    changed = run("train.py", *words, "training.resume=true", "model.block_length=8")
    assert changed.code == 2 and "model.block_length=8 is not what" in changed.err


def test_micro_batches_change_nothing_in_blocks(in_blocks, run, text_file):
    assert (
        run("train.py", *TINY, BLOCKS, f"data.path={text_file}", "training.grad_accum=4").code == 0
    )
    ours, theirs = (
        [json.loads(line).get("train/loss") for line in (folder / "metrics.jsonl").open()]
        for folder in (Path("out"), in_blocks)
    )
    assert [x for x in ours if x] == pytest.approx([x for x in theirs if x], rel=1e-5)


def test_plain_weights_learn_blocks_and_back(trained, run, text_file):
    words = [*TINY, f"data.path={text_file}", "training.max_iters=1", "training.learning_rate=1e-9"]
    start = f"training.init_from={trained}/ckpt.pt"
    assert run("train.py", *words, start, BLOCKS, "out_dir=a").code == 0
    loaded, plain = load_model("a/ckpt.pt"), load_model(trained / "ckpt.pt")
    assert loaded.model.config.block_length == 4
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], weight, atol=1e-6, rtol=0)
    kept = run("train.py", *words, "training.init_from=a/ckpt.pt", "out_dir=b")
    assert kept.code == 0 and load_model("b/ckpt.pt").model.config.block_length == 4
    back = ("training.init_from=a/ckpt.pt", "model.block_length=0", "out_dir=c")
    assert run("train.py", *words, *back).code == 0
    assert load_model("c/ckpt.pt").model.config.block_length == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.block_length=5"], "model.block_length=5 must divide model.block_size=32"),
        ([BLOCKS, "training.objective=ar"], "is for training.objective=diffusion: set it to 0"),
        ([BLOCKS, "sampling.options={guidance: 1}"], "has never seen a mask before its block"),
        (["model.block_length=-1"], "model.block_length=-1"),
    ],
)
def test_settings_that_no_run_can_have_are_refused(run, text_file, words, message):
    result = run("train.py", *TINY, f"data.path={text_file}", *words)
    assert result.code == 2 and message in result.err and not Path("out").exists()


def test_pairs_are_learnt_and_answered_in_blocks(run, tmp_path):
    lines = ({"prompt": f"{n % 9}?", "response": "ab"[n % 2] * (n % 4 + 1)} for n in range(80))
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [*TINY, BLOCKS, f"data.path={path}", "model.block_size=16"]
    result = run("train.py", *words)
    assert result.code == 0, result.err
    (tmp_path / "prompts.txt").write_text("1?\n23?\n4567?")
    together = run("sample.py", "prompt_file=prompts.txt", "sampling.steps=2").out
    answers = re.split(r"--- sample \d ---\n", together)[1:]
    assert len(answers) == 3 and answers[0] == run("sample.py", "prompt=1?", "sampling.steps=2").out
    evaluated = run("eval.py")
    assert evaluated.code == 0 and "exact answers at temperature 0" in evaluated.out
