"""bench/control.py: autoregression against diffusion, several seeds."""

import json
import types

import pytest
from conftest import TINY

from bench import control
from nanomdm import cli


@pytest.fixture
def compared(run, text_file, tmp_path, monkeypatch):
    """compared(seeds=1, ...): what the bench prints and writes; its runs are trained in here."""
    trained = []

    def train(command, stdout):
        trained.append(command)
        return types.SimpleNamespace(returncode=run("train.py", *command[2:]).code)

    def compared(**settings):
        monkeypatch.setattr(control, "subprocess", types.SimpleNamespace(run=train, DEVNULL=None))
        values = cli.load_defaults("bench/control") | {"device": "cpu", "draws": 2}
        values |= {"train": " ".join([*TINY, f"data.path={text_file}"]), "output": "o.json"}
        control.main(cli.section(values | settings))
        return json.loads((tmp_path / "o.json").read_text()), len(trained)

    return compared


def test_each_seed_is_a_pair_of_runs_on_the_same_text(compared):
    figures, trained = compared(seeds=2)
    runs = {row["run"]: row for row in figures["runs"]}
    assert set(runs) == {"diffusion-1", "ar-1", "diffusion-2", "ar-2"} and trained == 4
    assert {row["tokens"] for row in runs.values()} == {1016}
    gaps = [
        runs[f"diffusion-{seed}"]["loss"]["value"] - runs[f"ar-{seed}"]["loss"]["value"]
        for seed in (1, 2)
    ]
    assert figures["gap"]["value"] == pytest.approx(sum(gaps) / 2)
    assert figures["gap"]["standard_error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2, rel=1e-4)


def test_runs_that_are_there_are_not_repeated(compared):
    first, _ = compared(seeds=1)
    again, trained = compared(seeds=1)
    assert again == first and trained == 2


def test_words_for_the_autoregressive_runs_alone(compared):
    figures, _ = compared(seeds=1, train_ar="training.max_iters=5")
    assert [row["steps"] for row in figures["runs"]] == [12, 5]


def test_the_losses_are_drawn_against_the_steps(compared, tmp_path):
    pytest.importorskip("matplotlib")
    compared(seeds=1, plot="control.png")
    assert (tmp_path / "control.png").read_bytes()[:4] == b"\x89PNG"
