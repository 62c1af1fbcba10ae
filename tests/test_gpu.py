"""`bench.gpu` in miniature: a day with a GPU must not be lost to a typo."""

import json
import math
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_bench import RIVAL

from bench import agreement, gpu, throughput
from nanomdm import devices


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of all parts: the part sampling reads what the part small has trained."""
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture
def tables(folder, monkeypatch):
    """tables("small", seconds): run a part in this process; its tables by title."""

    def run(name: str, seconds: float, cut: bool = False, **settings) -> dict[str, list[dict]]:
        monkeypatch.chdir(folder)
        config = {"out": "out", "data": {"path": ""}, "nanogpt": "", "words": "", "device": "cpu"}
        (folder / "scratch" / name).mkdir(parents=True, exist_ok=True)
        (folder / "out").mkdir(exist_ok=True)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        end, scratch = time.time() + seconds, str(folder / "scratch")
        gpu.run_part(name, end, scratch, config | {"seed": 1} | settings)
        stored = json.loads((folder / "out" / "gpu.json").read_text())[name]
        found = stored["tables"]
        assert bool(stored["cut"]) == cut
        listing = (folder / "out" / "gpu.md").read_text()
        assert all(f"## {title}" in listing for title in found)
        return found

    return run


def number(text: str) -> float:
    return float(text.split()[0].rstrip("%").replace(",", ""))


def test_check_compares_everything_and_passes(tables, monkeypatch):
    monkeypatch.setattr(devices, "compiled", lambda function, options=None: function)
    rows = tables("check", 100)["Agreement"]
    assert {row["verdict"] for row in rows} == {"passed"}
    lines = " ".join(row["check"] for row in rows)
    for what in ("gradient, float32", "gradient, bfloat16", "bound", "skipped", "waits"):
        assert what in lines
    for what in ("adamw in float32", "muon in float32", "muon in bfloat16"):
        assert what in lines
    for what in ("ddp", "fsdp", "resumed", "compiled", "blocks of 8", "spread", "small: loss"):
        assert what in lines


def test_a_check_that_breaks_or_fails_is_a_line_and_ends_no_other(tables, folder, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    def checks(case, processes, scratch):
        yield "broken", broken
        yield "wrong", lambda: iter([("one and two", 1.0, 0.5)])
        yield "right", lambda: iter([("one and one", 0.0, 0.0)])

    monkeypatch.setattr(agreement, "checks", checks)
    with pytest.raises(SystemExit, match="2 of the checks failed"):
        tables("check", 100)
    rows = json.loads((folder / "out" / "gpu.json").read_text())["check"]["tables"]["Agreement"]
    assert [row["verdict"] for row in rows] == ["failed", "failed", "passed"]
    assert rows[0]["figure"] == "RuntimeError: no such kernel"


def test_the_error_of_a_process_is_found_in_its_log():
    log = "[rank0]: Traceback (most recent call last):\n[rank0]: ValueError: no such device\n"
    log += "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n====\n" * 20
    assert agreement.error_in(log) == "ValueError: no such device"
    assert agreement.error_in("x" * 400) == "x" * 300


def test_relative_is_the_distance_over_the_length():
    pairs = [torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([0.0]), torch.tensor([8.0])]
    assert agreement.relative(*pairs) == 5 / 8


def test_the_first_difference_is_that_of_the_positions_or_of_the_tokens():
    def step(i, revealed, tokens, logits):
        logits, tokens = torch.tensor([logits]), torch.tensor([tokens])
        return SimpleNamespace(
            step=i, revealed=torch.tensor(revealed), tokens=tokens, logits=logits
        )

    ours = [step(1, [True, False], 3, 0.5), step(2, [False, True], 4, 0.5)]
    tokens = [step(1, [True, False], 3, 0.5), step(2, [False, True], 5, 0.75)]
    places = [step(1, [False, True], 3, 0.5)]
    assert agreement.first_difference(ours, tokens) == (2, 0.25)
    assert agreement.first_difference(ours, places) == (1, math.inf)


def test_speed_has_a_row_for_each_network_the_rival_and_the_kernels(tables, folder, monkeypatch):
    (folder / "rival").mkdir()
    (folder / "rival" / "model.py").write_text(RIVAL)
    monkeypatch.setattr(throughput, "TOKENS", 2**14)
    monkeypatch.setattr(throughput, "matmul_peak", lambda device, dtype: 1e12)
    found = tables("speed", 60, nanogpt="rival")
    training, kernels, beside = found.values()
    assert [row["network"] for row in training] == list(gpu.SPEED)
    for row in training:
        assert number(row["tokens_per_second"]) > 0 and 0 < number(row["optimizer"]) < 100
    assert number(beside[0]["ratio"]) > 0
    spent = sum(number(kernels[0][kind]) for kind in gpu.KINDS)
    assert 0 < spent < 1.05 * number(kernels[0]["step"])
    assert "aten::mm" in (folder / "out" / "kernels-speed.txt").read_text()


def test_small_trains_both_for_the_same_time_and_draws_them(tables, folder):
    found = tables("small", 4)
    diffusion, control = found["The small preset, nats/token on validation (causal: exact)"]
    assert 2 < number(diffusion["last_on_val"]) < 4.2 and "±" in diffusion["last_on_val"]
    assert "±" not in control["last_on_val"]
    assert abs(number(control["seconds"]) - number(diffusion["seconds"])) <= 2
    for network in (diffusion, control):
        curve = [row for row in found["Curves"] if row["network"] == network["network"]]
        assert len(curve) == gpu.LOOKS + 1 and number(curve[0]["nats"]) > number(curve[-1]["nats"])
    assert (folder / "out" / "small.png").stat().st_size > 10_000


def test_sampling_times_every_strategy_and_scores_what_small_trained(tables, folder):
    found = tables("sampling", 60)
    rows = found["Sampling in float32"]
    assert {row["strategy"] for row in rows} >= {"spread", "threshold", "left_to_right"}
    assert {row["batch"] for row in rows} == {1, 4}
    scores = [row for title, rows in found.items() if "Held-out" in title for row in rows]
    few, many = (number(row["nats_per_token"]) for row in (scores[0], scores[2]))
    assert scores[0]["calls"] == "1" and many < few


def test_sudoku_solves_grids_in_several_orders(tables):
    ((title, rows),) = tables("sudoku", 5).items()
    assert title.startswith("Sudoku 4 x 4") and len(rows) == len(gpu.ORDERS)
    assert all(0 <= number(row["50% blank"]) <= 100 for row in rows)


CHILD = "import json, signal, sys, time; name = json.loads(sys.argv[1])['name']; "
CHILD += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('told to end', flush=True))); "
CHILD += "time.sleep(60 * (name == 'sampling')); sys.exit(3 * (name == 'check'))"


def test_a_part_that_fails_or_hangs_takes_no_other_along(run, tmp_path, monkeypatch):
    (tmp_path / "gpu").mkdir()
    earlier = {
        "small": {"about": "yesterday", "tables": {"Bounds": [{"network": "kept"}]}},
        "check": {"about": "yesterday", "tables": {"Agreement": [{"check": "gone"}]}},
    }
    (tmp_path / "gpu" / "gpu.json").write_text(json.dumps(earlier))
    monkeypatch.setattr(gpu, "CHILD", CHILD)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    words = ["minutes=0.01", "parts=[check,sudoku,sampling]", "device=cpu"]
    result = run("bench.gpu", *words)
    assert result.code == 1 and "check ended with exit code 3; sampling did not end" in result.err
    assert "told to end" in result.out
    parts = json.loads((tmp_path / "gpu" / "gpu.json").read_text())
    assert not parts["sudoku"]["failed"] and parts["small"]["tables"]
    listing = (tmp_path / "gpu" / "gpu.md").read_text()
    order = ["# check", "exit code 3", "# small", "yesterday", "kept", "# sudoku", "was stopped"]
    places = [listing.index(words) for words in order]
    assert places == sorted(places) and "gone" not in listing and "rehearsal" in listing


def test_a_check_that_is_ended_ends_its_processes(tmp_path):
    """As at the end of its time: nothing may run beside the parts that follow."""
    scratch, out = tmp_path / "scratch", tmp_path / "gpu"
    scratch.mkdir()
    out.mkdir()
    config = {"out": str(out), "data": {"path": ""}, "device": "cpu", "seed": 1}
    given = {"name": "check", "end": time.time() + 60, "scratch": str(scratch), "config": config}
    with subprocess.Popen([sys.executable, "-c", gpu.CHILD, json.dumps(given)], cwd=ROOT) as child:
        while not (scratch / "fsdp.log").exists():
            time.sleep(0.1)
            assert child.poll() is None
        child.terminate()
        assert child.wait(timeout=30) == 143
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(scratch) not in lines


def test_a_part_says_what_a_user_can_mend(run):
    """In a process of its own."""
    words = ["parts=[small]", "device=cpu", "words=training.lr_schedule=never"]
    result = run("bench.gpu", *words)
    assert result.code == 1 and "small ended with exit code 1" in result.err
    assert "error: training.lr_schedule=never is unknown" in result.err


def test_a_part_is_cut_to_its_share_of_the_time(run, monkeypatch):
    ends, now = [], time.time()
    monkeypatch.setattr(gpu, "why_it_failed", lambda name, given: ends.append(given["end"]) or "")
    result = run("bench.gpu", "minutes=8.0", "device=cpu")
    assert result.code == 0, result.err
    # Nothing was used of the time: what is left is shared by those that are left.
    shares = [480 * minutes / left for minutes, left in ((1, 8), (2, 7), (3, 5), (1.5, 2), (1, 1))]
    assert ends == pytest.approx([now + share for share in shares], abs=5)


@pytest.mark.parametrize("name", ["speed", "sampling"])
def test_what_time_has_not_sufficed_for_is_said(tables, folder, name):
    assert tables(name, 0, cut=True) == {}
    assert "Time ended before all of it" in (folder / "out" / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("parts=[fast]", "parts=fast is unknown"),
        ("parts=[]", "parts not empty"),
        ("minutes=0", "must be positive"),
        ("nanogpt=nowhere", "nowhere/model.py"),
        ("data.path=nowhere.txt", "nowhere.txt is not there"),
        ("words='", "words: No closing quotation"),
        ("device=cuda:1", "device=cuda:1 is unknown"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_run(run, tmp_path, word, said):
    result = run("bench.gpu", "device=cpu", word)
    assert (result.code, result.err.count("\n")) == (2, 1) and said in result.err
    assert not (tmp_path / "gpu").exists()
