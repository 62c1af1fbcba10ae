"""Crash test: training killed by SIGKILL at random moments. python -m tests.stress.crash kills=50

It trains a small model once without interruption. Then it starts the same command, with
training.resume=auto, again after every kill until it is done. After every kill the checkpoint must
load and be no older than before. At the end metrics.jsonl and every number in ckpt.pt must equal
those of the uninterrupted run, bit for bit.
"""

import json
import os
import random
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import train
from bench.throughput import hardware
from nanomdm import checkpoint, cli
from nanomdm.cli import Section
from nanomdm.errors import UserError

SMALL = (
    *("model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.block_size=32"),
    *("training.batch_size=4", "training.max_iters=80", "training.warmup_iters=5"),
    *("training.eval_interval=20", "eval.tokens=512", "training.sample_interval=0"),
    *("training.save_interval=4", "logging.interval=1"),
    *("system.compile=false", "system.device=cpu", "training.resume=auto"),
)
COMPARED = ("model", "ema", "optimizer", "stats", "scaler", "step", "best")
WRITING = 0.003  # seconds, about, to write such a small checkpoint


class Kill(NamedTuple):
    step: int  # of the checkpoint on disk, 0 if there was none yet
    writing: bool  # whether it left an unfinished file


# --- One process --------------------------------------------------------------------------------


def start(words: list[str], output: Path, fresh: bool = True) -> int:
    """The id of a process that runs train.py: a new Python or, if not `fresh`, a fork."""
    if child := os.fork():
        return child
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        if fresh:
            os.execv(sys.executable, [sys.executable, str(cli.ROOT / "train.py"), *words])
        train.main(cli.compose(words))
        os._exit(0)
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        os._exit(1)


def over(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(process: int, ready: Callable[[], bool], look: float = 5e-3) -> None:
    """Return when it is `ready` or the process has ended; `look` is the time between two checks."""
    while not (ready() or over(process)):
        time.sleep(look)


def sleep(process: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    wait(process, lambda: time.monotonic() > end)


def finish(process: int, output: Path) -> bool:
    """Whether it was killed; False if it was done. Raises `RuntimeError` for any other end."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"training ended with {code}: {output.read_text()[-2000:]}")
    return code != 0


# --- One run ------------------------------------------------------------------------------------


def survive(folder: Path, words: list[str], limit: int, config: Section, fresh: bool) -> list[Kill]:
    """One run into `folder`, to its end, with up to `limit` kills on the way."""
    chance, output = random.Random(f"{config.seed} {folder.name}"), folder.with_suffix(".txt")
    kills = []
    while True:
        process = start([*words, f"out_dir={folder}"], output, fresh)
        if len(kills) < limit:
            strike(process, folder, chance, config)
        if not finish(process, output):
            return kills
        kills.append(examine(folder, kills[-1].step if kills else 0))


def strike(process: int, folder: Path, chance: random.Random, config: Section) -> None:
    """Kill a process at a random moment after its first step, or in a write of a checkpoint."""
    log, started = folder / "metrics.jsonl", time.time_ns()
    wait(process, lambda: log.exists() and log.stat().st_mtime_ns > started)
    sleep(process, chance.uniform(0, config.span))
    if chance.random() < config.aimed:
        wait(process, lambda: any(unfinished(folder)), look=3e-4)
        sleep(process, chance.uniform(0, WRITING))
    if not over(process):
        os.kill(process, signal.SIGKILL)


def unfinished(folder: Path) -> list[Path]:
    """What errors.write_atomically leaves of a checkpoint when it is killed."""
    return list(folder.glob(".*.pt.*.tmp"))


def examine(folder: Path, before: int) -> Kill:
    """The state after a kill. Raises `RuntimeError` if the kill cost a checkpoint."""
    path = folder / "ckpt.pt"
    try:
        step = checkpoint.load(path)["step"] if before or path.exists() else 0
    except ValueError as error:
        raise RuntimeError(f"a kill destroyed the checkpoint: {error}") from error
    if step < before:
        raise RuntimeError(f"a kill lost steps: {path} had {before}, now {step}")
    return Kill(step, bool(unfinished(folder)))


def result(folder: Path) -> dict:
    """What two runs must have in common: every logged figure but times, and the last state."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in line.items() if k != "train/time_ms"} for line in lines]
    state = checkpoint.load(folder / "ckpt.pt")
    return {"figures": figures} | {key: state[key] for key in COMPARED}


def same(a, b) -> bool:
    """Whether two nested states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def crash_test(config: Section, words: list[str], fresh: bool = True) -> list[list[Kill]]:
    """The kills of each run. Raises `RuntimeError` if a kill changed the result of a run."""
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    survive(out / "uninterrupted", words, 0, config, fresh)
    expected, runs = result(out / "uninterrupted"), []
    while (left := config.kills - sum(map(len, runs))) > 0:
        folder = out / f"run{len(runs) + 1}"
        runs.append(survive(folder, words, left, config, fresh))
        if not same(result(folder), expected):
            raise RuntimeError(f"{folder} differs from {out / 'uninterrupted'}")
    return runs


def main(config: Section) -> None:
    if Path(config.out_dir).exists():
        raise UserError(f"out_dir={config.out_dir} exists: remove it or choose another")
    os.environ |= {"OMP_NUM_THREADS": "1", "NANOMDM_CACHE": f"{config.out_dir}/data"}
    text = config.path or str(cli.ROOT / "corpora" / "plays.txt")
    words = [*SMALL, f"data.path={text}"]
    began = time.monotonic()
    runs = crash_test(config, [*words, *shlex.split(config.words)])
    kills = [kill for run in runs for kill in run]
    print(
        f"{hardware(torch.device('cpu'))}\n"
        f"{len(kills)} kills in {len(runs)} runs, {sum(k.writing for k in kills)} of them in a "
        f"write, {sum(not k.step for k in kills)} before the first checkpoint: every checkpoint "
        f"loads, and every run ends with the figures and weights of the uninterrupted one\n"
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    cli.main(main, "stress/crash")
