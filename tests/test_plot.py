"""tools/plot.py: runs as a picture, from what they logged."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

pyplot = pytest.importorskip("matplotlib.pyplot")

from tools import plot  # noqa: E402


def write(folder: Path, entries: list[dict], end: str = "\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(json.dumps(entry) for entry in entries)
    (folder / "metrics.jsonl").write_text(lines + end)
    return folder


def training(step: int, loss: float | None = 2.0, **more: float) -> dict:
    names = {
        "loss": loss,
        "loss_avg": (loss or 0.0) + 0.5,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "time_ms": 100.0,
    }
    return {"step": step} | {f"train/{name}": value for name, value in (names | more).items()}


def evaluation(step: int, bound: float, error: float = 0.01) -> dict:
    names = {"train_loss": bound - 0.1, "val_loss": bound, "val_error": error}
    return {"step": step} | {f"eval/{name}": value for name, value in names.items()}


@pytest.fixture
def panels(tmp_path):
    """panels(entries, x): the four axes of the picture of one run."""
    figures = []

    def panels(entries: list[dict], x: str = "steps"):
        runs = plot.read_runs([str(write(tmp_path / "run", entries))])
        figures.append(plot.draw(runs, x, pyplot))
        return figures[-1].axes

    yield panels
    for figure in figures:
        pyplot.close(figure)


def points(line) -> list[tuple[float, float]]:
    return list(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True))


# --- What is read -------------------------------------------------------------------------------


def test_a_step_has_the_figures_of_all_its_lines(tmp_path):
    write(tmp_path, [training(10), evaluation(10, 1.5), training(20)])
    entries = plot.read_metrics(tmp_path / "metrics.jsonl")
    assert list(entries) == [10, 20]
    assert (entries[10]["train/loss"], entries[10]["eval/val_loss"]) == (2.0, 1.5)


def test_what_a_resumed_run_does_anew_replaces_what_was_there(tmp_path):
    first = [training(step, loss=9.0) for step in (10, 20, 30, 40)] + [evaluation(40, 9.0)]
    write(tmp_path, first + [training(step, loss=1.0) for step in (20, 30)])
    [run] = plot.read_runs([str(tmp_path)])
    assert run.series("train/loss")[0].tolist() == [10, 20, 30]
    assert run.series("train/loss")[1].tolist() == [9.0, 1.0, 1.0]
    assert not len(run.series("eval/val_loss")[0])


def test_the_last_of_two_lines_of_a_step_counts(tmp_path):
    write(tmp_path, [training(10, loss=9.0), training(10, loss=1.0)])
    assert plot.read_metrics(tmp_path / "metrics.jsonl")[10]["train/loss"] == 1.0


def test_a_last_line_that_is_being_written_is_left_out(tmp_path):
    write(tmp_path, [training(10), training(20)], end='\n{"step": 30, "train/lo')
    assert list(plot.read_metrics(tmp_path / "metrics.jsonl")) == [10, 20]


def test_seconds_are_those_of_the_steps_between_two_entries(tmp_path):
    entries = [training(10, time_ms=300.0), training(15, time_ms=100.0), training(25, time_ms=10.0)]
    [run] = plot.read_runs([str(write(tmp_path, entries))])
    assert run.at(np.array([10, 15, 20, 25]), "seconds") == pytest.approx([3.0, 3.5, 3.55, 3.6])


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["out"], ["out"]),
        (["a/x", "a/y"], ["x", "y"]),
        (["one/out", "two/out"], ["one", "two"]),
        (["s/1/out", "s/2/out/"], ["1", "2"]),
        (["out", "out/deeper"], ["out", "out/deeper"]),
        (["out", "out"], ["out", "out"]),
    ],
)
def test_runs_are_labelled_by_what_sets_their_paths_apart(paths, labels):
    assert plot.labels(paths) == labels


def test_settings_that_differ_are_told_and_the_speed_is_in_tokens(tmp_path):
    for name, seed, rate in (("a", 1, 1e-3), ("b", 2, 1e-3)):
        training_ = {"learning_rate": rate, "batch_size": 8}
        config = {"out_dir": name, "training": training_, "system": {"seed": seed}}
        write(tmp_path / name, [training(10, time_ms=50.0)])
        runs = [{"config": {}}, {"config": config | {"model": {"block_size": 32}}}]
        (tmp_path / name / "run.json").write_text(json.dumps(runs))
    runs = plot.read_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [run.label for run in runs] == ["a (seed=1)", "b (seed=2)"]
    figure = plot.draw(runs, "steps", pyplot)
    assert points(figure.axes[3].lines[0]) == [(10, 8 * 32 * 20.0)]
    assert figure.axes[3].get_title(loc="left") == "tokens per second"
    pyplot.close(figure)


def test_a_run_json_that_is_damaged_is_named(tmp_path):
    write(tmp_path, [training(10)])
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="run.json is damaged"):
        plot.read_runs([str(tmp_path)])


# --- What is drawn ------------------------------------------------------------------------------


def test_the_loss_is_a_running_mean_before_every_batch(panels):
    loss = panels([training(10, loss=3.0), training(20, loss=2.0)])[0]
    [mean, batches] = loss.lines
    assert points(mean) == [(10, 3.5), (20, 2.5)] and points(batches) == [(10, 3.0), (20, 2.0)]
    assert batches.get_alpha() < 0.5 and mean.get_zorder() > batches.get_zorder()


def test_a_spike_beyond_the_means_is_marked_at_the_top(panels):
    spike = training(20, loss=80.0, loss_avg=3.0)
    loss = panels([training(10, loss=3.0), spike, training(30, loss=2.0)])[0]
    assert loss.get_ylim()[1] < 5
    assert points(loss.lines[2]) == [(20, loss.get_ylim()[1])]


def test_the_axis_of_the_losses_holds_the_means_of_all_runs_and_where_they_begin(tmp_path):
    write(
        tmp_path / "a",
        [training(10, loss=1.0, loss_max=2.0), training(20, loss=1.2, loss_max=50.0)],
    )
    write(tmp_path / "b", [training(10, loss=6.0, loss_max=7.0), training(20, loss=5.0)])
    low, high = plot.loss_range(plot.read_runs([str(tmp_path / "a"), str(tmp_path / "b")]))
    assert 0.5 < low < 1.0 and 7.0 < high < 8.0


def test_a_spike_between_two_entries_is_marked_at_the_later_one(panels):
    loss = panels([training(10, loss_max=2.0), training(20, loss_max=80.0)])[0]
    assert points(loss.lines[2]) == [(20, loss.get_ylim()[1])]


def test_a_loss_that_is_no_number_leaves_a_gap(panels):
    loss = panels([training(10), training(20, loss=None, loss_avg=2.0), training(30)])[0]
    assert np.isfinite(loss.get_ylim()).all()
    assert math.isnan(points(loss.lines[1])[1][1])


def test_the_band_of_the_bound_is_two_standard_errors_wide_on_each_side(panels):
    bound = panels([training(10), evaluation(10, 2.0, error=0.1), evaluation(20, 1.0, error=0.05)])[
        1
    ]
    corners = bound.collections[0].get_paths()[0].vertices.tolist()
    for corner in ([10, 1.8], [10, 2.2], [20, 0.9], [20, 1.1]):
        assert any(np.allclose(corner, found) for found in corners)


def test_the_rate_and_the_speed_have_a_panel_each(panels):
    _, _, rate, speed = panels([training(10, time_ms=50.0, lr=3e-3)])
    assert points(rate.lines[0]) == [(10, 3e-3)] and points(speed.lines[0]) == [(10, 20.0)]


def test_a_run_that_was_never_evaluated_has_an_empty_panel_that_says_so(panels):
    assert [text.get_text() for text in panels([training(10)])[1].texts] == ["none yet"]


def test_many_runs_have_a_colour_each(tmp_path):
    paths = [str(write(tmp_path / str(i), [training(10)])) for i in range(12)]
    figure = plot.draw(plot.read_runs(paths), "steps", pyplot)
    colours = {str(line.get_color()) for line in figure.axes[2].lines}
    pyplot.close(figure)
    assert len(colours) == 12


# --- The command --------------------------------------------------------------------------------


def test_plain_words_are_runs_and_the_picture_lies_beside_the_first(run, tmp_path):
    write(tmp_path / "a", [training(10), evaluation(10, 1.9)])
    write(tmp_path / "b", [training(20), evaluation(20, 1.8)])
    result = run("tools.plot", "a", "b")
    assert result.code == 0, result.err
    assert (tmp_path / "a" / "metrics.png").read_bytes()[:4] == b"\x89PNG"
    picture = (tmp_path / "a" / "metrics.svg").read_text()
    assert "a: 1.900 ± 0.010 after 10 steps" in picture and "b: 1.800" in picture


def test_a_real_run_has_all_that_is_drawn(trained):
    [run] = plot.read_runs([str(trained)])
    for name in ("train/loss", "train/loss_avg", "train/lr", "train/time_ms", "train/loss_max"):
        assert run.series(name)[0].tolist() == list(range(1, 13))
    for name in ("eval/train_loss", "eval/val_loss", "eval/val_error"):
        assert run.series(name)[0].tolist() == [6, 12]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "is not a metrics.jsonl"),
        ("", "is empty"),
        ('{"step": 1}\nnonsense\n', "line 2 is damaged"),
        ('{"train/loss": 1}\n', "line 1 is damaged"),
        ('{"step": 1, "train/loss": "low"}\n', "line 1 is damaged"),
        ("[1]\n", "line 1 is damaged"),
        ('{"step": NaN}\n', "line 1 is damaged"),
        ('{"step": 1e999}\n', "line 1 is damaged"),
        ("[" * 10**5 + "\n", "line 1 is damaged"),
        ("\xff\xfe\n", "line 1 is damaged"),
    ],
)
def test_a_log_that_cannot_be_read_is_answered_in_one_line(content, named, tmp_path):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=named) as error:
        plot.read_runs([str(tmp_path)])
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("words", "named"), [((), "no runs"), (("x=time", "a"), "x=time"), (("nowhere",), "nowhere")]
)
def test_a_mistake_is_answered_in_one_line(run, tmp_path, words, named):
    write(tmp_path / "a", [training(10)])
    result = run("tools.plot", *words)
    assert (result.code, result.err.count("\n")) == (2, 1) and named in result.err


def test_a_sweeps_folder_stands_for_its_runs(run, tmp_path):
    for name in ("0", "1"):
        write(tmp_path / "sweep" / name, [training(1), evaluation(1, 2.0)])
    assert plot.runs_in(tmp_path / "sweep") == [str(tmp_path / "sweep" / name) for name in "01"]
    assert plot.runs_in(tmp_path / "sweep" / "0") == [str(tmp_path / "sweep" / "0")]
    result = run("tools.plot", "sweep")
    assert result.code == 0 and Path("sweep/metrics.svg").exists()
    svg = Path("sweep/metrics.svg").read_text()
    assert "0: 2.000 ± 0.010" in svg and "1: 2.000 ± 0.010" in svg
