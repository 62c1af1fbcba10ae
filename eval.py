"""Evaluate a checkpoint on its validation split or on any text: python eval.py data.path=TEXT"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import runtime
from nanomdm import bounds, cli, report, text
from nanomdm.bounds import Passes
from nanomdm.cli import Section
from nanomdm.errors import UserError, visible
from nanomdm.runlog import progress
from nanomdm.tracking import import_wandb, start_wandb
from runtime import Loaded

BINS = 20  # of the masking rate


def main(config: Section, explicit: set[str]) -> None:
    runtime.refuse_what_the_checkpoint_decides(explicit)
    check(config)
    device = runtime.pick_device(config.system.device)
    names = [config.checkpoint, *filter(None, [config.eval.against])]
    models = [runtime.load(name, device) for name in names]
    exact = [loaded.model.config.causal for loaded in models]
    about_masks = sorted(explicit & {"eval.bounds", "eval.curve", "eval.plot"})
    if exact[0] and about_masks:
        raise UserError(
            f"{about_masks[0]} is about masks, and {names[0]} is autoregressive, scored exactly: "
            "leave it out"
        )
    texts = choose_texts(config, explicit, models)
    dtype = runtime.pick_dtype(config.system.dtype, device, training=False)
    scoring = Scoring(config.system.seed, config.eval.draws, config.eval.batch_size, dtype)
    for name, loaded in zip(names, models, strict=True):
        print(f"{name}: {loaded.weights}, on {device}")
    how = "exactly" if exact[0] else f"{scoring.draws} passes"
    print(f"{texts.source}: {texts.tokens:,} tokens, {how}", flush=True)

    passes, seconds = measure(models[0], texts, scoring)
    figures = {"checkpoint": names[0], "source": texts.source, "exact": exact[0]}
    figures |= {"seed": scoring.seed, "draws": len(passes.nats)}
    figures |= tell_likelihood(passes, texts)
    if not exact[0]:
        figures |= tell_curve(passes, config.eval.curve)
        figures |= tell_bounds(passes, seconds, models[0], texts, scoring, config)
    if len(models) > 1:
        other, _ = measure(models[1], texts, scoring)
        figures["against"] = report.comparison(passes, other, names, exact)
        say(report.comparison_lines(figures["against"], names, len(texts.rows)))
    speed = len(passes.nats) * texts.tokens / seconds
    figures |= {"seconds": seconds, "tokens_per_second": speed}
    print(f"{seconds:.1f} s, {speed:,.0f} tokens/s")
    publish(figures, config)


def say(lines: list[str]) -> None:
    for line in lines:
        print(visible(line, sys.stdout), flush=True)


def check(config: Section) -> None:
    """Raise `UserError` for a setting out of its range, before anything is computed."""
    settings = config.eval
    least = {"draws": 1, "batch_size": 1, "tokens": 0, "stride": 0}
    for name, limit in least.items():
        if (value := getattr(settings, name)) < limit:
            raise UserError(f"eval.{name}={value} must be at least {limit}")
    for name in settings.bounds:
        if name not in forms(config):
            raise UserError(
                f"eval.bounds={name} is unknown: choose some of {', '.join(forms(config))}"
            )
    for key in ("output", "plot"):
        path = getattr(settings, key)
        if path and not Path(path).resolve().parent.is_dir():
            raise UserError(f"eval.{key}={path} lies in a folder that is not there: make it first")
    if settings.plot:
        report.import_pyplot()
    if config.logging.wandb:
        import_wandb()


def forms(config: Section) -> dict[str, tuple[bounds.Form, str]]:
    """Each bound, and the sampler whose -log p it bounds."""
    steps, eps = max(1, config.sampling.steps), config.diffusion.eps
    strategy = config.sampling.strategy
    other = "" if strategy == "stochastic" else f"; sampling.strategy={strategy} has no bound"
    return {
        "uniform": (bounds.uniform, "reveals one random position a call"),
        "continuous": (
            partial(bounds.continuous, eps=eps),
            f"stops at a masking rate of {eps:g} and fills the rest at once",
        ),
        "discrete": (
            partial(bounds.discrete, steps=steps),
            f"takes {steps} ancestral steps{other}",
        ),
        "chain": (bounds.chain, "reveals one random position a call: the same number"),
        "left_to_right": (bounds.left_to_right, "goes from left to right: exact, another model"),
    }


# --- What is scored -----------------------------------------------------------------------------


class Texts(NamedTuple):
    """Rows of ids, fit for the context, and what of them is to be predicted."""

    source: str
    names: list[str]  # of the documents
    rows: list[Tensor]  # each (L,)
    predict: list[Tensor]  # each (L,) bool; the rest is seen by way of context
    document: Tensor  # (N,): which document a row belongs to
    sizes: Tensor  # (N,): bytes of what is predicted

    @property
    def tokens(self) -> int:
        return sum(int(row.sum()) for row in self.predict)


def choose_texts(config: Section, explicit: set[str], models: list[Loaded]) -> Texts:
    """data.path= as a whole, a row for each file of a folder; else a validation split.

    That of data.dir= or data.dataset= if the command names one, or of the run's own data.
    """
    tokenizer = models[0].tokenizer
    if any(loaded.tokenizer.state() != tokenizer.state() for loaded in models):
        raise UserError(
            f"{config.eval.against} has another tokenizer than {config.checkpoint}: evaluate each "
            "by itself and compare bits per byte"
        )
    if "data.path" in explicit and config.data.path:
        source = config.data.path
        found = text.documents(source)
        documents = [(name, encode(tokenizer, name, content)) for name, content in found]
    else:
        source, tokens = validation_split(config, explicit, models[0])
        documents = [(source, tokens)]
    context = min(loaded.model.config.block_size for loaded in models)
    half = max(1, context // 2)
    stride = config.eval.stride or (half if len(documents) > 1 else context)
    return cut(source, documents, tokenizer, context, stride, config.eval.tokens)


def encode(tokenizer, name: str, content: str) -> np.ndarray:
    try:
        return tokenizer.encode(content)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def validation_split(config: Section, explicit: set[str], loaded: Loaded) -> tuple[str, np.ndarray]:
    named = "data.dataset" in explicit or config.data.dir
    settings, sha256 = vars(config.data), ""
    if not named:
        settings, sha256 = loaded.config["data"], loaded.state["corpus"]["sha256"]
        if not sha256:
            raise UserError(
                f"{config.checkpoint} was imported, and its text is not known: name one by "
                "data.path="
            )
    corpus = runtime.load_corpus(settings, loaded.tokenizer, sha256)
    return f"validation split of {corpus.name}", corpus.val


def cut(
    source: str, documents: list, tokenizer, context: int, stride: int, limit: int = 0
) -> Texts:
    """The windows over all documents; with a `limit`, as many as predict so many tokens, spread."""
    windows = [
        (number, *window)
        for number, (_, ids) in enumerate(documents)
        for window in bounds.windows(len(ids), context, stride)
    ]
    keep = max(1, limit // stride)
    if limit and keep < len(windows):
        windows = [windows[i * len(windows) // keep] for i in range(keep)]
    rows, predict = [], []
    for number, start, stop, first in windows:
        rows.append(torch.from_numpy(documents[number][1][start:stop].astype(np.int64)))
        predict.append(torch.arange(start, stop) >= first)
    sizes = [
        len(tokenizer.decode_bytes(row[where].tolist()))
        for row, where in zip(rows, predict, strict=True)
    ]
    document = torch.tensor([number for number, *_ in windows])
    return Texts(
        source, [name for name, _ in documents], rows, predict, document, torch.tensor(sizes)
    )


# --- Scoring ------------------------------------------------------------------------------------


class Scoring(NamedTuple):
    """How texts are scored."""

    seed: int
    draws: int = 8
    batch_size: int = 64
    dtype: torch.dtype = torch.float32


def measure(
    loaded: Loaded,
    texts: Texts,
    scoring: Scoring,
    form: bounds.Form = bounds.uniform,
    calls: int = 1,
) -> tuple[Passes, float]:
    """The passes of a form over the texts, and the seconds that they took.

    What is exact takes one pass. `calls` says how often a pass shows each row to the network; only
    the progress depends on it.
    """
    one = loaded.model.config.causal or form is bounds.left_to_right
    draws = 1 if one else scoring.draws
    total, start = draws * calls * sum(map(len, texts.rows)), time.perf_counter()
    with runtime.autocast(loaded.model.device, scoring.dtype), progress(total, "token") as told:
        passes = runtime.passes(
            loaded.model,
            texts.rows,
            scoring.seed,
            draws,
            form,
            predict=texts.predict,
            batch_size=scoring.batch_size,
            progress=told,
        )
    return passes, time.perf_counter() - start


# --- Telling ------------------------------------------------------------------------------------


def tell_likelihood(passes: Passes, texts: Texts) -> dict:
    """Loss, perplexity and bits per byte of all texts, and of each document by itself."""
    figures = report.likelihood(passes, texts.sizes)
    say(report.likelihood_lines(figures))
    if len(texts.names) == 1:
        return figures
    documents = []
    for number, name in enumerate(texts.names):
        rows = (texts.document == number).nonzero().squeeze(1)
        if len(rows):  # eval.tokens may have left it out
            each = report.likelihood(passes.part(rows), texts.sizes[rows])
            documents.append({"name": name} | each)
    say(report.document_lines(documents))
    return figures | {"documents": documents}


def tell_curve(passes: Passes, show: bool) -> dict:
    figures = report.cost_by_rate(passes, BINS)
    say(report.curve_lines(figures["curve"]) if show else [])
    say([report.falls_line(figures["falls"])] if len(passes.nats) > 1 else [])
    return figures


def tell_bounds(
    passes: Passes,
    seconds: float,
    loaded: Loaded,
    texts: Texts,
    scoring: Scoring,
    config: Section,
) -> dict:
    """Every bound of eval.bounds beside the uniform one, and what must hold between them."""
    falls = bool(bounds.falls(passes, BINS))
    rows, one_by_one = [], max(int(where.sum()) for where in texts.predict)
    for name in dict.fromkeys(["uniform", *config.eval.bounds]):
        form, sampler = forms(config)[name]
        calls = {"uniform": 1, "discrete": 1, "continuous": 2}.get(name, one_by_one)
        if name != "uniform":
            passes, seconds = measure(loaded, texts, scoring, form, calls)
        about = {"name": name, "draws": len(passes.nats), "calls": calls, "seconds": seconds}
        figure = report.figure(passes.bound(), len(passes.nats) - 1)
        rows.append(about | {"sampler": sampler} | figure)
    found = report.relations(rows, falls)
    if len(rows) > 1:
        say(report.bound_lines(rows) + report.relation_lines(found))
    return {"bounds": rows, **found}


def publish(figures: dict, config: Section) -> None:
    """Write what was printed: eval.output, eval.plot, W&B."""
    if config.eval.output:
        report.write_json(figures, config.eval.output)
    if config.eval.plot and "curve" in figures:
        report.plot_curve(figures["curve"], figures["source"], config.eval.plot)
    if config.logging.wandb:
        Path(config.out_dir).mkdir(parents=True, exist_ok=True)
        run = start_wandb(config, {"evaluated": figures["checkpoint"]})
        run.log({f"eval/{key}": figures[key]["value"] for key in ("loss", "bits_per_byte")})
        if "curve" in figures:
            rows = [[(r["low"] + r["high"]) / 2, r["value"]] for r in figures["curve"]]
            table = import_wandb().Table(["share masked", "nats per masked token"], rows)
            line = import_wandb().plot.line(table, *table.columns, title="cost by masking rate")
            run.log({"eval/cost_by_masking_rate": line})
        run.finish()


if __name__ == "__main__":
    cli.main(main)
