"""A short form of the crash test; `python -m tests.stress.crash` kills more processes."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import environment

from nanomdm import checkpoint
from tests.stress import crash


@pytest.fixture
def killed(tmp_path, text_file):
    """killed(kills=4): the kills of a crash test, whose processes are forked from one.

    Their disk is slow, so that a kill that is aimed at a write does not come too late.
    """
    script = (
        "import sys, json, os, time; from types import SimpleNamespace;"
        "import torch._dynamo;"  # seconds, which each process would take that is forked without it
        "from tests.stress import crash;"
        "sync = os.fsync; os.fsync = lambda file: (time.sleep(0.05), sync(file));"
        "config, words = json.loads(sys.argv[1]);"
        "print(json.dumps(crash.crash_test(SimpleNamespace(**config), words, fresh=False)))"
    )

    def killed(**settings) -> list:
        config = {"aimed": 0.7, "span": 0.1, "seed": 1, "out_dir": str(tmp_path / "runs")}
        words = [*crash.SMALL, f"data.path={text_file}"]
        words += ["training.max_iters=24", "system.dtype=float32"]
        result = subprocess.run(
            [sys.executable, "-c", script, json.dumps([config | settings, words])],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return [kill for kills in json.loads(result.stdout.splitlines()[-1]) for kill in kills]

    return killed


def test_a_run_that_is_killed_again_and_again_ends_as_the_uninterrupted_one(killed):
    """Every kill's checkpoint loads, and metrics and weights are the same bits: see crash.py."""
    kills = killed(kills=4)
    assert len(kills) == 4 and any(writing for _, writing in kills)


def test_the_crash_test_notices_a_checkpoint_that_a_kill_has_cost(tmp_path):
    checkpoint.save(tmp_path / "ckpt.pt", {"step": 8})
    assert crash.examine(tmp_path, before=4) == (8, False)
    with pytest.raises(RuntimeError, match="lost steps"):
        crash.examine(tmp_path, before=12)
    (tmp_path / "ckpt.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes()[:-9])
    with pytest.raises(RuntimeError, match="destroyed the checkpoint"):
        crash.examine(tmp_path, before=4)


@pytest.mark.parametrize(("a", "b"), [(0.0, 1e-38), (1.0, 1.0 + 2**-23)])
def test_the_crash_test_notices_one_bit(a, b):
    states = [{"ema": [{"weight": torch.tensor([2.0, value])}]} for value in (a, b)]
    assert crash.same(states[0], states[0]) and not crash.same(*states)
