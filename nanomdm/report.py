"""What an evaluation found: figures as plain values for JSON, and the lines that print them.

Each function of the first part computes some of the figures; `lines` prints those that it is given.
`samples` are `bounds.NLLSamples`.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from . import bounds
from .bounds import Estimate
from .texts import Texts

# --- Figures -------------------------------------------------------------------------------------


def figure(estimate: Estimate, df: int, factor: float = 1.0) -> dict:
    """A value, its standard error and its 95% interval (Student's t), all times `factor`."""
    value, error = (factor * number for number in estimate)
    if math.isnan(error):
        error = interval = None
    else:
        half = bounds.student_t(df) * error
        interval = [value - half, value + half]
    return {"value": value, "standard_error": error, "interval": interval}


def loss_of(samples, factor: float = 1.0) -> dict:
    """Nats per token, times `factor`."""
    return figure(samples.bound(), len(samples.nats) - 1, factor)


def likelihood(samples, texts: Texts, exact: bool) -> dict:
    """Loss, perplexity and bits per byte of all texts and, if there are several, of each."""
    figures = {"draws": len(samples.nats), "exact": exact} | _likelihood(samples, texts.sizes)
    if len(texts.names) > 1:
        figures["documents"] = []
        for number in texts.document.unique().tolist():  # eval.tokens may leave some out
            rows = texts.document == number
            found = _likelihood(samples.part(rows), texts.sizes[rows])
            figures["documents"].append({"name": texts.names[number]} | found)
    return figures


def _likelihood(samples, sizes: Tensor) -> dict:
    loss, size = loss_of(samples), int(sizes.sum())
    return {
        "tokens": samples.tokens,
        "bytes": size,
        "loss": loss,
        "perplexity": math.exp(loss["value"]),
        "bits_per_byte": loss_of(samples, samples.tokens / size / math.log(2)) if size else None,
    }


def cost_by_rate(samples, bins: int = 20) -> dict:
    """The cost of a masked token by masking rate, and where it decreases (None: few samples)."""
    df = len(samples.nats) - 1

    def curve(bins: int) -> list[dict]:
        return [
            {"low": b / bins, "high": (b + 1) / bins} | figure(cost, df)
            for b, cost in enumerate(bounds.curve(samples, bins))
            if not math.isnan(cost[0])
        ]

    enough = df and len(samples.counts) >= 2 * bins  # a few rows say nothing of 20 rates
    decreases = [
        {"from": (b - 1) / bins, "to": (b + 1) / bins} | figure(step, df)
        for b, step in bounds.decreases(samples, bins)
    ]
    return {
        "curve": curve(bins),
        "quarters": curve(4),
        "decreases": decreases if enough else None,
    }


def side_by_side(measured: dict[str, tuple], in_blocks: bool = False) -> dict:
    """A row for each bound from its (entry, samples, seconds), and what must hold between them.

    `uniform` comes first. `in_blocks` each block is masked by itself: no cost by masking rate says
    whether it decreases.
    """
    rows = [row(name, *found) for name, found in measured.items()]
    decreases = in_blocks or bool(bounds.decreases(measured["uniform"][1]))
    return {"bounds": rows} | relations(rows, decreases)


def row(name: str, bound: bounds.Bound, samples, seconds: float) -> dict:
    return {
        "name": name,
        "draws": len(samples.nats),
        "calls": bound.calls * samples.calls,
        "seconds": seconds,
        "sampler": bound.sampler,
        "relation": bound.relation,
    } | loss_of(samples)


def sampler(name: str, bound: bounds.Bound, samples, seconds: float, uniform) -> dict:
    """A row for the score of a strategy, beside the samples of the bound `uniform`.

    Texts with a token that the sampler cannot draw are counted and left out.
    """
    possible = ~samples.nats.isinf().any(dim=0)
    count = int(possible.sum())
    found = row(name, bound, samples, seconds) | {
        "texts": len(possible),
        "impossible_texts": len(possible) - count,
        "impossible_tokens": samples.impossible,
        "mixture": None,
        "above_uniform": None,
    }
    if not count:
        return found | {"value": None, "standard_error": None, "interval": None}
    samples, uniform = samples.part(possible), uniform.part(possible)
    if len(samples.nats) > 1:
        found["mixture"] = samples.mixture()
    mean = samples._replace(nats=samples.nats.mean(dim=0, keepdim=True))
    found["above_uniform"] = figure(bounds.difference(mean, uniform)[1], count - 1)
    return found | loss_of(samples)


def matches(scores: dict) -> dict:
    """The share of texts that each sampler writes at temperature 0, from their scores there."""
    rows = []
    for name, samples in scores.items():
        share, n = float(samples.nats.isfinite().double().mean()), len(samples.counts)
        interval = bounds.wilson(share, n)
        rows.append({"name": name, "texts": n, "share": share, "interval": interval})
    return {"matches": rows}


def relations(rows: Sequence[dict], decreases: bool) -> dict:
    """What must hold between the bounds and does not: violations, and remarks where it may not.

    `Bound.relation` says what must hold to `uniform`, the first row. Where the cost of a masked
    token `decreases` with the share masked, a bound that is otherwise above may be below.
    """
    base, *others = rows
    violations, remarks = [], []
    if base["standard_error"] is None:  # one pass says nothing
        others = []
    why = "a bug, or a network untrained where few tokens are masked"
    if decreases:
        why = "where the cost of a masked token decreases somewhere, it may"
    for row in others:
        name, gap, relation = row["name"], row["value"] - base["value"], row["relation"]
        error = math.hypot(base["standard_error"], row["standard_error"] or 0.0)
        limit = bounds.student_t(base["draws"] - 1, 0.999) * error
        if relation == "equal" and abs(gap) > limit:
            violations.append(
                f"{name} and uniform differ by {gap:+.4f}, more than chance allows "
                f"(± {limit:.4f}): they are one number, so this is a bug"
            )
        if relation == "above" and gap < -limit:
            remarks.append(f"{name} lies {-gap:.4f} below uniform: {why}")
    return {"violations": violations, "remarks": remarks}


def comparison(one, other, names: Sequence[str], exact: Sequence[bool]) -> dict:
    """The paired difference of two models, and which one is better.

    The verdict goes by the error over the rows, which holds for texts of this kind; for a single
    row, by that over the masks, which holds for this very text.
    """
    over_masks, over_rows = bounds.difference(one, other)
    masks = figure(over_masks, max(len(one.nats), len(other.nats)) - 1)
    rows = figure(over_rows, len(one.counts) - 1)
    interval, better = rows["interval"] or masks["interval"], None
    if interval and interval[0] * interval[1] > 0:
        better = names[int(over_masks[0] > 0)]
    return {
        "against": {
            "checkpoint": names[1],
            "loss": loss_of(other),
            "difference": masks,
            "rows": len(one.counts),
            "error_over_rows": rows["standard_error"],
            "interval": interval,
            "better": better,
            "remark": bounded_remark(over_masks[0], exact),
        }
    }


def bounded_remark(difference: float, exact: Sequence[bool]) -> str:
    """What a bound beside an exact likelihood leaves open."""
    if exact[0] == exact[1]:
        return ""
    if (difference > 0) == exact[0]:  # the diffusion model has the lower figure
        return "the lower figure is a bound: the true gap is at least as large"
    return "the higher figure is a bound: the true gap may be smaller"


def speed(samples, seconds: float) -> dict:
    """Of the passes that gave the loss."""
    return {
        "seconds": seconds,
        "tokens_per_second": len(samples.nats) * samples.tokens / seconds,
    }


# --- Lines ---------------------------------------------------------------------------------------


def lines(figures: dict) -> list[str]:
    """The figures of an evaluation, or some of them, as they are printed."""
    found = []
    if "loss" in figures:
        found += likelihood_lines(figures)
    if "documents" in figures:
        found += document_lines(figures["documents"])
    if figures.get("quarters"):
        found.append(quarters_line(figures["quarters"]))
    if figures.get("decreases") is not None:
        found.append(decreases_line(figures["decreases"]))
    if len(figures.get("bounds", [])) > 1:
        found += bound_lines(figures)
    if figures.get("samplers"):
        found += sampler_lines(figures["samplers"])
    for row in figures.get("matches", ()):
        low, high = row["interval"]
        found.append(
            f"exact answers at temperature 0, {row['name']}: {row['share']:.1%} of "
            f"{row['texts']:,} (95% interval {low:.1%} to {high:.1%})"
        )
    if "against" in figures:
        found += comparison_lines(figures["against"])
    if "seconds" in figures:
        found.append(f"{figures['seconds']:.1f} s, {figures['tokens_per_second']:,.0f} tokens/s")
    return found


def text_of(figure: dict, sign: str = "", over: str = "") -> str:
    value, error = f"{figure['value']:{sign}.4f}", figure["standard_error"]
    return value if error is None else f"{value} ± {error:.4f}{over}"


def likelihood_lines(figures: dict) -> list[str]:
    found = [
        f"loss {text_of(figures['loss'])} nats/token",
        f"perplexity {figures['perplexity']:.2f}",
    ]
    if bits := figures["bits_per_byte"]:
        found.append(f"bits {text_of(bits)} per byte")
    if figures["draws"] == 1 and not figures["exact"]:
        found.append("the error of one pass is not known: raise eval.draws")
    if interval := figures["loss"]["interval"]:
        found.append(f"95% interval {interval[0]:.4f} to {interval[1]:.4f} over the masks")
    return found


def document_lines(documents: list[dict]) -> list[str]:
    width = max(len(name) for name in ("document", *(each["name"] for each in documents)))
    rows = [
        f"{each['name']:<{width}} {each['tokens']:>10,}  {text_of(each['loss']):<16}  "
        f"{text_of(each['bits_per_byte']) if each['bits_per_byte'] else ''}"
        for each in documents
    ]
    return [f"{'document':<{width}} {'tokens':>10}  {'nats/token':<16}  bits/byte", *rows]


def quarters_line(quarters: list[dict]) -> str:
    cells = (f"{row['value']:.3f} with {row['low']:.0%} to {row['high']:.0%}" for row in quarters)
    return f"nats per masked token: {', '.join(cells)} of a text masked"


def decreases_line(steps: list[dict]) -> str:
    if not steps:
        return "the cost of a masked token never decreases with the share masked, beyond chance"
    where = (f"{step['from']:.0%} to {step['to']:.0%} ({text_of(step, '+')})" for step in steps)
    return f"the cost of a masked token decreases with the share masked: {', '.join(where)}"


def bound_lines(figures: dict) -> list[str]:
    header = f"{'bound':<14} {'nats/token':<16} {'calls':>6} {'seconds':>8}  of the sampler that"
    rows = [
        f"{row['name']:<14} {text_of(row):<16} {row['calls']:>6.4g} {row['seconds']:>8.1f}  "
        f"{row['sampler']}"
        for row in figures["bounds"]
    ]
    broken = [f"VIOLATION: {line}" for line in figures["violations"]]
    broken += [f"remark: {line}" for line in figures["remarks"]]
    broken = broken or ["every relation that must hold between these bounds holds"]
    return [header, *rows, *broken]


def sampler_lines(rows: list[dict]) -> list[str]:
    found = [
        f"{'sampler':<14} {'nats/token':<16} {'mixture':<8} {'above uniform':<17} {'calls':>6} "
        f"{'seconds':>8}  what it is"
    ]
    for row in rows:
        value, difference, mixture = "none", "", ""
        if row["value"] is not None:
            value, difference = text_of(row), text_of(row["above_uniform"], "+")
            mixture = f"{row['mixture']:.4f}" if row["mixture"] is not None else ""
        found.append(
            f"{row['name']:<14} {value:<16} {mixture:<8} {difference:<17} {row['calls']:>6.4g} "
            f"{row['seconds']:>8.1f}  {row['sampler']}"
        )
    found += [
        f"{row['name']} cannot draw {row['impossible_tokens']:,} tokens in "
        f"{row['impossible_texts']:,} of {row['texts']:,} texts, which are left out"
        for row in rows
        if row["impossible_texts"]
    ]
    return found


def comparison_lines(found: dict) -> list[str]:
    difference = text_of(found["difference"], "+", " over the masks")
    error = found["error_over_rows"]
    over_rows = "" if error is None else f", ± {error:.4f} over {found['rows']:,} rows of text"
    if not found["interval"]:
        verdict = "no error is known: raise eval.draws"
    elif found["better"]:
        low, high = sorted(map(abs, found["interval"]))
        verdict = f"{found['better']} is better, by {low:.4f} to {high:.4f} nats/token (95%)"
    else:
        low, high = found["interval"]
        verdict = f"no difference is certain (95% interval {low:+.4f} to {high:+.4f})"
    remark = f"; {found['remark']}" if found["remark"] else ""
    return [
        f"against {found['checkpoint']}: loss {text_of(found['loss'])} nats/token",
        f"difference {difference}{over_rows}",
        f"verdict: {verdict}{remark}",
    ]
