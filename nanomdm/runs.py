"""How a training run begins, and the checkpoints that it writes."""

import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from . import checkpoint, cli, devices, optim, parallel, runlog
from .errors import UserError, as_user_error, check_choice
from .prompts import Canvas, lengths, make_canvas
from .random import generator


def starting_point(config, Transformer, ModelConfig) -> tuple:
    """(config, loaded, resumes): how the run that `config` describes begins.

    `loaded` is None for a new run, or the checkpoint of training.init_from or of the run that
    training.resume continues, whose stored settings hold then, but for those that the command line
    names. A checkpoint decides the shape of the network and the tokenizer. Raises `UserError`.
    """
    wish, path = config.training.resume, Path(config.out_dir, "ckpt.pt")
    resumes = wish == "true" or wish == "auto" and path.exists()
    path = path if resumes else config.training.init_from
    if not path:
        return config, None, False
    loaded = checkpoint.load_model(path, "cpu", Transformer, ModelConfig, resumes)
    if resumes:
        config = cli.resumed(loaded.config, config, whole=wish == "auto")
    shape = loaded.model.config
    decided = {f"model.{name}": getattr(shape, name) for name in vars(config.model)}
    del decided["model.dropout"]
    if not resumes and "model.block_length" in config.explicit:
        del decided["model.block_length"]  # the weights are the same: first plain, then in blocks
    decided["data.tokenizer"] = loaded.tokenizer.state()["kind"]
    decide(config, decided, "the checkpoint")
    return config, loaded, resumes


def decide(config, decided: dict, source: str) -> None:
    """Set the settings `decided`, which follow from `source`.

    Raises `UserError` where the command line names another value of one.
    """
    for key, value in decided.items():
        section, name = key.split(".")
        section = getattr(config, section)
        if key in config.explicit and getattr(section, name) != value:
            raise UserError(
                f"{key}={getattr(section, name)} is not what {source} has ({value}): leave it out "
                f"(or its experiment), or do without {source}"
            )
        setattr(section, name, value)


def decided_by_data(config, corpus, loaded) -> None:
    """Set what follows from prepared data and, for a new network, from the length of its rows."""
    if config.data.dir:
        decide(config, {"data.tokenizer": corpus.tokenizer.kind}, config.data.dir)
    if corpus.row_length and not loaded:
        decide(config, {"model.block_size": corpus.row_length}, corpus.name)


def require_rows(splits: dict) -> None:
    """Say how many pairs of each split are too long. Raises `UserError` if all are."""
    for split, rows in splits.items():
        many = f"{rows.left_out:,} pairs of the {split} split are longer than {rows.length} tokens"
        if not len(rows):
            many = many if rows.left_out else f"the {split} split holds no pair"
            raise UserError(f"{many}, and no other is there: set a larger model.block_size")
        if rows.left_out and parallel.world().is_main:
            print(f"{many}, the model's context, and are left out", file=sys.stderr)


def sample_text(run, seeded) -> str:
    """A text for the log: from masks alone or, for pairs, the answer to a prompt of val."""
    tokenizer, L = run.corpus.tokenizer, run.model.config.block_size
    canvas = make_canvas("", 0, tokenizer, L, run.corpus.layout)
    prompt = ""
    if run.corpus.layout == "pairs":
        ids, predict, _ = run.eval_rows["val"][0]
        canvas = Canvas(ids, predict, predict.int().argmax())
        prompt = f"{tokenizer.decode(ids[: canvas.start - 1].tolist())} -> "
    is_masked = canvas.is_masked[None]
    ids = run.sampler.fill(run.ema, canvas.ids[None], is_masked, generator=seeded).ids.cpu()
    length = lengths(ids, is_masked, tokenizer.eos)
    return prompt + tokenizer.decode(ids[0, canvas.start : length].tolist())


def announce_schedule(settings, state: dict) -> None:
    """Print how the learning rate goes on where a resumed run had another number of steps."""
    step, now = state["step"], settings.max_iters
    before = cli.flat(state["config"]).get("training.max_iters", now)
    if not 0 < step < now or not parallel.world().is_main:
        return
    last, new = (
        f"{optim.learning_rate_factor(i, n, settings.warmup_iters, settings.lr_schedule):.0%}"
        for i, n in ((step - 1, before), (step, now))
    )
    if now != before and last != new:
        rates = f"the learning rate goes from {last} to {new} of its peak"
        print(f"training.max_iters was {before} and is {now}: {rates}", file=sys.stderr)


def build_model(config, corpus, loaded, Transformer, ModelConfig):
    """A new network, or that of a checkpoint with its EMA weights.

    The checkpoint decides the shape, but for what has no weights: dropout, blocks, the objective.
    """
    shape = {"attention_gate": True, "causal": config.training.objective == "ar"}
    shape |= vars(config.model)
    with as_user_error():
        if loaded:
            free = {name: shape[name] for name in ("dropout", "block_length", "causal")}
            shape = replace(loaded.model.config, **free)
        else:
            shape = ModelConfig(corpus.tokenizer.vocab_size, **shape)
    require_room(config, corpus, shape)
    torch.manual_seed(generator(config.system.seed, "weights").initial_seed())
    model = Transformer(shape)
    if loaded:
        model.load_state_dict(loaded.model.state_dict())
    return model


def check(config) -> None:
    """Raise `UserError` for settings of training that would fail in the first step."""
    settings = config.training
    check_choice("training.lr_schedule", settings.lr_schedule, optim.SCHEDULES)
    parts, size = settings.grad_accum, parallel.world().size
    if settings.batch_size % (parts * size):
        raise UserError(
            f"training.batch_size={settings.batch_size} is not divisible by training.grad_accum="
            f"{parts} x {size} processes: change one of them"
        )


def require_room(config, corpus, shape) -> None:
    """Raise `UserError` for a block longer than the text, or more memory than the device has.

    At the least each weight takes itself, its gradient, its average and a moment, and each token
    most of what a CPU was measured to keep of it for the backward pass (docs/LOG.md).
    """
    settings, processes, tokens = config.training, parallel.world().size, len(corpus.train)
    if tokens < shape.block_size and corpus.layout != "pairs":
        raise UserError(
            f"the train split of {corpus.name} has {tokens} tokens, fewer than model.block_size="
            f"{shape.block_size}: set model.block_size={tokens} or less, or take a longer text"
        )
    device = devices.pick_device(config.system.device)
    layers, rows = shape.n_layer, settings.batch_size / (settings.grad_accum * processes)
    weights = shape.n_embd * (12 * layers * shape.n_embd + shape.vocab_size)
    weights /= processes if config.system.parallel == "fsdp" else 1
    kept = 1 if settings.activation_checkpointing else layers
    kept *= rows * shape.block_size * shape.n_embd * (100 if device.type == "cpu" else 16)
    kept *= 2 if 0 < shape.block_length < shape.block_size else 1  # streams
    gibibytes = [n / 2**30 for n in (16 * weights, kept, devices.memory(device))]
    if sum(gibibytes[:2]) > gibibytes[2]:
        model, batch, memory = (f"{n:,.1f} GiB" for n in gibibytes)
        raise UserError(
            f"training takes at least {model} for the model and {batch} for {rows:,.0f} rows, and "
            f"{device} has {memory}: lower model.n_embd, model.n_layer, model.block_size or "
            "training.batch_size, or raise training.grad_accum"
        )


def save(run, name: str) -> bool:
    """Write ckpt.pt, with all that a resume needs, or best.pt, whose only weights are the EMA's.

    Returns whether it was written; if not, the reason is printed and the old file stays. In several
    processes all of them have to call this: the main one writes.
    """
    state = {
        "model_config": asdict(run.model.config),
        "tokenizer": run.corpus.tokenizer.state(),
        "config": run.config.as_dict(),
        "corpus": {
            "name": run.corpus.name,
            "sha256": run.corpus.sha256,
            "layout": run.corpus.layout,
        },
        "step": run.step,
        "best": run.best,
        "ema": run.ema.state_dict(),
    }
    if name == "ckpt.pt":
        state["model"] = run.model.state_dict()
        state["optimizer"] = run.optimizer.state_dict()
        state["scaler"] = run.scaler.state_dict()
        state["stats"] = run.stats.state()
    state, failed = parallel.gather(state), False
    if parallel.world().is_main:
        try:
            checkpoint.save(Path(run.config.out_dir, name), state)
        except (OSError, UserError) as error:
            runlog.echo(f"{error}. The run continues, and saves again later", sys.stderr)
            failed = True
    failed = parallel.largest(failed, run.device)
    if name == "ckpt.pt" and not failed:
        run.saved = run.step
    return not failed


def last_good(run) -> str:
    path = Path(run.config.out_dir, "ckpt.pt")
    is_there = run.saved and path.exists()
    return f"{path} holds step {run.saved}" if is_there else "there is no checkpoint"


def require_saved(run) -> None:
    """Raise `OSError` if ckpt.pt is not that of the last step."""
    if run.saved != run.step:
        raise OSError(f"the state after step {run.step} is lost: {last_good(run)}")
