"""model.py: the network against closed forms and a float64 transformer written with loops."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model as model_module
from model import (
    WRITTEN_OUT_UP_TO,
    Attention,
    Block,
    ModelConfig,
    ShortConvolution,
    SwiGLU,
    Transformer,
    apply_rope,
    attend,
    rope_tables,
)

V, L = 11, 6
CONFIG = ModelConfig(vocab_size=V, block_size=L, n_layer=2, n_head=2, n_embd=16)


def drawn(module: nn.Module, seed: int = 0, scale: float = 0.4) -> nn.Module:
    """The module with parameters so large that every part of it matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def build(**changes) -> Transformer:
    return drawn(Transformer(replace(CONFIG, **changes)))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_ids(B: int, length: int = L, seed: int = 2) -> Tensor:
    """Ids with masks (B, length)."""
    return torch.randint(V + 1, (B, length), generator=torch.Generator().manual_seed(seed))


# --- The same in float64, by definition ---------------------------------------------------------


def normed(x: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


def turned(x: Tensor, position: int) -> Tensor:
    """x (K,) as K/2 complex numbers, each times e^(i position frequency)."""
    K = len(x)
    frequencies = 10000.0 ** (-2 * torch.arange(K // 2, dtype=torch.float64) / K)
    turn = torch.polar(torch.ones(K // 2, dtype=torch.float64), position * frequencies)
    product = torch.complex(x[: K // 2], x[K // 2 :]) * turn
    return torch.cat((product.real, product.imag))


def attention_by_loops(module: Attention, x: Tensor) -> Tensor:
    """Attention of x (length, D), head by head and position by position."""
    length, D = x.shape
    config = module.config
    H = config.n_head
    Wq, Wk, Wv = module.qkv.weight.detach().double().view(3, H, D // H, D)
    heads = torch.zeros(length, H, D // H, dtype=torch.float64)
    for h in range(H):
        q, k, v = ([W[h] @ x[i] for i in range(length)] for W in (Wq, Wk, Wv))
        if config.qk_norm:
            eps = torch.finfo(torch.float32).eps
            q, k = ([config.qk_norm * normed(y, eps) for y in ys] for ys in (q, k))
        q, k = ([turned(y, i) for i, y in enumerate(ys)] for ys in (q, k))
        for i in range(length):
            weights = torch.stack([(q[i] @ k[j] / math.sqrt(D // H)).exp() for j in range(length)])
            heads[i, h] = sum(w * y for w, y in zip(weights / weights.sum(), v, strict=True))
            if config.attention_gate:
                heads[i, h] *= 2 / (1 + (-module.gate.weight[h].detach().double() @ x[i]).exp())
    return heads.view(length, D) @ module.out.weight.detach().double().T


def swiglu_by_formula(module: SwiGLU, x: Tensor) -> Tensor:
    W, out = module.gate_up.weight.detach().double(), module.out.weight.detach().double()
    gate, up = x @ W[: len(W) // 2].T, x @ W[len(W) // 2 :].T
    return (gate / (1 + (-gate).exp()) * up) @ out.T


def logits_by_loops(model: Transformer, ids: Tensor) -> Tensor:
    """Logits (length, V) of one row of ids (length,)."""
    embedding = model.embedding.weight.detach().double()
    x = embedding[ids]
    for block in model.blocks:
        gain = block.attention_norm.weight.detach().double()
        x = x + attention_by_loops(block.attention, normed(x, 1e-5) * gain)
        gain = block.mlp_norm.weight.detach().double()
        x = x + swiglu_by_formula(block.mlp, normed(x, 1e-5) * gain)
    head = embedding[:-1] if model.config.tie_weights else model.head.weight.detach().double()
    return normed(x, 1e-5) * model.norm.weight.detach().double() @ head.T


# --- Shapes that cannot be built ----------------------------------------------------------------


@pytest.mark.parametrize("key", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd"])
def test_a_size_below_one_is_refused_by_its_name_and_limit(key):
    with pytest.raises(ValueError, match=rf"model\.{key}=0 must be at least 1"):
        ModelConfig(**{"vocab_size": V, key: 0})


def test_a_width_that_the_heads_do_not_divide_is_refused_with_a_remedy():
    message = r"model\.n_embd=30 .* model\.n_head=4: choose a multiple of 4"
    with pytest.raises(ValueError, match=message):
        ModelConfig(V, n_embd=30, n_head=4)


def test_an_odd_head_width_is_refused_with_a_remedy():
    message = r"model\.n_embd / model\.n_head = 15 is odd.*: choose an even head width"
    with pytest.raises(ValueError, match=message):
        ModelConfig(V, n_embd=30, n_head=2)


@pytest.mark.parametrize("dropout", [1.0, -0.1, math.nan])
def test_a_dropout_outside_its_range_is_refused_by_its_name_and_range(dropout):
    with pytest.raises(ValueError, match=rf"model\.dropout={dropout} must lie in \[0, 1\)"):
        ModelConfig(V, dropout=dropout)


@pytest.mark.parametrize(
    ("key", "value"),
    [("n_layer", 2.0), ("n_head", True), ("n_embd", "64"), ("tie_weights", 1), ("qk_norm", "1")],
)
def test_a_value_of_another_type_is_refused_by_its_name(key, value):
    with pytest.raises(ValueError, match=rf"model\.{key}={value!r} is not of type"):
        ModelConfig(**{"vocab_size": V, key: value})


@pytest.mark.parametrize("key", ["rope_base", "norm_eps", "qk_norm"])
@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_a_value_that_is_negative_or_not_finite_is_refused_by_its_name(key, value):
    with pytest.raises(ValueError, match=rf"model\.{key}={value} must be at least [01] and finite"):
        ModelConfig(V, **{key: value})


def test_a_context_whose_tables_would_not_fit_is_refused_with_the_longest():
    with pytest.raises(
        ValueError, match=r"model\.block_size=10+ is too long: choose at most 1048576"
    ):
        ModelConfig(V, block_size=10**9, n_head=4, n_embd=128)


@pytest.mark.parametrize(("n_embd", "hidden_size"), [(96, 256), (128, 352), (384, 1024)])
def test_the_hidden_layer_is_8_thirds_as_wide_rounded_up_to_a_multiple_of_32(n_embd, hidden_size):
    assert ModelConfig(V, n_embd=n_embd).hidden_size == hidden_size


# --- What goes in and what comes out ------------------------------------------------------------


def test_the_embedding_has_a_row_for_the_mask():
    assert build().embedding.weight.shape == (V + 1, 16)


def test_the_mask_is_the_id_after_the_vocabulary():
    assert CONFIG.mask_id == V


@pytest.mark.parametrize("tie_weights", [True, False])
def test_no_logit_is_computed_for_the_mask(tie_weights):
    assert build(tie_weights=tie_weights)(random_ids(3)).shape == (3, L, V)


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"qk_norm": 0}, {"attention_gate": True}], ids=str)
def test_the_network_equals_a_float64_transformer_written_with_loops(tie_weights, options):
    model, xt = build(tie_weights=tie_weights, **options), random_ids(2)
    expected = torch.stack([logits_by_loops(model, row) for row in xt])
    torch.testing.assert_close(model(xt).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_last_token_changes_the_first_positions_logits():
    model, xt = build(), random_ids(1)
    changed = xt.clone()
    changed[0, -1] = (xt[0, -1] + 1) % V
    assert (model(xt)[0, 0] - model(changed)[0, 0]).abs().max() > 1e-3


def test_a_row_of_a_batch_gets_the_logits_that_it_gets_alone():
    model, xt = build(), random_ids(4)
    torch.testing.assert_close(model(xt)[2:3], model(xt[2:3]), rtol=1e-5, atol=1e-5)


def test_more_tokens_than_the_block_are_refused_with_both_numbers_and_a_remedy():
    message = rf"has {L + 1} tokens but model\.block_size is {L}: shorten it or train with"
    with pytest.raises(ValueError, match=message):
        build()(random_ids(1, L + 1))


def test_fewer_tokens_than_the_block_get_the_logits_of_a_model_with_a_block_of_their_number():
    long, short, xt = build(), build(block_size=4), random_ids(2, 4)
    torch.testing.assert_close(long(xt), short(xt), rtol=0, atol=0)


def test_a_state_dict_holds_parameters_only_so_that_another_block_size_can_load_it():
    model = build()
    assert model.state_dict().keys() == {name for name, _ in model.named_parameters()}


# --- The parts ----------------------------------------------------------------------------------


def test_rope_is_a_multiplication_by_complex_numbers_of_modulus_one():
    x = random(50, 1, 8)
    expected = torch.stack([turned(y, i) for i, y in enumerate(x[:, 0].double())])
    y = apply_rope(x, *rope_tables(50, 8))
    torch.testing.assert_close(y[:, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_rope_scores_depend_on_the_distance_alone():
    q, k = random(2, 1, 1, 8).expand(2, 40, 1, 8)  # one query and one key, everywhere
    tables = rope_tables(40, 8)
    q, k = apply_rope(q, *tables)[:, 0], apply_rope(k, *tables)[:, 0]
    scores = q @ k.mT  # (40, 40)
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-4)


def test_rope_keeps_the_dtype_of_bfloat16_queries():
    assert apply_rope(random(4, 1, 8).bfloat16(), *rope_tables(4, 8)).dtype == torch.bfloat16


def test_rope_tables_are_exact_to_the_rounding_of_float32_however_far():
    cos, sin = (table[-1, 0].double() for table in rope_tables(10**5, 64))
    angles = (10**5 - 1) * 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    torch.testing.assert_close(cos, angles.cos().repeat(2), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, torch.cat((-angles.sin(), angles.sin())), rtol=0, atol=1e-7)


def test_rope_tables_tell_neighbouring_positions_apart_at_length_4096():
    cos, sin = rope_tables(4096, 8)
    turns = torch.complex(cos, sin)[:, 0, 4]
    steps = turns[1:] / turns[:-1]
    torch.testing.assert_close(steps.angle(), torch.ones(4095), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("qk_norm", [1.25, 2, 0, True, False])  # earlier networks have True: 1
def test_attention_equals_a_float64_loop_over_heads_and_positions(qk_norm, gate):
    module = drawn(Attention(replace(CONFIG, qk_norm=qk_norm, attention_gate=gate)))
    x = random(1, L, 16)
    expected = attention_by_loops(module, x[0].double())
    y = module(x, *rope_tables(L, 8))[0]
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, WRITTEN_OUT_UP_TO, WRITTEN_OUT_UP_TO + 1])
def test_attend_is_the_softmax_of_scaled_scores_times_the_values(length):
    q, k, v = random(3, 1, 2, length, 4)
    scores = q.double() @ k.double().mT / 2  # the root of the head width 4
    expected = scores.softmax(dim=-1) @ v.double()
    torch.testing.assert_close(attend(q, k, v).double(), expected, rtol=1e-5, atol=1e-5)


def test_attention_written_out_equals_the_fused_one():
    q, k, v = random(3, 2, 2, WRITTEN_OUT_UP_TO, 4)
    fused = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend(q, k, v), fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("beyond", "dtype", "masked", "fused_calls"),
    [
        (0, torch.float32, False, 0),
        (1, torch.float32, False, 1),
        (0, torch.bfloat16, True, 0),
        (1, torch.bfloat16, True, 1),
        (0, torch.float32, True, 1),
    ],
)
def test_attention_is_written_out_up_to_a_length_and_under_a_mask_in_bfloat16_only(
    beyond, dtype, masked, fused_calls, monkeypatch
):
    calls, length = [], WRITTEN_OUT_UP_TO + beyond
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv, **k: calls.append(1) or fused(*qkv, **k)
    )
    visible = torch.ones(length, length, dtype=torch.bool).tril() if masked else None
    attend(*random(3, 1, 1, length, 2).to(dtype), visible)
    assert len(calls) == fused_calls


@pytest.mark.parametrize("length", [8, WRITTEN_OUT_UP_TO + 8])
def test_a_network_under_bfloat16_autocast_agrees_with_float32_to_bfloat16_precision(length):
    model, xt = Transformer(replace(CONFIG, block_size=length)), random_ids(1, length)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(xt)
    error = (rough.float() - model(xt)).norm() / model(xt).norm()
    assert rough.dtype == torch.bfloat16 and error < 0.02


def scores_of(module: Attention, x: Tensor, monkeypatch) -> Tensor:
    """The attention scores before the softmax (B, H, L, L)."""
    seen = []
    monkeypatch.setattr(model_module, "attend", lambda q, k, v, *_: seen.append((q, k)) or v)
    module(x, *rope_tables(x.size(1), 8))
    q, k = seen[0]
    return q @ k.mT / math.sqrt(q.size(-1))


def test_scores_are_bounded_however_large_the_weights(monkeypatch):
    module = drawn(Attention(CONFIG), scale=1e3)
    scores = scores_of(module, random(1, L, 16), monkeypatch)
    assert scores.abs().max() <= module.config.qk_norm**2 * math.sqrt(8) + 1e-4


def test_scores_grow_with_the_weights_without_the_norm_of_queries_and_keys(monkeypatch):
    module = drawn(Attention(replace(CONFIG, qk_norm=0)), scale=1e3)
    scores = scores_of(module, random(1, L, 16), monkeypatch)
    assert scores.abs().max() > 1e4


@pytest.mark.parametrize("size", [1.0, 1e-3])  # at 1e-3 the epsilon decides
@pytest.mark.parametrize("name", ["attention_norm", "mlp_norm"])
def test_a_norm_divides_by_the_root_mean_square_and_multiplies_by_its_gain(name, size):
    norm, x = drawn(getattr(Block(CONFIG), name)), size * random(3, 16)
    gain = norm.weight.detach().double()
    expected = torch.stack([y / math.sqrt(y.square().sum() / 16 + 1e-5) for y in x.double()]) * gain
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_swiglu_is_its_formula():
    module, x = drawn(SwiGLU(CONFIG)), random(3, 16)
    expected = swiglu_by_formula(module, x.double())
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-4, atol=1e-4)


# --- Weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tie_weights", "changed"), [(True, [3]), (False, [])])
def test_a_tokens_embedding_is_its_row_of_the_head_where_weights_are_tied(tie_weights, changed):
    model, xt = build(tie_weights=tie_weights), torch.zeros(1, L, dtype=torch.long)
    before = model(xt)
    with torch.no_grad():
        model.embedding.weight[3] += 1  # a token that the input does not have
    differs = (model(xt) != before).any(dim=1)[0]  # (V,)
    assert differs.nonzero().flatten().tolist() == changed


@pytest.mark.parametrize(("tie_weights", "extra"), [(True, 0), (False, V * 16)])
def test_untied_weights_add_a_matrix_of_the_vocabulary_times_the_width(tie_weights, extra):
    hidden = CONFIG.hidden_size
    block = 4 * 16 * 16 + 3 * 16 * hidden + 2 * 16
    count = sum(p.numel() for p in build(tie_weights=tie_weights).parameters())
    assert count == (V + 1) * 16 + 2 * block + 16 + extra


@pytest.mark.parametrize("masked", [False, True])
def test_the_masks_row_gets_a_gradient_exactly_where_the_input_has_a_mask(masked):
    model, xt = build(), random_ids(2) % V
    xt[0, 1] = V if masked else xt[0, 1]
    model(xt).square().sum().backward()
    rows = model.embedding.weight.grad.abs().sum(dim=1) > 0
    assert rows.tolist() == [True] * V + [masked]


def test_initial_matrices_have_deviation_0_02_and_less_by_depth_where_they_write_to_the_stream():
    torch.manual_seed(0)
    config = ModelConfig(400, n_layer=3, n_embd=128, tie_weights=False)
    inputs = ("embedding", "head", "qkv", "gate_up")
    for name, parameter in Transformer(config).named_parameters():
        if parameter.ndim == 2:
            std = 0.02 if name.split(".")[-2] in inputs else 0.02 / math.sqrt(2 * 3)
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name


def test_initial_gains_are_one():
    gains = [p for p in Transformer(CONFIG).parameters() if p.ndim == 1]
    assert len(gains) == 5 and all((gain == 1).all() for gain in gains)


def test_a_fresh_network_predicts_almost_uniformly():
    torch.manual_seed(0)
    xt = random_ids(4)
    nll = -Transformer(CONFIG)(xt).log_softmax(dim=-1)
    assert (nll - math.log(V)).abs().max() < 0.5


def test_dropout_is_random_in_training():
    model, xt = build(dropout=0.5).train(), random_ids(1)
    assert not torch.equal(model(xt), model(xt))


def test_dropout_acts_on_the_embedding_and_on_both_branches_of_each_block(monkeypatch):
    calls, dropout = [], F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, *args: calls.append(args[0]) or dropout(x, *args))
    build(dropout=0.5).train()(random_ids(1))
    assert calls == [0.5] * (1 + 2 * 2)


def test_dropout_changes_nothing_in_evaluation():
    xt = random_ids(1)
    assert torch.equal(build(dropout=0.5).eval()(xt), build(dropout=0.0)(xt))


# --- Cross-entropies ----------------------------------------------------------------------------


def case(seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Ids with masks, targets and where to compute: 7 of 18 positions."""
    where = torch.zeros(3 * L, dtype=torch.bool)
    where[torch.randperm(3 * L, generator=torch.Generator().manual_seed(seed))[:7]] = True
    where = where.view(3, L)
    x0 = random_ids(3) % V
    return x0.masked_fill(where, V), x0, where


def by_definition(logits: Tensor, x0: Tensor, where: Tensor) -> Tensor:
    """Minus the log of the softmax at the target, 0 outside `where`."""
    logits = logits.float()
    nll = logits.exp().sum(dim=-1).log() - logits.gather(-1, x0[..., None])[..., 0]
    return nll * where


ENOUGH = [None, 7, 8, 3 * L, 3 * L + 5]


@pytest.mark.parametrize("capacity", ENOUGH)
def test_cross_entropies_are_those_of_the_logits_and_zero_elsewhere(capacity):
    model, (xt, x0, where) = build(), case()
    nll = model(xt, targets=x0, where=where, capacity=capacity)
    torch.testing.assert_close(nll, by_definition(model(xt), x0, where), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capacity", ENOUGH)
@pytest.mark.parametrize("tie_weights", [True, False])
def test_cross_entropies_have_the_gradients_of_those_of_the_logits(capacity, tie_weights):
    model, (xt, x0, where) = build(tie_weights=tie_weights), case()
    weights, parameters = random(3, L), list(model.parameters())
    nll = model(xt, targets=x0, where=where, capacity=capacity)
    gradients = torch.autograd.grad((weights * nll).sum(), parameters)
    loss = (weights * by_definition(model(xt), x0, where)).sum()
    expected = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_positions_beyond_the_capacity_are_left_out():
    model, (xt, x0, where) = build(), case()
    nll = model(xt, targets=x0, where=where, capacity=5)
    first_five = where & (where.flatten().cumsum(0).view_as(where) <= 5)
    expected = by_definition(model(xt), x0, first_five)
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capacity", [None, 4])
def test_no_position_asked_for_gives_zeros_and_gradients_of_zero(capacity):
    model, (xt, x0, where) = build(), case()
    nll = model(xt, targets=x0, where=where & False, capacity=capacity)
    gradients = torch.autograd.grad(nll.sum(), list(model.parameters()))
    assert not nll.any() and not any(g.any() for g in gradients)


def test_logits_are_built_for_the_positions_asked_for_alone(monkeypatch):
    model, (xt, x0, where) = build(), case()
    shapes, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda h: shapes.append(tuple(h.shape)) or logits(h))
    model(xt, targets=x0, where=where)
    assert shapes == [(7, 16)]


@pytest.mark.parametrize("capacity", [None, 12])
def test_cross_entropies_are_float32_under_bfloat16_autocast(capacity):
    model, (xt, x0, where) = build(), case()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(xt, targets=x0, where=where, capacity=capacity).dtype == torch.float32


def test_cross_entropies_of_a_bfloat16_network_are_float32():
    xt, x0, where = case()
    assert build().bfloat16()(xt, targets=x0, where=where).dtype == torch.float32


def test_cross_entropies_are_not_rounded_to_bfloat16_under_autocast():
    model, (xt, x0, where) = build(), case()
    with torch.autocast("cpu", torch.bfloat16):
        nll = model(xt, targets=x0, where=where)
        expected = by_definition(model(xt), x0, where)
    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-4)


# --- Chunks, tiles, activations -----------------------------------------------------------------


def gradients_of(model: Transformer, capacity: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """Cross-entropies (3, L) and the gradients of their weighted sum."""
    xt, x0, where = case()
    nll = model(xt, targets=x0, where=where, capacity=capacity)
    return nll, torch.autograd.grad((random(3, L) * nll).sum(), list(model.parameters()))


@pytest.mark.parametrize("at_once", [1, 2 * V + 3, 7 * V - 1])
@pytest.mark.parametrize("capacity", ENOUGH)
def test_cross_entropies_in_chunks_are_those_in_one_piece(capacity, at_once, monkeypatch):
    whole = gradients_of(build(), capacity)
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", at_once)
    torch.testing.assert_close(gradients_of(build(), capacity), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at_once", [2 * V + 3, 3 * V, 100 * V])
def test_no_more_logits_are_built_at_once_than_the_limit(at_once, monkeypatch):
    model, sizes = build(), []
    logits = model.logits
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(model, "logits", lambda h: sizes.append(len(h) * V) or logits(h))
    gradients_of(model)
    assert max(sizes) <= at_once and sum(sizes) in (7 * V, 2 * 7 * V)  # in chunks twice


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_vocabulary_padded_to_whole_tiles_has_the_same_logits(tie_weights, monkeypatch):
    model, xt = build(tie_weights=tie_weights), random_ids(3)
    plain = model(xt)
    monkeypatch.setattr(model_module, "TILES", {"cpu": 64})
    torch.testing.assert_close(model(xt), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_vocabulary_padded_to_whole_tiles_has_the_same_gradients(tie_weights, monkeypatch):
    plain = gradients_of(build(tie_weights=tie_weights))
    monkeypatch.setattr(model_module, "TILES", {"cpu": 64})
    padded = gradients_of(build(tie_weights=tie_weights))
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


def test_the_head_multiplies_by_whole_tiles_of_the_vocabulary(monkeypatch):
    shapes, linear = [], F.linear
    monkeypatch.setattr(model_module, "TILES", {"cpu": 64})
    monkeypatch.setattr(F, "linear", lambda x, w: shapes.append(tuple(w.shape)) or linear(x, w))
    build().logits(random(5, 16))
    assert shapes == [(64, 16)]


def recomputing(dropout: float) -> Transformer:
    model = build(dropout=dropout).train()
    model.recompute = True
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activations_computed_again_give_the_same_gradients(dropout):
    torch.manual_seed(0)
    kept = gradients_of(build(dropout=dropout).train())
    torch.manual_seed(0)
    torch.testing.assert_close(gradients_of(recomputing(dropout)), kept, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("recompute", "times"), [(False, 1), (True, 2)])
def test_activations_are_computed_again_only_if_asked_for(recompute, times, monkeypatch):
    model, calls, forward = build().train(), [], Attention.forward
    model.recompute = recompute
    monkeypatch.setattr(Attention, "forward", lambda *given: calls.append(1) or forward(*given))
    gradients_of(model)
    assert len(calls) == times * CONFIG.n_layer


# --- Short convolutions -------------------------------------------------------------------------


def test_a_convolution_is_the_grouped_one_of_pytorch_beside_its_input():
    conv = drawn(ShortConvolution(replace(CONFIG, conv_width=5)))
    x = random(3, L, 16)
    expected = x.mT + F.conv1d(x.mT, conv.weight.permute(2, 1, 0), padding=2, groups=16)
    torch.testing.assert_close(conv(x), expected.mT)


def test_a_causal_convolution_is_the_one_that_is_padded_on_the_left_alone():
    conv = drawn(ShortConvolution(replace(CONFIG, conv_width=5, causal=True)))
    x = random(3, L, 16)
    expected = x.mT + F.conv1d(F.pad(x.mT, (4, 0)), conv.weight.permute(2, 1, 0), groups=16)
    torch.testing.assert_close(conv(x), expected.mT)


def test_a_network_with_convolutions_begins_as_the_one_without():
    plain = Transformer(CONFIG)
    network = Transformer(replace(CONFIG, conv_width=3))
    missing, surplus = network.load_state_dict(plain.state_dict(), strict=False)
    assert len(missing) == 2 * CONFIG.n_layer and not surplus
    xt = random_ids(2)
    torch.testing.assert_close(network(xt), plain(xt), rtol=0, atol=0)


def test_a_causal_network_with_convolutions_sees_what_stands_before_alone():
    network = build(conv_width=5, causal=True)
    ids = random_ids(1) % V
    changed = ids.clone()
    changed[0, 3] = (changed[0, 3] + 1) % V
    differs = (network(ids) != network(changed)).any(dim=-1)[0]
    assert differs.tolist() == [False] * 4 + [True] * 2


@pytest.mark.parametrize(("width", "limit"), [(-1, "at least 0"), (2, "odd")])
def test_a_convolution_needs_as_many_neighbours_on_each_side(width, limit):
    with pytest.raises(ValueError, match=rf"model\.conv_width={width} must be {limit}"):
        replace(CONFIG, conv_width=width)


# --- Other networks' shapes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("mlp_size", -1), ("norm_eps", -1e-5), ("rope_base", 0.5)]
)
def test_a_field_of_other_networks_out_of_its_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"model.{field}={value} must be at least"):
        ModelConfig(V, **{field: value})


def test_the_norms_take_their_epsilon_from_the_shape():
    norms = [
        m
        for m in Transformer(replace(CONFIG, norm_eps=0.25)).modules()
        if isinstance(m, nn.RMSNorm)
    ]
    assert len(norms) == 5 and all(norm.eps == 0.25 for norm in norms)


def test_rounded_rope_tables_are_the_nearest_numbers_of_eight_bits():
    exact, rounded = rope_tables(50, 8)[0].double(), rope_tables(50, 8, rounded=True)[0].double()
    mantissa, exponent = torch.frexp(exact)
    assert torch.equal(rounded, torch.ldexp((mantissa * 2**8).round(), exponent - 8))


def test_the_longest_wave_of_rope_is_2_pi_times_the_base_to_the_share_of_pairs_before_it():
    frequencies = torch.tensor([1, 0.5, 0.25, 0.125, 1, 0.5, 0.25, 0.125])
    angles = torch.arange(1000.0)[:, None].double() * frequencies
    cos, _ = rope_tables(1000, 8, base=16.0)
    torch.testing.assert_close(cos[:, 0].double(), angles.cos(), atol=1e-6, rtol=0)
