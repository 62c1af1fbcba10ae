"""bench/frontier.py on the tiny model, under a judge that counts characters."""

import json
import math
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import TEXT

from bench import frontier
from bench import judge as judges
from nanomdm import cli, strategies


class CountingJudge(judges.Judge):
    """Predicts a character from the three before it, as often as it follows them in TEXT."""

    name, context, device = "counts", 10**6, torch.device("cpu")
    ends = Counter(TEXT[i - 3 : i + 1] for i in range(3, len(TEXT)))
    starts = Counter(TEXT[i - 3 : i] for i in range(3, len(TEXT)))

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def nll(self, x0: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self.costs("".join(map(chr, row))) for row in x0.tolist()])

    def costs(self, text: str) -> list[float]:
        last = [text[max(0, i - 3) : i + 1] for i in range(len(text))]
        return [-math.log((self.ends[w] + 0.01) / (self.starts[w[:-1]] + 0.5)) for w in last]


@pytest.fixture(scope="module")
def measured(trained, text_file, tmp_path_factory):
    """The figures of a run over every strategy, and its folder."""
    folder = tmp_path_factory.mktemp("frontier")
    words = ("calls=[2,8,64]", "thresholds=[0.5]", "gammas=[4]", "remask_rates=[0.2]", "samples=5")
    words += ("judge=counts", "tokens=96", "passes=4", "compile=false")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judges, "load_judge", lambda name, device: CountingJudge())
        patch.setattr(sys, "argv", [
            "frontier", f"checkpoint={trained}/ckpt.pt", f"held_out={text_file}", "device=cpu",
            f"output={folder}/deep/f", "batch_size=4", *words,
        ])  # fmt: skip
        cli.main(frontier.main, "bench/frontier")
    return json.loads((folder / "deep/f.json").read_text()), folder / "deep"


def test_the_table_has_the_controls_and_every_strategy(measured):
    names = [row["name"].split()[0] for row in measured[0]["rows"]]
    assert names[:4] == ["any-order", "held-out", "its", "one"]
    assert set(names[4:]) == set(strategies.STRATEGIES)


def test_a_row_for_every_number_of_calls_within_the_context(measured):
    names = [row["name"] for row in measured[0]["rows"]]
    assert [name for name in names if "margin" in name] == ["margin steps=2", "margin steps=8"]


def test_the_calls_are_those_that_one_text_needs(measured):
    calls = {row["name"]: (row["calls"], row["batch_calls"]) for row in measured[0]["rows"]}
    assert calls["confidence steps=8"] == (8, 16)  # two batches
    assert calls["first_hitting"] == calls["left_to_right"] == (32, 64)


def test_held_out_text_costs_what_eval_py_says_under_each_strategy(measured, run, trained):
    """All but remask have the cost; `stochastic` and `first_hitting` by one call a row."""
    rows = {row["name"]: row for row in measured[0]["rows"] if row["nats"]}
    assert {name.split()[0] for name in rows} == {"any-order"} | set(strategies.STRATEGIES) - {
        "remask"
    }
    words = ("eval.tokens=96", "sampling.steps=8", "eval.samplers=[margin,left_to_right]")
    result = run("eval.py", f"checkpoint={trained}/ckpt.pt", "system.device=cpu", *words)
    for name, known in (("margin", "margin steps=8"), ("left_to_right", "left_to_right")):
        found = re.search(rf"^{name} +(\S+) +.*? ([\d.]+) +[\d.]+  exact", result.out, flags=re.M)
        assert float(found[1]) == pytest.approx(rows[known]["nats"], abs=2e-4)
        assert float(found[2]) == rows[known]["score_calls"]
    assert rows["margin steps=8"]["nats_error"] is None
    assert rows["spread steps=8"]["nats_error"] > 0 and rows["spread steps=8"]["mixture"]


def test_the_table_names_the_label_of_every_row(measured):
    labels = {row["name"].split()[0]: row["label"] for row in measured[0]["rows"]}
    assert labels["stochastic"] == labels["first_hitting"] == strategies.BOUND
    assert labels["eb"] == strategies.EXACT and labels["held-out"] == "control"


def test_the_table_and_the_conclusions_are_written(measured):
    table = (measured[1] / "f.md").read_text()
    assert table.count("\n| ") == 1 + len(measured[0]["rows"])
    assert "within" in table and measured[0]["about"]["samples"] == 5


def test_the_plot_is_written_where_matplotlib_is_installed(measured):
    pytest.importorskip("matplotlib")
    assert (measured[1] / "f.png").stat().st_size > 10_000
    light, dark = ((measured[1] / f"f-{theme}.svg").read_text() for theme in ("light", "dark"))
    assert light != dark and all(len(picture) < 200_000 for picture in (light, dark))


def test_without_a_judge_and_without_tokens_there_is_nothing_to_measure(run, trained):
    result = run("bench.frontier", "tokens=0", "device=cpu", f"checkpoint={trained}/ckpt.pt")
    assert result.code == 2 and "name a judge, or tokens" in result.err


def row(name: str, calls: float, bits: float, entropy: float) -> frontier.Row:
    judged = {"bits": bits, "bits_error": 0.01, "entropy": entropy, "entropy_error": 0.05}
    return frontier.Row(name, "", calls, **judged, distinct={2: 1.0}, speed=1.0)


ROWS = [
    row("held-out text", 0, 1.0, 3.0),
    row("stochastic steps=64", 60.0, 2.0, 3.0),
    row("quick", 8.0, 3.0, 2.95),
    row("dull", 8.0, 1.0, 2.0),
    row("slow", 31.9, 2.5, 2.91),
]


@pytest.mark.parametrize("calls, name", [(8, "quick"), (32, "slow"), (64, "stochastic steps=64")])
def test_the_best_has_the_fewest_bits_among_those_that_are_not_duller(calls, name):
    assert frontier.best(ROWS, calls, ROWS[1]).name == name


def test_nothing_is_best_within_too_few_calls():
    assert frontier.best(ROWS, 4, ROWS[1]) is None


def test_a_row_is_named_by_its_own_settings_and_what_is_not_the_default():
    assert frontier.describe(frontier.sampling("first_hitting")) == "first_hitting"
    assert frontier.describe(frontier.sampling("eb", 1, {"gamma": 4.0})) == "eb gamma=4.0"
    section = frontier.sampling("remask", 16, {"remask_rate": 0.05}, temperature=0.9)
    name = "remask steps=16 temperature=0.9 remask_rate=0.05"
    assert frontier.describe(section) == name
