"""eval.py as a user sees it: loss, bounds side by side, comparison, curve, documents, JSON."""

import json
import math
import re
import sys
import types

import pytest
from conftest import TEXT, TINY
from torch._dynamo.utils import counters

import eval as eval_script
from nanomdm import checkpoint, devices, runlog

CPU = "system.device=cpu"


@pytest.fixture
def evaluated(run, trained, tmp_path):
    """evaluated("key=value", ...): what eval.py prints for the tiny model, and its JSON."""

    def evaluated(*words: str) -> tuple[str, dict]:
        settings = (f"checkpoint={trained}/ckpt.pt", CPU, "output=o.json")
        result = run("eval.py", *settings, *words)
        assert result.code == 0, result.err
        return result.out, json.loads((tmp_path / "o.json").read_text())

    return evaluated


def number(text: str, pattern: str) -> float:
    return float(re.search(pattern, text, flags=re.M)[1])


# --- Likelihood ----------------------------------------------------------------------------------


def test_the_bound_is_that_of_the_whole_validation_split(evaluated):
    split = TEXT[int(0.9 * len(TEXT)) :]
    assert f"kings.txt: {len(split):,} tokens" in evaluated()[0]


def test_perplexity_and_bits_per_byte_follow_from_the_loss(evaluated, tmp_path):
    (tmp_path / "other.txt").write_text(TEXT[:500])
    _, figures = evaluated("data.path=other.txt", "eval.draws=2")
    loss, bits = figures["loss"]["value"], figures["bits_per_byte"]["value"]
    assert figures["perplexity"] == pytest.approx(math.exp(loss))
    assert bits == pytest.approx(loss / math.log(2))  # one byte a character here


def test_bits_are_per_byte_where_a_character_has_two(run, tmp_path):
    """Every é is two bytes: the same nats are spread over twice the bytes."""
    (tmp_path / "accents.txt").write_text("éèêë" * 200)
    assert run("train.py", *TINY, "data.path=accents.txt").code == 0
    assert run("eval.py", CPU, "output=o.json").code == 0
    figures = json.loads((tmp_path / "o.json").read_text())
    loss, bits = figures["loss"]["value"], figures["bits_per_byte"]["value"]
    assert bits == pytest.approx(loss / math.log(2) / 2)


def test_an_evaluation_repeats_to_the_last_digit(evaluated):
    (first, _), (second, _) = evaluated(), evaluated()
    assert first.splitlines()[:-1] == second.splitlines()[:-1]  # the last line is the time


def test_a_compiled_evaluation_has_the_same_result(evaluated):
    counters.clear()
    (_, eager), (_, compiled) = evaluated(), evaluated("system.compile=true")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert compiled["loss"]["value"] == pytest.approx(eager["loss"]["value"], abs=1e-3)


def test_the_usual_batch_alone_is_compiled(evaluated, monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT[: 70 * 32 + 3])
    words, seen = ("data.path=text.txt", "eval.draws=2"), []
    (_, expected), compiled = evaluated(*words), []

    def stand_in(function):
        compiled.append(function)
        return lambda x, *rest: seen.append(tuple(x.shape[:2])) or function(x, *rest)

    monkeypatch.setattr(devices, "compiled", stand_in)
    _, figures = evaluated(*words, "system.compile=true")
    assert figures["loss"] == expected["loss"]
    assert seen == 2 * len(compiled) * [(64, 32)]  # neither the last 6 rows nor the text's end


# --- JSON ----------------------------------------------------------------------------------------


def test_what_is_printed_is_what_is_written(evaluated):
    out, figures = evaluated("eval.draws=3")
    assert number(out, r"^loss (\S+)") == round(figures["loss"]["value"], 4)
    assert number(out, r"^loss \S+ ± (\S+)") == round(figures["loss"]["standard_error"], 4)
    assert number(out, r"^perplexity (\S+)") == round(figures["perplexity"], 2)
    assert number(out, r"^bits (\S+)") == round(figures["bits_per_byte"]["value"], 4)
    low, high = figures["loss"]["interval"]
    assert f"95% interval {low:.4f} to {high:.4f}" in out
    assert len(figures["curve"]) == 20
    first, *_, last = figures["quarters"]
    assert f"nats per masked token: {first['value']:.3f} with 0% to 25%, " in out
    assert f"{last['value']:.3f} with 75% to 100% of a text masked" in out
    assert f"{figures['tokens']:,} tokens, 3 passes" in out


def test_one_pass_has_no_error_and_valid_json(evaluated):
    out, figures = evaluated("eval.draws=1")
    assert figures["loss"]["standard_error"] is None and "±" not in out and "nan" not in out


# --- Bounds --------------------------------------------------------------------------------------


def test_all_bounds_stand_side_by_side(evaluated):
    names = ["uniform", "continuous", "discrete", "chain", "left_to_right"]
    words = ("eval.draws=3", "eval.tokens=64", "sampling.steps=128")
    out, figures = evaluated(f"eval.bounds=[{','.join(names)}]", *words)
    assert [row["name"] for row in figures["bounds"]] == names
    assert all(re.search(rf"^{name} +\d", out, flags=re.M) for name in names)
    assert "takes 128 ancestral steps" in out and figures["tokens"] == 64
    assert not figures["violations"]


def test_the_discrete_bound_is_that_of_the_steps_that_would_run(evaluated):
    """One step predicts everything from nothing: no chance is left in it."""
    out, figures = evaluated("eval.bounds=[discrete]", "sampling.steps=1", "eval.draws=3")
    assert "takes 1 ancestral" in out
    assert figures["bounds"][1]["standard_error"] < 1e-6 < figures["bounds"][0]["standard_error"]


# --- Scores of strategies ------------------------------------------------------------------------


def test_every_strategy_has_a_row_with_its_own_likelihood(evaluated):
    words = ("eval.samplers=[spread,margin,threshold]", "sampling.steps=4", "eval.draws=3")
    option = "sampling.options={threshold: 0.2}"
    out, figures = evaluated(*words, option, "eval.tokens=64")
    spread, margin, threshold = figures["samplers"]
    assert (spread["name"], spread["draws"], spread["calls"]) == ("spread", 3, 4)
    assert spread["standard_error"] > 0 and spread["mixture"] <= spread["value"]
    assert (margin["name"], margin["draws"], margin["calls"]) == ("margin", 1, 4)
    assert margin["standard_error"] is None and margin["interval"] is None
    assert 1 <= threshold["calls"] <= 64 / margin["texts"] and threshold["draws"] == 1
    assert number(out, r"^margin +(\S+)") == round(margin["value"], 4)
    assert re.search(r"^spread .*  bound on the likelihood$", out, flags=re.M)
    assert re.search(r"^margin .*  exact likelihood$", out, flags=re.M)


def test_what_has_no_effect_without_a_sampler_is_said(evaluated, run, trained):
    words = ("eval.draws=1", "eval.tokens=64", CPU, f"checkpoint={trained}/ckpt.pt")
    settings = ("sampling.steps=4", "sampling.temperature=2", "sampling.options={top_k: 2}")
    alone = run("eval.py", *words, *settings)
    assert alone.code == 0
    for key in ("sampling.steps", "sampling.temperature", "sampling.options"):
        assert f"{key} has no effect with eval.samplers=[]" in alone.err
    assert "has no effect" not in run("eval.py", *words, *settings, "eval.samplers=[margin]").err
    discrete = run("eval.py", *words, "sampling.steps=4", "eval.bounds=[discrete]")
    assert "has no effect" not in discrete.err


def test_one_step_of_every_strategy_costs_the_same(evaluated):
    words = ("eval.samplers=[spread,margin,stochastic]", "eval.bounds=[discrete]")
    _, figures = evaluated(*words, "sampling.steps=1", "eval.draws=2", "eval.tokens=64")
    _, discrete = figures["bounds"]
    for row in figures["samplers"]:
        assert row["value"] == pytest.approx(discrete["value"], abs=1e-5)


@pytest.mark.parametrize("name", ["margin", "spread"])
def test_a_text_that_a_filter_makes_impossible_is_counted_and_not_infinite(evaluated, name):
    words = (f"eval.samplers=[{name}]", "sampling.options={top_k: 1}", "eval.tokens=64")
    out, figures = evaluated(*words, "eval.draws=2")
    (row,) = figures["samplers"]
    assert row["impossible_texts"] == row["texts"] and row["value"] is None
    assert 0 < row["impossible_tokens"] <= 64
    assert re.search(rf"^{name} cannot draw {row['impossible_tokens']} tokens in", out, flags=re.M)
    assert "inf" not in out and "nan" not in out


def test_one_random_position_a_call_costs_the_bound_and_k_steps_that_of_k_steps(evaluated):
    words = ("eval.samplers=[first_hitting,stochastic]", "eval.bounds=[discrete]")
    _, figures = evaluated(*words, "sampling.steps=3", "eval.draws=20", "eval.tokens=320")
    for bound, sampler in zip(figures["bounds"], figures["samplers"], strict=True):
        error = math.hypot(bound["standard_error"], sampler["standard_error"])
        assert abs(bound["value"] - sampler["value"]) < 4 * error < 0.3


def test_remasking_is_refused_before_anything_is_computed(run, trained):
    result = run("eval.py", f"checkpoint={trained}/ckpt.pt", "eval.samplers=[remask]", CPU)
    assert result.code == 2 and "many paths lead to a text" in result.err and not result.out


# --- Comparison ----------------------------------------------------------------------------------


def test_a_model_against_itself_is_no_better(evaluated, trained):
    out, figures = evaluated(f"eval.against={trained}/ckpt.pt")
    assert figures["against"]["difference"]["value"] == 0 and figures["against"]["better"] is None
    assert "no difference is certain" in out


def test_the_better_of_two_is_named_whichever_comes_first(run, text_file, tmp_path):
    words = (
        *TINY,
        f"data.path={text_file}",
        "training.eval_interval=0",
        "training.save_interval=0",
    )
    for steps in (3, 40):
        assert run("train.py", *words, f"training.max_iters={steps}", f"out_dir={steps}").code == 0
    verdicts = []
    for one, other in ((3, 40), (40, 3)):
        settings = (f"checkpoint={one}/ckpt.pt", f"eval.against={other}/ckpt.pt", CPU)
        verdicts.append(run("eval.py", *settings, "output=o.json").out)
        figures = json.loads((tmp_path / "o.json").read_text())
        assert figures["against"]["better"] == "40/ckpt.pt"
        paired = figures["loss"]["value"] - figures["against"]["loss"]["value"]
        assert figures["against"]["difference"]["value"] == pytest.approx(paired)
    assert all("verdict: 40/ckpt.pt is better" in verdict for verdict in verdicts)


def test_diffusion_against_autoregression_says_that_one_of_them_is_a_bound(
    evaluated, run, text_file
):
    words = (*TINY, f"data.path={text_file}", "training.objective=ar", "out_dir=ar")
    assert run("train.py", *words).code == 0
    out, figures = evaluated("eval.against=ar/best.pt")
    assert "is a bound: the true gap" in out
    assert figures["against"]["error_over_rows"] > 0
    assert figures["against"]["loss"]["standard_error"] is None


def test_models_with_different_symbols_are_not_compared_by_token(run, trained, tmp_path):
    (tmp_path / "o.txt").write_text("abc " * 300)
    assert run("train.py", *TINY, "data.path=o.txt", "out_dir=other").code == 0
    result = run("eval.py", f"checkpoint={trained}/ckpt.pt", "eval.against=other/ckpt.pt", CPU)
    assert result.code == 2 and "compare bits per byte" in result.err


# --- By masking rate -----------------------------------------------------------------------------


def test_whether_the_cost_decreases_is_said_of_a_text_that_is_long_enough(evaluated, text_file):
    out, figures = evaluated()
    assert "the cost of a masked token" not in out and figures["decreases"] is None  # 32 rows
    out, figures = evaluated(f"data.path={text_file}")
    assert "the cost of a masked token" in out and "decreases" in figures


# --- Texts ---------------------------------------------------------------------------------------


def test_a_folder_gives_a_row_for_each_file_and_they_add_up(evaluated, tmp_path):
    (tmp_path / "docs").mkdir()
    for name, size in (("a.txt", 100), ("b.txt", 20)):
        (tmp_path / "docs" / name).write_text(TEXT[:size])
    out, figures = evaluated("data.path=docs")
    a, b = figures["documents"]
    assert (a["name"], a["tokens"], b["name"], b["tokens"]) == ("a.txt", 100, "b.txt", 20)
    whole = (100 * a["loss"]["value"] + 20 * b["loss"]["value"]) / 120
    assert figures["loss"]["value"] == pytest.approx(whole)
    assert re.search(r"^a\.txt +100 ", out, flags=re.M)


@pytest.mark.parametrize("stored", [{"dir": ["a"]}, {"path": ["a"]}, {"rows": "never"}])
def test_stored_settings_that_no_run_saves_are_refused_in_one_line(run, trained, tmp_path, stored):
    state = checkpoint.load(trained / "ckpt.pt")
    state["config"]["data"] |= stored
    checkpoint.save(tmp_path / "ckpt.pt", state)
    result = run("eval.py", "checkpoint=ckpt.pt", CPU)
    assert (result.code, result.err.count("\n")) == (2, 1) and "is not of type" in result.err


@pytest.mark.parametrize("key", ["logging.wandb=True", "training.max_iters=-1"])
def test_stored_settings_that_an_evaluation_does_not_read_do_not_stop_it(
    run, trained, tmp_path, monkeypatch, key
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    state = checkpoint.load(trained / "ckpt.pt")
    section, name, value = re.split("[.=]", key)
    state["config"][section][name] = {"True": True, "-1": -1}[value]
    checkpoint.save(tmp_path / "ckpt.pt", state)
    assert run("eval.py", "checkpoint=ckpt.pt", "eval.draws=1", CPU).code == 0


def test_an_evaluation_that_is_interrupted_leaves_the_file_that_was_there(
    run, trained, tmp_path, monkeypatch
):
    def interrupted(*_):
        raise KeyboardInterrupt

    (tmp_path / "o.json").write_text("{}")
    monkeypatch.setattr(eval_script, "measure", interrupted)
    assert run("eval.py", f"checkpoint={trained}/ckpt.pt", "output=o.json", CPU).code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["o.json"]


# --- Progress ------------------------------------------------------------------------------------


def test_without_a_terminal_lines_on_stderr_show_the_progress(run, trained, monkeypatch):
    monkeypatch.setattr(runlog.progress.__wrapped__, "__defaults__", (0, 0))  # no seconds between
    words = (f"checkpoint={trained}/ckpt.pt", "eval.draws=2", "eval.tokens=64", CPU)
    result = run("eval.py", *words)
    assert result.code == 0
    assert [line[:16] for line in result.err.splitlines()] == [
        "token    64/128 ",
        "token   128/128 ",
    ]


# --- Weights & Biases ----------------------------------------------------------------------------


def test_figures_and_curve_go_to_wandb_if_asked(evaluated, monkeypatch):
    sent = {}
    stub = types.ModuleType("wandb")
    stub.init = lambda **settings: stub
    stub.log, stub.finish = lambda values: sent.update(values), lambda: None
    stub.Table = lambda columns, data: types.SimpleNamespace(columns=columns, data=data)
    stub.plot = types.SimpleNamespace(line=lambda table, x, y, title: (table.data, x, y))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ("eval.samplers=[margin]", "sampling.steps=2")
    _, figures = evaluated("logging.wandb=true", "eval.draws=2", *words)
    assert sent["eval/margin"] == figures["samplers"][0]["value"]
    assert sent["eval/loss"] == figures["loss"]["value"]
    points, x, y = sent["eval/cost_by_masking_rate"]
    middles = [((row["low"] + row["high"]) / 2, row["value"]) for row in figures["curve"]]
    assert list(map(tuple, points)) == middles
    assert (x, y) == ("share masked", "nats per masked token")


# --- What does not go together -----------------------------------------------------------------


@pytest.mark.parametrize("word", ["eval.bounds=[chain]", "eval.samplers=[left_to_right]"])
def test_what_is_about_masks_is_refused_for_an_autoregressive_model(run, text_file, word):
    assert run("train.py", *TINY, f"data.path={text_file}", "training.objective=ar").code == 0
    result = run("eval.py", CPU, word)
    assert result.code == 2 and "leave it out" in result.err
