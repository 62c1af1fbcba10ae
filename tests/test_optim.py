"""Parameter groups, steps, schedule and average against formulas written out here."""

import copy
import math

import pytest
import torch
from torch import Tensor

from model import ModelConfig, Transformer
from nanomdm import checkpoint
from nanomdm.errors import UserError
from nanomdm.optim import (
    MUON_RATE,
    OPTIMIZERS,
    SCHEDULES,
    TAPS_RATE,
    Muon,
    Optimizers,
    StepStats,
    build_optimizer,
    learning_rate_factor,
    orthogonalise,
    update_ema,
)

RATE, DECAY = 1e-2, 0.1
HIDDEN = {
    f"blocks.{i}.{name}.weight"
    for i in range(2)
    for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.out")
}


def build(tie_weights: bool = True) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(7, 8, n_layer=2, n_head=2, n_embd=16, tie_weights=tie_weights))


def optimizer_of(model: Transformer, name: str, rate: float = RATE) -> Optimizers:
    return build_optimizer(model, name, rate, DECAY)


def names_in(model: Transformer, groups: list[dict]) -> list[str]:
    """The names of the parameters in `groups`, each as often as it is there."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [name_of[id(p)] for group in groups for p in group["params"]]


def draw_gradients(model: Transformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# --- Groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tie_weights", [True, False])
def test_every_parameter_is_in_exactly_one_group(name, tie_weights):
    model = build(tie_weights)
    names = names_in(model, optimizer_of(model, name).param_groups)
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_decay_and_gains_do_not(name):
    model = build(tie_weights=False)
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that a step is nothing but decay
    optimizer_of(model, name).step()
    for (key, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        rate = MUON_RATE * RATE if name == "muon" and key in HIDDEN else RATE
        kept = 1 - rate * DECAY if new.ndim == 2 else 1
        torch.testing.assert_close(new, kept * old, rtol=1e-6, atol=0, msg=key)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_muon_gets_exactly_the_hidden_matrices(tie_weights):
    model = build(tie_weights)
    (part,) = (p for p in optimizer_of(model, "muon").parts if isinstance(p, Muon))
    assert set(names_in(model, part.param_groups)) == HIDDEN


def test_adamw_keeps_the_embedding_the_head_and_the_gains_beside_muon():
    model = build(tie_weights=False)
    (part,) = (p for p in optimizer_of(model, "muon").parts if isinstance(p, torch.optim.AdamW))
    others = {name for name, _ in model.named_parameters()} - HIDDEN
    assert {"embedding.weight", "head.weight", "norm.weight"} < others
    assert set(names_in(model, part.param_groups)) == others


def test_convolutions_are_trained_by_adamw_without_decay():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(7, 8, n_layer=2, n_head=2, n_embd=16, conv_width=3))
    adamw = optimizer_of(model, "muon").parts[0]
    plain = [group for group in adamw.param_groups if group["weight_decay"] == 0]
    names = set(names_in(model, plain))
    assert {f"blocks.{i}.{n}_conv.weight" for i in range(2) for n in ("attention", "mlp")} < names


def test_convolutions_have_a_higher_rate_than_the_rest_of_adamw():
    model = Transformer(ModelConfig(7, 8, n_layer=1, n_head=2, n_embd=16, conv_width=3))
    for group in optimizer_of(model, "muon").parts[0].param_groups:
        convolutions = {"conv" in name for name in names_in(model, [group])}
        assert len(convolutions) == 1  # all or none
        assert group["lr"] == RATE * (TAPS_RATE if convolutions.pop() else 1)


def test_adamw_trains_every_parameter_once_whatever_its_dimensions():
    model = build()
    model.scalar = torch.nn.Parameter(torch.ones(()))
    model.picture = torch.nn.Conv2d(2, 2, 3)
    for name in OPTIMIZERS:
        names = names_in(model, optimizer_of(model, name).param_groups)
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_a_state_of_an_earlier_version_is_refused_with_the_remedy():
    """Parameters were numbered differently, and their rates were others."""
    optimizer = optimizer_of(build(), "muon")
    stored = optimizer.state_dict()
    stored[0]["param_groups"] = stored[0]["param_groups"][:2]
    with pytest.raises(UserError, match=r"earlier version.*training\.init_from="):
        optimizer.load_state_dict(stored)


def test_a_frozen_parameter_is_left_out():
    model = build()
    model.embedding.weight.requires_grad_(False)
    names = names_in(model, optimizer_of(model, "muon").param_groups)
    assert "embedding.weight" not in names


def test_twice_the_learning_rate_is_twice_the_rate_of_every_group():
    once, twice = (optimizer_of(build(), "muon", rate).param_groups for rate in (RATE, 2 * RATE))
    assert [g["lr"] for g in twice] == [2 * g["lr"] for g in once]


def test_the_factor_of_the_schedule_is_of_the_rates_that_the_groups_were_built_with():
    optimizer = optimizer_of(build(), "muon")
    built = [g["lr"] for g in optimizer.param_groups]
    optimizer.set_learning_rate(0.25)
    optimizer.set_learning_rate(0.5)  # not of the quarter
    assert [g["lr"] for g in optimizer.param_groups] == [0.5 * rate for rate in built]


def test_an_unknown_optimizer_is_refused_with_the_choices():
    message = r"training\.optimizer=sgd is unknown: choose one of muon, adamw"
    with pytest.raises(ValueError, match=message):
        build_optimizer(build(), "sgd", RATE, DECAY)


def test_zero_grad_drops_every_gradient():
    model = build()
    draw_gradients(model, seed=0)
    optimizer_of(model, "muon").zero_grad()
    assert all(p.grad is None for p in model.parameters())


# --- Steps --------------------------------------------------------------------------------------


def adamw_by_hand(x: Tensor, gradients: list[Tensor], decay: float) -> Tensor:
    """x after a step for each gradient: arXiv 1711.05101, algorithm 2, in float64."""
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    x = x.double()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        m = beta1 * m + (1 - beta1) * g.double()
        v = beta2 * v + (1 - beta2) * g.double() ** 2
        update = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
        x = x - RATE * decay * x - RATE * update
    return x


def test_steps_of_adamw_are_those_written_out_in_float64():
    model = build()
    before, gradients = copy.deepcopy(model), []
    optimizer = optimizer_of(model, "adamw")
    for seed in range(4):
        draw_gradients(model, seed)
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    for i, (new, old) in enumerate(zip(model.parameters(), before.parameters(), strict=True)):
        decay = DECAY if old.ndim == 2 else 0
        expected = adamw_by_hand(old.detach(), [g[i] for g in gradients], decay)
        torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-6)


def orthogonal_by_hand(x: Tensor) -> Tensor:
    """Five steps y <- a y + (b A + c A A) y with A = y y^T, from x over its norm, in float64."""
    y = x.T if len(x) > len(x.T) else x
    y = y / y.square().sum().sqrt()
    for _ in range(5):
        A = y @ y.T
        y = 3.4445 * y + (-4.7750 * A + 2.0315 * A @ A) @ y
    return y.T if len(x) > len(x.T) else y


def muon_by_hand(x: Tensor, gradients: list[Tensor], parts: int, decay: float) -> Tensor:
    """x after a step for each gradient, in float64; `parts` maps are stacked in it."""
    rate, x, m = MUON_RATE * RATE, x.double(), torch.zeros_like(x, dtype=torch.float64)
    for g in gradients:
        m = 0.7 * m + 0.3 * g.double()
        update = []
        for u in (0.7 * m + 0.3 * g.double()).chunk(parts):
            u = orthogonal_by_hand(u)
            neuron = int(len(u) >= len(u.T))  # along columns if there are more of them
            update.append(0.2 * u / u.square().mean(dim=neuron, keepdim=True).sqrt())
        x = x - rate * decay * x - rate * torch.cat(update)
    return x


PARTS = [("attention.qkv", 3), ("attention.out", 1), ("mlp.gate_up", 2), ("mlp.out", 1)]


@pytest.mark.parametrize(("name", "parts"), PARTS)
def test_steps_of_muon_are_those_written_out_in_float64_for_each_map_by_itself(name, parts):
    model = build()
    weights = [block.get_submodule(name).weight for block in model.blocks]
    before, gradients = [w.detach().clone() for w in weights], []
    optimizer = optimizer_of(model, "muon")
    for seed in range(3):
        draw_gradients(model, seed)
        gradients.append([w.grad.clone() for w in weights])
        optimizer.step()
    for i, (new, old) in enumerate(zip(weights, before, strict=True)):
        expected = muon_by_hand(old, [g[i] for g in gradients], parts, DECAY)
        torch.testing.assert_close(new.double(), expected, rtol=1e-3, atol=1e-5)


def test_the_matrix_products_of_muon_are_in_the_precision_that_it_is_built_with():
    steps = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build()
        before = [p.detach().clone() for p in model.parameters()]
        draw_gradients(model, 0)
        build_optimizer(model, "muon", RATE, DECAY, dtype).step()
        steps[dtype] = [p - q for p, q in zip(model.parameters(), before, strict=True)]
    exact, rounded = steps.values()
    names = [name for name, _ in build().named_parameters()]
    differ = {n for n, a, b in zip(names, exact, rounded, strict=True) if not torch.equal(a, b)}
    assert differ == HIDDEN
    for one, other in zip(exact, rounded, strict=True):
        assert (one - other).norm() <= 0.05 * one.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 64, 16), (1, 32, 32)])
def test_orthogonalising_brings_every_singular_value_near_one(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = orthogonalise(x, dtype)
    values = torch.linalg.svdvals(y.float())
    assert y.dtype == dtype and values.max() < 1.25 and values.quantile(0.1) > 0.6


def muon_update(singular_values: Tensor) -> tuple[Tensor, Tensor]:
    """Muon's first update of a (16, 64) matrix whose gradient has these singular values, divided
    by its rate; and the gradient's polar factor U V^T."""
    model = build()
    weight = model.blocks[0].mlp.out.weight
    draw_gradients(model, seed=1)
    U, _, Vh = torch.linalg.svd(weight.grad, full_matrices=False)
    weight.grad = U @ singular_values.diag() @ Vh
    before = weight.detach().clone()
    build_optimizer(model, "muon", RATE, weight_decay=0.0).step()
    return (before - weight.detach()) / (MUON_RATE * RATE), U @ Vh


def test_muon_takes_the_direction_of_the_gradients_polar_factor():
    update, polar = muon_update(torch.linspace(0.1, 1, 16))
    assert (update * polar).sum() / (update.norm() * polar.norm()) > 0.97


def test_muon_makes_singular_values_that_differ_tenfold_nearly_equal():
    update, _ = muon_update(torch.linspace(0.1, 1, 16))
    values = torch.linalg.svdvals(update)
    assert values.max() / values.min() < 2


def test_muons_update_has_a_root_mean_square_of_a_fifth_of_its_rate():
    update, _ = muon_update(torch.linspace(0.1, 1, 16))
    assert update.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_device_that_decides_by_itself_skips_the_same_steps(name):
    """As on a GPU, where nobody may wait for the number: here on the CPU, part by part."""

    def trained(on_device: bool) -> list[Tensor]:
        model = build()
        optimizer = optimizer_of(model, name)
        for seed, bad in enumerate((1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0)):
            draw_gradients(model, seed)
            if bad:
                for parameter in model.parameters():
                    parameter.grad[0] = float("nan")
            before = copy.deepcopy(everything(model, optimizer))
            for part in optimizer.parts if on_device else ():
                part.found_inf = torch.tensor(bad)
                part.step()
            if not on_device:
                optimizer.step(skip=torch.tensor(bad))
            if bad and seed:  # the first step creates the state
                assert all(map(torch.equal, everything(model, optimizer), before))
        return everything(model, optimizer)

    def everything(model, optimizer) -> list[Tensor]:
        return [*model.parameters(), *checkpoint.tensors(optimizer.state_dict())]

    pairs = list(zip(trained(on_device=True), trained(on_device=False), strict=True))
    assert len(pairs) > 4
    for there, here in pairs:  # a rate in float32 there, in float64 here
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-7)


# --- Stored states ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_takes_the_step_that_the_saved_one_takes(name):
    model = build()
    optimizer = optimizer_of(model, name)
    for seed in range(3):
        draw_gradients(model, seed)
        optimizer.step()
    twin = copy.deepcopy(model)
    restored = optimizer_of(twin, name)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, its_optimizer in ((model, optimizer), (twin, restored)):
        draw_gradients(network, seed=3)
        its_optimizer.set_learning_rate(0.5)
        its_optimizer.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_optimizer_keeps_the_rates_that_it_was_built_with(name):
    state = optimizer_of(build(), name, 0.5 * RATE).state_dict()
    restored = optimizer_of(build(), name)
    built = [(g["lr"], g["weight_decay"]) for g in restored.param_groups]
    restored.load_state_dict(state)
    assert [(g["lr"], g["weight_decay"]) for g in restored.param_groups] == built


def test_the_state_of_one_optimizer_is_refused_by_the_other():
    state = optimizer_of(build(), "adamw").state_dict()
    with pytest.raises(ValueError):
        optimizer_of(build(), "muon").load_state_dict(state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_of_another_shape_are_refused(name):
    model = build()
    optimizer = optimizer_of(model, name)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    values = state[-1]["state"][0]
    values["momentum" if name == "muon" else "exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="does not fit the network"):
        optimizer_of(build(), name).load_state_dict(state)


def test_moments_that_repeat_one_number_in_memory_are_spread_out():
    """PyTorch's fused AdamW would write beyond them."""
    model = build()
    optimizer = optimizer_of(model, "adamw")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    values = state[0]["state"][0]
    values["exp_avg"] = torch.zeros(1).expand(values["exp_avg"].shape)
    restored = optimizer_of(model, "adamw")
    restored.load_state_dict(state)
    moments = [v for part in restored.parts for each in part.state.values() for v in each.values()]
    assert all(moment.is_contiguous() for moment in moments)


@pytest.mark.parametrize("state", [[], [{}], [{"state": {99: {}}}], None, [{"state": 1}, 2]])
def test_a_state_of_no_optimizer_is_refused_with_a_remedy(state):
    with pytest.raises(ValueError, match=r"does not fit the network .* training\.init_from"):
        optimizer_of(build(), "muon").load_state_dict(state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_without_one_of_its_tensors_is_refused(name):
    model = build()
    optimizer = optimizer_of(model, name)
    draw_gradients(model, seed=0)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state[-1]["state"][0].popitem()
    with pytest.raises(ValueError, match="does not fit the network"):
        optimizer_of(build(), name).load_state_dict(state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restoring_changes_no_weight_and_leaves_no_gradient(name):
    model = build()
    optimizer = optimizer_of(model, name)
    draw_gradients(model, seed=0)
    optimizer.step()
    before = copy.deepcopy(list(model.parameters()))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(map(torch.equal, model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())


def test_a_parameter_that_had_no_gradient_has_no_state_after_restoring():
    model = build()
    optimizer = optimizer_of(model, "adamw")
    draw_gradients(model, seed=0)
    model.embedding.weight.grad = None
    optimizer.step()
    restored = optimizer_of(model, "adamw")
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.state_dict()[0]["state"].keys() == optimizer.state_dict()[0]["state"].keys()


# --- Schedule -----------------------------------------------------------------------------------


def factors(schedule: str, max_iters: int = 105, warmup: int = 4):
    return [learning_rate_factor(s, max_iters, warmup, schedule) for s in range(max_iters)]


EACH_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)


@EACH_SCHEDULE
def test_the_warm_up_rises_in_equal_steps_that_skip_zero(schedule):
    assert factors(schedule)[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@EACH_SCHEDULE
def test_the_peak_is_one_and_comes_after_the_warm_up(schedule):
    values = factors(schedule)
    assert values[4] == 1 == max(values) and values.count(1) == 1


@EACH_SCHEDULE
def test_the_schedule_never_rises_after_its_peak(schedule):
    values = factors(schedule)[4:]
    assert values == sorted(values, reverse=True)


@EACH_SCHEDULE
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_last_step_has_a_rate_of_exactly_zero(schedule, warmup):
    assert factors(schedule, warmup=warmup)[-1] == 0


@pytest.mark.parametrize(
    ("schedule", "left"), [("cosine", (1 + math.sqrt(0.5)) / 2), ("linear", 0.75)]
)
def test_a_quarter_of_the_decay_leaves_what_the_wave_or_the_line_says(schedule, left):
    assert factors(schedule)[29] == pytest.approx(left)


def test_an_unknown_schedule_is_refused_with_the_choices():
    message = r"training\.lr_schedule=step is unknown: choose one of linear, cosine"
    with pytest.raises(ValueError, match=message):
        learning_rate_factor(0, 10, 1, "step")


# --- Moving average -----------------------------------------------------------------------------


def test_the_average_weighs_what_it_saw_by_powers_of_the_decay():
    d, start = 0.9, torch.tensor([1.0, -2.0])
    seen = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    average = [start.clone()]
    for i, current in enumerate(seen):
        update_ema(average, [current], d, step=1000 + i)
    weights = (1 - d) * d ** torch.arange(19.0, -1, -1)
    expected = d**20 * start + (weights[:, None] * seen).sum(dim=0)
    torch.testing.assert_close(average[0], expected)


@pytest.mark.parametrize(("step", "d"), [(0, 0.1), (5, 0.4), (80, 0.9), (81, 0.9), (10**6, 0.9)])
def test_the_decay_rises_to_its_limit(step, d):
    average = [torch.tensor([1.0])]
    update_ema(average, [torch.tensor([0.0])], 0.9, step)
    torch.testing.assert_close(average[0], torch.tensor([d]))


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_initial_weights_keep_one_part_in_a_binomial_coefficient(steps):
    average = [torch.ones(1, dtype=torch.float64)]  # the product of (1 + s) / (10 + s)
    for step in range(steps):
        update_ema(average, [torch.zeros(1, dtype=torch.float64)], 0.9999, step)
    assert average[0].item() == pytest.approx(1 / math.comb(steps + 9, 9))


def test_the_average_takes_no_part_in_gradients():
    model = build()
    average = copy.deepcopy(model)
    update_ema(list(average.parameters()), list(model.parameters()), 0.9, 0)
    assert all(p.is_leaf for p in average.parameters())


# --- Step statistics ----------------------------------------------------------------------------

CPU = torch.device("cpu")


def stats_of(*losses: float) -> StepStats:
    """The statistics after steps of these losses, whose gradients' norms are twice as large."""
    stats = StepStats(CPU, {})
    for step, loss in enumerate(losses, start=1):
        stats.add(torch.tensor(loss), torch.tensor(2 * loss), step)
    return stats


def test_steps_that_are_not_finite_are_counted_and_change_nothing_else():
    good, bad = stats_of(3.0, 5.0).state(), stats_of(3.0, math.inf, math.nan, 5.0).state()
    assert good["loss_avg"] == 4 and good["loss_max"] == 5 and good["grad_norm_max"] == 10
    assert bad == good | {"skipped": 2.0}


def test_a_skipped_step_adds_nothing_to_the_largest_figures():
    assert stats_of(0.25, math.nan).state()["grad_norm_max"] == 0.5


def test_the_average_of_the_loss_is_about_the_last_fifty_steps():
    assert stats_of(*[1.0] * 100, 51.0).state()["loss_avg"] == pytest.approx(2.0)


def test_consecutive_skipped_steps_are_those_since_the_last_good_one():
    assert int(stats_of(math.nan, 1.0).consecutive) == 0
    assert int(stats_of(math.nan, 1.0, math.nan, math.nan).consecutive) == 2


def test_reading_begins_the_largest_values_anew():
    stats = stats_of(3.0)
    assert stats.read() == {"loss_avg": 3.0, "loss_max": 3.0, "grad_norm_max": 6.0, "skipped": 0.0}
    assert stats.read() == {"loss_avg": 3.0, "loss_max": 0.0, "grad_norm_max": 0.0, "skipped": 0.0}


def test_statistics_go_on_from_what_was_stored():
    stored = stats_of(3.0, math.nan).state()
    assert StepStats(CPU, stored).state() == stored


def test_a_warm_up_takes_half_of_the_run_at_most():
    assert factors("linear", max_iters=6, warmup=100)[:4] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1])
    assert factors("linear", max_iters=6, warmup=3) == factors("linear", 6, 100)
    assert factors("linear", max_iters=1, warmup=100) == [1]
