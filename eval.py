"""Evaluate a checkpoint on its validation split or on any text: python eval.py data.path=TEXT"""

import sys
import time
from pathlib import Path

import torch

import diffusion
import runtime
from diffusion import NLLSamples
from nanomdm import bounds, cli, report, texts
from nanomdm.bounds import AUTOREGRESSIVE, BOUNDS, Bound
from nanomdm.cli import Section
from nanomdm.errors import UserError, visible
from nanomdm.runlog import import_wandb, progress, start_wandb
from nanomdm.texts import Texts
from runtime import Loaded


def main(config: Section, explicit: set[str]) -> None:
    runtime.refuse_what_the_checkpoint_decides(explicit)
    check(config)
    chosen = bounds.choose(config.eval.bounds, config.sampling.steps, config.sampling.strategy)
    device = runtime.pick_device(config.system.device)
    names = [config.checkpoint, *filter(None, [config.eval.against])]
    models = [runtime.load(name, device) for name in names]
    exact = [loaded.model.config.causal for loaded in models]
    about_masks = sorted(explicit & {"eval.bounds", "eval.curve"})
    if exact[0] and about_masks:
        raise UserError(
            f"{about_masks[0]} is about masks, and {names[0]} is autoregressive, scored exactly: "
            "leave it out"
        )
    scored = choose_texts(config, explicit, models)
    settings = {
        "seed": config.system.seed,
        "draws": config.eval.draws,
        "batch_size": config.eval.batch_size,
        "dtype": runtime.pick_dtype(config.system.dtype, device, training=False),
    }
    figures = {"checkpoint": names[0], "source": scored.source, "exact": exact[0]}
    figures |= {"seed": config.system.seed, "draws": 1 if exact[0] else config.eval.draws}
    for name, loaded in zip(names, models, strict=True):
        print(f"{name}: {loaded.weights}, on {device}")
    how = "exactly" if exact[0] else f"{config.eval.draws} passes"
    print(f"{scored.source}: {scored.tokens:,} tokens, {how}", flush=True)

    def show(part: dict) -> None:
        figures.update(part)
        for line in report.lines(part, config.eval.curve):
            print(visible(line, sys.stdout), flush=True)

    samples, seconds = measure(models[0], scored, **settings)
    show(report.likelihood(samples, scored))
    if not exact[0]:
        show(report.cost_by_rate(samples))
        measured = {"uniform": (chosen.pop("uniform"), samples, seconds)}
        for name, bound in chosen.items():
            measured[name] = (bound, *measure(models[0], scored, bound, **settings))
        show(report.side_by_side(measured))
    if len(models) > 1:
        other, _ = measure(models[1], scored, **settings)
        show(report.comparison(samples, other, names, exact))
    show(report.speed(samples, seconds))
    publish(figures, config)


def check(config: Section) -> None:
    """Raise `UserError` for a setting out of its range, before anything is computed."""
    settings = config.eval
    least = {"draws": 1, "batch_size": 1, "tokens": 0, "stride": 0}
    for name, limit in least.items():
        if (value := getattr(settings, name)) < limit:
            raise UserError(f"eval.{name}={value} must be at least {limit}")
    path = settings.output
    if path and not Path(path).resolve().parent.is_dir():
        raise UserError(f"eval.output={path} lies in a folder that is not there: make it first")
    if config.logging.wandb:
        import_wandb()


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
        documents = texts.read(source, tokenizer)
    else:
        source, tokens = validation_split(config, explicit, models[0])
        documents = [(source, tokens)]
    context = min(loaded.model.config.block_size for loaded in models)
    return texts.cut(
        source, documents, tokenizer, context, config.eval.stride, limit=config.eval.tokens
    )


def validation_split(config: Section, explicit: set[str], loaded: Loaded) -> tuple:
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


def measure(
    loaded: Loaded,
    scored: Texts,
    bound: Bound = BOUNDS["uniform"],
    *,
    seed: int,
    draws: int = 8,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> tuple[NLLSamples, float]:
    """The costs of the texts by a bound, and the seconds that they took.

    An autoregressive model is scored exactly, whatever the `bound` is. What is exact takes one
    pass.
    """
    bound = AUTOREGRESSIVE if loaded.model.config.causal else bound
    draws = 1 if bound.exact else draws
    calls = bound.calls or max(int(where.sum()) for where in scored.predict)
    total, start = draws * calls * sum(map(len, scored.rows)), time.perf_counter()
    with runtime.autocast(loaded.model.device, dtype), progress(total, "token") as told:
        samples = runtime.passes(
            loaded.model,
            scored.rows,
            seed,
            draws,
            bound.estimator or diffusion.any_order,
            predict=scored.predict,
            batch_size=batch_size,
            progress=told,
        )
    return samples, time.perf_counter() - start


def publish(figures: dict, config: Section) -> None:
    """Write what was printed: eval.output, W&B."""
    if config.eval.output:
        report.write_json(figures, config.eval.output)
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
