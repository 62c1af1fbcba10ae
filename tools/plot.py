"""Training runs as a picture: loss, bound, learning rate and speed, from their metrics.jsonl.

python -m tools.plot out
python -m tools.plot out-control/* x=seconds output=control
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from nanomdm import cli
from nanomdm.cli import Section
from nanomdm.errors import UserError, optional

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLE = {  # the colours above are Okabe's and Ito's, which the colour-blind can tell apart
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "nanomdm",  # the same runs give the same bytes
}
X = {"steps": "steps", "seconds": "seconds of training"}


# --- What the runs wrote ------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run's log: its figures by name, for each step that has any."""

    label: str
    entries: dict[int, dict[str, float]]
    config: dict  # its settings by dotted name; none for a run without run.json

    @property
    def tokens(self) -> int:
        """Per step; 1 if unknown."""
        names = ("training.batch_size", "model.block_size")
        return math.prod(self.config.get(name, 1) for name in names)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps at which `name` was logged, and its values there."""
        found = [(step, entry[name]) for step, entry in self.entries.items() if name in entry]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, float), np.array(values, float)

    @cached_property
    def clock(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps, from 0 on, and the seconds of training until then."""
        steps, milliseconds = self.series("train/time_ms")
        seconds = np.cumsum(np.diff(steps, prepend=0) * np.nan_to_num(milliseconds) / 1e3)
        return np.insert(steps, 0, 0), np.insert(seconds, 0, 0)

    def at(self, steps: np.ndarray, x: str) -> np.ndarray:
        """The steps on the axis `x`."""
        return np.interp(steps, *self.clock) if x == "seconds" else steps

    def summary(self) -> str:
        """The label, and the last bound with its error."""
        steps, bounds = self.series("eval/val_loss")
        if not len(steps):
            return self.label
        error = self.entries[int(steps[-1])].get("eval/val_error")
        error = f" ± {error:.3f}" if error else ""
        return f"{self.label}: {bounds[-1]:.3f}{error} after {steps[-1]:,.0f} steps"


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in these folders or files, each labelled by what distinguishes its path.

    Raises `UserError`.
    """
    if not paths:
        raise UserError("no runs: name their out_dirs, as in `python -m tools.plot out`")
    files = [Path(path, "metrics.jsonl") if Path(path).is_dir() else Path(path) for path in paths]
    entries = [read_metrics(file) for file in files]
    configs = [read_config(file.with_name("run.json")) for file in files]
    configs = configs if all(configs) else [{} for _ in files]
    names = zip(labels(paths), differences(configs), strict=True)
    return [Run(" ".join(n).strip(), *run) for n, *run in zip(names, entries, configs, strict=True)]


def runs_in(path: Path) -> list[str]:
    """The path, or the runs in a folder that is none itself, as a sweep's."""
    inside = sorted(str(file.parent) for file in path.glob("*/metrics.jsonl"))
    return inside if inside and not Path(path, "metrics.jsonl").exists() else [str(path)]


def read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """The figures in a metrics.jsonl by step, in rising order. Raises `UserError`.

    Where a run was resumed from an earlier step, repeated steps replace the earlier entries. A last
    line without its end is still being written, or a kill has cut it: it is left out.
    """
    if not path.is_file() or path.suffix != ".jsonl":
        raise UserError(f"{path} is not a metrics.jsonl: name the out_dir of a run that has begun")
    entries, last = {}, -1
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)  # what is not finite is null
            entry = {k: math.nan if v is None else float(v) for k, v in entry.items()}
            step = int(entry.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise UserError(
                f"{path}, line {number} is damaged: expected a JSON object of numbers with a step; "
                "remove the line"
            ) from None
        if step < last:
            entries = {before: entry for before, entry in entries.items() if before < step}
        last = step
        entries[step] = entries.get(step, {}) | entry
    if not entries:
        raise UserError(f"{path} is empty: wait for the run's first entry (logging.interval)")
    return entries


def read_config(path: Path) -> dict:
    """The settings in a run.json, by dotted name; none if there is no such file."""
    if not path.is_file():
        return {}
    try:
        sections = json.loads(path.read_bytes())[-1]["config"]
        found = {k: v if isinstance(v, dict) else {"": v} for k, v in sections.items()}
        return {f"{a}.{b}".strip("."): v for a, values in found.items() for b, v in values.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged: remove it to label the runs by path") from None


def differences(configs: Sequence[dict]) -> list[str]:
    """The settings that distinguish each run, if they are at most three."""
    keys = [key for key in configs[0] if len({repr(each.get(key)) for each in configs}) > 1]
    keys = [key for key in keys if key != "out_dir" and not key.startswith("logging.")]
    if not 0 < len(keys) <= 3:
        return ["" for _ in configs]
    short = [", ".join(f"{key.split('.')[-1]}={each.get(key)}" for key in keys) for each in configs]
    return [f"({text})" for text in short]


def labels(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them begin or end with."""
    parts = [Path(path).parts for path in paths]
    if len(set(parts)) < 2:
        return [str(Path(path)) for path in paths]
    while all(each[0] == parts[0][0] for each in parts) and min(map(len, parts)) > 1:
        parts = [each[1:] for each in parts]
    while all(each[-1] == parts[0][-1] for each in parts) and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]
    return [str(Path(*each)) for each in parts]


# --- The picture --------------------------------------------------------------------------------


def draw(runs: Sequence[Run], x: str, pyplot):
    """A figure of four panels: loss, bound, learning rate and speed."""
    figure, axes = pyplot.subplots(
        2, 2, figsize=(10, 6.4), sharex=True, height_ratios=(5, 3), layout="constrained"
    )
    many = pyplot.get_cmap("viridis")(np.linspace(0, 0.9, len(runs)))
    colours = COLOURS if len(runs) <= len(COLOURS) else many
    axes[0, 0].set_ylim(loss_range(runs))
    unit = "tokens" if runs[0].config else "steps"
    for axis, (title, panel) in zip(axes.flat, PANELS.items(), strict=True):
        axis.set_title(title.format(unit=unit), loc="left")
        for run, colour in zip(runs, colours, strict=False):
            panel(axis, run, x, colour)
        if not any(len(line.get_xdata()) for line in axis.lines):
            axis.text(0.5, 0.5, "none yet", transform=axis.transAxes, ha="center", color="#888888")
            axis.set_yticks([])
    for axis in axes[1]:
        axis.set_ylim(bottom=0)
        axis.set_xlabel(X[x])
    axes[0, 0].set_xlim(left=0)
    axes[1, 0].xaxis.set_major_formatter("{x:,.0f}")
    axes[1, 0].yaxis.set_major_formatter("{x:g}")
    axes[1, 1].yaxis.set_major_formatter("{x:,g}")
    handles = [
        pyplot.Line2D([], [], color=colour, lw=3, label=run.summary())
        for run, colour in zip(runs, colours, strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=2 if len(runs) > 3 else 1)
    return figure


def loss_range(runs: Sequence[Run]) -> tuple[float, float]:
    """The range of the loss axis: all means and every run's first batches, but no spikes."""
    lows = [run.series(name)[1] for run in runs for name in ("train/loss", "train/loss_avg")]
    firsts = [run.series(name)[1][:1] for run in runs for name in ("train/loss", "train/loss_max")]
    highs = [*firsts, *(run.series("train/loss_avg")[1] for run in runs)]
    low, high = np.concatenate(lows), np.concatenate(highs)
    if not (np.isfinite(low).any() and np.isfinite(high).any()):
        return 0.0, 1.0
    margin = 0.05 * (np.nanmax(high) - np.nanmin(low)) + 1e-3
    return np.nanmin(low) - margin, np.nanmax(high) + margin


def draw_loss(axis, run: Run, x: str, colour) -> None:
    """The running mean, and each batch faintly behind it; a spike beyond the top is marked."""
    steps, means = run.series("train/loss_avg")
    axis.plot(run.at(steps, x), means, color=colour, lw=1.6, zorder=3)
    steps, losses = run.series("train/loss")
    axis.plot(run.at(steps, x), losses, color=colour, lw=0.7, alpha=0.35)
    peaks, largest = run.series("train/loss_max")  # of all batches since the previous entry
    steps, losses = (peaks, largest) if len(peaks) else (steps, losses)
    top = axis.get_ylim()[1]
    if (beyond := losses > top).any():
        axis.plot(run.at(steps[beyond], x), np.full(beyond.sum(), top), "^", color=colour)


def draw_bound(axis, run: Run, x: str, colour) -> None:
    """On the validation split, with its band; dashed, on the training split."""
    for split, line in (("train", "--"), ("val", "o-")):
        steps, bounds = run.series(f"eval/{split}_loss")
        axis.plot(run.at(steps, x), bounds, line, color=colour, lw=1.6, ms=4)
    errors = [2 * run.entries[int(step)].get("eval/val_error", 0) for step in steps]
    band = bounds - errors, bounds + errors
    axis.fill_between(run.at(steps, x), *band, color=colour, alpha=0.2, lw=0)


def draw_rate(axis, run: Run, x: str, colour) -> None:
    steps, rates = run.series("train/lr")
    axis.plot(run.at(steps, x), rates, color=colour, lw=1.6)


def draw_speed(axis, run: Run, x: str, colour) -> None:
    steps, milliseconds = run.series("train/time_ms")
    axis.plot(run.at(steps, x), 1e3 * run.tokens / milliseconds, color=colour, lw=1.2)


PANELS = {
    "training loss, nats per token\n(faint: each batch; line: running mean)": draw_loss,
    "bound on val, nats per token\n(band: ± 2 standard errors; dashed: on train)": draw_bound,
    "learning rate": draw_rate,
    "{unit} per second": draw_speed,
}


def import_pyplot():
    """matplotlib, set to draw into files. Raises `UserError` if it is not installed."""
    optional("matplotlib").use("agg")
    return optional("matplotlib.pyplot")


def main(config: Section) -> None:
    if config.x not in X:
        raise UserError(f"x={config.x} is unknown: choose steps or seconds")
    pyplot, paths = import_pyplot(), [run for path in config.runs for run in runs_in(Path(path))]
    runs, first = read_runs(paths), Path(config.runs[0])
    beside = (first if first.is_dir() else first.parent) / "metrics"
    output = config.output.removesuffix(".png").removesuffix(".svg") or str(beside)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with pyplot.rc_context(STYLE):
        figure = draw(runs, config.x, pyplot)
        figure.savefig(f"{output}.png", dpi=150)
        figure.savefig(f"{output}.svg", metadata={"Date": None})
    pyplot.close(figure)
    print(f"written: {output}.png and {output}.svg")


if __name__ == "__main__":
    cli.main(main, "tools/plot")
