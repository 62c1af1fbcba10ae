"""Sudoku, solved in several orders by one network: python -m bench.sudoku checkpoint=out/best.pt

The puzzles are grids of the validation split with some cells blanked. Every filled grid is checked
by the rules, and for its clues: a puzzle may have several solutions. A checkpoint that was trained
on pairs, puzzle and solution, is asked for the solution.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

import diffusion
from bench.throughput import hardware
from model import ModelConfig, Transformer
from nanomdm import cli, devices, strategies, sudoku, text, texts
from nanomdm.bounds import wilson
from nanomdm.checkpoint import Loaded, load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError, as_user_error, write_atomically
from nanomdm.prompts import batches, make_canvas, require_order, with_blanks
from nanomdm.random import generator

NAMES = {"first_hitting": "random", "left_to_right": "left to right"}
COLOURS = {  # of the picture: light, dark
    "margin": ("#047857", "#34d399"),
    "threshold": ("#7e22ce", "#c084fc"),
    "random": ("#1d4ed8", "#60a5fa"),
    "left to right": ("#57534e", "#d6d3d1"),
    "autoregressive": ("#c2410c", "#fb923c"),
}


class Result(NamedTuple):
    """How many puzzles of one share of blanks an order solved."""

    order: str
    blanks: float
    solved: float  # share
    interval: tuple[float, float]  # 95%
    calls: float  # network calls that a puzzle took by itself, on average


def is_solved(grids: np.ndarray, size: int) -> np.ndarray:
    """(N,): whether each row, column and box of grids (N, n * n) has every digit once."""
    return (np.sort(grids[:, sudoku.units(size)]) == np.arange(size)).all(axis=(1, 2))


def main(config: Section) -> None:
    if config.dataset not in sudoku.DATASETS:
        raise UserError(f"dataset={config.dataset}: choose {', '.join(sudoku.DATASETS)}")
    if config.puzzles < 1 or config.seed < 0 or not all(map(str.isdecimal, config.steps)):
        raise UserError("puzzles must be at least 1; seed and each of steps a number from 0 on")
    size, _ = sudoku.DATASETS[config.dataset]
    train, val = texts.split_texts(text.find(config.dataset, "", config.cache, rows=True))
    rng = np.random.default_rng(config.seed)
    if config.pairs:
        write_atomically(Path(config.pairs), pairs(train + val, rng).encode())
        print(f"{config.pairs}: {len(train + val):,} pairs")
        return
    shares = [share_of(word) for word in config.blanks]
    grids = [val[i * len(val) // config.puzzles] for i in range(config.puzzles)]
    puzzles = {share: [blanked(grid, share, rng) for grid in grids] for share in shares}
    results = []
    print("\n".join(header(shares)))
    for name in filter(None, (config.checkpoint, config.against)):
        loaded = load_model(name, devices.pick_device(config.device), Transformer, ModelConfig)
        check(loaded, name, size)
        for order, sampler in orders(config, loaded):
            row = [measure(loaded, sampler, order, share, puzzles[share], size) for share in shares]
            results += row
            print(line(row), flush=True)
    write(results, config)
    plot(results, Path(config.output))


# --- Puzzles ------------------------------------------------------------------------------------


def share_of(word: str) -> float:
    try:
        share = float(word)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UserError(f"blanks={word} must be a share of the cells in (0, 1], such as 0.6")
    return share


def blanked(grid: str, share: float, rng: np.random.Generator) -> str:
    """The grid with a point in the place of this share of its cells."""
    blanks = set(rng.permutation(len(grid))[: max(1, round(share * len(grid)))].tolist())
    return "".join("." if i in blanks else digit for i, digit in enumerate(grid))


def pairs(grids: list[str], rng: np.random.Generator) -> str:
    """A .jsonl of puzzles, each with any number of blanks, and their solutions."""
    puzzles = ((blanked(grid, 1 - rng.random(), rng), grid) for grid in grids)
    return "".join(json.dumps(dict(zip(text.PAIR, pair, strict=True))) + "\n" for pair in puzzles)


def is_solution(answer: str, puzzle: str, size: int) -> bool:
    """Whether the answer keeps the clues and the rules."""
    if len(answer) != size**2 or not answer.isdecimal():
        return False
    grid = np.array([[int(digit) - 1 for digit in answer]])
    keeps = all(clue in (".", digit) for clue, digit in zip(puzzle, answer, strict=True))
    return keeps and bool(is_solved(grid, size)[0])


# --- Solving ------------------------------------------------------------------------------------


def check(loaded: Loaded, name: str, size: int) -> None:
    L = {"rows": size**2, "pairs": 2 * size**2 + 2}.get(loaded.layout)
    if loaded.model.config.block_size != L:
        raise UserError(f"{name} knows no {size} x {size} grids: name another, or set dataset=")


def orders(config: Section, loaded: Loaded):
    """(name, sampler) for each strategy, and for each number of steps if it takes one."""
    causal, steps = loaded.model.config.causal, [int(n) for n in config.steps]
    for name in ["left_to_right"] if causal else config.strategies:
        shown = "autoregressive" if causal else NAMES.get(name, name)
        for count in [0] if strategies.is_adaptive(name) else steps:
            section = SimpleNamespace(strategy=name, steps=count or 1, temperature=0.0, options={})
            with as_user_error():
                sampler = strategies.from_config(
                    section, diffusion.sample, causal, loaded.model.config.block_length
                )
            yield (f"{shown}, {count} steps" if count else shown), sampler


def measure(
    loaded: Loaded,
    sampler: strategies.Sampler,
    order: str,
    share: float,
    puzzles: Sequence[str],
    size: int,
) -> Result:
    """All puzzles of a share of blanks, at temperature 0; 0 steps are one for each blank."""
    L, tokenizer = loaded.model.config.block_size, loaded.tokenizer
    is_pair = loaded.layout == "pairs"
    lines = puzzles if is_pair else with_blanks(puzzles, ".")
    canvases = [make_canvas(line, 0, tokenizer, L, loaded.layout) for line in lines]
    for canvas in canvases:
        require_order(loaded.model.config, canvas.is_masked)
    if not order.endswith("steps"):
        settings = sampler.settings | {"steps": int(canvases[0].is_masked.sum())}
        sampler = strategies.Sampler(sampler.sample, sampler.name, settings)
    solved, calls = [], []
    for rows, ids, is_masked, starts in batches(canvases, 64):
        seeded = generator(0, "sudoku")
        found = sampler.fill(
            loaded.model, ids, is_masked, generator=seeded, rows=torch.tensor(rows)
        )
        for row, filled, order_of, start in zip(rows, found.ids, found.order, starts, strict=True):
            answer = tokenizer.decode(filled[start : start + size**2].tolist())
            solved.append(is_solution(answer, puzzles[row], size))
            calls.append(len(order_of.unique()) - int(0 in order_of))
    solved = float(np.mean(solved))
    return Result(order, share, solved, wilson(solved, len(puzzles)), float(np.mean(calls)))


# --- Output -------------------------------------------------------------------------------------


def header(shares: Sequence[float]) -> list[str]:
    columns = ["order", *(f"{share:.0%} blanks: solved (95% interval), calls" for share in shares)]
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]


def line(row: Sequence[Result]) -> str:
    cells = [row[0].order]
    for result in row:
        low, high = result.interval
        cells.append(f"{result.solved:.1%} ({low:.1%} to {high:.1%}), {result.calls:.1f}")
    return f"| {' | '.join(cells)} |"


def write(results: Sequence[Result], config: Section) -> None:
    about = {name: value for name, value in config.as_dict().items() if name != "output"}
    about["hardware"] = hardware(devices.pick_device(config.device))
    figures = {"about": about, "rows": [result._asdict() for result in results]}
    path = Path(config.output).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")


def plot(results: Sequence[Result], path: Path) -> None:
    """PATH-light.svg and PATH-dark.svg: the share that is solved, by the share of blanks."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    for dark, theme in enumerate(("light", "dark")):
        style = dict.fromkeys(keys, ("#1c1917", "#e7e5e4")[dark])
        with matplotlib.rc_context(style | {"font.size": 13, "svg.hashsalt": "nanomdm"}):
            figure, axis = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
            for order, colours in COLOURS.items():
                rows = [result for result in results if result.order == order]
                if rows:
                    x, y = ([getattr(row, name) for row in rows] for name in ("blanks", "solved"))
                    low, high = zip(*(row.interval for row in rows), strict=True)
                    axis.fill_between(x, low, high, color=colours[dark], alpha=0.15, lw=0)
                    axis.plot(x, y, "o-", color=colours[dark], lw=2, label=order)
            axis.set(xlabel="cells that are blank", ylabel="puzzles solved", ylim=(0, 1.02))
            for ticks in (axis.xaxis, axis.yaxis):
                ticks.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axis.set_xticks(sorted({result.blanks for result in results}))
            axis.grid(alpha=0.2)
            axis.legend(fontsize=11, frameon=False)
            figure.savefig(f"{path}-{theme}.svg", transparent=True, metadata={"Date": None})
            pyplot.close(figure)


if __name__ == "__main__":
    cli.main(main, "bench/sudoku")
