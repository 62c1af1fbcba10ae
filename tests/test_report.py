"""Figures from samples, what must hold between bounds, the verdict on two models, and the lines."""

import json
import math

import pytest
import torch

from nanomdm import bounds, report
from nanomdm.bounds import BOUNDS, Bound, NLLSamples
from nanomdm.texts import Texts


def samples_of(nats: list[list[float]], counts: list[int]) -> NLLSamples:
    """Samples with these costs (draws, N) of rows with these numbers of tokens."""
    nats = torch.tensor(nats, dtype=torch.float64)
    u = (torch.arange(nats.size(1)).double() + 0.5).expand_as(nats) / nats.size(1)
    return NLLSamples(nats, u, torch.tensor(counts))


def texts_of(document: list[int], sizes: list[int], names: list[str]) -> Texts:
    document = torch.tensor(document)
    return Texts("", names, [], [], document, torch.tensor(sizes), torch.ones_like(document))


TWO_DRAWS = samples_of([[2.0, 4.0, 6.0], [4.0, 2.0, 9.0]], [2, 2, 4])  # 1.5 and 1.875 nats a token


# --- Figures -------------------------------------------------------------------------------------


def test_the_interval_is_students_t_times_the_error():
    figure = report.figure((2.0, 0.1), df=3)
    assert figure["interval"] == pytest.approx([2 - 0.3182446, 2 + 0.3182446])


def test_a_factor_scales_a_figure_its_error_and_its_interval():
    one, ten = (report.figure((2.0, 0.1), 3, factor) for factor in (1, 10))
    assert ten["value"] == 20 and ten["standard_error"] == 1
    assert ten["interval"] == pytest.approx([10 * end for end in one["interval"]])


def test_a_figure_without_an_error_has_no_interval_and_is_valid_json():
    figure = report.figure((2.0, math.nan), df=0)
    assert json.dumps(figure) == '{"value": 2.0, "standard_error": null, "interval": null}'


def test_the_likelihood_is_per_token_and_per_byte():
    figures = report.likelihood(TWO_DRAWS, texts_of([0, 0, 0], [3, 3, 10], ["a"]), False)
    assert (figures["tokens"], figures["bytes"]) == (8, 16)
    assert figures["loss"]["value"] == 1.6875 and figures["perplexity"] == math.exp(1.6875)
    assert figures["loss"]["standard_error"] == pytest.approx(0.1875)  # (1.875 - 1.5) / 2
    assert figures["bits_per_byte"]["value"] == pytest.approx(1.6875 * 8 / 16 / math.log(2))
    assert "documents" not in figures


def test_each_document_has_figures_of_its_own_but_one_that_a_limit_left_out():
    texts = texts_of([0, 2, 2], [3, 3, 10], ["a", "b", "c"])
    a, c = report.likelihood(TWO_DRAWS, texts, False)["documents"]
    assert (a["name"], a["tokens"], a["loss"]["value"]) == ("a", 2, 1.5)
    assert (c["name"], c["tokens"], c["loss"]["value"]) == ("c", 6, 1.75)


def test_the_curve_has_the_bins_that_have_rows():
    figures = report.cost_by_rate(TWO_DRAWS, bins=4)  # a row of 2 tokens has only halves
    assert [(row["low"], row["high"]) for row in figures["curve"]] == [(0.25, 0.5), (0.75, 1.0)]
    assert [row["value"] for row in figures["curve"]] == [pytest.approx(1.5), pytest.approx(1.75)]


def test_a_decrease_spans_two_bins_and_has_an_interval_by_the_passes(monkeypatch):
    monkeypatch.setattr(bounds, "decreases", lambda samples, bins: [(2, (-0.2, 0.05))])
    samples = samples_of([[1.0] * 40 for _ in range(8)], [20] * 40)
    [step] = report.cost_by_rate(samples, bins=10)["decreases"]
    assert (step["from"], step["to"]) == (0.1, 0.3)
    assert step["interval"] == pytest.approx([-0.2 - 2.3646243 * 0.05, -0.2 + 2.3646243 * 0.05])
    assert "10% to 30% (-0.2000 ± 0.0500)" in report.decreases_line([step])


def test_one_pass_says_nothing_about_decreases():
    figures = report.cost_by_rate(samples_of([[2.0, 4.0]], [2, 2]))
    assert figures["decreases"] is None
    assert len(report.lines(figures)) == 1


def test_the_speed_is_that_of_all_passes():
    found = report.speed(TWO_DRAWS, 4.0)
    assert found == {"seconds": 4.0, "tokens_per_second": 4.0}
    assert report.lines(found) == ["4.0 s, 4 tokens/s"]


# --- Bounds side by side -------------------------------------------------------------------------


def row(name: str, value: float, error: float | None = 0.01) -> dict:
    found = {"name": name, "value": value, "standard_error": error, "draws": 8}
    return found | {"relation": BOUNDS[name].relation}


def test_a_row_says_what_its_bound_costs_and_of_which_sampler():
    measured = {
        "uniform": (BOUNDS["uniform"], TWO_DRAWS, 0.5),
        "chain": (BOUNDS["chain"], TWO_DRAWS._replace(calls=2.7), 0.5),
    }
    uniform, chain = report.side_by_side(measured)["bounds"]
    assert (uniform["calls"], chain["calls"]) == (1, 2.7)
    assert uniform["draws"] == 2 and uniform["seconds"] == 0.5 and uniform["value"] == 1.6875
    assert chain["sampler"] == BOUNDS["chain"].sampler


def test_a_chain_that_differs_from_uniform_is_a_violation():
    found = report.relations([row("uniform", 2.0), row("chain", 2.5)], decreases=False)
    assert len(found["violations"]) == 1 and not found["remarks"]


@pytest.mark.parametrize(("errors", "violations"), [(5.3, 0), (5.5, 1)])
def test_chance_makes_a_chain_differ_by_students_t_of_the_draws(errors, violations):
    """With 8 draws |t| is below 5.408 in 99.9% of cases."""
    rows = [row("uniform", 2.0), row("chain", 2.0 + errors * math.hypot(0.01, 0.01))]
    found = report.relations(rows, decreases=False)
    assert len(found["violations"]) == violations and not found["remarks"]


@pytest.mark.parametrize("name", ["discrete", "continuous"])
@pytest.mark.parametrize(
    "decreases, why", [(True, "somewhere, it may"), (False, "a bug, or a network")]
)
def test_fewer_steps_below_the_bound_are_a_remark_that_says_why(name, decreases, why):
    found = report.relations([row("uniform", 2.0), row(name, 1.5)], decreases)
    assert not found["violations"] and why in found["remarks"][0]


def test_left_to_right_may_lie_anywhere():
    rows = [row("uniform", 2.0), row("left_to_right", 1.0, None)]
    assert report.relations(rows, decreases=False) == {"violations": [], "remarks": []}


UNIFORM = samples_of([[2.5, 4.0, 6.0], [2.5, 6.0, 8.0]], [2, 2, 4])


def sampler_row(nats: list[list[float]], counts: list[int], uniform=UNIFORM, **settings) -> dict:
    samples = samples_of(nats, counts)._replace(**settings)
    entry = Bound(None, "exact likelihood", exact=True, strategy="margin")
    return report.sampler("margin", entry, samples, 0.5, uniform)


def test_a_sampler_is_compared_with_uniform_on_the_same_texts():
    found = sampler_row([[3.0, 4.0, 9.0]], [2, 2, 4], calls=3.5)
    assert found["value"] == 2.0 and found["calls"] == 3.5 and found["mixture"] is None
    assert found["above_uniform"]["value"] == pytest.approx((16 - 14.5) / 8)
    expected = bounds.ratio(torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([2, 2, 4]))
    assert found["above_uniform"]["standard_error"] == pytest.approx(expected[1])
    low, high = found["above_uniform"]["interval"]  # of three texts: t is 4.302653
    assert (high - low) / 2 == pytest.approx(4.302653 * expected[1])


def test_texts_that_cannot_be_drawn_are_counted_and_left_out_of_both():
    found = sampler_row([[3.0, math.inf, 9.0], [3.0, 4.0, 9.0]], [2, 2, 4], impossible=2)
    assert (found["texts"], found["impossible_texts"], found["impossible_tokens"]) == (3, 1, 2)
    assert found["value"] == found["mixture"] == 2.0
    assert found["above_uniform"]["value"] == pytest.approx((12 - 9.5) / 6)
    line = "margin cannot draw 2 tokens in 1 of 3 texts, which are left out"
    assert report.lines({"samplers": [found]})[-1] == line


def test_where_no_text_can_be_drawn_there_is_no_figure():
    found = sampler_row([[math.inf] * 3, [3.0, math.inf, math.inf]], [2, 2, 4], impossible=6)
    assert found["value"] is found["interval"] is found["mixture"] is found["above_uniform"] is None
    assert report.lines({"samplers": [found]})[1].startswith("margin         none ")
    json.dumps(found, allow_nan=False)


def test_the_lines_of_samplers():
    exact = sampler_row([[3.0, 4.0, 9.0]], [2, 2, 4], calls=16.0)
    random = sampler_row([[3.0, 4.0, 9.0], [3.0, 6.0, 9.0]], [2, 2, 4], calls=3.53125)
    header, first, second = report.lines({"samplers": [exact, random | {"name": "spread"}]})
    figures = "nats/token       mixture  above uniform      calls  seconds  what it is"
    assert header == f"sampler        {figures}"
    figures = "2.0000                    +0.1875 ± 0.2851      16      0.5  exact likelihood"
    assert first == f"margin         {figures}"
    figures = "2.1250 ± 0.1250  2.0708   +0.3125 ± 0.1507   3.531      0.5  exact likelihood"
    assert second == f"spread         {figures}"


def test_one_pass_violates_nothing():
    rows = [row("uniform", 2.0, None), row("chain", 3.0, None)]
    assert report.relations(rows, decreases=False) == {"violations": [], "remarks": []}


def test_what_a_bound_must_hold_to_comes_from_its_entry(monkeypatch):
    monkeypatch.setitem(BOUNDS, "mine", Bound(bounds.everything, "is mine", relation="equal"))
    found = report.relations([row("uniform", 2.0), row("mine", 2.5, None)], decreases=False)
    assert "mine and uniform differ by +0.5000" in found["violations"][0]


# --- Two models ----------------------------------------------------------------------------------


def compared(one: NLLSamples, other: NLLSamples, exact=(False, False)) -> dict:
    return report.comparison(one, other, ["a.pt", "b.pt"], exact)["against"]


def shifted(by: float, rows: int = 50, draws: int = 4) -> NLLSamples:
    """Rows of ten tokens that cost 20 nats, and `by` more, give or take one."""
    noise = torch.randn(draws, rows, generator=torch.Generator().manual_seed(0))
    return samples_of((20 + by + noise * bool(by)).tolist(), [10] * rows)


@pytest.mark.parametrize("by, better", [(-5.0, "b.pt"), (5.0, "a.pt"), (0.0, None)])
def test_the_model_that_costs_less_is_better(by, better):
    found = compared(shifted(0.0), shifted(by))
    assert found["better"] == better
    assert found["difference"]["value"] == pytest.approx(-by / 10, abs=0.05)


def test_the_interval_of_a_difference_goes_by_the_passes_of_the_bound():
    """Also beside an exact figure, which has one: with 3 degrees of freedom t is 3.182446."""
    exact = shifted(0.0, draws=1)
    for pair in ((exact, shifted(5.0)), (shifted(5.0), exact), (shifted(0.0), shifted(5.0))):
        found = compared(*pair)["difference"]
        low, high = found["interval"]
        assert (high - low) / 2 == pytest.approx(3.182446 * found["standard_error"])


def test_the_verdict_on_a_single_row_goes_by_the_error_over_the_masks():
    found = compared(shifted(0.0, rows=1), shifted(5.0, rows=1))
    assert found["error_over_rows"] is None
    assert found["interval"] == found["difference"]["interval"]


def test_two_exact_figures_of_one_row_decide_nothing():
    one, other = shifted(0.0, rows=1, draws=1), shifted(5.0, rows=1, draws=1)
    found = compared(one, other, exact=(True, True))
    assert found["interval"] is None and found["better"] is None
    assert report.lines({"against": found})[-1] == "verdict: no error is known: raise eval.draws"


@pytest.mark.parametrize(
    "difference, exact, said",
    [
        (0.1, (False, True), "may be smaller"),  # the bound is the higher one
        (-0.1, (False, True), "at least as large"),
        (0.1, (True, False), "at least as large"),
        (-0.1, (True, False), "may be smaller"),
        (0.1, (False, False), ""),
    ],
)
def test_what_a_bound_leaves_open_depends_on_which_is_lower(difference, exact, said):
    remark = report.bounded_remark(difference, exact)
    assert said in remark and bool(said) == bool(remark)


# --- Lines ---------------------------------------------------------------------------------------


def test_the_lines_of_a_likelihood():
    figures = report.likelihood(
        TWO_DRAWS, texts_of([0, 0, 1], [3, 3, 10], ["a", "long name"]), False
    )
    assert report.lines(figures) == [
        "loss 1.6875 ± 0.1875 nats/token",
        "perplexity 5.41",
        "bits 1.2173 ± 0.1353 per byte",
        "95% interval -0.6949 to 4.0699 over the masks",
        "document      tokens  nats/token        bits/byte",
        "a                  4  1.5000 ± 0.0000   1.4427 ± 0.0000",
        "long name          4  1.8750 ± 0.3750   1.0820 ± 0.2164",
    ]


def test_the_curve_is_printed_in_quarters():
    figures = report.cost_by_rate(TWO_DRAWS)  # a row of 2 tokens has only halves
    assert report.lines(figures | {"decreases": []}) == [
        "nats per masked token: 1.500 with 25% to 50%, 1.750 with 75% to 100% of a text masked",
        "the cost of a masked token never decreases with the share masked, beyond chance",
    ]


def test_the_line_of_decreases_says_where_and_by_how_much():
    step = {"from": 0.4, "to": 0.5, **report.figure((-0.25, 0.05), 3)}
    assert report.lines({"decreases": [step]}) == [
        "the cost of a masked token decreases with the share masked: 40% to 50% (-0.2500 ± 0.0500)"
    ]


def test_the_lines_of_several_bounds():
    about = {"draws": 8, "seconds": 1.25}
    uniform = {"name": "uniform", **about, "calls": 1, "sampler": "s", **report.figure((2, 0.5), 7)}
    exact = {"name": "left_to_right", **about, "calls": 128, "sampler": "t"}
    exact |= report.figure((1.5, math.nan), 0)
    figures = {"bounds": [uniform, exact], "violations": [], "remarks": []}
    assert report.lines(figures) == [
        "bound          nats/token        calls  seconds  of the sampler that",
        "uniform        2.0000 ± 0.5000       1      1.2  s",
        "left_to_right  1.5000              128      1.2  t",
        "every relation that must hold between these bounds holds",
    ]
    broken = report.lines(figures | {"violations": ["a"], "remarks": ["b"]})
    assert broken[-2:] == ["VIOLATION: a", "remark: b"]


def test_uniform_alone_has_no_table():
    figures = report.side_by_side({"uniform": (BOUNDS["uniform"], TWO_DRAWS, 0.5)})
    assert len(figures["bounds"]) == 1 and report.lines(figures) == []


def test_the_lines_of_a_comparison():
    found = compared(TWO_DRAWS, samples_of([[2.0, 4.0, 2.0]], [2, 2, 4]), exact=(False, True))
    assert report.lines({"against": found}) == [
        "against b.pt: loss 1.0000 nats/token",
        "difference +0.6875 ± 0.1875 over the masks, ± 0.5592 over 3 rows of text",
        "verdict: no difference is certain (95% interval -1.7187 to +3.0937); "
        "the higher figure is a bound: the true gap may be smaller",
    ]


def test_the_line_of_a_verdict_names_the_better_model():
    line = report.lines({"against": compared(shifted(0.0), shifted(5.0))})[-1]
    assert line.startswith("verdict: a.pt is better, by 0.4") and line.endswith("nats/token (95%)")


def test_a_text_of_few_rows_says_nothing_about_decreases():
    draws = [[4.0, 3.0, 2.0, 1.0] * 9 + [1.0] * 3] * 8  # 39 rows
    assert report.cost_by_rate(samples_of(draws, [4] * 39))["decreases"] is None
    assert (
        report.cost_by_rate(samples_of([each + [1.0] for each in draws], [4] * 40))["decreases"]
        is not None
    )


def test_one_pass_says_that_its_error_is_not_known():
    one = TWO_DRAWS._replace(nats=TWO_DRAWS.nats[:1], u=TWO_DRAWS.u[:1])
    texts = texts_of([0, 0, 0], [3, 3, 10], ["a"])
    said = "the error of one pass is not known: raise eval.draws"
    assert said in report.lines(report.likelihood(one, texts, False))
    assert said not in report.lines(report.likelihood(one, texts, True))
    assert said not in report.lines(report.likelihood(TWO_DRAWS, texts, False))


def test_ids_without_text_have_no_bits_per_byte():
    figures = report.likelihood(TWO_DRAWS, texts_of([0, 0, 1], [0, 0, 0], ["a", "b"]), False)
    assert figures["bits_per_byte"] is None
    assert not any("bits" in line for line in report.lines(figures)[:3])
