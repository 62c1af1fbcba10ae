"""What a run tells while it goes on: progress, metrics.jsonl, Weights & Biases; and Ctrl-C."""

import json
import netrc
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit


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
        self.file.close()
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=0 if error is None else 1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record figures at `step` (optimizer steps done) in metrics.jsonl and W&B."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def samples(self, step: int, texts: list[str]) -> None:
        """Show generated texts, and send them to W&B as a table."""
        for text in texts:
            self.say(f"--- sample after {step} steps ---\n{text}\n---")
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
        print(line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """Print on stdout without breaking the bar."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)


class Silence:
    """The log of a process that does not lead."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *error) -> None:
        pass

    def _nothing(self, *args) -> None:
        pass

    metrics = samples = progress = say = _nothing


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


def open_metrics(path: Path, first_step: int):
    """metrics.jsonl for writing on: a resumed run drops what was recorded after its first step."""
    lines = path.read_text().splitlines(keepends=True) if first_step and path.exists() else []
    file = path.open("w")
    file.writelines(ln for ln in lines if ln[-2:] == "}\n" and json.loads(ln)["step"] <= first_step)
    return file


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
        raise ValueError("logging.wandb=true needs a package: pip install wandb") from None
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
    """Turns the first Ctrl-C into a request to save and exit; a second one ends at once."""

    asked = False

    def __enter__(self) -> "Interrupt":
        self.previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _ask(self, number, frame) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
