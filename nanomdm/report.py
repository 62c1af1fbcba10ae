"""What an evaluation tells: figures as plain values for JSON, and the lines that show them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from . import bounds
from .bounds import Bound, Passes
from .errors import UserError

NEVER_BELOW = ("discrete", "continuous")  # the uniform bound, if the cost never falls with the rate


def figure(bound: Bound, freedom: int, factor: float = 1.0) -> dict:
    """A value, its standard error and its 95% interval (Student's t), all times `factor`."""
    value, error = bound.value * factor, bound.standard_error * factor
    if math.isnan(error):
        return {"value": value, "standard_error": None, "interval": None}
    half = bounds.student_t(freedom) * error
    return {"value": value, "standard_error": error, "interval": [value - half, value + half]}


def text_of(figure: dict, sign: str = "") -> str:
    error = figure["standard_error"]
    return f"{figure['value']:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


# --- One text -----------------------------------------------------------------------------------


def likelihood(passes: Passes, sizes: Tensor) -> dict:
    """Loss, perplexity and bits per byte of rows that stand for `sizes` (N,) bytes."""
    bound, freedom = passes.bound(), len(passes.nats) - 1
    to_bits = passes.tokens / int(sizes.sum()) / math.log(2)  # nats per token to bits per byte
    return {
        "tokens": passes.tokens,
        "bytes": int(sizes.sum()),
        "loss": figure(bound, freedom),
        "perplexity": math.exp(bound.value),
        "bits_per_byte": figure(bound, freedom, to_bits),
    }


def likelihood_lines(figures: dict) -> list[str]:
    lines = [
        f"loss {text_of(figures['loss'])} nats/token",
        f"perplexity {figures['perplexity']:.2f}",
        f"bits {text_of(figures['bits_per_byte'])} per byte",
    ]
    if interval := figures["loss"]["interval"]:
        lines.append(f"95% interval {interval[0]:.4f} to {interval[1]:.4f} nats/token")
    return lines


def document_lines(documents: Sequence[dict]) -> list[str]:
    """A table with a row for each document."""
    width = max(len("document"), *(len(document["name"]) for document in documents))
    lines = [f"{'document':<{width}} {'tokens':>10}  {'nats/token':<16}  bits/byte"]
    for each in documents:
        loss, bits = text_of(each["loss"]), text_of(each["bits_per_byte"])
        lines.append(f"{each['name']:<{width}} {each['tokens']:>10,}  {loss:<16}  {bits}")
    return lines


# --- By masking rate ----------------------------------------------------------------------------


def cost_by_rate(passes: Passes, bins: int = 20) -> dict:
    """The cost of a masked token by masking rate, and where it falls with the rate."""
    freedom = len(passes.nats) - 1
    curve = [
        {"low": low, "high": high, **figure(cost, freedom)}
        for low, high, cost in bounds.curve(passes, bins)
        if not math.isnan(cost.value)
    ]
    falls = [
        {"from": (b - 1) / bins, "to": (b + 1) / bins, **figure(step, freedom)}
        for b, step in bounds.falls(passes, bins)
    ]
    return {"curve": curve, "falls": falls}


def curve_lines(curve: Sequence[dict]) -> list[str]:
    rows = [f"{row['low']:>5.0%} to {row['high']:>4.0%}  {text_of(row)}" for row in curve]
    return [f"{'tokens masked':<14} nats per masked token", *rows]


def falls_line(falls: Sequence[dict]) -> str:
    if not falls:
        return "the cost of a masked token never falls with the share masked, beyond chance"
    where = ", ".join(f"{f['from']:.0%} to {f['to']:.0%} ({text_of(f, '+')})" for f in falls)
    return f"the cost of a masked token falls with the share masked: {where}"


def plot_curve(curve: Sequence[dict], title: str, path: str) -> None:
    """A picture of the cost by masking rate; twice its standard error as bars."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    middles = [(row["low"] + row["high"]) / 2 for row in curve]
    errors = [2 * (row["standard_error"] or 0.0) for row in curve]
    axes.errorbar(middles, [row["value"] for row in curve], errors, fmt="o-", ms=3, capsize=2)
    axes.set(xlabel="share of tokens masked", ylabel="nats per masked token", title=title)
    axes.set(xlim=(0, 1))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def import_pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("a picture needs a package: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


# --- Bounds side by side ------------------------------------------------------------------------


def relations(rows: Sequence[dict], falls: bool) -> dict:
    """What must hold between the bounds, and does not: alarms, and mere remarks.

    `uniform` and `chain` are one number, always. The bounds in NEVER_BELOW lie above it only where
    the cost of a masked token never falls with the share masked. `left_to_right` is the likelihood
    of another sampler, in no order with any.
    """
    found = {"alarms": [], "remarks": []}
    by_name = {row["name"]: row for row in rows}
    base = by_name["uniform"]
    for name in (name for name in ("chain", *NEVER_BELOW) if name in by_name):
        gap = by_name[name]["value"] - base["value"]
        errors = [by_name[name]["standard_error"], base["standard_error"]]
        if None in errors:
            continue
        limit = bounds.student_t(base["draws"] - 1, 0.999) * math.hypot(*errors)
        if name == "chain" and abs(gap) > limit:
            found["alarms"].append(
                f"chain and uniform differ by {gap:+.4f}, more than chance allows "
                f"(± {limit:.4f}): they are one number, so this is a bug"
            )
        elif name in NEVER_BELOW and gap < -limit:
            why = (
                "the cost of a masked token falls somewhere, and then it may"
                if falls
                else "a bug, or a network untrained where few tokens are masked"
            )
            found["remarks"].append(f"{name} lies {-gap:.4f} below uniform: {why}")
    return found


def bound_lines(rows: Sequence[dict]) -> list[str]:
    lines = [f"{'bound':<14} {'nats/token':<16} {'calls':>6} {'seconds':>8}  of the sampler that"]
    return lines + [
        f"{row['name']:<14} {text_of(row):<16} {row['calls']:>6} {row['seconds']:>8.1f}  "
        f"{row['sampler']}"
        for row in rows
    ]


def relation_lines(found: dict) -> list[str]:
    alarms, remarks = found["alarms"], found["remarks"]
    lines = [f"ALARM: {line}" for line in alarms] + [f"remark: {line}" for line in remarks]
    return lines or ["every relation holds that must hold between these bounds"]


# --- Two models ---------------------------------------------------------------------------------


def comparison(one: Passes, other: Passes, names: Sequence[str], exact: Sequence[bool]) -> dict:
    """The paired difference of two models, and who is better.

    The verdict goes by the error over the rows, which holds for texts of this kind; for a single
    row, by that over the masks, which holds for this very text.
    """
    masks, rows = bounds.difference(one, other)
    over_masks = figure(masks, max(1, len(one.nats), len(other.nats)) - 1)
    over_rows = figure(rows, len(one.holes) - 1)
    interval = over_rows["interval"] or over_masks["interval"]
    decided = interval is not None and interval[0] * interval[1] > 0
    better = names[int(masks.value > 0)] if decided else None
    return {
        "checkpoint": names[1],
        "loss": figure(other.bound(), len(other.nats) - 1),
        "difference": over_masks,
        "error_over_rows": over_rows["standard_error"],
        "interval": interval,
        "better": better,
        "remark": bounded_remark(masks.value, exact),
    }


def bounded_remark(difference: float, exact: Sequence[bool]) -> str:
    """What a bound against an exact likelihood leaves open."""
    if exact[0] == exact[1]:
        return ""
    if (difference > 0) == exact[0]:  # the diffusion model has the lower figure
        return "the lower figure is a bound: the true gap is at least as large"
    return "the higher figure is a bound: the true gap may be smaller"


def comparison_lines(found: dict, names: Sequence[str], rows: int) -> list[str]:
    error = found["error_over_rows"]
    over_rows = "" if error is None else f", ± {error:.4f} over {rows:,} rows of text"
    over_masks = " over the masks" if found["difference"]["standard_error"] is not None else ""
    lines = [
        f"against {names[1]}: loss {text_of(found['loss'])} nats/token",
        f"difference {text_of(found['difference'], '+')}{over_masks}{over_rows}",
    ]
    if found["better"]:
        low, high = sorted(abs(end) for end in found["interval"])
        verdict = f"{found['better']} is better, by {low:.4f} to {high:.4f} nats/token (95%)"
    elif found["interval"]:
        low, high = found["interval"]
        verdict = f"no difference is certain (95% interval {low:+.4f} to {high:+.4f})"
    else:
        verdict = "no error can be told: raise eval.draws"
    remark = f"; {found['remark']}" if found["remark"] else ""
    return [*lines, f"verdict: {verdict}{remark}"]


# --- Files --------------------------------------------------------------------------------------


def write_json(figures: dict, path: str) -> None:
    """Everything that was printed. Raises `OSError` where it cannot be written."""
    Path(path).write_text(json.dumps(figures, indent=1) + "\n")
