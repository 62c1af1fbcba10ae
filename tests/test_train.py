"""train.py: what a run leaves behind, and that interrupting it changes nothing."""

import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUIET, ROOT, TEXT, TINY, environment
from torch._dynamo.utils import counters

import data
import train as train_script
from model import ModelConfig
from nanomdm import checkpoint, cli, optim, runlog, runs
from nanomdm import text as text_room
from nanomdm.errors import UserError

STEPS = 12  # of TINY
FIGURE = r"\d\.\d{4} ± \d\.\d{4}"
BOUND_LINE = rf"step \d+: bound {FIGURE} on train and {FIGURE} on val, nats/token"


@pytest.fixture
def train(run, text_file):
    """train("key=value", ...) on the tiny corpus into ./out; returns the checkpoint."""

    def train(*words: str, code: int = 0) -> dict:
        result = run("train.py", *TINY, f"data.path={text_file}", *words)
        assert result.code == code, result
        out = [word.split("=")[1] for word in words if word.startswith("out_dir=")] or ["out"]
        return checkpoint.load(f"{out[0]}/ckpt.pt")

    return train


def metrics(folder: str | Path = "out") -> list[dict]:
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "train/time_ms"} for line in lines]


def losses(folder: str = "out") -> list[float]:
    return [line["train/loss"] for line in metrics(folder) if "train/loss" in line]


def equal(a, b) -> bool:
    """Whether two nested states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def interrupt_at(monkeypatch, step: int) -> None:
    """Press Ctrl-C, for real, while the run logs this step."""
    log = runlog.Log.metrics

    def logged(self, now, values):
        log(self, now, values)
        if now == step and "train/loss" in values:
            monkeypatch.undo_interrupt()
            signal.raise_signal(signal.SIGINT)

    monkeypatch.undo_interrupt = lambda: setattr(runlog.Log, "metrics", log)
    monkeypatch.setattr(runlog.Log, "metrics", logged)


STATE = ("model", "ema", "optimizer", "step", "best", "stats")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(train, monkeypatch, optimizer):
    words = (f"training.optimizer={optimizer}", "model.dropout=0.2", "training.grad_accum=2")
    whole, recorded = train(*words, "out_dir=whole"), metrics("whole")
    interrupt_at(monkeypatch, step=7)
    assert train(*words, code=130)["step"] == 7
    resumed = train("training.resume=true")
    assert all(equal(whole[key], resumed[key]) for key in STATE)
    assert metrics() == recorded


def test_a_killed_run_resumes_from_its_last_checkpoint(train, monkeypatch):
    whole, recorded = train("out_dir=whole"), metrics("whole")
    log = runlog.Log.metrics

    def dies(self, step, values):
        log(self, step, values)
        if step == 8:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(runlog.Log, "metrics", dies)
        with pytest.raises(MemoryError):
            train()
    assert checkpoint.load("out/ckpt.pt")["step"] == 6
    resumed = train("training.resume=true")
    assert all(equal(whole[key], resumed[key]) for key in STATE)
    assert metrics() == recorded


def test_resuming_a_finished_run_leaves_it_as_it_is(train):
    assert equal(train(), train("training.resume=true"))


def test_a_resumed_run_can_be_made_longer(train):
    train()
    longer = train("training.resume=true", f"training.max_iters={STEPS + 3}")
    assert longer["step"] == STEPS + 3
    assert len(losses()) == STEPS + 3


def test_the_same_seed_gives_the_same_weights(train):
    assert equal(train("out_dir=a")["model"], train("out_dir=b")["model"])


def test_another_seed_gives_other_weights(train):
    assert not equal(train("out_dir=a")["model"], train("out_dir=b", "system.seed=2")["model"])


def test_evaluating_and_sampling_do_not_change_what_is_trained(train):
    often = train("out_dir=a", "training.eval_interval=1", "training.sample_interval=1")
    never = train("out_dir=b", "training.eval_interval=0", "training.sample_interval=0")
    assert equal(often["model"], never["model"])


def test_accumulated_gradients_equal_those_of_the_whole_batch(train):
    train("out_dir=a")
    train("out_dir=b", "training.grad_accum=4")
    assert losses("a")[:3] == pytest.approx(losses("b")[:3], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_multiplies_in_the_precision_of_the_run(train, monkeypatch, dtype):
    seen, original = set(), optim.orthogonalise
    monkeypatch.setattr(optim, "orthogonalise", lambda *x: seen.add((y := original(*x)).dtype) or y)
    train(f"system.dtype={dtype}", "training.max_iters=1")
    assert seen == {getattr(torch, dtype)}


def test_the_loss_curve_is_what_it_was(train):
    """Seeded, so that a change that should alter nothing can be seen not to."""
    train("training.max_iters=20", "model.dropout=0.1", *BEFORE)
    assert losses() == pytest.approx(CURVE, abs=2e-3)


BEFORE = (  # the recipe that the curve was recorded with
    *("model.conv_width=0", "diffusion.weighting=1.0", "training.learning_rate=3e-3"),
    *("training.weight_decay=0.1", "training.ema_decay=0.98"),
)
CURVE = [
    4.0550,
    3.2985,
    3.4192,
    2.9274,
    3.6434,
    3.0130,
    4.3946,
    3.1235,
    2.5997,
    4.2793,
    3.7802,
    2.6600,
    3.4485,
    3.3587,
    3.1305,
    3.4599,
    2.6236,
    3.3309,
    3.6948,
    3.2792,
]


def test_training_learns_the_text(train):
    """A model that knows the letters' frequencies alone could not pass."""
    train(*QUIET, "training.max_iters=150", "training.eval_interval=150")
    shares = torch.tensor([TEXT.count(c) for c in set(TEXT)]) / len(TEXT)
    entropy = -(shares * shares.log()).sum().item()
    assert metrics()[-1]["eval/val_loss"] < 0.8 * entropy


def test_best_pt_holds_the_weights_with_the_lowest_bound(train):
    train("training.eval_interval=2", "training.learning_rate=0.3")
    bounds = {line["step"]: line["eval/val_loss"] for line in metrics() if "eval/val_loss" in line}
    best = checkpoint.load("out/best.pt")
    assert best["step"] == min(bounds, key=bounds.get)
    assert best["best"] == min(bounds.values())


def test_the_bound_in_the_log_is_the_one_that_eval_prints(run, trained):
    logged = metrics(trained)[-1]["eval/val_loss"]
    printed = run("eval.py", f"checkpoint={trained}/ckpt.pt", "eval.draws=2", TINY[-1])
    assert f"loss {logged:.4f} ± " in printed.out


def test_every_bound_that_is_printed_has_its_error(run, text_file):
    result = run("train.py", *TINY, f"data.path={text_file}")
    lines = [line for line in result.out.splitlines() if "bound" in line]
    assert len(lines) == 2
    assert all(re.fullmatch(BOUND_LINE, line) for line in lines)


@pytest.mark.parametrize("characters", [200, 1_100])  # one block to validate, and four
def test_the_error_of_a_bound_on_few_rows_is_what_other_masks_differ_by(run, tmp_path, characters):
    (tmp_path / "short.txt").write_text(TEXT[:characters])
    words = ("data.path=short.txt", "training.sample_interval=0")
    assert "tokens to validate are few" in run("train.py", *TINY, *words).out
    words += (*TINY, "training.resume=true", "training.max_iters=13")
    going_on, found = train_script.Run(cli.compose(words), torch.device("cpu")), []
    log = SimpleNamespace(say=print, metrics=lambda step, values: found.append(values))
    for seed in range(12):
        going_on.config.system.seed, going_on.best = seed, -math.inf  # none is a best one to save
        train_script.evaluate(going_on, log)
    values = torch.tensor([line["eval/val_loss"] for line in found])
    errors = torch.tensor([line["eval/val_error"] for line in found])
    assert 0.5 < values.std() / errors.mean() < 1.6


def test_the_rate_of_a_run_that_is_made_longer_is_announced(run, text_file):
    words = (*TINY, f"data.path={text_file}", "training.sample_interval=0")
    run("train.py", *words)
    longer = run("train.py", *words, "training.resume=true", "training.max_iters=24")
    line = "training.max_iters was 12 and is 24: the learning rate goes from 0% to 52% of its peak"
    assert line in longer.err
    last, first = [row["train/lr"] for row in metrics() if "train/lr" in row][11:13]
    assert last == 0 and first == pytest.approx(11 / 21 * 1e-2)


@pytest.mark.parametrize(
    ("step", "now", "said"),
    [
        (6, 24, "training.max_iters was 12 and is 24: the learning rate goes from 67% to 81%"),
        (6, 12, ""),
        (0, 24, ""),
        (12, 12, ""),
    ],
)
def test_the_rate_is_announced_where_another_number_of_steps_changes_it(step, now, said, capsys):
    settings = SimpleNamespace(max_iters=now, warmup_iters=2, lr_schedule="linear")
    runs.announce_schedule(settings, {"step": step, "config": {"training": {"max_iters": 12}}})
    err = capsys.readouterr().err
    assert err.startswith(said) and bool(err) == bool(said)


@pytest.mark.parametrize(
    ("device", "processes", "changes", "shards", "layers", "rows", "bytes_"),
    [
        ("cpu", 1, {}, 1, 8, 64, 100),
        ("cpu", 1, {"activation_checkpointing": True}, 1, 1, 64, 100),
        ("cpu", 1, {"grad_accum": 4}, 1, 8, 16, 100),
        ("cpu", 1, {"block_length": 64}, 1, 16, 64, 100),  # two streams
        ("cpu", 1, {"block_length": 512}, 1, 8, 64, 100),
        ("cpu", 2, {"parallel": "ddp"}, 1, 8, 32, 100),
        ("cpu", 2, {"parallel": "fsdp"}, 2, 8, 32, 100),
        ("cuda", 1, {}, 1, 8, 64, 16),
    ],
)
def test_a_run_that_takes_a_byte_more_than_there_is_is_refused(
    device, processes, changes, shards, layers, rows, bytes_, monkeypatch
):
    """16 bytes a weight, of 12 n d^2 + V d, and so many for each number of a layer."""
    settings = {"parallel": "auto", "grad_accum": 1, "activation_checkpointing": False} | changes
    shape = ModelConfig(1000, 512, 8, 8, 1024, block_length=settings.pop("block_length", 0))
    config = SimpleNamespace(
        training=SimpleNamespace(batch_size=64, **settings),
        system=SimpleNamespace(device=device, parallel=settings["parallel"]),
    )
    corpus = SimpleNamespace(train=range(10**6), layout="stream", name="text")
    model = 16 * (12 * 8 * 1024**2 + 1000 * 1024) // shards
    batch = bytes_ * layers * rows * 512 * 1024
    monkeypatch.setattr(runs.devices, "pick_device", torch.device)
    monkeypatch.setattr(runs.parallel, "world", lambda: SimpleNamespace(size=processes))
    monkeypatch.setattr(runs.devices, "memory", lambda device: model + batch)
    runs.require_room(config, corpus, shape)
    monkeypatch.setattr(runs.devices, "memory", lambda device: model + batch - 1)
    with pytest.raises(UserError) as error:
        runs.require_room(config, corpus, shape)
    sizes = f"{model / 2**30:.1f} GiB for the model and {batch / 2**30:.1f} GiB for {rows} rows"
    assert f"training takes at least {sizes}, and {device} has" in str(error.value)


@pytest.mark.parametrize(("finite", "code"), [(6, 0), (5, 1)])
def test_a_run_whose_steps_were_mostly_skipped_fails_with_a_last_word(
    run, text_file, monkeypatch, finite, code
):
    add = optim.StepStats.add

    def broken(self, loss, grad_norm, step):
        return add(self, loss, grad_norm if step <= finite else grad_norm * math.nan, step)

    monkeypatch.setattr(optim.StepStats, "add", broken)
    result = run("train.py", *TINY, f"data.path={text_file}", "training.sample_interval=0")
    said = f"not finite in {12 - finite} of 12 steps, which were skipped: train again with a lower"
    assert result.code == code and (said in result.err) == bool(code)
    assert checkpoint.load("out/ckpt.pt")["step"] == STEPS


def test_ids_of_ones_own_without_a_meta_file_are_trained_on_sampled_and_scored(run):
    rng = np.random.default_rng(0)
    for split, count in (("train", 900), ("val", 100)):
        rng.integers(0, 1500, count).astype(np.uint16).tofile(f"{split}.bin")
    ids = ("data.dir=.", "data.tokenizer=ids", "data.vocab_size=1500")
    assert "1500 symbols" in run("train.py", *TINY, *ids).out
    resumed = run("train.py", "training.resume=true", "training.max_iters=13", "data.dir=.")
    assert resumed.code == 0, resumed.err
    sample = run("sample.py", "prompt=7 [MASK*2] 1499", "sampling.steps=2").out.split()
    assert sample[0] == "7" and len(sample) == 4 and sample[3] == "1499"
    assert all(0 <= int(word) < 1500 for word in sample)
    printed = run("eval.py", "output=figures.json").out
    assert "nats/token" in printed and "bits" not in printed
    assert json.loads(Path("figures.json").read_text())["bits_per_byte"] is None


@pytest.mark.parametrize("key", ["path", "dir"])
def test_a_text_that_has_changed_is_neither_trained_on_further_nor_scored(run, tmp_path, key):
    def place(text: str) -> None:
        """As a.txt, or as the bins in the folder a."""
        Path("a.txt").write_text(text)
        if key == "dir":
            found = text_room.find("", "a.txt", tmp_path)
            data.prepare(found, "char", 0, tmp_path / "new")
            shutil.rmtree("a", ignore_errors=True)
            next(Path("new").iterdir()).rename("a")

    place(TEXT)
    where = f"data.{key}=a" + (".txt" if key == "path" else "")
    assert run("train.py", *TINY, *QUIET, where).code == 0
    place(TEXT[::-1])
    for command in (["train.py", "training.resume=true", "training.max_iters=20"], ["eval.py"]):
        result = run(*command)
        assert result.code == 2 and "is not the text that the checkpoint was" in result.err
    place(TEXT)
    assert run("eval.py").code == 0


def test_a_second_run_keeps_the_first_ones_files(train):
    first = train()
    train("system.seed=2")
    assert equal(checkpoint.load("out/ckpt-1.pt"), first)


def test_a_second_run_says_what_it_keeps(run, text_file):
    run("train.py", *TINY, f"data.path={text_file}")
    result = run("train.py", *TINY, f"data.path={text_file}")
    assert "ckpt-1.pt" in result.out and "best-1.pt" in result.out


def test_init_from_starts_a_new_run_from_the_ema_weights(train, trained):
    start = checkpoint.load(trained / "ckpt.pt")
    tuned = train(f"training.init_from={trained}/ckpt.pt", "training.learning_rate=1e-9")
    assert tuned["step"] == STEPS
    close = [torch.allclose(tuned["ema"][k], v, atol=1e-6) for k, v in start["ema"].items()]
    assert all(close)


def test_init_from_takes_the_network_from_the_checkpoint(run, trained, text_file):
    result = run(
        "train.py",
        *[word for word in TINY if not word.startswith("model.")],
        *(f"data.path={text_file}", f"training.init_from={trained}/ckpt.pt", "model.dropout=0.1"),
    )
    assert result.code == 0, result.err
    shape = checkpoint.load("out/ckpt.pt")["model_config"]
    assert (shape["n_embd"], shape["dropout"]) == (32, 0.1)


def test_a_checkpoint_names_its_corpus(trained, text_file):
    corpus = checkpoint.load(trained / "ckpt.pt")["corpus"]
    digest = hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert corpus == {"name": text_file.name, "sha256": digest, "layout": "stream"}


def script(name: str | Path, *words: str, folder, **changes: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / name), *words]
    return subprocess.run(
        command, cwd=folder, env=environment(**changes), capture_output=True, text=True, timeout=120
    )


def test_a_run_goes_on_without_a_working_compiler(tmp_path, text_file):
    result = script(
        "train.py",
        *(*TINY, f"data.path={text_file}", "system.compile=true", "training.max_iters=2"),
        folder=tmp_path,
        CXX="false",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    assert result.returncode == 0, result.stderr
    assert "going on without" in result.stderr
    assert checkpoint.load(tmp_path / "out" / "ckpt.pt")["step"] == 2


def test_compiling_does_not_change_the_losses(train):
    words = ("model.n_layer=3", "training.max_iters=3")
    train("out_dir=eager", *words)
    counters.clear()
    train("out_dir=compiled", *words, "system.compile=true")
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-3)
    assert counters["stats"]["unique_graphs"] == 1  # a block, in one piece, once for all three
    assert not counters["graph_break"]


BLOCKER = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
extras = {"tqdm", "tiktoken", "tokenizers", "wandb", "pytest", "hypothesis"}
extras |= {"matplotlib", "transformers", "lm_eval", "datasets"}

def find_installed(name, *rest):
    return None if name.split(".")[0] in extras else find(name, *rest)

PathFinder.find_spec = staticmethod(find_installed)
"""


@pytest.fixture
def plain_install(tmp_path):
    """PYTHONPATH of a Python that has none of the optional packages."""
    (tmp_path / "blocker").mkdir()
    (tmp_path / "blocker" / "sitecustomize.py").write_text(BLOCKER)
    return {"PYTHONPATH": f"{tmp_path}/blocker:{ROOT}"}


ALL_THREE = """
import json, runpy, sys
for name, *words in json.loads(sys.argv[1]):
    sys.argv = [name, *words]
    runpy.run_path(f"{ROOT}/{name}", run_name="__main__")
"""


def test_the_scripts_need_no_optional_package(tmp_path, text_file, plain_install):
    commands = [["train.py", *TINY, f"data.path={text_file}"]]
    commands += [[name, "sampling.steps=2"] for name in ("sample.py", "eval.py")]
    (tmp_path / "all.py").write_text(f"ROOT = {str(ROOT)!r}\n{ALL_THREE}")
    result = script(tmp_path / "all.py", json.dumps(commands), folder=tmp_path, **plain_install)
    assert result.returncode == 0, result.stderr
    assert "nats/token" in result.stdout
