"""What each ingredient of the recipe is worth: python -m bench.recipe seeds=[1,2,3]

train.py trains every variation once per seed; all of them are evaluated on the same masks. The
default is the last tenth of the training split, for choosing between variations. `validation=true`
is for the published table.
"""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import data
import train
from bench.score import nll_samples
from bench.throughput import hardware
from model import ModelConfig, Transformer
from nanomdm import cli, devices, text
from nanomdm.checkpoint import load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError

VARIATIONS = {  # words for train.py
    "recipe": [],
    "weight of the bound": ["diffusion.weighting=1.0"],
    "no weight": ["diffusion.weighting=0.0"],
    "no convolution": ["model.conv_width=0"],
    "no gate": [],
    "no QK-norm": [],
    "QK-norm 1": [],
    "untied head": [],
    "cosine": ["training.lr_schedule=cosine"],
    "half the rate": ["training.learning_rate=5e-3"],
    "AdamW 1e-3": ["training.optimizer=adamw", "training.learning_rate=1e-3"],
    "AdamW 3e-3": ["training.optimizer=adamw", "training.learning_rate=3e-3"],
    "AdamW 6e-3": ["training.optimizer=adamw", "training.learning_rate=6e-3"],
    "plain AdamW": [  # the usual recipe: a Llama-like network, the bound's weight, AdamW
        *("training.optimizer=adamw", "training.learning_rate=3e-3", "model.conv_width=0"),
        *("diffusion.weighting=1.0", "training.lr_schedule=cosine"),
    ],
}
FIELDS = {  # of ModelConfig, besides: they are no settings
    "no gate": {"attention_gate": False},
    "no QK-norm": {"qk_norm": 0},
    "QK-norm 1": {"qk_norm": 1},
    "untied head": {"tie_weights": False},
    "plain AdamW": {"attention_gate": False, "qk_norm": 0},
}
CHILD = "import json, sys; from bench import recipe; recipe.run(**json.loads(sys.argv[1]))"


def run(words: list[str], experiment: str, fields: dict) -> None:
    """Train in this process, a network with these fields of `ModelConfig`."""
    config = cli.compose(words, experiment)
    vars(config.model).update(fields)
    train.main(config)


def run_of(config: Section, name: str, seed: int, corpus: Path) -> Path:
    """The folder of one run. Trains it in a separate process unless that is done."""
    folder = Path(config.out_dir, f"{name.replace(' ', '-')}-{seed}")
    if (folder / "done").is_file():
        return folder
    words = [f"data.path={corpus}", f"out_dir={folder}", f"system.seed={seed}"]
    words += [f"training.eval_interval={config.curve}", "training.sample_interval=0"]
    words += ["training.save_interval=0", *shlex.split(config.words), *VARIATIONS[name]]
    words += [f"training.max_iters={config.steps}"] if config.steps else []
    given = {"words": words, "experiment": config.experiment, "fields": FIELDS.get(name, {})}
    result = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(given)],
        env=os.environ | {"PYTHONPATH": str(cli.ROOT)},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise UserError(f"{name}, seed {seed} failed: {result.stderr.strip().splitlines()[-1:]}")
    (folder / "done").touch()
    return folder


def evaluate(folder: Path, device: torch.device, draws: int) -> float:
    """The bound of a run's averaged weights on its validation split, nats per token."""
    loaded = load_model(folder / "ckpt.pt", device, Transformer, ModelConfig)
    corpus = data.load(cli.stored_data(loaded.config), loaded.tokenizer)
    rows = [row.ids for row in corpus.rows("val", loaded.model.config.block_size).evenly()]
    return nll_samples(loaded.model, rows, seed=0, draws=draws).bound()[0]


def write_corpus(path: str, out_dir: str, validation: bool) -> Path:
    """Write the text of the runs to a file: for `validation` all of it, else its training split."""
    dataset = cli.load_defaults()["data"]["dataset"]
    cache = Path(os.environ.get("NANOMDM_CACHE", "prepared"))  # as in data.load
    content = text.find(dataset, path, cache).text
    written = Path(out_dir, "all.txt" if validation else "train-split.txt")
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(content if validation else content[: int(0.9 * len(content))])
    return written


def spread(values: list[float]) -> str:
    """The mean of several seeds and its standard error."""
    if len(values) < 2:
        return f"{values[0]:+.4f}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.4f} ± {error:.4f}"


def line(name: str, runs: list[dict], reference: list[dict]) -> str:
    """A row of the table; differences are taken seed by seed."""
    differences = [a["bound"] - b["bound"] for a, b in zip(runs, reference, strict=False)]
    compared = spread(differences) if name != "recipe" else ""
    bound = spread([run["bound"] for run in runs]).lstrip("+")
    return (
        f"| {name} | {bound} | {compared} | {statistics.median(r['seconds'] for r in runs):.0f} |"
    )


def curve(folder: Path) -> tuple[list[float], list[float | None]]:
    """Seconds of training, with the start and without evaluations, and the bound at each."""
    seconds, last, times, bounds = 0.0, 0, [], []
    for entry in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "train/time_ms" in entry:
            seconds += entry["train/time_ms"] / 1e3 * (entry["step"] - last)
            last = entry["step"]
            times.append(seconds)
            bounds.append(None)
        else:
            bounds[-1] = entry["eval/val_loss"]
    return times, bounds


def points(folder: Path) -> list[tuple[float, float]]:
    """The bound of a run against its seconds of training."""
    return [point for point in zip(*curve(folder), strict=True) if point[1]]


def draw(curves: dict[str, list[list[tuple[float, float]]]], path: Path) -> None:
    """A picture of the bound against seconds of training: the points of each run, by name."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the plot needs a package: pip install matplotlib") from None
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for number, (name, runs) in enumerate(curves.items()):
        for run in runs:
            label = name if run is runs[0] else None
            axes.plot(*zip(*run, strict=True), "o-", color=f"C{number}", label=label, lw=1, ms=3)
    axes.set(xlabel="seconds of training", ylabel="bound on val, nats per token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main(config: Section) -> None:
    names = config.variations or list(VARIATIONS)
    for name in names:
        if name not in VARIATIONS:
            raise UserError(f"variations={name} is unknown: choose some of {', '.join(VARIATIONS)}")
    corpus = write_corpus(config.path, config.out_dir, config.validation)
    device, results = devices.pick_device("auto"), {}
    print(f"{hardware(device)}; {config.steps or 'all'} steps, seeds {', '.join(config.seeds)}")
    print("| variation | nats/token | against the recipe | seconds |\n| --- | --- | --- | --- |")
    for name in names:
        results[name] = []
        for seed in map(int, config.seeds):
            folder = run_of(config, name, seed, corpus)
            bound, seconds = evaluate(folder, device, config.draws), curve(folder)[0][-1]
            row = {"seed": seed, "bound": bound, "seconds": seconds, "folder": str(folder)}
            results[name].append(row)
        print(line(name, results[name], results[names[0]]), flush=True)
        Path(config.out_dir, "results.json").write_text(json.dumps(results, indent=1))
    if config.curve:
        curves = {
            name: [points(Path(run["folder"])) for run in runs] for name, runs in results.items()
        }
        draw(curves, Path(config.out_dir, "curve.png"))


if __name__ == "__main__":
    cli.main(main, "bench/recipe")
