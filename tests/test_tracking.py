"""Weights & Biases: what a recording stub receives, and one real run without a network."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT, TINY, environment

from nanomdm import checkpoint

FIGURES = ("loss", "loss_avg", "loss_max", "grad_norm", "grad_norm_max", "skipped", "lr", "time_ms")
TRAIN = {f"train/{name}" for name in FIGURES}
EVAL = {f"eval/{split}_{name}" for split in ("train", "val") for name in ("loss", "ppl", "error")}

SHORT = ("training.max_iters=1", "training.eval_interval=0", "training.sample_interval=0")


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """Nobody is logged in, and the environment has no settings of W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


class Stub(ModuleType):
    """Records what is sent to W&B; nobody is logged in."""

    Error = RuntimeError

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.finished = [], [], []

    def login(self, prompt):
        return False

    def init(self, **settings):
        self.started.append(settings)
        return self  # as its own run

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.finished.append(exit_code)

    @staticmethod
    def Table(columns, data):
        return SimpleNamespace(columns=columns, data=data)

    def steps_of(self, key: str) -> list[int]:
        return [step for step, values in self.logged if key in values]


@pytest.fixture
def wandb(monkeypatch) -> Stub:
    stub = Stub()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


@pytest.fixture
def train(run, text_file, trained):
    """train("key=value", ...): a tiny run with W&B switched on."""
    data = (f"data.path={text_file}",)

    def train(*words: str, code: int = 0):
        result = run("train.py", *TINY, *data, "logging.wandb=true", *words)
        assert result.code == code, result
        return result

    return train


# --- Off ----------------------------------------------------------------------------------------


def test_wandb_is_off_by_default_and_then_not_imported(run, text_file, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    assert run("train.py", *TINY, f"data.path={text_file}", *SHORT).code == 0
    assert "wandb" not in sys.modules


def test_without_wandb_the_line_says_how_to_install_it(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = train(code=2)
    assert result.err.count("\n") == 1 and "pip install wandb" in result.err


# --- What is logged -----------------------------------------------------------------------------


def test_exactly_these_keys_are_logged(train, wandb):
    train()
    keys = {frozenset(values) for _, values in wandb.logged}
    assert keys == {frozenset(TRAIN), frozenset(EVAL), frozenset({"samples"})}


@pytest.mark.parametrize(
    ("key", "steps"),
    [("train/loss", range(2, 13, 2)), ("eval/val_loss", (6, 12)), ("samples", (4, 8, 12))],
)
def test_each_kind_is_logged_at_its_interval_and_after_the_last_step(train, wandb, key, steps):
    train("logging.interval=2", "training.sample_interval=4")
    assert wandb.steps_of(key) == list(steps)


def test_no_step_is_logged_after_a_later_one(train, wandb):
    train()
    steps = [step for step, _ in wandb.logged]
    assert steps == sorted(steps)  # W&B drops what comes late


def test_perplexity_is_the_exponential_of_the_loss(train, wandb):
    train()
    [first, last] = [values for _, values in wandb.logged if "eval/val_ppl" in values]
    for split in ("train", "val"):
        for values in (first, last):
            assert values[f"eval/{split}_ppl"] == math.exp(values[f"eval/{split}_loss"])


def test_the_figures_are_those_of_the_metrics_file(train, wandb):
    train()
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    sent = [{"step": step, **values} for step, values in wandb.logged if "samples" not in values]
    assert sent == lines


def test_samples_are_a_table_of_the_texts_that_are_printed(train, wandb):
    out = train().out
    tables = [(step, values["samples"]) for step, values in wandb.logged if "samples" in values]
    assert [step for step, _ in tables] == [6, 12]
    for step, table in tables:
        [[at, text]] = table.data
        assert table.columns == ["step", "text"] and at == step
        assert f"--- sample after {step} steps ---\n{text}\n---\n" in out


# --- What is sent about the run ------------------------------------------------------------------


def test_project_name_and_tags_are_passed_on(train, wandb):
    words = ("logging.project=it's mine", "logging.name=a, b", "logging.tags=[small,debug]")
    train(*words, *SHORT)
    [started] = wandb.started
    sent = (started["project"], started["name"], started["tags"], started["dir"])
    assert sent == ("it's mine", "a, b", ["small", "debug"], "out")


def test_an_empty_name_leaves_the_choice_to_wandb(train, wandb):
    train(*SHORT)
    assert wandb.started[0]["name"] is None


def test_the_whole_resolved_configuration_is_sent(train, wandb):
    train(*SHORT)
    config = checkpoint.load("out/ckpt.pt")["config"]
    assert wandb.started[0]["config"].items() >= config.items()
    assert config["training"]["max_iters"] == 1 and config["model"]["n_embd"] == 32


def test_the_number_of_parameters_is_sent(train, wandb):
    train(*SHORT)
    weights = checkpoint.load("out/ckpt.pt")["model"]
    assert wandb.started[0]["config"]["parameters"] == sum(w.numel() for w in weights.values())


def test_the_architecture_is_sent(train, wandb):
    train(*SHORT, "model.n_layer=1")
    architecture = wandb.started[0]["config"]["architecture"]
    assert architecture == checkpoint.load("out/ckpt.pt")["model_config"]
    assert (architecture["n_layer"], architecture["block_size"]) == (1, 32)


def test_a_run_to_its_end_is_finished_as_a_success(train, wandb):
    train(*SHORT)
    assert wandb.finished == [0]


def test_a_run_that_fails_is_finished_as_a_failure(train, wandb, monkeypatch):
    monkeypatch.setattr(wandb, "log", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(*SHORT)
    assert wandb.finished == [1]


# --- Offline ------------------------------------------------------------------------------------


def lines_of(result) -> list[str]:
    return [line for line in result.err.splitlines() if "W&B" in line]


def test_without_a_login_the_run_goes_offline_and_says_so_once(train, wandb):
    [line] = lines_of(train(*SHORT))
    assert wandb.started[0]["mode"] == "offline" and "no login" in line


@pytest.mark.parametrize("error", [RuntimeError, ValueError, TypeError])  # the first is W&B's here
def test_where_the_login_fails_the_run_goes_offline_and_says_why_once(
    train, wandb, monkeypatch, error
):
    def login(prompt):
        raise error("failed to\nreach the server")

    monkeypatch.setattr(wandb, "login", login)
    [line] = lines_of(train(*SHORT))
    assert wandb.started[0]["mode"] == "offline" and "failed to reach the server" in line


def test_with_a_login_the_run_is_online(train, wandb, monkeypatch):
    monkeypatch.setattr(wandb, "login", lambda prompt: True)
    assert lines_of(train(*SHORT)) == []
    assert wandb.started[0]["mode"] is None  # what W&B takes by itself


@pytest.mark.parametrize("error", [RuntimeError, ValueError])  # W&B's own is RuntimeError here
def test_what_wandb_refuses_is_one_line_with_the_remedy(train, wandb, monkeypatch, error):
    def refuse(**_):
        raise error("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setenv("WANDB_MODE", "online")
    *_, line = train(*SHORT, code=2).err.splitlines()
    assert line == "error: W&B: No API key configured: log in, or set WANDB_MODE=offline"


def test_an_empty_mode_is_none(train, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    train(*SHORT)
    assert wandb.started[0]["mode"] == "offline"


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_the_users_own_mode_takes_precedence_without_a_line(train, wandb, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    assert lines_of(train(*SHORT)) == []
    assert wandb.started[0]["mode"] == mode


# --- For real -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def offline(tmp_path_factory, text_file, trained):
    """A tiny run with the real wandb, without a login, as from a shell: its folder and output."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("offline")
    env = environment(HOME=str(folder), NETRC=str(folder / "none"), OMP_NUM_THREADS="1")
    env = {name: value for name, value in env.items() if not name.startswith("WANDB_")}
    for name in ("CACHE", "CONFIG", "DATA"):
        env[f"WANDB_{name}_DIR"] = str(folder / "private")
    data = (f"data.path={text_file}",)
    command = [sys.executable, ROOT / "train.py", *TINY, *data, "logging.wandb=true"]
    (folder / "here").mkdir()
    result = subprocess.run(
        command, cwd=folder / "here", env=env, capture_output=True, text=True, timeout=60
    )
    return folder / "here", result


def test_a_real_run_without_a_login_goes_to_its_end_and_says_why_it_is_offline(offline):
    _, result = offline
    assert result.returncode == 0, result.stderr
    assert len([line for line in result.stderr.splitlines() if "no login" in line]) == 1


def test_a_real_offline_run_is_kept_in_the_out_dir_and_nowhere_else(offline):
    folder, _ = offline
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert len(list(folder.glob("out/wandb/offline-run-*/run-*.wandb"))) == 1


def test_a_real_offline_run_holds_the_samples(offline):
    folder, result = offline
    tables = folder.glob("out/wandb/offline-run-*/files/media/table/samples_*.table.json")
    rows = [row for table in tables for row in json.loads(table.read_text())["data"]]
    assert sorted(step for step, _ in rows) == [6, 12]
    assert all(text in result.stdout for _, text in rows)


# --- One run there for one run here --------------------------------------------------------------


def test_a_resumed_run_goes_on_in_the_first_ones_and_a_new_one_does_not(train, wandb):
    train()
    train("training.resume=true", "training.max_iters=14")
    train("training.resume=true", "training.max_iters=16")
    train()
    first, second, third, new = (started["id"] for started in wandb.started)
    assert first == second == third != new and len(first) == 8
    assert all(started["resume"] == "allow" for started in wandb.started)


def test_each_run_of_a_sweep_keeps_its_own(train, wandb):
    words = ("-m", "system.seed=1,2", *SHORT)
    train(*words)
    train(*words, "training.resume=true", "training.max_iters=2")
    ids = [started["id"] for started in wandb.started]
    assert ids[:2] == ids[2:] and ids[0] != ids[1]


def test_the_users_own_id_takes_precedence(train, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    train(*SHORT)
    assert wandb.started[0]["id"] == "mine"


def test_an_evaluation_is_a_run_of_its_own_and_has_its_errors(run, trained, wandb, monkeypatch):
    monkeypatch.setattr(Stub, "log", lambda self, values: self.logged.append((0, values)))
    monkeypatch.setattr(Stub, "finish", lambda self: None)
    wandb.plot = SimpleNamespace(line=lambda *words, **options: None)
    words = (f"checkpoint={trained}/ckpt.pt", "logging.wandb=true", "eval.tokens=256")
    assert run("eval.py", *words, "output=figures.json").code == 0
    figures = json.loads(Path("figures.json").read_text())
    sent = {key: value for _, values in wandb.logged for key, value in values.items()}
    for name in ("loss", "bits_per_byte"):
        assert sent[f"eval/{name}"] == figures[name]["value"]
        assert sent[f"eval/{name}_error"] == figures[name]["standard_error"] > 0
    assert wandb.started[0]["id"] is None
