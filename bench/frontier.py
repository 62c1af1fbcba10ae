"""Quality against network calls, for every strategy: python -m bench.frontier

An autoregressive model judges the samples (bench/judge.py). Bits per byte are reported with the
entropy of the tokens and the share of distinct n-grams, because repetition lowers the bits, too.
"""

import json
import math
import platform
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

import diffusion
from bench import judge as judges
from model import ModelConfig, Transformer
from nanomdm import cli, devices, strategies
from nanomdm.checkpoint import Loaded, load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.random import generator
from nanomdm.strategies import STRATEGIES

BUDGETS = (8, 32)  # calls within which the best strategy is named, besides the context
SAME = 2.0  # standard errors of a difference within which two entropies count as equal


class Row(NamedTuple):
    """One line of the table; errors are standard errors over the texts."""

    name: str
    label: str
    calls: float  # network calls that a text needs by itself, on average
    batch_calls: int  # network calls of the batches
    bits: float  # per byte, under the judge
    bits_error: float
    entropy: float  # nats, of the tokens of a text, on average
    entropy_error: float
    distinct: dict[int, float]  # share of n-grams in a text that are distinct
    speed: float  # tokens a second


def main(config: Section) -> None:
    device = devices.pick_device(config.device)
    loaded = load_model(config.checkpoint, device, Transformer, ModelConfig)
    judge = judges.load_judge(config.judge, device)
    L = loaded.model.config.block_size
    grid = settings_of(config, L)
    text = judges.held_out_text(judge, config.held_out)
    held_out = judges.cut(text, L, config.samples, config.seed)
    judges.controls(judge, held_out, config.seed)  # refuses a judge that cannot judge
    rows = []
    print(HEADER)
    for name, texts in judges.control_texts(held_out, config.seed).items():
        rows.append(measure(judge, texts, name, "control"))
        print(line(rows[-1]), flush=True)
    for section in grid:
        rows.append(sample_and_measure(loaded, judge, section, config))
        print(line(rows[-1]), flush=True)
        write(rows, config, L)  # after each row: an interrupted run loses nothing
    print("\n".join(conclusions(rows, L)))
    plot(rows, Path(config.output).with_suffix(".png"))


def settings_of(config: Section, context: int) -> list[Section]:
    """The sections `sampling` to sample with: every strategy over its own range of calls."""
    steps = [int(calls) for calls in config.calls]
    within = [calls for calls in steps if calls <= context]
    options = {
        "threshold": [{"threshold": float(value)} for value in config.thresholds],
        "eb": [{"gamma": float(value)} for value in config.gammas],
        "remask": [{"remask_rate": float(rate)} for rate in config.remask_rates],
    }
    # More steps than tokens may improve remask further.
    calls = {"remask": steps} | {name: [1] for name in STRATEGIES if is_adaptive(name)}
    grid = []
    for name in config.strategies or STRATEGIES:
        if name not in STRATEGIES:
            raise UserError(f"strategies={name} is unknown: choose some of {', '.join(STRATEGIES)}")
        grid += [
            sampling(name, number, own, float(temperature))
            for temperature in config.temperatures
            for own in options.get(name, [{}])
            for number in calls.get(name, within)
        ]
    return grid


def sampling(strategy: str, steps: int = 1, options=None, temperature: float = 1.0) -> Section:
    """A section `sampling` of config.yaml."""
    return Section(strategy=strategy, steps=steps, options=options or {}, temperature=temperature)


def is_adaptive(strategy: str) -> bool:
    return getattr(STRATEGIES[strategy], "adaptive", False)


def sample_and_measure(
    loaded: Loaded, judge: judges.Judge, section: Section, config: Section
) -> Row:
    """Draw `config.samples` unconditional texts, count their calls and judge them."""
    model, texts, alone, calls = loaded.model, [], 0, 0
    sampler = strategies.from_config(section, diffusion.sample)
    dtype = devices.pick_dtype(config.dtype, model.device, training=False)
    start = time.perf_counter()
    for rows in torch.arange(config.samples).split(config.batch_size):
        is_masked = torch.ones(len(rows), model.config.block_size, dtype=torch.bool)
        history = []
        with devices.autocast(model.device, dtype):
            filled = sampler.fill(
                model,
                is_masked.long(),
                is_masked,
                generator=generator(config.seed, "frontier"),
                rows=rows,
                history=history,
            )
        calls += filled.calls
        alone += sum(int(event.revealed.any(dim=1).sum()) for event in history)
        texts += [loaded.tokenizer.decode(ids) for ids in filled.ids.tolist()]
    speed = config.samples * model.config.block_size / (time.perf_counter() - start)
    row = measure(judge, texts, describe(section), sampler.label)
    return row._replace(calls=alone / config.samples, batch_calls=calls, speed=speed)


def describe(section: Section) -> str:
    """The strategy, its own settings, and the other settings that are not the default."""
    shown = {} if is_adaptive(section.strategy) else {"steps": section.steps}
    if section.temperature != 1:
        shown["temperature"] = section.temperature
    shown |= section.options
    return " ".join([section.strategy, *(f"{name}={value}" for name, value in shown.items())])


def measure(judge: judges.Judge, texts: list[str], name: str, label: str) -> Row:
    """The row of some texts, without calls."""
    verdict = judges.judge_texts(judge, texts)
    entropies = [judges.entropy(judge.encode(text)) for text in texts]
    error = statistics.stdev(entropies) / math.sqrt(len(texts))
    figures = verdict.bits_per_byte, verdict.error, verdict.entropy, error, verdict.distinct
    return Row(name, label, 0.0, 0, *figures, speed=0.0)


# --- Output -------------------------------------------------------------------------------------


HEADER = """\
| sampler | label | calls | bits/byte | entropy | distinct 2-, 4-grams | tokens/s |
| --- | --- | --- | --- | --- | --- | --- |"""


def line(row: Row) -> str:
    calls = f"{row.calls:.1f}" if row.calls else "–"
    speed = f"{row.speed:,.0f}" if row.speed else "–"
    figures = f"{row.bits:.3f} ± {row.bits_error:.3f} | {row.entropy:.3f} ± {row.entropy_error:.3f}"
    distinct = ", ".join(f"{share:.3f}" for share in row.distinct.values())
    return f"| {row.name} | {row.label} | {calls} | {figures} | {distinct} | {speed} |"


def best(rows: list[Row], calls: float, reference: Row) -> Row | None:
    """The row of lowest bits within `calls` whose entropy is not significantly lower."""

    def is_duller(row: Row) -> bool:
        error = math.hypot(row.entropy_error, reference.entropy_error)
        return row.entropy < reference.entropy - SAME * error

    fits = [row for row in rows if 0 < row.calls <= calls + 0.5 and not is_duller(row)]
    return min(fits, key=lambda row: row.bits, default=None)


def conclusions(rows: list[Row], context: int) -> list[str]:
    """The best row within each budget, at the entropy of ancestral sampling with the most steps."""
    ancestral = [row for row in rows if row.name.startswith("stochastic")]
    if not ancestral:
        return []
    reference = max(ancestral, key=lambda row: row.calls)
    found = [f"at the entropy of {reference.name} ({reference.entropy:.3f}), within"]
    for calls in sorted({*BUDGETS, context // 8, context}):
        row = best(rows, calls, reference)
        found.append(f"{calls} calls: {row.name if row else 'none'}")
    return found


def write(rows: list[Row], config: Section, context: int) -> None:
    cores = f"{torch.get_num_threads()} threads"
    about = {
        "checkpoint": config.checkpoint,
        "judge": config.judge,
        "samples": config.samples,
        "seed": config.seed,
        "hardware": f"{platform.processor() or platform.machine()}, {cores}",
    }
    table, found = "\n".join([HEADER, *map(line, rows)]), conclusions(rows, context)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figures = {"about": about, "rows": [row._asdict() for row in rows], "best": found}
    output.with_suffix(".json").write_text(json.dumps(figures, indent=1))
    output.with_suffix(".md").write_text("\n".join([table, "", *found, ""]))


def plot(rows: list[Row], path: Path) -> None:
    """Bits per byte and entropy against calls, a line for each strategy; dashed: held-out text."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (bits, entropy) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    series = defaultdict(list)
    for row in rows:
        if row.calls:
            words = row.name.split()
            key = " ".join(w for w in words if not w.startswith(("steps", "gamma", "threshold=")))
            series[key].append(row)
    for name, group in series.items():
        group.sort(key=lambda row: row.calls)
        calls = [row.calls for row in group]
        for axis, value, error in ((bits, 4, 5), (entropy, 6, 7)):
            values, errors = [row[value] for row in group], [row[error] for row in group]
            axis.errorbar(calls, values, errors, label=name, marker="o", markersize=3, capsize=2)
    for axis, value, title in ((bits, 4, "bits per byte"), (entropy, 6, "entropy, nats")):
        axis.axhline(rows[0][value], color="black", linestyle="--", linewidth=1)
        axis.set(xscale="log", xlabel="network calls per text", ylabel=title)
    bits.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    cli.main(main, "bench/frontier")
