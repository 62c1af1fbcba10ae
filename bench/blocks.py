"""From autoregression to diffusion: the bound against the length of a block.

python -m bench.blocks seeds=[1,2,3] steps=300
python -m bench.blocks seconds=180

For each model.block_length train.py trains a network per seed, for the same steps or the same
seconds; all are evaluated on the same text. The first seed's are also scored under a sampler in few
steps a block: what a text costs against the network calls that it takes.
"""

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import data
import diffusion
import train
from bench.recipe import spread, write_corpus
from bench.score import nll_samples
from bench.throughput import hardware, make_run, seconds
from model import ModelConfig, Transformer
from nanomdm import bounds, cli, devices, texts
from nanomdm.checkpoint import Loaded, load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.strategies import STRATEGIES, Sampler
from tools.plot import import_pyplot

CONTROL = "causal"
TIMED = 12  # steps


def words_of(config: Section, name: str) -> list[str]:
    """What train.py is told of a run: the length of its blocks, or the causal control."""
    own = "training.objective=ar" if name == CONTROL else f"model.block_length={name}"
    return [*shlex.split(config.words), own]


def steps_of(config: Section, name: str) -> int:
    """The optimizer steps of a run: those of the configuration, or what fits into its seconds."""
    if not config.seconds:
        return config.steps
    device = devices.pick_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        settings = cli.compose(words_of(config, name))
        run = make_run(settings, Path(folder), device)
        step = partial(devices.eager_if_compiling_fails(train.training_step, run.model), run)
        start = seconds(step, device)
        step()
        each = statistics.median(seconds(step, device) for _ in range(TIMED))
    return max(1, int((config.seconds - start) / each))


def run_of(config: Section, name: str, steps: int, seed: int, corpus: Path) -> Path:
    """The folder of a run. Trains it in a process of its own unless that is done."""
    folder = Path(config.out_dir, f"{name}-{steps}-{seed}")
    if (folder / "seconds.json").is_file():
        return folder
    words = [f"data.path={corpus}", f"out_dir={folder}", f"system.seed={seed}"]
    words += [f"training.max_iters={steps}", "training.eval_interval=0"]
    words += ["training.sample_interval=0", "training.save_interval=0", *words_of(config, name)]
    began = time.perf_counter()
    command = [sys.executable, str(cli.ROOT / "train.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{name}, seed {seed} failed: {result.stderr.strip().splitlines()[-1:]}")
    (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - began))
    return folder


def evaluate(folder: Path, config: Section) -> dict:
    """The bound of a run's averaged weights on the validation split, with its error."""
    loaded, corpus = load(folder)
    rows = [row.ids for row in corpus.rows("val", loaded.model.config.block_size).evenly()]
    value, error = nll_samples(loaded.model, rows, seed=0, draws=config.draws).bound()
    taken = json.loads((folder / "seconds.json").read_text())
    return {"folder": str(folder), "bound": value, "error": error, "seconds": taken}


def load(folder: Path) -> tuple[Loaded, data.Corpus]:
    device = devices.pick_device("auto")
    loaded = load_model(folder / "ckpt.pt", device, Transformer, ModelConfig)
    return loaded, data.load(cli.stored_data(loaded.config), loaded.tokenizer)


def scores(folder: Path, config: Section) -> list[dict]:
    """(steps of a block, calls of a text, nats per token) under the sampler `spread`."""
    loaded, corpus = load(folder)
    model, found = loaded.model, []
    context, size = model.config.block_size, model.config.block_length
    scored = texts.cut("", [("", corpus.val)], loaded.tokenizer, context, limit=config.tokens)
    for count in (2**i for i in range(size.bit_length()) if 2**i <= size):
        settings = {"strategy": STRATEGIES["spread"], "steps": count}
        sampler = Sampler(diffusion.sample, "spread", settings)
        samples = bounds.score(sampler, model, scored, draws=1, seed=0, advance=lambda n: None)
        nats = samples.bound()[0]
        found.append({"steps": count, "calls": samples.calls, "nats": nats})
    return found


COLOURS = ("#c2410c", "#fb923c"), ("#1d4ed8", "#60a5fa")  # light and dark: blocks, the control
CURVES = "viridis_r", "viridis"  # of colours from the shortest block to the longest


def plot(results: dict[str, dict], path: Path) -> None:
    """PATH-light.svg and PATH-dark.svg: nats by the length of a block, and nats against calls."""
    pyplot = import_pyplot()
    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    lengths = [name for name in results if name != CONTROL]
    for dark, theme in enumerate(("light", "dark")):
        style = dict.fromkeys(keys, ("#1c1917", "#e7e5e4")[dark])
        with pyplot.rc_context(style | {"font.size": 12, "svg.hashsalt": "nanomdm"}):
            figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
            draw_bounds(axes[0], results, lengths, dark)
            draw_scores(axes[1], results, lengths, pyplot.get_cmap(CURVES[dark]))
            for axis in axes:
                axis.grid(alpha=0.2)
                if axis.get_legend_handles_labels()[0]:
                    place = "center right" if axis is axes[0] else "upper right"
                    axis.legend(fontsize=10, frameon=False, loc=place)
            figure.savefig(f"{path}-{theme}.svg", transparent=True, metadata={"Date": None})
            pyplot.close(figure)


def draw_bounds(axis, results: dict[str, dict], lengths: list[str], dark: int) -> None:
    for number, name in enumerate(lengths):
        values = [run["bound"] for run in results[name]["runs"]]
        axis.plot([number] * len(values), values, "o", color=COLOURS[0][dark], ms=4, alpha=0.5)
    means = [statistics.fmean(run["bound"] for run in results[name]["runs"]) for name in lengths]
    axis.plot(means, color=COLOURS[0][dark], lw=2.5, label="blocks: each seed, and the mean")
    if CONTROL in results:
        control = statistics.fmean(run["bound"] for run in results[CONTROL]["runs"])
        axis.axhline(control, color=COLOURS[1][dark], ls="--", label="causal network")
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set(xlabel="tokens in a block", ylabel="nats per token: exact at 1, else a bound")


def draw_scores(axis, results: dict[str, dict], lengths: list[str], colours) -> None:
    for number, name in enumerate(lengths):
        points = [(each["calls"], each["nats"]) for each in results[name]["scores"]]
        if points:
            colour = colours((number + 0.5) / len(lengths))
            axis.plot(
                *zip(*points, strict=True), "o-", color=colour, ms=4, label=f"blocks of {name}"
            )
    axis.set(
        xscale="log", xlabel="network calls for a text", ylabel="nats per token under `spread`"
    )
    ticks = [2**k for k in range(11) if 2**k <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axis.minorticks_off()


def main(config: Section) -> None:
    names = [str(int(length)) for length in config.lengths] + [CONTROL] * config.control
    import_pyplot()  # before anything is trained
    corpus = write_corpus(config.path, config.out_dir, config.validation)
    results = {}
    print(f"{hardware(devices.pick_device('auto'))}; seeds {', '.join(config.seeds)}")
    print("| block | steps | nats/token | seconds |\n| --- | --- | --- | --- |")
    for name in names:
        steps = steps_of(config, name)
        folders = [run_of(config, name, steps, int(seed), corpus) for seed in config.seeds]
        runs = [evaluate(folder, config) for folder in folders]
        found = [] if name == CONTROL or not config.tokens else scores(folders[0], config)
        results[name] = {"steps": steps, "runs": runs, "scores": found}
        bound = spread([run["bound"] for run in runs]).lstrip("+")
        taken = statistics.median(run["seconds"] for run in runs)
        print(f"| {name} | {steps} | {bound} | {taken:.0f} |", flush=True)
        about = {"hardware": hardware(devices.pick_device("auto")), "results": results}
        Path(config.out_dir, "results.json").write_text(json.dumps(about, indent=1))
    print("\n| block | calls: nats/token |\n| --- | --- |")
    for name, found in results.items():
        cells = (f"{each['calls']:.0f}: {each['nats']:.3f}" for each in found["scores"])
        if found["scores"]:
            print(f"| {name} | {', '.join(cells)} |")
    plot(results, Path(config.out_dir, "blocks"))


if __name__ == "__main__":
    cli.main(main, "bench/blocks")
