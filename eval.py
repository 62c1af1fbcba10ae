"""What a text costs under a checkpoint: python eval.py, python eval.py data.path=TEXT."""

import sys
import time

import data
import diffusion
from diffusion import any_order, estimate
from model import ModelConfig, Transformer
from nanomdm import bounds, checkpoint, cli, devices, folders, report, runlog, texts, tracking
from nanomdm.errors import UserError, visible
from nanomdm.random import generator


def main(config: cli.Section) -> None:
    folders.check_output(config.output)
    device = devices.pick_device(config.system.device)
    names = [name for name in (config.checkpoint, config.eval.against) if name]
    models = [checkpoint.load_model(name, device, Transformer, ModelConfig) for name in names]
    shape = models[0].model.config
    exact = [bounds.is_exact(loaded.model.config) for loaded in models]
    about_masks = config.explicit & {"eval.bounds", "eval.samplers"}
    if exact[0] and about_masks:
        raise UserError(
            f"{min(about_masks)} is about masks, and {names[0]} is autoregressive, scored exactly: "
            "leave it out"
        )
    if all(exact):
        cli.ignored(config, {"eval.draws"}, f"{names[0]} is autoregressive, scored exactly")
    cli.decided_by_shape(config, shape)
    chosen = bounds.choose(config.eval.bounds, config.sampling.steps, diffusion.sample)
    samplers = bounds.samplers(
        config.eval.samplers, config.sampling, diffusion.sample, shape.block_length
    )
    greedy = []
    if models[0].layout == "pairs":
        greedy = bounds.greedy(config, diffusion.sample, exact[0])
    scored = choose_texts(config, models)
    passes = 1 if exact[0] else config.eval.draws
    for loaded in models:
        devices.compile_calls(loaded.model, config.system.compile, scored.rows, passes)
    dtype = devices.pick_dtype(config.system.dtype, device, training=False)
    for name, loaded in zip(names, models, strict=True):
        print(f"{name}: {loaded.weights}, on {device}")
    how = "exactly" if exact[0] else f"{config.eval.draws} passes"
    print(f"{scored.source}: {scored.tokens:,} tokens, {how}", flush=True)
    figures = {"checkpoint": names[0], "source": scored.source}

    def show(found: dict) -> None:
        figures.update(found)
        for line in report.lines(found):
            print(visible(line, sys.stdout), flush=True)

    with devices.autocast(device, dtype):
        uniform = chosen.pop("uniform")
        samples, seconds = measure(models[0], uniform, scored, config)
        show({"seed": config.system.seed} | report.likelihood(samples, scored, exact[0]))
        if not exact[0]:
            if not shape.block_length:  # in blocks a row has a masking rate for each block
                show(report.cost_by_rate(samples))
            measured = {"uniform": (uniform, samples, seconds)}
            for name, bound in chosen.items():
                measured[name] = (bound, *measure(models[0], bound, scored, config))
            show(report.side_by_side(measured, shape.block_length > 0))
            rows = [
                report.sampler(
                    name, bound, *measure(models[0], bound, scored, config), uniform=samples
                )
                for name, bound in samplers.items()
            ]
            show({"samplers": rows})
        if greedy:
            found = {name: measure(models[0], bound, scored, config)[0] for name, bound in greedy}
            show(report.matches(found))
        if len(models) > 1:
            other, _ = measure(models[1], bounds.BOUNDS["uniform"], scored, config)
            show(report.comparison(samples, other, names, exact))
    show(report.speed(samples, seconds))
    folders.write_output(config.output, figures)
    if config.logging.wandb:
        tracking.log_evaluation(config, figures)


def measure(
    loaded: checkpoint.Loaded, bound: bounds.Bound, scored: texts.Texts, config: cli.Section
) -> tuple[bounds.NLLSamples, float]:
    """The samples of a bound on the texts, and the seconds that they took.

    An autoregressive network is scored exactly, unless the bound is the score of a strategy. The
    masks follow from the seed alone, so that two models are compared on the same masks.
    """
    model, start = loaded.model, time.perf_counter()
    if model.config.causal and not bound.strategy:
        bound = bounds.AUTOREGRESSIVE
    exact, seed = bound.exact or bounds.is_exact(model.config), config.system.seed
    draws = 1 if exact else config.eval.draws
    with runlog.progress(draws * bound.calls * sum(map(len, scored.rows)), "token") as advance:

        def nll(xt, targets, where):
            advance(xt.numel())
            return model(xt, targets, where)

        if bound.strategy:
            samples = bounds.score(
                bound.strategy, model, scored, draws=draws, seed=seed, advance=advance
            )
        else:
            found = estimate(
                bound.estimator or any_order,
                nll,
                [row.to(model.device) for row in scored.rows],
                mask_id=model.config.mask_id,
                predict=scored.predict,
                block_length=model.config.block_length,
                generator=generator(seed, "evaluation"),
                draws=draws,
            )
            samples = bounds.NLLSamples(*found)
    return samples.counting(scored.counts), time.perf_counter() - start


def choose_texts(config: cli.Section, models: list[checkpoint.Loaded]) -> texts.Texts:
    """About `eval.tokens` tokens to score. Raises `UserError`.

    They are those of data.path, else of the validation split of data.dir or data.dataset, else of
    that of the corpus that the checkpoint was trained on.
    """
    tokenizer, layout = models[0].tokenizer, models[0].layout
    if any(loaded.tokenizer.state() != tokenizer.state() for loaded in models):
        raise UserError(
            f"{config.eval.against} has another tokenizer than {config.checkpoint}: evaluate each "
            "by itself and compare bits per byte"
        )
    context = min(loaded.model.config.block_size for loaded in models)
    if "data.path" in config.explicit and config.data.path:
        source = config.data.path
        found = [
            (name, data.Rows(ids, context, layout, tokenizer))
            for name, ids in texts.read(source, tokenizer, layout, context)
        ]
    else:
        settings, sha256 = config.data, ""
        if not (config.data.dir or "data.dataset" in config.explicit):
            sha256 = models[0].state["corpus"]["sha256"]
            if not sha256:
                raise UserError(
                    f"the text that {config.checkpoint} was trained on is not known: name one by "
                    "data.path="
                )
            settings = cli.stored_data(models[0].config, config.checkpoint)
        settings.rows = layout == "rows"
        corpus = data.load(settings, tokenizer, sha256)
        texts.check_layout(corpus.name, corpus.layout, layout)
        source = f"validation split of {corpus.name}"
        found = [(source, corpus.rows("val", context))]
    if layout in ("rows", "pairs"):
        return texts.whole(source, found, tokenizer, limit=config.eval.tokens)
    documents = [(name, rows.tokens) for name, rows in found]
    return texts.cut(source, documents, tokenizer, context, limit=config.eval.tokens)


if __name__ == "__main__":
    cli.main(main)
