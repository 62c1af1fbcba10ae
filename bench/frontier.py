"""Quality against network calls, for every strategy: python -m bench.frontier

What held-out text costs under each sampler's own law (`diffusion.score`): no judge is needed. With
`judge=CHECKPOINT` also what samples cost under an autoregressive model (bench/judge.py), reported
with the entropy of their tokens and the share of distinct n-grams: repetition lowers the bits, too.
"""

import json
import math
import statistics
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import data
import diffusion
from bench import judge as judges
from bench.score import nll_samples
from bench.throughput import hardware
from model import ModelConfig, Transformer
from nanomdm import bounds, cli, devices, strategies, texts
from nanomdm.checkpoint import Loaded, load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.random import generator
from nanomdm.runlog import progress
from nanomdm.strategies import STRATEGIES, is_adaptive

BUDGETS = (4, 8, 16, 32)  # calls within which the best strategy is named, besides the context
ANY_ORDER, SCORED = "any-order bound", ("score_calls", "nats", "nats_error")
SAME = 2.0  # standard errors of a difference within which two entropies count as equal


class Row(NamedTuple):
    """One line of the table; errors are standard errors."""

    name: str
    label: str
    calls: float = 0.0  # network calls that a text needs by itself, on average
    score_calls: float = 0.0  # the same for held-out text
    nats: float | None = None  # per token of held-out text, under the sampler's own law
    nats_error: float | None = None  # over the noise that chooses the positions
    mixture: float | None = None  # the tighter bound of all draws together
    bits: float | None = None  # per byte of samples, under the judge
    bits_error: float = 0.0  # over the texts, as are the following
    entropy: float = 0.0  # nats, of the tokens of a text, on average
    entropy_error: float = 0.0
    distinct: dict[int, float] = {}  # share of n-grams in a text that are distinct
    batch_calls: int = 0  # network calls of the batches
    speed: float = 0.0  # tokens a second


def main(config: Section) -> None:
    if not (config.judge or config.tokens):
        raise UserError("nothing to measure: name a judge, or tokens of held-out text")
    device = devices.pick_device(config.device)
    loaded = load_model(config.checkpoint, device, Transformer, ModelConfig)
    if bounds.is_exact(loaded.model.config):
        raise UserError(f"{config.checkpoint} is autoregressive: its order is from left to right")
    shape = loaded.model.config
    grid, rows, seconds = settings_of(config, shape.block_length or shape.block_size), [], 0.0
    if config.judge:
        judge = judges.load_judge(config.judge, device)
        text = judges.held_out_text(judge, config.held_out)
        held_out = judges.cut(text, loaded.model.config.block_size, config.samples, config.seed)
        judges.controls(judge, held_out, config.seed)  # refuses a judge that cannot judge
    if not shape.block_length and devices.pays_to_compile(config.compile, device, math.inf):
        devices.compile_parts(loaded.model)
    print(HEADER)
    if config.tokens:
        scored = validation_split(loaded, config)
        rows.append(any_order_bound(loaded, scored, config))
        print(line(rows[-1]), flush=True)
    if config.judge:
        for name, texts_ in judges.control_texts(held_out, config.seed).items():
            rows.append(Row(name, "control")._replace(**measure(judge, texts_)))
            print(line(rows[-1]), flush=True)
    for section in grid:
        sampler = strategies.from_config(section, diffusion.sample, False, shape.block_length)
        row = Row(describe(section), sampler.label)
        if config.judge:
            row = row._replace(**sample_and_measure(loaded, judge, sampler, config))
        if config.tokens and section.strategy == "first_hitting" and section.temperature == 1:
            row = row._replace(**{name: getattr(rows[0], name) for name in SCORED})
        elif config.tokens and sampler.label != strategies.NONE:
            start = time.perf_counter()
            row = row._replace(**score(loaded, sampler, section.steps, scored, config))
            seconds += time.perf_counter() - start
        rows.append(row)
        print(line(row), flush=True)
        write(rows, config, loaded.model.config.block_size)  # an interrupted run loses nothing
    print("\n".join(conclusions(rows, loaded.model.config.block_size)))
    if config.tokens:
        print(f"{scored.tokens:,} tokens of the {scored.source} scored in {seconds:.0f} s")
    plot(rows, Path(config.output))


# --- Held-out text under the sampler -------------------------------------------------------------


def validation_split(loaded: Loaded, config: Section) -> texts.Texts:
    """About `config.tokens` tokens of the text that the run was validated on."""
    settings, sha256 = cli.stored_data(loaded.config), loaded.state["corpus"]["sha256"]
    corpus = data.load(settings, loaded.tokenizer, sha256)
    source, context = f"validation split of {corpus.name}", loaded.model.config.block_size
    return texts.cut(source, [("", corpus.val)], loaded.tokenizer, context, limit=config.tokens)


def any_order_bound(loaded: Loaded, scored: texts.Texts, config: Section) -> Row:
    """The bound of one random position a call, as `first_hitting` takes them."""
    rows = nll_samples(loaded.model, scored.rows, seed=config.seed, draws=config.passes)
    (nats, error), calls = rows.bound(), loaded.model.config.block_size
    return Row(ANY_ORDER, strategies.BOUND, score_calls=calls, nats=nats, nats_error=error)


def score(
    loaded: Loaded, sampler: strategies.Sampler, steps: int, scored: texts.Texts, config: Section
) -> dict:
    """What the held-out text costs under a sampler, and the calls that a text takes."""
    model, L = loaded.model, loaded.model.config.block_size
    if sampler.name == "stochastic" and sampler.settings["temperature"] == 1:
        # One call a row instead of a path of calls, and the same mean (tests/test_score.py).
        options = {"draws": max(2, config.passes // 4), "seed": config.seed}
        estimator = partial(bounds.discrete, steps=steps)
        nats, error = nll_samples(model, scored.rows, estimator=estimator, **options).bound()
        size = model.config.block_length or L
        calls = (
            L / size * steps * (1 - (1 - 1 / steps) ** size)
        )  # that reveal something, on average
        return {"score_calls": calls, "nats": nats, "nats_error": error}
    draws = 1 if sampler.label == strategies.EXACT else config.draws
    with progress(draws * sum(map(len, scored.rows)), "token") as advance:
        options = {"draws": draws, "seed": config.seed, "advance": advance}
        found = bounds.score(sampler, model, scored, **options)
    if found.impossible:
        return {"score_calls": found.calls}
    nats, error = found.bound()
    mixture = found.mixture() if draws > 1 else None
    error = None if math.isnan(error) else error
    return {"score_calls": found.calls, "nats": nats, "nats_error": error, "mixture": mixture}


# --- Samples under the judge ---------------------------------------------------------------------


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


def sample_and_measure(
    loaded: Loaded, judge: judges.Judge, sampler: strategies.Sampler, config: Section
) -> dict:
    """Draw `config.samples` unconditional texts, count their calls and judge them."""
    model, drawn, alone, calls = loaded.model, [], 0, 0
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
        drawn += [loaded.tokenizer.decode(ids) for ids in filled.ids.tolist()]
    speed = config.samples * model.config.block_size / (time.perf_counter() - start)
    figures = {"calls": alone / config.samples, "batch_calls": calls, "speed": speed}
    return figures | measure(judge, drawn)


def describe(section: Section) -> str:
    """The strategy, its own settings, and the other settings that are not the default."""
    shown = {} if is_adaptive(section.strategy) else {"steps": section.steps}
    if section.temperature != 1:
        shown["temperature"] = section.temperature
    shown |= section.options
    return " ".join([section.strategy, *(f"{name}={value}" for name, value in shown.items())])


def measure(judge: judges.Judge, texts: list[str]) -> dict:
    """What the judge says of some texts."""
    verdict = judges.judge_texts(judge, texts)
    entropies = [judges.entropy(judge.encode(text)) for text in texts]
    return {
        "bits": verdict.bits_per_byte,
        "bits_error": verdict.error,
        "entropy": verdict.entropy,
        "entropy_error": statistics.stdev(entropies) / math.sqrt(len(texts)),
        "distinct": verdict.distinct,
    }


# --- Output -------------------------------------------------------------------------------------


COLUMNS = [
    "sampler",
    "likelihood",
    "calls",
    "nats/token",
    "bits/byte",
    "entropy",
    "distinct",
    "tokens/s",
]
HEADER = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}"


def line(row: Row) -> str:
    def figure(value: float | None, error: float | None, digits: int) -> str:
        if value is None:
            return "–"
        doubt = "" if error is None or math.isnan(error) else f" ± {error:.{digits}f}"
        return f"{value:.{digits}f}{doubt}"

    likelihood = row.label.split()[0]  # exact, bound, no; or control
    calls = row.calls or row.score_calls
    cells = [row.name, likelihood, f"{calls:.1f}" if calls else "–"]
    cells.append(figure(row.nats, row.nats_error, 4))
    cells.append(figure(row.bits, row.bits_error, 3))
    cells.append(figure(row.entropy or None, row.entropy_error, 3))
    cells.append(", ".join(f"{share:.3f}" for share in row.distinct.values()) or "–")
    cells.append(f"{row.speed:,.0f}" if row.speed else "–")
    return f"| {' | '.join(cells)} |"


def best(rows: list[Row], calls: float, reference: Row) -> Row | None:
    """The row of lowest bits within `calls` whose entropy is not significantly lower."""

    def is_duller(row: Row) -> bool:
        error = math.hypot(row.entropy_error, reference.entropy_error)
        return row.entropy < reference.entropy - SAME * error

    judged = [row for row in rows if row.bits is not None]
    fits = [row for row in judged if 0 < row.calls <= calls + 0.5 and not is_duller(row)]
    return min(fits, key=lambda row: row.bits, default=None)


def conclusions(rows: list[Row], context: int) -> list[str]:
    """The best row within each budget: by nats per token of held-out text, then by the judge.

    The latter at the entropy of ancestral sampling with the most steps.
    """
    found, budgets = [], [*(calls for calls in BUDGETS if calls < context), context]
    scored = [row for row in rows if row.nats is not None]
    if scored:
        base = scored[0].nats
        found.append(f"held-out text, any-order bound {base:.4f} nats/token; the lowest within")
        for calls in budgets:
            fits = [row for row in scored[1:] if row.score_calls <= calls + 0.5]
            if fits:
                row = min(fits, key=lambda row: row.nats)
                found.append(f"{calls} calls: {row.name}, {row.nats - base:+.4f}")
    ancestral = [row for row in rows if row.bits is not None and row.name.startswith("stochastic")]
    if ancestral:
        reference = max(ancestral, key=lambda row: row.calls)
        found.append(f"judge, at the entropy of {reference.name} ({reference.entropy:.3f}), within")
        for calls in budgets:
            row = best(rows, calls, reference)
            found.append(f"{calls} calls: {row.name if row else 'none'}")
    return found


def write(rows: list[Row], config: Section, context: int) -> None:
    about = {
        "checkpoint": config.checkpoint,
        "judge": config.judge,
        "samples": config.samples,
        "tokens": config.tokens,
        "seed": config.seed,
        "hardware": hardware(devices.pick_device(config.device)),
    }
    table, found = "\n".join([HEADER, *map(line, rows)]), conclusions(rows, context)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figures = {"about": about, "rows": [row._asdict() for row in rows], "best": found}
    output.with_suffix(".json").write_text(json.dumps(figures, indent=1))
    output.with_suffix(".md").write_text("\n".join([table, "", *found, ""]))


SHOWN = {  # colours of the picture: light, dark
    "spread": ("#c2410c", "#fb923c"),
    "stochastic": ("#1d4ed8", "#60a5fa"),
    "first_hitting": ("#1d4ed8", "#60a5fa"),
    "margin": ("#047857", "#34d399"),
    "confidence": ("#0f766e", "#2dd4bf"),
    "entropy": ("#4d7c0f", "#a3e635"),
    "threshold": ("#7e22ce", "#c084fc"),
    "eb": ("#be185d", "#f472b6"),
    "left_to_right": ("#57534e", "#d6d3d1"),
    "remask": ("#a16207", "#facc15"),
}


def plot(rows: list[Row], path: Path) -> None:
    """PATH.png: all that was measured. PATH-light.svg and -dark.svg: held-out text alone."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [("nats", "nats_error", "score_calls", "nats per token of held-out text")]
    panels += [("bits", "bits_error", "calls", "bits per byte of samples, judged")]
    panels += [("entropy", "entropy_error", "calls", "entropy of samples, nats")]
    measured = [panel for panel in panels if any(getattr(row, panel[0]) for row in rows)]
    size = {"figsize": (5.5 * len(measured), 5), "layout": "constrained", "squeeze": False}
    figure, axes = pyplot.subplots(1, len(measured), **size)
    for axis, panel in zip(axes[0], measured, strict=True):
        lines(axis, rows, panel, dark=False)
    axes[0][min(1, len(measured) - 1)].legend(fontsize=8)  # with a judge, remask has points there
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)
    for theme in ("light", "dark") if measured[0] is panels[0] else ():
        ink = "#e7e5e4" if theme == "dark" else "#1c1917"
        keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        style = dict.fromkeys(keys, ink) | {"font.size": 13, "svg.hashsalt": "nanomdm"}
        with matplotlib.rc_context(style):
            figure, axis = pyplot.subplots(figsize=(6.4, 5.6), layout="constrained")
            lines(axis, rows, panels[0], theme == "dark")
            axis.legend(fontsize=11, frameon=False)
            figure.savefig(f"{path}-{theme}.svg", transparent=True, metadata={"Date": None})
            pyplot.close(figure)


def lines(axis, rows: list[Row], panel: tuple, dark: bool) -> None:
    """Draw a figure against calls, a line for each strategy; dashed: the first row that has it."""
    value, error, calls, title = panel
    series = defaultdict(list)
    for row in rows:
        if getattr(row, value) and getattr(row, calls) and row.name.split()[0] in SHOWN:
            words = row.name.split()
            key = " ".join(w for w in words if not w.startswith(("steps", "gamma", "threshold=")))
            series[key].append(row)
    for name, group in series.items():
        group.sort(key=lambda row: getattr(row, calls))
        x, y, e = ([getattr(row, field) or 0 for row in group] for field in (calls, value, error))
        strong, colour = name.startswith("spread"), SHOWN[name.split()[0]][dark]
        look = {"lw": 3 if strong else 1.6, "ms": 6 if strong else 4, "zorder": 3 if strong else 2}
        axis.errorbar(x, y, [0 if math.isnan(z) else z for z in e], label=name, fmt="o-",
                      color=colour, capsize=2, **look)  # fmt: skip
    base = next(row for row in rows if getattr(row, value))
    axis.axhline(getattr(base, value), color="#888888", linestyle="--", lw=1.5, label=base.name)
    known = [getattr(row, calls) for row in rows if getattr(row, calls)]
    ticks = [2**k for k in range(12) if min(known) <= 2**k <= max(known)]
    axis.set(xscale="log", xlabel="network calls per text", ylabel=title)
    axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.2)


if __name__ == "__main__":
    cli.main(main, "bench/frontier")
