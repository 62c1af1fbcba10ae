"""What several tests share: the three scripts run in this process, on a tiny corpus and model."""

import importlib
import os
import sys
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import hydra
import pytest
import torch
import yaml

import eval as eval_script
import sample as sample_script
import train as train_script
from model import ModelConfig, Transformer
from nanomdm import checkpoint, cli
from nanomdm.runlog import Log

torch.set_num_threads(1)  # threads only get into each other's way where models are tiny
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "train.py": train_script.main,
    "sample.py": sample_script.main,
    "eval.py": eval_script.main,
}
TINY = (
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=32"),
    *("training.max_iters=12", "training.batch_size=8", "training.warmup_iters=2"),
    *("training.eval_interval=6", "training.sample_interval=6", "training.save_interval=6"),
    *("sampling.steps=4", "logging.interval=1", "system.compile=false"),
    *("system.device=cpu", "system.dtype=float32"),
)
QUIET = tuple(f"training.{what}_interval=0" for what in ("eval", "sample", "save"))
TEXT = "".join(f"KING {n % 7}:\nThe {w} of {w}s, and {n} more.\n\n" for n in range(60) for w in
               ("crown", "night", "sword", "rose"))  # fmt: skip


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """run("train.py", "key=value", ...) as from a shell, in `tmp_path`: exit code and output.

    Also run("bench.NAME", ...), run("tools.NAME", ...) and run("tests.stress.NAME", ...).
    """
    monkeypatch.chdir(tmp_path)

    def run(script: str, *words: str) -> Result:
        monkeypatch.setattr(sys, "argv", [script, *words])
        capfd.readouterr()
        code = 0
        try:
            if script in SCRIPTS:
                cli.main(SCRIPTS[script])
            else:  # "bench.judge", as by python -m
                name = script.removeprefix("tests.").replace(".", "/")
                cli.main(importlib.import_module(script).main, name)
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """The folder of downloads and tokenized texts, one for all tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOMDM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def composed_once():
    """Equal files and words have equal settings: a thousand commands would parse them anew."""
    load, scan, compose, known = yaml.load, yaml.scan, hydra.compose, {}

    def load_once(stream, Loader):
        content = stream.read() if hasattr(stream, "read") else stream
        key = content, Loader.__qualname__
        if key not in known:
            known[key] = load(content, Loader)
        return deepcopy(known[key])

    def scan_once(content):
        if content not in known:
            known[content] = list(scan(content))
        return known[content]

    def compose_once(name, overrides):
        files = sorted(cli.CONFIGS.rglob("*.yaml"))
        key = name, *overrides, *((str(file), file.read_bytes()) for file in files)
        if key not in known:
            known[key] = compose(name, overrides)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "load", load_once)
        patch.setattr(yaml, "scan", scan_once)
        patch.setattr(hydra, "compose", compose_once)
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "kings.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, text_file) -> Path:
    """The out_dir of a tiny run that is over: ckpt.pt, best.pt and metrics.jsonl."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = [f"data.path={text_file}", f"out_dir={folder}/out"]
        patch.setattr(sys, "argv", ["train.py", *TINY, *words])
        cli.main(train_script.main)
    return folder / "out"


@pytest.fixture
def log(tmp_path):
    """log(first_step): the log of a run of 20 steps in a folder of its own."""
    config = SimpleNamespace(
        training=SimpleNamespace(max_iters=20, batch_size=4),
        model=SimpleNamespace(block_size=8),
        logging=SimpleNamespace(wandb=False),
        out_dir=str(tmp_path),
    )
    return lambda first_step=0: Log(config, first_step, {})


def load_model(path: str | Path, resume: bool = False) -> checkpoint.Loaded:
    """What the scripts make of a checkpoint, on the CPU."""
    return checkpoint.load_model(path, "cpu", Transformer, ModelConfig, resume)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for a subprocess that is to import the project's files."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | changes


@contextmanager
def files_limited_to(size: int):
    """A quota: no file of this process may grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
