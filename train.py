"""Train a masked diffusion language model: python train.py, python train.py +experiment=medium."""

import copy
import math
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

import checkpoint
import cli
import data
import diffusion
import optim
import runtime
from cli import Section
from model import ModelConfig, Transformer
from runlog import Clock, Interrupt, RunLog, import_wandb

FILES = ("ckpt.pt", "best.pt", "metrics.jsonl")
INTERRUPTED = 130  # exit code of a run that Ctrl-C ended, after saving
KEPT = (  # when a run is resumed
    *("data.tokenizer", "data.vocab_size", "training.optimizer", "training.objective"),
)
AVERAGED = 50  # steps, about, in the running average of the training loss


@dataclass
class Run:
    """A training run: what a checkpoint stores, and what it takes to go on."""

    config: Section
    corpus: data.Corpus
    device: torch.device
    dtype: torch.dtype
    model: Transformer
    forward: torch.nn.Module  # the model, compiled or not
    ema: Transformer  # the same network with the moving average of the weights
    optimizer: optim.Optimizers
    step: int = 0  # optimizer steps done
    best: float = math.inf  # lowest validation bound so far, nats per token
    loss_avg: Tensor = field(default_factory=lambda: torch.zeros(()))  # of the training loss

    @property
    def finished(self) -> bool:
        return self.step >= self.config.training.max_iters

    def due(self, interval: int) -> bool:
        """Whether to do now what is done every `interval` steps and after the last; 0: never."""
        return interval > 0 and (self.step % interval == 0 or self.finished)

    def describe(self) -> dict:
        """What is told of a run beside its configuration."""
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "architecture": asdict(self.model.config),
            "corpus": {"name": self.corpus.name, "sha256": self.corpus.sha256},
        }


def train(config: Section, explicit: set[str]) -> None:
    run = build(config, explicit)
    settings = run.config.training
    announce(run)
    if run.finished:
        print("nothing is left to do: raise training.max_iters to go on")
        return
    with Interrupt() as interrupt, RunLog(run.config, run.step, run.describe()) as log:
        clock = Clock(run.step)
        while not (run.finished or interrupt.asked):
            loss, grad_norm = optimize(run)
            if run.due(run.config.logging.interval):
                report(run, log, loss, grad_norm, clock)
            with clock.paused():
                if run.due(settings.eval_interval):
                    evaluate(run, log)
                if run.due(settings.sample_interval):
                    log.samples(run.step, [generate(run)])
                if run.due(settings.save_interval) or run.finished or interrupt.asked:
                    save(run, "ckpt.pt")
    if interrupt.asked:
        saved = Path(run.config.out_dir, "ckpt.pt").exists()
        print(
            f"saved after step {run.step}: go on with training.resume=true"
            if saved
            else "stopped before the first step: there is nothing to save"
        )
        sys.exit(INTERRUPTED)


# --- Before the first step ----------------------------------------------------------------------


def build(config: Section, explicit: set[str]) -> Run:
    """The run that the configuration describes: a new one, one from other weights, or a resumed.

    Raises `ValueError` before anything is written.
    """
    start, cpu = None, torch.device("cpu")
    if config.training.resume:
        start = runtime.load(Path(config.out_dir, "ckpt.pt"), cpu)
        config = resumed_config(config, explicit, start)
    elif config.training.init_from:
        start = runtime.load(config.training.init_from, cpu)
    check(config)
    device = runtime.pick_device(config.system.device)
    dtype = runtime.pick_dtype(config.system.dtype, device, training=True)
    corpus = runtime.load_corpus(vars(config.data), start.tokenizer if start else None)
    if corpus.name == "plays":  # the fallback was taken: a resumed run has to take it, too
        config.data.dataset = "plays"
    model = make_model(config, explicit, corpus, start).to(device)
    settings = config.training
    optimizer = optim.build_optimizer(
        model, settings.optimizer, settings.learning_rate, settings.weight_decay
    )
    average = copy.deepcopy(model).eval()
    run = Run(config, corpus, device, dtype, model, model, average, optimizer)
    if settings.resume:
        restore(run, start.state)
    if runtime.pays_to_compile(config.system.compile, device, settings.max_iters - run.step):
        run.forward = torch.compile(model)
    claim_folder(config.out_dir)
    if not settings.resume:
        for path in checkpoint.set_aside(config.out_dir, FILES):
            print(f"an earlier run's file is kept as {path}")
    return run


def resumed_config(config: Section, explicit: set[str], start: runtime.Loaded) -> Section:
    """The interrupted run's configuration, but for what this command names.

    Raises `ValueError` where that would be another network, tokenizer or optimizer.
    """
    resumed = cli.section(start.config)
    for key in sorted(explicit):
        *path, name = key.split(".")
        old, new = resumed, config
        for part in path:
            old, new = getattr(old, part), getattr(new, part)
        was, value = getattr(old, name), getattr(new, name)
        if was != value and (key.startswith("model.") or key in KEPT):
            raise ValueError(
                f"{key}={value} is not what the interrupted run had ({was}): leave it out (or its "
                "experiment), or start a new run in another out_dir"
            )
        setattr(old, name, value)
    resumed.out_dir = config.out_dir
    return resumed


def make_model(
    config: Section, explicit: set[str], corpus: data.Corpus, start: runtime.Loaded | None
) -> Transformer:
    """A new network, or that of the checkpoint `start`, which decides its shape but not dropout."""
    shape, kind = vars(config.model), config.data.tokenizer
    if start:
        decided = asdict(start.model.config) | {"dropout": config.model.dropout}
        named = {f"model.{k}": (v, decided[k]) for k, v in shape.items()}
        named["data.tokenizer"] = (kind, start.tokenizer.state()["kind"])
        for key, (value, given) in named.items():
            if key in explicit and value != given:
                raise ValueError(
                    f"{key}={value} is not what the checkpoint has ({given}): leave it out (or its "
                    "experiment), or train from the beginning"
                )
        shape.update((name, decided[name]) for name in shape)
    corpus.require(config.model.block_size)
    torch.manual_seed(runtime.generator(config.system.seed, "weights").initial_seed())
    causal = config.training.objective == "ar"
    model = Transformer(ModelConfig(corpus.tokenizer.vocab_size, causal=causal, **shape))
    if start:
        model.load_state_dict(start.model.state_dict())
    return model


def check(config: Section) -> None:
    """Raise `ValueError` for a value out of its range."""
    values = vars(config.training)
    positive = ("max_iters", "batch_size", "grad_accum", "learning_rate")
    for name, value in values.items():
        if not isinstance(value, str) and (value < 0 or (value == 0 and name in positive)):
            kind = "positive" if name in positive else "0 or more"
            raise ValueError(f"training.{name}={value} must be {kind}")
    if values["batch_size"] % values["grad_accum"]:
        raise ValueError(
            f"training.batch_size={values['batch_size']} is not divisible by "
            f"training.grad_accum={values['grad_accum']}: change one of them"
        )
    if values["ema_decay"] >= 1:
        raise ValueError(f"training.ema_decay={values['ema_decay']} must be less than 1")
    if values["objective"] not in ("diffusion", "ar"):
        raise ValueError(
            f"training.objective={values['objective']} is unknown: choose diffusion or ar"
        )
    if not 0 < config.diffusion.eps < 1:
        raise ValueError(f"diffusion.eps={config.diffusion.eps} must lie between 0 and 1")
    for section, name in (("logging", "interval"), ("eval", "batch_size")):
        if (value := getattr(getattr(config, section), name)) < 1:
            raise ValueError(f"{section}.{name}={value} must be at least 1")
    schedule(config, 0)
    diffusion.check_sampling(**runtime.sampling_settings(config.sampling))
    if config.logging.wandb:
        import_wandb()


def claim_folder(folder: str) -> None:
    """Make the folder and try to write into it, before hours are spent. Raises `ValueError`."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"cannot write into out_dir={folder} ({error.strerror}): choose another out_dir"
        ) from error


def restore(run: Run, state: dict) -> None:
    if "optimizer" not in state:
        raise ValueError(
            f"{run.config.out_dir}/ckpt.pt holds averaged weights only and cannot be resumed: "
            "start from them by training.init_from="
        )
    if state["corpus"]["sha256"] != run.corpus.sha256:
        raise ValueError(
            f"the interrupted run's text ({state['corpus']['name']}) is not what it was: bring it "
            "back, or start a new run in another out_dir"
        )
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step, run.best, run.loss_avg = state["step"], state["best"], state["loss_avg"]


def announce(run: Run) -> None:
    corpus, compiled = run.corpus, "" if run.forward is run.model else ", compiled"
    print(
        f"corpus {corpus.name} (sha256 {corpus.sha256[:12]}): {len(corpus.train):,} tokens to "
        f"train on, {len(corpus.val):,} to validate, {corpus.tokenizer.vocab_size} symbols\n"
        f"model of {run.describe()['parameters']:,} parameters on {run.device}, "
        f"{str(run.dtype)[6:]}{compiled}; steps {run.step} to {run.config.training.max_iters}, "
        f"results in {run.config.out_dir}",
        flush=True,
    )


# --- One step -----------------------------------------------------------------------------------


def optimize(run: Run) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns the loss and the norm of the gradient before clipping."""
    settings = run.config.training
    run.optimizer.set_learning_rate(schedule(run.config, run.step))
    loss = compute_gradients(run)
    parameters = list(run.model.parameters())
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip or math.inf)
    run.optimizer.step()
    run.optimizer.zero_grad()
    optim.update_ema(list(run.ema.parameters()), parameters, settings.ema_decay, run.step)
    run.step += 1
    run.loss_avg = torch.lerp(run.loss_avg.to(loss.device), loss, max(1 / AVERAGED, 1 / run.step))
    return loss, grad_norm


def schedule(config: Section, step: int) -> float:
    """The share of the peak learning rate in a step."""
    names = ("max_iters", "warmup_iters", "lr_schedule", "min_lr_ratio")
    return optim.learning_rate_factor(step, *(getattr(config.training, name) for name in names))


def compute_gradients(run: Run) -> Tensor:
    """The gradients of a global batch; if torch.compile fails, without it from here on."""
    try:
        return accumulate(run)
    except TorchDynamoException as error:
        if run.forward is run.model:
            raise
        print(f"torch.compile failed ({type(error).__name__}): going on without", file=sys.stderr)
        run.forward = run.model
        run.optimizer.zero_grad()
        return accumulate(run)


def accumulate(run: Run) -> Tensor:
    """Add up the gradients of the micro-batches. All of it is a function of (seed, step, row)."""
    settings, seed, L = run.config.training, run.config.system.seed, run.model.config.block_size
    B, parts = settings.batch_size, settings.grad_accum
    compiled = run.forward is not run.model  # wants static shapes
    capacity = (
        diffusion.mask_capacity(B // parts, L, B, run.config.diffusion.eps) if compiled else None
    )
    torch.manual_seed(runtime.generator(seed, "dropout", run.step).initial_seed())
    total = torch.zeros((), device=run.device)
    for part in range(parts):
        rows = torch.arange(part, B, parts)  # so that each part has times from all over [0, 1]
        x0 = run.corpus.batch(B, L, runtime.generator(seed, "data", run.step), rows)
        with runtime.autocast(run.device, run.dtype):
            loss = loss_of(run, x0.to(run.device), rows.to(run.device), capacity)
        (loss / parts).backward()
        total += loss.detach() / parts
    return total


def loss_of(run: Run, x0: Tensor, rows: Tensor, capacity: int | None) -> Tensor:
    """The loss of the `rows` x0 (B, L) of a global batch, as training.objective says."""
    if run.model.config.causal:
        everywhere = torch.ones_like(x0, dtype=torch.bool)
        return runtime.nll(run.forward, x0, x0, everywhere, capacity=x0.numel()).mean()
    return diffusion.masked_diffusion_loss(
        run.forward,
        x0,
        mask_id=run.model.config.mask_id,
        generator=runtime.generator(run.config.system.seed, "masks", run.step),
        eps=run.config.diffusion.eps,
        rows=rows,
        global_batch_size=run.config.training.batch_size,
        nll=partial(runtime.nll, capacity=capacity),
    )


# --- Beside the steps ---------------------------------------------------------------------------


def report(run: Run, log: RunLog, loss: Tensor, grad_norm: Tensor, clock: Clock) -> None:
    average, milliseconds = run.loss_avg.item(), clock.milliseconds_per_step(run.step)
    values = {
        "train/loss": loss.item(),
        "train/loss_avg": average,
        "train/lr": run.optimizer.groups()[0]["lr"],
        "train/grad_norm": grad_norm.item(),
        "train/time_ms": milliseconds,
    }
    log.metrics(run.step, values)
    speed = run.config.training.batch_size * run.model.config.block_size / milliseconds
    log.progress(run.step, f"loss {average:.3f} | {speed:.1f}k tokens/s")


def evaluate(run: Run, log: RunLog) -> None:
    """The bound of the EMA weights on both splits, on the same masks every time; keeps the best."""
    limit, seed = run.config.training.eval_tokens, run.config.system.seed
    quarter = max(1, (limit or len(run.corpus.val)) // 4)
    values = {}
    for split, tokens in (("train", run.corpus.train), ("val", run.corpus.val)):
        rows = data.blocks(
            tokens, run.model.config.block_size, quarter if split == "train" else limit
        )
        batch_size = run.config.eval.batch_size
        loss = runtime.passes(run.ema, rows, seed, draws=1, batch_size=batch_size).bound()
        values[f"eval/{split}_loss"] = loss.value
        values[f"eval/{split}_ppl"] = math.exp(loss.value)
    log.metrics(run.step, values)
    bounds = " and ".join(f"{values[f'eval/{split}_loss']:.4f} on {split}" for split in data.SPLITS)
    name = "loss" if run.model.config.causal else "bound"
    log.say(f"step {run.step}: {name} {bounds}, nats/token")
    if values["eval/val_loss"] < run.best:
        run.best = values["eval/val_loss"]
        save(run, "best.pt")


def generate(run: Run) -> str:
    """A text drawn from the EMA weights."""
    canvas = torch.zeros((1, run.model.config.block_size), dtype=torch.long)
    generator = runtime.generator(run.config.system.seed, "sample", run.step)
    is_masked = torch.ones_like(canvas, dtype=torch.bool)
    sampled = runtime.fill(run.ema, canvas, is_masked, run.config.sampling, generator)
    return run.corpus.tokenizer.decode(sampled.ids[0].tolist())


def save(run: Run, name: str) -> None:
    """ckpt.pt holds everything that a resumed run needs; best.pt the averaged weights only."""
    state = {
        "model_config": asdict(run.model.config),
        "tokenizer": run.corpus.tokenizer.state(),
        "config": run.config.as_dict(),
        "corpus": run.describe()["corpus"],
        "step": run.step,
        "best": run.best,
        "ema": run.ema.state_dict(),
    }
    if name == "ckpt.pt":
        state["model"], state["loss_avg"] = run.model.state_dict(), run.loss_avg
        state["optimizer"] = run.optimizer.state_dict()
    checkpoint.save(Path(run.config.out_dir, name), state)


if __name__ == "__main__":
    cli.main(train)
