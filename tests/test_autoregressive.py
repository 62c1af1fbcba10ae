"""training.objective=ar: the same network and loop under a causal mask, as a control."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import TEXT, TINY
from problems import CHAIN, CHAIN_ENTROPY, CHAIN_TEXT, LOOP, chi_square_z, exact_denoiser, seeded

import diffusion
from model import ModelConfig, Transformer, attend
from nanomdm import bounds, strategies

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8}


@pytest.fixture(scope="module")
def network() -> Transformer:
    """A causal network over the tokens of LOOP, with weights that say something."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(LOOP.V, causal=True, **SHAPE)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def cost(model: Transformer, x0: torch.Tensor) -> torch.Tensor:
    """-log p (N,) of ids (N, L) in nats."""
    settings = {"mask_id": model.config.mask_id, "draws": 1}
    return diffusion.estimate(bounds.everything, model, x0, **settings)[0][0]


def test_the_probabilities_of_all_sequences_add_up_to_one(network):
    assert cost(network, LOOP.data).neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("length", [4, 600])  # written out, and by PyTorch's fused attention
def test_an_answer_depends_on_what_stands_before_it_alone(length):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(5, causal=True, **SHAPE | {"block_size": 600})).eval()
    ids = torch.randint(5, (1, length), generator=seeded(0))
    changed = ids.clone()
    changed[0, 2:] = (changed[0, 2:] + 1) % 5
    before, after = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(before[:3], after[:3])
    assert not torch.allclose(before[3:], after[3:])


def test_the_row_of_the_mask_stands_for_the_start_of_the_text(network):
    other, ids = copy.deepcopy(network), LOOP.data[-1:]
    other.embedding.weight.data[LOOP.V] += 1
    assert not torch.allclose(other(ids)[0, 0], network(ids)[0, 0])


def test_both_attentions_of_a_causal_network_agree():
    q, k, v = torch.randn(3, 2, 2, 40, 8, generator=seeded(0))
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, causal=True), fused)


def test_a_causal_network_has_the_parameters_of_the_bidirectional_one():
    causal, full = (Transformer(ModelConfig(5, causal=c, **SHAPE)) for c in (True, False))
    assert {k: v.shape for k, v in causal.state_dict().items()} == {
        k: v.shape for k, v in full.state_dict().items()
    }


def test_its_likelihood_is_the_mean_of_its_training_loss(network):
    x0 = LOOP.draw(50, 0)
    everywhere = torch.ones_like(x0, dtype=torch.bool)
    loss = network(x0, x0, everywhere, x0.numel()).mean()
    assert cost(network, x0).mean().item() / x0.size(1) == pytest.approx(loss.item())


def test_the_exact_network_of_a_chain_has_the_loss_of_its_entropy():
    """Each token given those before it, by enumeration; what comes after is hidden from it."""
    denoiser = exact_denoiser(CHAIN)

    def causal(xt):
        answers = [denoiser(xt.masked_fill(torch.arange(3) >= i, CHAIN.V))[:, i] for i in range(3)]
        return torch.stack(answers, dim=1)

    unmasked = diffusion.nll_from_logits(
        causal, CHAIN_TEXT, CHAIN_TEXT, torch.ones_like(CHAIN_TEXT) > 0
    )
    assert unmasked.sum(dim=1).mean().item() == pytest.approx(CHAIN_ENTROPY, abs=1e-12)
    options = {"mask_id": CHAIN.V, "strategy": strategies.left_to_right}
    exact = diffusion.score(denoiser, CHAIN_TEXT, **options)
    assert exact.mean().item() == pytest.approx(CHAIN_ENTROPY, abs=1e-12)


def test_samples_follow_the_law_that_the_likelihood_says(network):
    canvas, is_masked = LOOP.blank(4000)
    settings = {"strategy": strategies.left_to_right, "mask_id": LOOP.V}
    with torch.no_grad():
        ids = diffusion.sample(
            network, canvas, is_masked=is_masked, generator=seeded(0), **settings
        ).ids
    law = cost(network, LOOP.data).neg().exp()
    assert chi_square_z(LOOP.counts(ids), law / law.sum()) < 4


def test_one_flag_trains_a_control_that_learns_samples_and_is_evaluated(run, text_file):
    result = run("train.py", *TINY, f"data.path={text_file}", "training.objective=ar")
    assert result.code == 0, result.err
    first = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] == pytest.approx(math.log(len(set(TEXT))), abs=0.1)  # untrained
    losses = [float(x) for x in re.findall(r"loss ([\d.]+) on train", result.out)]
    assert losses[-1] < losses[0]
    evaluated = run("eval.py", "system.device=cpu").out
    tokens = len(TEXT) - int(0.9 * len(TEXT))
    assert f"{tokens:,} tokens" in evaluated
    logged = float(re.findall(r"and ([\d.]+) on val", result.out)[-1])
    assert float(re.search(r"^loss (\S+)", evaluated, flags=re.M)[1]) == pytest.approx(
        logged, abs=2e-4
    )
    sampled = run("sample.py", "prompt=KING", "sampling.length=12", "system.device=cpu")
    assert sampled.out.startswith("KING") and len(sampled.out.strip("\n")) == 12


def test_a_resumed_run_keeps_its_objective(run, text_file):
    assert run("train.py", *TINY, f"data.path={text_file}", "training.objective=ar").code == 0
    result = run("train.py", "training.resume=true", "training.objective=diffusion")
    assert result.code == 2 and "training.objective=diffusion is not what" in result.err


def test_an_unknown_objective_lists_the_two(run, text_file):
    result = run("train.py", f"data.path={text_file}", "training.objective=gan")
    assert result.code == 2 and "choose one of diffusion, ar" in result.err
