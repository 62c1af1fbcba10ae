"""The log of a run: progress, metrics.jsonl, samples, W&B; and what Ctrl-C does."""

import json
import math
import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, TextIO

from . import folders, parallel
from .errors import visible, write_atomically
from .optim import warmup
from .tracking import run_id, start_wandb

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


FEW = 8  # contexts: a validation split with less is worth a warning


def echo(line: str, file: TextIO | None = None) -> None:
    """Print a line without breaking the bar. A closed pipe or a full disk does not end a run."""
    with suppress(OSError), tqdm.external_write_mode(file) if tqdm else nullcontext():
        print(line, file=file, flush=True)


class Log(ExitStack):
    """A training run's log: progress on stderr, metrics.jsonl in out_dir, and W&B if switched on.

    The main process has one, every other process a `NullLog`. `about` is a dict of facts that goes
    to W&B beside the configuration.
    """

    def __init__(self, config: SimpleNamespace, first_step: int, about: dict):
        super().__init__()
        settings, path = config.training, Path(config.out_dir, "metrics.jsonl")
        self.tokens_per_step = settings.batch_size * config.model.block_size
        self.wandb = start_wandb(config, about) if config.logging.wandb else None
        if self.wandb:
            self.push(lambda error, *_: self.wandb.finish(exit_code=1 if error else 0))
        self.file = self.enter_context(open_metrics(path, first_step))
        self.unwritten = b""
        self.callback(self.flush)
        self.advance = self.enter_context(progress(settings.max_iters, "step", first_step, 0))
        self.logged, self.start = first_step, time.perf_counter()  # the last step that was logged

    def step(self, step: int, **figures: float) -> None:
        """Record the figures of optimizer step number `step` as train/NAME, and show progress.

        `loss_avg` and `skipped` are among them. train/time_ms is added, the mean time of a step
        since the last call, without what was done in `paused`.
        """
        steps, now = step - self.logged, time.perf_counter()
        figures["time_ms"] = milliseconds = 1e3 * (now - self.start) / steps
        self.logged, self.start = step, now
        self.metrics(step, {f"train/{name}": float(value) for name, value in figures.items()})
        speed = self.tokens_per_step / milliseconds
        skipped = f" | {figures['skipped']:.0f} steps skipped" if figures["skipped"] else ""
        self.advance(steps, f"loss {figures['loss_avg']:.3f} | {speed:.1f}k tokens/s{skipped}")

    @contextmanager
    def paused(self):
        """Leave what is done in this context out of the time per step."""
        pause = time.perf_counter()
        yield
        self.start += time.perf_counter() - pause

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record figures at `step` (optimizer steps done) in metrics.jsonl and W&B.

        A figure that is not finite is null in metrics.jsonl, because JSON has no such number.
        """
        plain = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self.unwritten += json.dumps({"step": step, **plain}).encode() + b"\n"
        self.flush()
        if self.wandb:
            self.wandb.log(values, step=step)

    def flush(self) -> None:
        """Write what is recorded; if that fails, print why and try again with the next entry."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            echo(
                f"cannot write {self.file.name} ({error.strerror}): free some space there; the "
                "missing entries are written then",
                sys.stderr,
            )

    def samples(self, step: int, texts: list[str]) -> None:
        """Print generated texts, and send them to W&B as a table."""
        for text in texts:
            echo(f"--- sample after {step} steps ---\n{visible(text, sys.stdout)}\n---")
        if self.wandb:
            import wandb

            table = wandb.Table(["step", "text"], [[step, text] for text in texts])
            self.wandb.log({"samples": table}, step=step)

    say = staticmethod(echo)


class NullLog(ExitStack):
    """The log of a process that is not the main one: every method of `Log`, without effect."""

    def say(self, *args, **figures) -> None:
        pass

    step = metrics = samples = say
    paused = nullcontext


def start_message(config: SimpleNamespace, first_step: int, about: dict) -> str:
    """The first lines of a run on the terminal: corpus, model, device and steps.

    `about` has corpus (name, sha256), tokens (train, val), architecture (vocab_size), parameters,
    processes, device, dtype and compiled.
    """
    size, last_step = about["processes"], config.training.max_iters
    kind = "shards" if config.system.parallel == "fsdp" else "copies"
    processes = f" in {size} processes ({kind})" if size > 1 else ""
    message = (
        f"corpus {about['corpus']['name']} (sha256 {about['corpus']['sha256'][:12]}): "
        f"{about['tokens']['train']:,} tokens to train on, {about['tokens']['val']:,} to validate, "
        f"{about['architecture']['vocab_size']} symbols\n"
        f"model of {about['parameters']:,} parameters on {about['device']}{processes}, "
        f"{about['dtype']}{', compiled' if about['compiled'] else ''}; "
        f"steps {first_step} to {last_step}, results in {config.out_dir}"
    )
    settings, val = config.training, about["tokens"]["val"]
    if first_step >= last_step:
        message += "\nnothing is left to do: raise training.max_iters to go on"
    elif first_step < (steps := warmup(last_step, settings.warmup_iters)) < settings.warmup_iters:
        message += f"\nthe warm-up takes half of the run, {steps} steps"
    if settings.eval_interval and val < FEW * config.model.block_size:
        message += (
            f"\n{val:,} tokens to validate are few: the bound on them, by which best.pt is chosen, "
            "says little about other texts"
        )
    return message


@contextmanager
def progress(total: int | None, unit: str, done: int = 0, seconds: float = 10):
    """Gives a function `advance(more, text="")`, which moves tqdm's bar with `text` beside it.

    Without tqdm or a terminal it prints lines on stderr, at most one in `seconds`.
    """
    if tqdm and sys.stderr.isatty():
        scale = unit != "step"  # 1.2M tokens
        with tqdm(
            total=total, initial=done, unit=unit, unit_scale=scale, dynamic_ncols=True
        ) as bar:

            def advance(more: int, text: str = "") -> None:
                bar.set_postfix_str(text, refresh=False)
                bar.update(more)

            yield advance
        return
    first, start = done, time.perf_counter()
    printed = start

    def advance(more: int, text: str = "") -> None:
        nonlocal done, printed
        done, now = done + more, time.perf_counter()
        if now - printed >= seconds:
            printed, elapsed, new = now, now - start, done - first
            text = text or f"{new / elapsed:,.0f} {unit}s/s"
            left = f", {elapsed * (total - done) / max(new, 1):.0f} s left" if total else ""
            line = f"{unit} {done:>5}/{total or '?'} | {text} | {elapsed:.0f} s{left}"
            echo(line, sys.stderr)

    yield advance


def open_metrics(path: Path, first_step: int) -> BinaryIO:
    """Open metrics.jsonl for appending, unbuffered.

    A new run begins with an empty file, a resumed one with the entries up to its first step. A
    crash leaves the old file or the new one.
    """
    lines = path.read_bytes().splitlines(True) if path.exists() else []
    kept = [line for line in lines if _is_entry(line, first_step)]
    if kept != lines:
        write_atomically(path, b"".join(kept))
    return path.open("ab", buffering=0)


def _is_entry(line: bytes, last_step: int) -> bool:
    """Whether a line of metrics.jsonl is complete and of a step up to `last_step`."""
    try:
        return line.endswith(b"}\n") and json.loads(line)["step"] <= last_step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def ranking(jobs: dict[str, str]) -> list[str]:
    """The runs of a sweep, {out_dir: settings}, as lines: by the lowest loss on val of each."""
    rows = []
    for folder, settings in jobs.items():
        lines = Path(folder, "metrics.jsonl").read_bytes().splitlines()
        found = [json.loads(line) for line in lines if b"eval/val_loss" in line]
        losses = [(e["eval/val_loss"], with_error(e, "val")) for e in found if e["eval/val_loss"]]
        loss, text = min(losses, default=(math.inf, "not evaluated"))
        rows.append((loss, f"{text:<16}  {folder}  {settings}"))
    header = ["runs of the sweep by their lowest loss on val, nats/token:"] if rows else []
    return header + [line for _, line in sorted(rows)]


def with_error(figures: dict[str, float], split: str) -> str:
    """eval/SPLIT_loss ± eval/SPLIT_error of an evaluation; an exact loss has no error."""
    loss, error = (figures.get(f"eval/{split}_{name}") for name in ("loss", "error"))
    return f"{loss:.4f}" if error is None else f"{loss:.4f} ± {error:.4f}"


class Interrupt(ExitStack):
    """Turns Ctrl-C and SIGTERM into a request to save and exit; a third Ctrl-C ends at once.

    `asked` is the signal's number, or 0 before there is one. A second Ctrl-C changes nothing, so
    that impatience costs no checkpoint.
    """

    asked = pressed = stop = 0

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self.callback(signal.signal, number, signal.signal(number, self._ask))
        return self

    def _ask(self, number, frame):
        self.asked = number
        if number != signal.SIGINT:
            return
        self.pressed += 1
        if self.pressed == 1:  # print() is not for signal handlers
            os.write(2, b"saving after this step; Ctrl-C twice more ends without it\n")
        if self.pressed >= 3:
            raise KeyboardInterrupt

    def agree(self, due: bool, device) -> None:
        """Set `stop` to the number of a signal that a process got, in all processes alike.

        Several processes compare only where it is `due`: they have to wait for each other then.
        """
        if due or parallel.world().size == 1:
            self.stop = parallel.largest(self.asked, device)

    def exit(self, step: int) -> None:
        """End the process, if a signal stopped the run, as a shell expects it."""
        if self.stop:
            if parallel.world().is_main:
                echo(f"saved after step {step}: resume with training.resume=true")
            sys.exit(128 + self.stop)


# --- The log of train.py ------------------------------------------------------------------------


def open_log(run) -> Log | NullLog:
    """Announce a training run, prepare its folder and open its log.

    All but the main process get a `NullLog`, and so does a run that is over.
    """
    if not parallel.world().is_main:
        return NullLog()
    about = describe(run)
    echo(start_message(run.config, run.step, about))
    if run.finished:
        return NullLog()
    if run.config.logging.wandb:
        about["wandb_id"] = run_id(run.config.out_dir, run.step)
    config = run.config.as_dict()
    for path in folders.begin(run.config.out_dir, run.step, about | {"config": config}):
        echo(f"an earlier run's file is kept as {path}")
    return Log(run.config, run.step, about)


def describe(run) -> dict:
    """What a log has of a training run beside its configuration."""
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "architecture": vars(run.model.config),
        "corpus": {"name": run.corpus.name, "sha256": run.corpus.sha256},
        "tokens": {"train": len(run.corpus.train), "val": len(run.corpus.val)},
        "processes": parallel.world().size,
        "device": str(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "compiled": run.compiled,
    }
