"""What a run tells while it goes on: progress, metrics.jsonl, Weights & Biases; and Ctrl-C."""

import json
import math
import netrc
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO
from urllib.parse import urlsplit

from .errors import UserError, visible, write_atomically


class RunLog:
    """A training run's log: a progress bar or lines, metrics.jsonl in its folder and W&B if asked.

    `details` go to W&B beside the configuration.
    """

    def __init__(self, config: SimpleNamespace, first_step: int, details: dict):
        self.total, self.first_step = config.training.max_iters, first_step
        self.wandb = start_wandb(config, details) if config.logging.wandb else None
        self.file = open_metrics(Path(config.out_dir, "metrics.jsonl"), first_step)
        self.bar = progress_bar(self.total, first_step, "step")
        self.start = time.monotonic()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.flush()
        with suppress(OSError):  # said by flush
            self.file.close()
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if error is None else 1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record figures at `step` (optimizer steps done) in metrics.jsonl and W&B.

        What is not finite is null in metrics.jsonl, for JSON has no word for it.
        """
        plain = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self.file.write(json.dumps({"step": step, **plain}) + "\n")
        self.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def flush(self) -> None:
        """Write what is recorded; where that fails, say so and try again with the next entry."""
        try:
            self.file.flush()
        except OSError as error:
            tell(
                f"cannot write {self.file.name} ({error.strerror}): free some space there, then "
                "the entries that are missing follow",
                sys.stderr,
            )

    def samples(self, step: int, texts: list[str]) -> None:
        """Show generated texts, and send them to W&B as a table."""
        for text in texts:
            self.say(f"--- sample after {step} steps ---\n{visible(text, sys.stdout)}\n---")
        if self.wandb is not None:
            table = import_wandb().Table(["step", "text"], [[step, text] for text in texts])
            self.wandb.log({"samples": table}, step=step)

    def progress(self, step: int, text: str) -> None:
        """Move the bar, or print a line, with `text` beside the steps and the time left."""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
            return
        seconds = time.monotonic() - self.start
        left = seconds / (step - self.first_step) * (self.total - step)
        line = f"step {step:>5}/{self.total} | {text} | {seconds:.0f} s, {left:.0f} s left"
        tell(line, sys.stderr)

    def say(self, line: str) -> None:
        """Print on stdout without breaking the bar."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            tell(line)


class Silence:
    """The log of a process that does not lead."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *error) -> None:
        pass

    def _nothing(self, *args) -> None:
        pass

    metrics = samples = progress = say = _nothing


def tell(line: str, file: TextIO | None = None) -> None:
    """Print a line. A reader that is gone, or a full disk behind stdout, does not end a run."""
    with suppress(OSError):
        print(line, file=file or sys.stdout, flush=True)


def progress_bar(total: int, done: int, unit: str):
    """tqdm's bar, where tqdm is installed and stderr is a terminal; else None."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total, initial=done, unit=unit, unit_scale=unit != "step", dynamic_ncols=True)


@contextmanager
def progress(total: int, unit: str):
    """A function to be told how much more is done: a bar, or a line on stderr every ten seconds."""
    bar, done, last = progress_bar(total, 0, unit), 0, time.monotonic()

    def told(more: int) -> None:
        nonlocal done, last
        done += more
        if bar is not None:
            bar.update(more)
        elif time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{done / total:.0%} of {total:,} {unit}s", file=sys.stderr, flush=True)

    yield told
    if bar is not None:
        bar.close()


def open_metrics(path: Path, first_step: int) -> TextIO:
    """metrics.jsonl for writing on: a resumed run drops what was recorded after its first step.

    A crash on the way leaves the file as it was, or as it is to be.
    """
    lines = path.read_text(errors="replace").splitlines(True) if path.exists() else []
    kept = [line for line in lines if first_step and _step(line) <= first_step]
    if kept != lines:
        write_atomically(path, "".join(kept).encode())
    return path.open("a")


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite if it was cut or damaged."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("}\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


# --- Weights & Biases ---------------------------------------------------------------------------


def start_wandb(config: SimpleNamespace, details: dict):
    """A W&B run; offline, and saying so, without login or network. WANDB_MODE goes before that."""
    wandb = import_wandb()
    mode, settings = os.environ.get("WANDB_MODE"), config.logging
    if mode is None and (reason := why_offline()):
        mode = "offline"
        print(
            f"W&B goes offline ({reason}): set WANDB_MODE=online if that is wrong", file=sys.stderr
        )
    return wandb.init(
        project=settings.project,
        name=settings.name or None,
        tags=settings.tags,
        mode=mode,
        dir=config.out_dir,
        config=config.as_dict() | details,
    )


def import_wandb():
    try:
        import wandb
    except ImportError:
        raise UserError("logging.wandb=true needs a package: pip install wandb") from None
    return wandb


def why_offline() -> str:
    """Why W&B cannot be reached; empty if it can."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    port = url.port or (80 if url.scheme == "http" else 443)
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(url.hostname):
        return "no login"
    try:
        socket.create_connection((url.hostname, port), timeout=3).close()
    except OSError as error:
        return f"no network: {error}"
    return ""


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


# --- Time and signals ---------------------------------------------------------------------------


class Clock:
    """Times the steps, and leaves out what is done between them."""

    def __init__(self, step: int):
        self.step, self.start = step, time.perf_counter()

    def milliseconds_per_step(self, step: int) -> float:
        """The mean since the last call."""
        milliseconds = 1e3 * (time.perf_counter() - self.start) / (step - self.step)
        self.step, self.start = step, time.perf_counter()
        return milliseconds

    @contextmanager
    def paused(self):
        pause = time.perf_counter()
        yield
        self.start += time.perf_counter() - pause


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a request to save and exit; a third Ctrl-C ends at once.

    `asked` is the signal's number, 0 before there is one. The second Ctrl-C is heard and changes
    nothing: impatience does not cost a checkpoint.
    """

    asked = pressed = 0

    def __enter__(self) -> "Interrupt":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.previous = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        self.asked = number
        if number != signal.SIGINT:
            return
        self.pressed += 1
        if self.pressed == 1:  # print() is not for signal handlers
            os.write(2, b"saving after this step; Ctrl-C twice more ends without it\n")
        if self.pressed == 2:
            signal.signal(signal.SIGINT, signal.default_int_handler)
