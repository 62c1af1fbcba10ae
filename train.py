"""Train a masked diffusion language model: python train.py, python train.py +experiment=medium."""

import copy
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

import data
import diffusion
import runtime
from model import Transformer
from nanomdm import bounds, checkpoint, cli, folders, optim, parallel
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.runlog import Interrupt, Log, NullLog, echo, start_message
from nanomdm.tracking import import_wandb

POSITIVE = ("max_iters", "batch_size", "grad_accum", "learning_rate")
SIGNALLED = 128  # and the signal's number: exit code of a run that a signal ended, after saving


@dataclass
class Run:
    """A training run: what a checkpoint stores, and what it takes to go on."""

    config: Section
    corpus: data.Corpus
    device: torch.device
    dtype: torch.dtype
    model: Transformer
    forward: torch.nn.Module  # the model, or its copies in all processes
    ema: Transformer  # the same network with the moving average of the weights
    optimizer: optim.Optimizers
    scaler: torch.amp.GradScaler  # of the loss under float16; idle otherwise
    meter: optim.Meter
    world: parallel.World
    compiled: bool
    step: int = 0  # optimizer steps done
    saved: int = 0  # the step of ckpt.pt, 0 if there is none
    best: float = math.inf  # lowest validation bound so far, nats per token

    @cached_property
    def capacity(self) -> int:
        """An upper bound on the masked tokens of a micro-batch; that of the latest times."""
        settings, size = self.config.training, self.world.size
        B, parts = settings.batch_size, settings.grad_accum
        rows = parallel.World(size - 1, size).rows(B, parts - 1, parts)
        length, eps = self.model.config.block_size, self.config.diffusion.eps
        return diffusion.mask_capacity(rows, length, B, eps, self.config.diffusion.masking)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.training.max_iters

    def due(self, interval: int) -> bool:
        """Whether to do now what is done every `interval` steps and after the last; 0: never."""
        return interval > 0 and (self.step % interval == 0 or self.finished)

    def say(self, line: str) -> None:
        """Print a line, once for all processes."""
        if self.world.leads:
            echo(line)

    def describe(self) -> dict:
        """What is told of a run beside its configuration."""
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "architecture": asdict(self.model.config),
            "corpus": {"name": self.corpus.name, "sha256": self.corpus.sha256},
            "tokens": {split: len(getattr(self.corpus, split)) for split in data.SPLITS},
            "processes": self.world.size,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "compiled": self.compiled,
        }


def train(config: Section, explicit: set[str]) -> None:
    device = runtime.pick_device(config.system.device, parallel.world().local_rank)
    with parallel.processes(device, config.system.timeout):
        session(config, explicit, device)  # whose models are gone before the processes part


def session(config: Section, explicit: set[str], device: torch.device) -> None:
    with folders.locked(config.out_dir) if parallel.world().leads else nullcontext():
        run = build(config, explicit, device)
        run.say(start_message(run.config, run.step, run.describe()))
        if not run.finished:
            open_folder(run)
            loop(run)


def loop(run: Run) -> None:
    """Train to the end, or to a signal. Raises `OSError` if the last state could not be saved."""
    settings, interval, asked = run.config.training, run.config.logging.interval, 0
    with Interrupt() as interrupt, start_log(run) as log:  # to open it takes its time
        while not (run.finished or asked):
            loss, grad_norm = optimize(run)
            if run.due(interval):
                report(run, log, loss, grad_norm)
            if run.world.size == 1 or run.due(interval):  # several agree, where they wait anyway
                asked = parallel.largest(interrupt.asked, run.device)
            with log.paused():
                if run.due(settings.eval_interval):
                    evaluate(run, log)
                if run.due(settings.sample_interval):
                    log.samples(run.step, [generate(run)])
                wanted = run.due(settings.save_interval) and not run.meter.failing
                if run.finished or asked or wanted:
                    save(run, "ckpt.pt")
    if run.saved != run.step:
        raise OSError(f"the state after step {run.step} is lost, {last_good(run)}")
    if asked:
        run.say(f"saved after step {run.step}: go on with training.resume=true")
        sys.exit(SIGNALLED + asked)


def start_log(run: Run) -> Log | NullLog:
    return Log(run.config, run.step, run.describe()) if run.world.leads else NullLog()


def last_good(run: Run) -> str:
    path = Path(run.config.out_dir, "ckpt.pt")
    return f"{path} holds step {run.saved}" if run.saved else "and there is no checkpoint"


# --- Before the first step ----------------------------------------------------------------------


def build(config: Section, explicit: set[str], device: torch.device) -> Run:
    """The run that the configuration describes: a new one, one from other weights, or a resumed.

    Raises `UserError` before anything is written.
    """
    wish, path = config.training.resume, Path(config.out_dir, "ckpt.pt")
    resume = wish == "true" or wish == "auto" and path.exists()
    path = path if resume else config.training.init_from
    start = runtime.load(path, torch.device("cpu"), resume) if path else None
    if resume:
        config = cli.resumed(start.config, config, explicit, whole=wish == "auto")
    world = parallel.world()
    check(config, world)
    with parallel.leader_first():
        corpus = runtime.load_corpus(vars(config.data), start.tokenizer if start else None)
    if corpus.name == "plays":  # the fallback was taken: a resumed run has to take it, too
        config.data.dataset = "plays"
    if resume:
        runtime.require_same(corpus, start.state["corpus"])
    model = runtime.make_model(config, explicit, corpus, start).to(device)
    return assemble(config, corpus, model, device, world, start if resume else None)


def assemble(
    config: Section,
    corpus: data.Corpus,
    model: Transformer,
    device: torch.device,
    world: parallel.World,
    resumed: runtime.Loaded | None = None,
) -> Run:
    """A run of `model`, which goes on from the checkpoint `resumed` if there is one."""
    settings, system = config.training, config.system
    dtype = runtime.pick_dtype(system.dtype, device, training=True)
    model.recompute = settings.activation_checkpointing
    ema = copy.deepcopy(model).eval()
    if resumed:
        model.load_state_dict(resumed.state["model"])
    state = resumed.state if resumed else {"step": 0, "best": math.inf}
    compiled = runtime.pays_to_compile(system.compile, device, settings.max_iters - state["step"])
    if compiled:
        runtime.compile_parts(model)
    forward = parallel.distribute(system.parallel, model, ema, dtype)
    named = (settings.optimizer, settings.learning_rate, settings.weight_decay)
    optimizer = optim.build_optimizer(model, *named, parallel.whole, parallel.like)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if resumed:
        optimizer.load_state_dict(state["optimizer"])
    if scaler.is_enabled() and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    return Run(
        *(config, corpus, device, dtype, model, forward, ema, optimizer, scaler),
        *(optim.Meter(device, state.get("meter", state)), world, compiled),
        *(state["step"], state["step"], state["best"]),
    )


def check(config: Section, world: parallel.World) -> None:
    """Raise `UserError` for a value out of its range."""
    settings = config.training
    cli.check_numbers("training", vars(settings), POSITIVE)
    cli.check_numbers("logging", {"interval": config.logging.interval}, ("interval",))
    cli.check_numbers("eval", {"batch_size": config.eval.batch_size}, ("batch_size",))
    cli.check_numbers("system", {"timeout": config.system.timeout}, ("timeout",))
    cli.check_choice("training.objective", settings.objective, ("diffusion", "ar"))
    cli.check_choice("training.resume", settings.resume, ("auto", "true", "false"))
    world.check_batch(settings.batch_size, settings.grad_accum)
    if settings.ema_decay >= 1:
        raise UserError(f"training.ema_decay={settings.ema_decay} must be less than 1")
    schedule(config, 0)
    parallel.check_kind(config.system.parallel)
    diffusion.check_loss(**vars(config.diffusion))
    runtime.sampling(config.sampling)
    if config.logging.wandb:
        import_wandb()


def open_folder(run: Run) -> None:
    """What an earlier run left there gets another name; run.json says how to repeat this one."""
    if run.world.leads:
        about = run.describe() | {"config": run.config.as_dict()}
        for path in folders.begin(run.config.out_dir, run.step, about):
            run.say(f"an earlier run's file is kept as {path}")


# --- One step -----------------------------------------------------------------------------------


def optimize(run: Run) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns the loss and the norm of the gradient before clipping."""
    settings = run.config.training
    run.optimizer.set_learning_rate(schedule(run.config, run.step))
    loss = compute_gradients(run)
    run.scaler.unscale_(run.optimizer)
    parameters = list(run.model.parameters())
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip or math.inf)
    grad_norm = parallel.whole(grad_norm)
    run.optimizer.step(skip=run.meter.add(loss, grad_norm, run.step + 1))
    run.scaler.update()
    run.optimizer.zero_grad()
    optim.update_ema(list(run.ema.parameters()), parameters, settings.ema_decay, run.step)
    run.step += 1
    return loss, grad_norm


def schedule(config: Section, step: int) -> float:
    """The share of the peak learning rate in a step."""
    names = ("max_iters", "warmup_iters", "lr_schedule", "min_lr_ratio")
    return optim.learning_rate_factor(step, *(getattr(config.training, name) for name in names))


def compute_gradients(run: Run) -> Tensor:
    """The gradients of a global batch; if torch.compile fails, without it from here on."""
    try:
        return accumulate(run)
    except RuntimeError as error:
        if not (run.compiled and runtime.failed_to_compile(error)):
            raise
        print(f"torch.compile failed ({type(error).__name__}): going on without", file=sys.stderr)
        torch.compiler.set_stance("force_eager")
        run.compiled = False
        run.optimizer.zero_grad()
        return accumulate(run)


def accumulate(run: Run) -> Tensor:
    """Add up the gradients of the micro-batches. All of it is a function of (seed, step, row)."""
    settings, seed, L = run.config.training, run.config.system.seed, run.model.config.block_size
    B, parts = settings.batch_size, settings.grad_accum
    torch.manual_seed(runtime.generator(seed, "dropout", run.step).initial_seed() + run.world.rank)
    total = torch.zeros((), device=run.device)
    for part in range(parts):
        rows = run.world.rows(B, part, parts)
        x0 = run.corpus.batch(B, L, runtime.generator(seed, "data", run.step), rows)
        with (
            parallel.synchronising(run.forward, last=part == parts - 1),
            runtime.autocast(run.device, run.dtype),
        ):
            loss = loss_of(run, runtime.move(x0, run.device), runtime.move(rows, run.device))
        run.scaler.scale(loss / parts).backward()
        total += loss.detach() / parts
    return parallel.mean(total)


def loss_of(run: Run, x0: Tensor, rows: Tensor) -> Tensor:
    """The loss of the `rows` x0 (B, L) of a global batch, as training.objective says."""
    if run.model.config.causal:
        everywhere = torch.ones_like(x0, dtype=torch.bool)
        return runtime.nll(run.forward, x0, x0, everywhere, capacity=x0.numel()).mean()
    return diffusion.masked_diffusion_loss(
        run.forward,
        x0,
        mask_id=run.model.config.mask_id,
        generator=runtime.generator(run.config.system.seed, "masks", run.step),
        **vars(run.config.diffusion),
        rows=rows,
        global_batch_size=run.config.training.batch_size,
        nll=partial(runtime.nll, capacity=run.capacity),
    )


# --- Beside the steps ---------------------------------------------------------------------------


def report(run: Run, log: Log, loss: Tensor, grad_norm: Tensor) -> None:
    """Raises `RuntimeError` if too many steps in a row had to be skipped."""
    log.step(
        run.step,
        loss=loss.item(),
        **run.meter.read(),
        lr=run.optimizer.groups()[0]["lr"],
        grad_norm=grad_norm.item(),
    )
    run.meter.require_progress(run.config.training.max_skipped, last_good(run))


def evaluate(run: Run, log: Log) -> None:
    """The bound of the EMA weights on both splits, on the same masks every time; keeps the best."""
    limit, L = run.config.training.eval_tokens, run.model.config.block_size
    quarter = max(1, (limit or len(run.corpus.val)) // 4)
    nll, batch_size = parallel.share_rows(runtime.nll), run.config.eval.batch_size
    values = {}
    for split in data.SPLITS:
        count = quarter if split == "train" else limit
        rows = data.blocks(getattr(run.corpus, split), L, count)
        found = runtime.passes(
            run.ema, rows, run.config.system.seed, draws=1, batch_size=batch_size, nll=nll
        )
        values[f"eval/{split}_loss"] = loss = found.bound().value
        values[f"eval/{split}_ppl"] = math.exp(min(loss, 700.0))  # beyond, it overflows
        if len(rows) > 1 and not run.model.config.causal:
            values[f"eval/{split}_error"] = bounds.error_within(found)
    log.metrics(run.step, values)
    costs = " and ".join(f"{values[f'eval/{split}_loss']:.4f} on {split}" for split in data.SPLITS)
    name = "loss" if run.model.config.causal else "bound"
    log.say(f"step {run.step}: {name} {costs}, nats/token")
    if values["eval/val_loss"] < run.best:
        before, run.best = run.best, values["eval/val_loss"]
        if not save(run, "best.pt"):
            run.best = before  # so that the next one that is better than what is saved is tried


def generate(run: Run) -> str:
    """A text drawn from the EMA weights."""
    is_masked = torch.ones((1, run.model.config.block_size), dtype=torch.bool)
    generator = runtime.generator(run.config.system.seed, "sample", run.step)
    settings = runtime.sampling(run.config.sampling, run.model)
    sampled = runtime.fill(run.ema, is_masked.long(), is_masked, settings, generator)
    return run.corpus.tokenizer.decode(sampled.ids[0].tolist())


def save(run: Run, name: str) -> bool:
    """Whether it was written; if not, it says why, and the file of before stays.

    ckpt.pt holds all that a resumed run needs, best.pt the averaged weights, whole in any case.
    """
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
        state["model"], state["meter"] = run.model.state_dict(), run.meter.state()
        state["optimizer"], state["scaler"] = run.optimizer.state_dict(), run.scaler.state_dict()
    state, failed = parallel.gather(state, run.world.leads), False
    if run.world.leads:
        try:
            keep = run.config.training.keep if name == "ckpt.pt" else 0
            checkpoint.save(Path(run.config.out_dir, name), state, keep)
        except (OSError, ValueError) as error:
            echo(f"{error}. The run goes on, and tries again at the next save", sys.stderr)
            failed = True
    failed = bool(parallel.largest(int(failed), run.device))
    run.saved = run.step if name == "ckpt.pt" and not failed else run.saved
    return not failed


if __name__ == "__main__":
    cli.main(train)
