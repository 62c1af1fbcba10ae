"""diffusion.py: the reverse process against enumerated laws, its draws and random numbers."""

import functools
import inspect
import math

import pytest
import torch
from problems import (
    CHAIN,
    LOOP,
    Counting,
    arbitrary_network,
    chi_square_z,
    divergence,
    exact_denoiser,
    sampler_law,
    seeded,
    total_variation,
    z_score,
)

import diffusion
from nanomdm import strategies

PROBLEMS = {"chain": CHAIN, "loop": LOOP}
STRATEGIES = list(strategies.STRATEGIES)
ADAPTIVE = [name for name, f in strategies.STRATEGIES.items() if hasattr(f, "adaptive")]
FIXED_STEPS = [name for name in STRATEGIES if name not in ADAPTIVE]
V, L = 5, 12  # of `linear_network`


def sampled(
    model,
    canvas,
    is_masked,
    mask_id: int,
    seed: int | None = 0,
    strategy: str = "stochastic",
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 0.0,
    **settings,
) -> diffusion.Sampled:
    """`diffusion.sample` with a strategy by its name, its options, truncation and guidance."""
    function = strategies.STRATEGIES[strategy]
    known = inspect.signature(function).parameters if callable(function) else {}
    options = {name: settings.pop(name) for name in OPTIONS & settings.keys()}
    if options := {name: value for name, value in options.items() if name in known}:
        function = functools.partial(function, **options)
    if top_k or top_p < 1:
        settings["truncate"] = functools.partial(
            strategies.keep_likeliest, top_k=top_k, top_p=top_p
        )
    if guidance:
        model = strategies.guided(model, is_masked, mask_id, guidance)
    settings = {"steps": 128, "strategy": function} | settings
    if seed is not None:
        settings["generator"] = seeded(seed)
    return diffusion.sample(model, canvas, is_masked=is_masked, mask_id=mask_id, **settings)


OPTIONS = {"threshold", "gamma", "remask_rate"}


def fill(*canvas, **settings) -> torch.Tensor:
    """The ids (B, L) of `sampled`."""
    return sampled(*canvas, **settings).ids


def linear_network(xt: torch.Tensor) -> torch.Tensor:
    """Logits (B, L, V) that depend on every token of xt (B, L) and hardly ever tie."""
    weight = torch.randn(L * (V + 1), L * V, dtype=torch.float64, generator=seeded(7))
    one_hot = torch.nn.functional.one_hot(xt, V + 1).double().flatten(1)
    return (one_hot @ weight).view(-1, L, V)


def prompts(B: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A canvas (B, L) of random tokens and where it is masked, a different number in each row."""
    canvas = torch.randint(V, (B, L), generator=seeded(1))
    return canvas, torch.rand(B, L, generator=seeded(2)) < torch.linspace(0.2, 1, B)[:, None]


def history(strategy: str, steps: int, **settings) -> list[torch.Tensor]:
    """The states xt (B, L) of `linear_network` after each step, the given canvas first."""
    canvas, is_masked = prompts(6)
    states = [canvas.masked_fill(is_masked, V)]
    fill(
        linear_network,
        canvas,
        is_masked,
        V,
        steps=steps,
        strategy=strategy,
        callback=lambda j, t, xt: states.append(xt.clone()),
        **settings,
    )
    return states


# --- The enumeration itself ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, distance, kl",
    [
        (1, 0.470000, 0.560809),
        (2, 0.243189, 0.152158),
        (4, 0.123642, 0.044988),
        (8, 0.062333, 0.012960),
        (32, 0.015679, 0.000948),
    ],
)
def test_the_enumerated_law_of_k_steps_is_as_far_from_the_data_as_the_table_says(
    steps, distance, kl
):
    law = sampler_law(exact_denoiser(CHAIN), CHAIN, steps)
    far = (total_variation(CHAIN.law, law), divergence(CHAIN.law, law))
    assert far == pytest.approx((distance, kl), abs=1e-6)


# --- The law of the stochastic strategy ----------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", PROBLEMS)
def test_samples_follow_the_enumerated_law_of_k_steps(name, steps):
    problem = PROBLEMS[name]
    model = exact_denoiser(problem)
    ids = fill(model, *problem.blank(40_000), problem.V, steps=steps)
    assert chi_square_z(problem.counts(ids), sampler_law(model, problem, steps)) < 4


def test_samples_at_a_temperature_follow_the_tempered_law():
    def temper(probabilities: torch.Tensor) -> torch.Tensor:
        return probabilities**2 / (probabilities**2).sum(dim=-1, keepdim=True)

    model = exact_denoiser(LOOP)
    ids = fill(model, *LOOP.blank(40_000), LOOP.V, steps=2, temperature=0.5)
    law = sampler_law(model, LOOP, 2, change=temper)
    assert chi_square_z(LOOP.counts(ids), law) < 4


def test_samples_with_top_p_follow_the_truncated_law():
    def truncate(probabilities: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros_like(probabilities)
        for row, new in zip(probabilities.view(-1, 3), kept.view(-1, 3), strict=True):
            total = 0.0
            for token in sorted(range(3), key=lambda token: -row[token]):
                if total < 0.7:
                    new[token] = row[token]
                total += row[token].item()
        return kept / kept.sum(dim=-1, keepdim=True)

    model = arbitrary_network(LOOP)
    ids = fill(model, *LOOP.blank(40_000), LOOP.V, steps=2, top_p=0.7)
    law = sampler_law(model, LOOP, 2, change=truncate)
    assert chi_square_z(LOOP.counts(ids), law) < 4


def test_samples_follow_the_law_given_the_tokens_of_the_canvas():
    start, model = torch.tensor([LOOP.V, 1, LOOP.V, 0]), exact_denoiser(LOOP)
    canvas = start.expand(40_000, 4)
    ids = fill(model, canvas, canvas == LOOP.V, LOOP.V, steps=3)
    assert chi_square_z(LOOP.counts(ids), sampler_law(model, LOOP, 3, start)) < 4


def test_confidence_that_fills_one_position_a_step_draws_from_the_law_of_an_exact_denoiser():
    """The order then depends on the tokens before, which the chain rule allows."""
    blank = LOOP.blank(40_000)
    ids = fill(exact_denoiser(LOOP), *blank, LOOP.V, steps=LOOP.L, strategy="confidence")
    assert chi_square_z(LOOP.counts(ids), LOOP.law) < 4


# --- What every strategy keeps -------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("steps", [1, 5, L, 3 * L])
def test_no_mask_is_left_after_the_last_step(strategy, steps):
    assert (history(strategy, steps)[-1] < V).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_given_token_never_changes(strategy):
    canvas, is_masked = prompts(6)
    states = history(strategy, 5)
    assert all(torch.equal(xt[~is_masked], canvas[~is_masked]) for xt in states)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_given_token_that_has_the_id_of_the_mask_never_changes(strategy):
    canvas, is_masked = torch.full((50, L), V), prompts(50)[1]
    ids = fill(linear_network, canvas, is_masked, V, steps=4, strategy=strategy)
    assert torch.equal(ids == V, ~is_masked)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "remask"])
def test_a_revealed_token_never_changes(strategy):
    states = history(strategy, 8)
    for before, after in zip(states, states[1:], strict=False):
        assert torch.equal(after[before < V], before[before < V])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_the_canvas_holds_at_its_holes_does_not_matter(strategy):
    canvas, is_masked = prompts(6)
    settings = {"steps": 4, "strategy": strategy}
    other = canvas.masked_fill(is_masked, V)
    assert torch.equal(
        fill(linear_network, canvas, is_masked, V, **settings),
        fill(linear_network, other, is_masked, V, **settings),
    )


def test_the_canvas_and_its_mask_are_left_as_they_are():
    canvas, is_masked = prompts(6)
    fill(linear_network, canvas, is_masked, V, steps=4)
    assert all(torch.equal(*pair) for pair in zip((canvas, is_masked), prompts(6), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_canvas_without_holes_comes_back_without_a_call(strategy):
    canvas, model = prompts(6)[0], Counting(linear_network)
    nowhere = torch.zeros_like(canvas).bool()
    result = sampled(model, canvas, nowhere, V, strategy=strategy)
    assert torch.equal(result.ids, canvas) and result.calls == model.calls == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_row_i_of_a_batch_is_what_it_is_alone(strategy):
    canvas, is_masked = prompts(6)
    settings = {"steps": 4, "strategy": strategy, "temperature": 1.0}
    batch = fill(linear_network, canvas, is_masked, V, **settings)
    for i in range(6):
        row = torch.tensor([i])
        alone = fill(linear_network, canvas[row], is_masked[row], V, rows=row, **settings)
        assert torch.equal(alone[0], batch[i])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_seed_decides_the_sample(strategy):
    first, again, other = (history(strategy, 4, seed=seed)[-1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_a_generator_the_global_seed_decides_the_sample():
    def ids(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        canvas, is_masked = prompts(6)
        return fill(linear_network, canvas, is_masked, V, seed=None)

    first, again, other = ids(0), ids(0), ids(1)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("strategy", FIXED_STEPS)
def test_in_one_step_at_temperature_0_every_hole_gets_its_most_probable_token(strategy):
    canvas, is_masked = prompts(6)
    best = linear_network(canvas.masked_fill(is_masked, V)).argmax(dim=-1)
    ids = fill(linear_network, canvas, is_masked, V, steps=1, strategy=strategy, temperature=0.0)
    assert torch.equal(ids, torch.where(is_masked, best, canvas))


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_an_adaptive_strategy_ends_as_soon_as_no_mask_is_left(strategy):
    seen = []
    fill(
        linear_network,
        *prompts(6),
        V,
        steps=1,
        strategy=strategy,
        callback=lambda j, t, xt: seen.append((j, (xt == V).sum().item())),
    )
    steps, left = zip(*seen, strict=True)
    assert steps == tuple(range(1, len(steps) + 1)) and left[-1] == 0 and 0 not in left[:-1]
    assert sorted(set(left), reverse=True) == list(left)  # something is revealed in each step


@pytest.mark.parametrize("strategy", FIXED_STEPS)
def test_the_callback_sees_every_step_at_its_time(strategy):
    seen = []
    canvas, is_masked = prompts(2)
    fill(
        linear_network,
        canvas,
        is_masked,
        V,
        steps=40,
        strategy=strategy,
        callback=lambda j, t, xt: seen.append((j, t)),
    )
    assert seen == [(j, pytest.approx(1 - j / 40, abs=1e-15)) for j in range(1, 41)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_callback_sees_the_result_after_the_last_step(strategy):
    canvas, is_masked = prompts(6)
    settings = {"steps": 5, "strategy": strategy}
    ids = fill(linear_network, canvas, is_masked, V, **settings)
    assert torch.equal(history(strategy, 5)[-1], ids)


# --- Calls of the network ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_calls_reported_are_those_that_were_made(strategy):
    model = Counting(linear_network)
    result = sampled(model, *prompts(1), V, steps=20, strategy=strategy)
    assert result.calls == model.calls > 0


def test_a_step_that_reveals_nothing_does_not_call_the_network():
    model, made = Counting(linear_network), []
    canvas = torch.full((1, L), V)
    states = [canvas]

    def callback(j, t, xt):
        states.append(xt.clone())
        made.append(model.calls)

    fill(model, canvas, canvas == V, V, steps=40, callback=callback)
    changed = [not torch.equal(*pair) for pair in zip(states, states[1:], strict=False)]
    assert made == torch.tensor(changed).cumsum(dim=0).tolist()


def test_one_row_needs_as_many_calls_on_average_as_the_formula_says():
    K = 8
    canvas = torch.full((1, K), 2)
    calls = [
        sampled(lambda xt: torch.zeros(*xt.shape, 2), canvas, canvas == 2, 2, seed, steps=K).calls
        for seed in range(200)
    ]
    assert z_score(torch.tensor(calls).double(), K * (1 - (1 - 1 / K) ** K)) < 4


# --- The confidence strategy ---------------------------------------------------------------------


def plain_confidence(canvas: list[int], is_masked: list[bool], steps: int) -> list[list[int]]:
    """The states of one row after each step at temperature 0, from the definition."""
    holes = [i for i in range(L) if is_masked[i]]
    xt = [V if i in holes else canvas[i] for i in range(L)]
    left, states = list(holes), []
    for j in range(1, steps + 1):
        top = linear_network(torch.tensor([xt]))[0].softmax(dim=-1).max(dim=-1)
        score, token = top.values.tolist(), top.indices.tolist()
        budget = len(holes) * j // steps - (len(holes) - len(left))
        for i in sorted(left, key=score.__getitem__, reverse=True)[:budget]:
            xt[i] = token[i]
            left.remove(i)
        states.append(list(xt))
    return states


@pytest.mark.parametrize("steps", [1, 3, 8, 20])
def test_confidence_at_temperature_0_is_its_definition_token_for_token(steps):
    canvas, is_masked = prompts(6)
    states = torch.stack(history("confidence", steps, temperature=0.0)[1:])  # (steps, B, L)
    for i in range(6):
        expected = plain_confidence(canvas[i].tolist(), is_masked[i].tolist(), steps)
        assert states[:, i].tolist() == expected


@pytest.mark.parametrize("steps", [1, 3, 5, 8, 30])
def test_confidence_has_filled_the_floor_of_m_j_over_k_holes_after_step_j(steps):
    holes = prompts(6)[1].sum(dim=1).tolist()
    left = [(xt == V).sum(dim=1).tolist() for xt in history("confidence", steps)]
    assert left == [[M - M * j // steps for M in holes] for j in range(steps + 1)]


def two_positions(xt: torch.Tensor) -> torch.Tensor:
    """The best token has 0.48 on the left and 0.5 on the right, but 0.63 and 0.5 at temperature
    0.5, and 1 and 1 under top_p = 0.4."""
    probabilities = torch.tensor([[0.48, 0.26, 0.26], [0.5, 0.5, 0.0]], dtype=torch.float64)
    return probabilities.log().expand(len(xt), 2, 3)


@pytest.mark.parametrize("settings", [{"temperature": 0.5}, {"top_p": 0.4}, {}])
def test_confidence_is_the_top_probability_before_temperature_and_top_p_and_draw(settings):
    states, canvas = [], torch.full((100, 2), 3)
    fill(
        two_positions,
        canvas,
        canvas == 3,
        3,
        steps=2,
        strategy="confidence",
        callback=lambda j, t, xt: states.append(xt.clone()),
        **settings,
    )
    assert (states[0] == 3).tolist() == [[True, False]] * 100


# --- Drawing tokens ------------------------------------------------------------------------------


def middles(n: int) -> torch.Tensor:
    """n equally spaced points of (0, 1)."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def keep(top_p: float = 1.0, top_k: int = 0):
    """`truncate` of diffusion.sample."""
    return functools.partial(strategies.keep_likeliest, top_k=top_k, top_p=top_p)


def drawn(
    probabilities: list[float], u: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0
) -> torch.Tensor:
    """The tokens for every u (N,), under one distribution."""
    logits = torch.tensor(probabilities, dtype=torch.float64).log().expand(len(u), -1)
    return draw_tokens(logits, u, temperature, keep(top_p))


def draw_tokens(logits, u: torch.Tensor, *options, **settings) -> torch.Tensor:
    """Tokens (N,) from logits (N, V), at a temperature and after `truncate`."""
    return diffusion.draw_tokens(diffusion.log_probabilities(logits, *options, **settings), u)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_in_proportion_to_their_tempered_probabilities(temperature):
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    tempered = probabilities ** (1 / temperature)
    counts = drawn(probabilities.tolist(), middles(1000), temperature).bincount(minlength=4)
    assert (counts - 1000 * tempered / tempered.sum()).abs().max() <= 1


@pytest.mark.parametrize("u, token", [(1 - 2e-9, 0), (1 - 0.5e-9, 1), (1 - 1e-13, 1)])
def test_a_tail_of_one_in_a_thousand_million_is_drawn_exactly_in_its_quantile(u, token):
    assert drawn([1 - 1e-9, 1e-9], torch.tensor([u], dtype=torch.float64)).item() == token


def test_gumbel_noise_from_float32_uniforms_could_never_draw_that_tail():
    """Which is why the test above fails for it: no two such draws differ by ln(1e9) = 20.7."""
    smallest, largest = (
        torch.tensor([2**-24, 1 - 2**-24], dtype=torch.float32).log().neg().log().neg()
    )
    assert largest - smallest < math.log(1e9)


def test_probabilities_are_not_rounded_to_float32():
    u = torch.tensor([0.5 + 0.5e-9, 0.5 + 1.5e-9], dtype=torch.float64)
    assert drawn([0.5 + 1e-9, 0.5 - 1e-9], u).tolist() == [0, 1]


def test_float32_logits_keep_their_tail():
    logits = torch.tensor([[0.0, math.log(1e-9)]])
    u = torch.tensor([1 - 0.5e-9], dtype=torch.float64)
    assert draw_tokens(logits, u).item() == 1


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_the_extreme_draws_never_give_a_token_of_probability_zero(u, top_p):
    logits = 3 * torch.randn(2000, 50, dtype=torch.float64, generator=seeded(0))
    allowed = torch.rand(2000, 50, generator=seeded(1)) < 0.5
    allowed[:, 0] = allowed[:, -1] = False
    u = torch.full((2000,), u, dtype=torch.float64)
    logits = logits.masked_fill(~allowed, -math.inf)
    tokens = draw_tokens(logits, u, truncate=keep(top_p))
    assert allowed.gather(1, tokens[:, None]).all()


@pytest.mark.parametrize(
    "top_p, kept", [(0.01, {1}), (0.5, {1}), (0.6, {1, 3}), (0.75, {1, 3}), (0.76, {0, 1, 3})]
)
def test_top_p_keeps_the_token_that_crosses_the_threshold_and_none_after_it(top_p, kept):
    tokens = drawn([0.125 + 2**-9, 0.5, 0.125 - 2**-9, 0.25], middles(1000), 1.0, top_p)
    assert set(tokens.tolist()) == kept


def test_top_p_keeps_the_proportions_of_what_it_keeps():
    counts = drawn([0.5, 0.25, 0.15, 0.1], middles(900), 1.0, 0.7).bincount()
    assert counts.tolist() == pytest.approx([600, 300], abs=1)


def test_top_p_is_counted_after_temperature():
    """At temperature 0.5 the best token has 0.64 / 0.68 = 0.94."""
    assert set(drawn([0.8, 0.2], middles(1000), 0.5, 0.9).tolist()) == {0}


def test_temperature_0_takes_the_most_probable_token_whatever_the_draw():
    assert set(drawn([0.3, 0.4, 0.3], middles(100), 0.0).tolist()) == {1}


# --- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"steps": 0}, {"steps": -1}, {"temperature": -0.1}])
def test_a_setting_out_of_its_range_is_refused(settings):
    with pytest.raises(ValueError, match="{}={}".format(*next(iter(settings.items())))):
        fill(exact_denoiser(CHAIN), *CHAIN.blank(1), CHAIN.V, **settings)


def test_a_strategy_by_name_is_one_of_the_two_of_this_file():
    canvas, is_masked = prompts(2)
    for name in ("stochastic", "confidence"):
        diffusion.sample(linear_network, canvas, is_masked=is_masked, mask_id=V, strategy=name)
    with pytest.raises(ValueError, match="strategy='margin'"):
        diffusion.sample(linear_network, canvas, is_masked=is_masked, mask_id=V, strategy="margin")


# --- Random numbers ------------------------------------------------------------------------------


def block(*salt: int, seed: int = 5, first_row: int = 0) -> torch.Tensor:
    """A million draws (1000, 1000)."""
    return diffusion.hash_noise(seed, torch.arange(first_row, first_row + 1000), 1000, *salt)


def correlation_z(x: torch.Tensor, y: torch.Tensor) -> float:
    """The correlation of two blocks of independent uniform draws, in its standard errors."""
    return ((x - 0.5) * (y - 0.5)).mean().abs().item() * 12 * math.sqrt(x.numel())


def test_the_draws_have_the_mean_and_the_variance_of_uniform_ones():
    u = block().flatten()
    assert z_score(u, 1 / 2) < 4 and z_score((u - 0.5) ** 2, 1 / 12) < 4


def test_the_draws_are_float64_in_the_unit_interval():
    assert block().dtype == torch.float64 and 0 <= block().min() and block().max() < 1


@pytest.mark.parametrize("bits", [0, 21, 43], ids=["high bits", "middle bits", "low bits"])
def test_the_draws_are_uniform_in_all_their_bits(bits):
    cells = (block().flatten() * 2**bits).frac().mul(1024).long()
    assert chi_square_z(cells.bincount(minlength=1024), torch.full((1024,), 2**-10).double()) < 4


NEIGHBOURS = {
    "rows": lambda: (block(), block(first_row=1)),
    "columns": lambda: (block()[:, 1:], block()[:, :-1]),
    "seeds": lambda: (block(), block(seed=6)),
    "salts": lambda: (block(1), block(2)),
    "a salt and none": lambda: (block(), block(0)),
    "salts in another order": lambda: (block(1, 2), block(2, 1)),
    "a row and a column": lambda: (block()[:500, 500:], block()[500:, :500].T),
    "a row and a seed": lambda: (block(first_row=1), block(seed=6)),
    "a row and a salt": lambda: (block(1, first_row=1), block(2)),
}


@pytest.mark.parametrize("kind", NEIGHBOURS)
def test_neighbouring_draws_are_not_correlated(kind):
    x, y = NEIGHBOURS[kind]()
    assert correlation_z(x, y) < 4


def test_pairs_of_neighbouring_draws_are_uniform_on_the_square():
    cells = (block() * 32).long()
    pairs = cells[:, ::2] * 32 + cells[:, 1::2]
    counts = pairs.flatten().bincount(minlength=1024)
    assert chi_square_z(counts, torch.full((1024,), 2**-10).double()) < 4


def test_all_of_two_million_draws_differ():
    draws = torch.cat((block().flatten(), block(1).flatten()))
    assert len(draws.unique()) == 2_000_000


def test_a_row_has_the_same_draws_in_every_batch_and_at_every_width():
    rows = torch.tensor([999, 0, 17, 17])
    assert torch.equal(diffusion.hash_noise(5, rows, 10), block()[rows, :10])


def test_the_mixer_gives_the_published_outputs_of_splitmix64():
    """Seed 1234567, https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64"""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    outputs = diffusion._mix(1234567 + torch.arange(1, 6) * diffusion.GOLDEN)
    assert [output % 2**64 for output in outputs.tolist()] == published
