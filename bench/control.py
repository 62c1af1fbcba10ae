"""Compare diffusion with autoregression: same network, data and steps, several seeds.

python -m bench.control seeds=3 train="training.max_iters=1000"
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

import data
from bench.score import nll_samples
from bench.throughput import hardware
from model import ModelConfig, Transformer
from nanomdm import bounds, cli, devices, report
from nanomdm.checkpoint import load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.texts import cut
from tools.plot import import_pyplot

OBJECTIVES = ("diffusion", "ar")


def train(config: Section, objective: str, seed: int) -> Path:
    """The folder of a run. Trains it unless the folder holds the complete run."""
    folder = Path(config.out, f"{objective}-{seed}")
    if (folder / "seconds.json").is_file():
        return folder
    words = shlex.split(config.train) + (shlex.split(config.train_ar) if objective == "ar" else [])
    settings = [f"training.objective={objective}", f"system.seed={seed}", f"out_dir={folder}"]
    print(f"training {folder}", flush=True)
    start = time.perf_counter()
    command = [sys.executable, str(cli.ROOT / "train.py"), *words, *settings]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise RuntimeError(f"training {folder} ended with exit code {code}: see above")
    (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - start))
    return folder


def score(folder: Path, config: Section) -> tuple[bounds.NLLSamples, dict]:
    """The scores of a run's latest weights on its validation split, and its figures."""
    device = devices.pick_device(config.device)
    loaded = load_model(folder / "ckpt.pt", device, Transformer, ModelConfig)
    corpus = data.load(cli.stored_data(loaded.config), loaded.tokenizer)
    context = loaded.model.config.block_size
    texts = cut(corpus.name, [("", corpus.val)], loaded.tokenizer, context)
    samples = nll_samples(
        loaded.model, texts.rows, seed=1337, draws=config.draws, batch_size=config.batch_size
    )
    seconds = json.loads((folder / "seconds.json").read_text())
    exact = bounds.is_exact(loaded.model.config)
    about = {"steps": loaded.state["step"], "seconds": seconds, "corpus": corpus.name}
    return samples, {"run": folder.name, **about, **report.likelihood(samples, texts, exact)}


def history(folder: Path) -> list[tuple[int, float]]:
    """(step, validation loss) as a run logged it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["eval/val_loss"]) for line in lines if "eval/val_loss" in line]


def plot(folders: dict[str, list[Path]], path: str) -> None:
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (objective, runs), colour in zip(folders.items(), ("C0", "C1"), strict=True):
        for number, folder in enumerate(runs):
            steps, losses = zip(*history(folder), strict=True)
            label = {"diffusion": "diffusion (bound)", "ar": "autoregression (exact)"}[objective]
            axes.plot(steps, losses, "o-", color=colour, ms=3, label=None if number else label)
    axes.set(xlabel="steps", ylabel="validation loss, nats/token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(config: Section) -> None:
    if config.seeds < 1:
        raise UserError(f"seeds={config.seeds} must be at least 1")
    if config.plot:
        import_pyplot()
    seeds = range(1, config.seeds + 1)
    folders = {name: [train(config, name, seed) for seed in seeds] for name in OBJECTIVES}
    rows, gaps = [], []
    print(hardware(devices.pick_device(config.device)))
    print(f"{'run':<14} {'steps':>6} {'seconds':>8}  {'nats/token':<16}  bits/byte")
    for pair in zip(*folders.values(), strict=True):
        scored = [score(folder, config) for folder in pair]
        for _, row in scored:
            rows.append(row)
            figures = (report.text_of(row[name]) for name in ("loss", "bits_per_byte"))
            print(
                f"{row['run']:<14} {row['steps']:>6} {row['seconds']:>8.0f}  {'  '.join(figures)}"
            )
        (gap, _), (_, over_rows) = bounds.difference(scored[0][0], scored[1][0])
        gaps.append(gap)
        print(f"  diffusion - ar {gap:+.4f} ± {over_rows:.4f}")
    figure = report.figure(bounds.mean_and_error(torch.tensor(gaps)), len(gaps) - 1)
    print(f"diffusion - ar, over {len(gaps)} seeds: {report.text_of(figure, '+')} nats/token")
    if config.output:
        figures = {"runs": rows, "gap": figure, "train": config.train, "train_ar": config.train_ar}
        Path(config.output).write_text(json.dumps(figures, indent=1))
    if config.plot:
        plot(folders, config.plot)


if __name__ == "__main__":
    cli.main(main, "bench/control")
