"""A run survives real damage: kills, signals, full disks and numbers that are not finite."""

import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, environment, files_limited_to
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train as train_script
from nanomdm import bounds, checkpoint, cli, optim, parallel
from tests.stress import crash

STEPS = 12  # of TINY, which saves after 6 and 12 and logs every step
SECOND = timedelta(seconds=1)


@pytest.fixture
def train(run, text_file):
    """train("key=value", ...) on the tiny corpus into ./out: exit code and output."""
    return lambda *words: run("train.py", *TINY, f"data.path={text_file}", *words)


@pytest.fixture
def at(monkeypatch):
    """at(step, f): call f(run) just before this step (from 1) of the runs of this test, once."""

    def at(step: int, function) -> None:
        training_step, waits = train_script.training_step, [True]

        def watched(run):
            if run.step + 1 == step and waits:
                waits.clear()
                function(run)
            return training_step(run)

        monkeypatch.setattr(train_script, "training_step", watched)

    return at


@pytest.fixture
def broken(monkeypatch):
    """broken(steps, value): from now on the gradients of these steps hold this value."""

    def broken(steps, value: float = float("nan")) -> None:
        training_step = train_script.training_step

        def spoil(parameter) -> None:
            parameter.grad[0, 0] = value

        def broken_step(run):
            embedding = run.model.embedding.weight
            hook = embedding.register_post_accumulate_grad_hook(spoil)
            if run.step + 1 not in steps:
                hook.remove()
            result = training_step(run)
            hook.remove()
            return result

        monkeypatch.setattr(train_script, "training_step", broken_step)

    return broken


@pytest.fixture
def scaled(monkeypatch, at):
    """scaled(step, factor): multiply the loss of this step (from 1) by a factor."""

    def scaled(step: int, factor: float) -> None:
        loss_of, factors = train_script.masked_diffusion_loss, []
        at(step, lambda run: factors.append(factor))

        def loss(*args, **options):
            return loss_of(*args, **options) * (factors.pop() if factors else 1)

        monkeypatch.setattr(train_script, "masked_diffusion_loss", loss)

    return scaled


def state(name: str = "out/ckpt.pt") -> dict:
    return checkpoint.load(name)


def entries(folder: str = "out") -> list[dict]:
    """metrics.jsonl, as a strict reader of JSON takes it, without times."""

    def refuse(word: str):
        raise ValueError(f"{word} is not JSON")

    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{k: v for k, v in line.items() if k != "train/time_ms"} for line in lines]


def losses(folder: str = "out") -> list[float]:
    return [line["train/loss"] for line in entries(folder) if "train/loss" in line]


def content(folder: str) -> dict:
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {
        path: (hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns)
        for path in files
    }


# --- Kills --------------------------------------------------------------------------------------


def test_what_a_killed_process_was_writing_is_removed_by_the_next_run(train):
    Path("out").mkdir()
    Path("out/.ckpt.pt.123.tmp").write_bytes(b"half")
    assert train().code == 0
    assert sorted(os.listdir("out")) == ["best.pt", "ckpt.pt", "metrics.jsonl", "run.json"]


# --- Signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_with_a_code_that_names_it(train, at, number, code):
    at(8, lambda run: signal.raise_signal(number))
    result = train()
    assert result.code == code and "saved after step 8" in result.out
    assert state()["step"] == 8


def interrupt_the_save(monkeypatch, times: int) -> None:
    """Press Ctrl-C so many times while a checkpoint is being written."""
    save = torch.save

    def impatient(*given):
        monkeypatch.setattr(torch, "save", save)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        save(*given)

    monkeypatch.setattr(torch, "save", impatient)


def test_a_second_ctrl_c_does_not_destroy_the_save_that_the_first_one_asked_for(
    train, at, monkeypatch
):
    at(8, lambda run: signal.raise_signal(signal.SIGINT))
    at(8, lambda run: interrupt_the_save(monkeypatch, times=1))
    assert train().code == 130 and state()["step"] == 8


def test_a_third_ctrl_c_costs_the_new_checkpoint_but_not_the_old_one(train, at, monkeypatch):
    at(12, lambda run: interrupt_the_save(monkeypatch, times=3))
    assert train("training.eval_interval=0").code == 130
    assert state()["step"] == 6 and not list(Path("out").glob(".*"))


# --- training.resume=auto -----------------------------------------------------------------------

AUTO = "training.resume=auto"


def test_auto_starts_anew_and_goes_on_by_the_same_command(train, at):
    assert train("out_dir=whole").code == 0
    at(8, lambda run: signal.raise_signal(signal.SIGTERM))
    assert [train(AUTO).code, train(AUTO).code] == [143, 0]
    assert crash.same(crash.result(Path("out")), crash.result(Path("whole")))


def test_auto_leaves_a_finished_run_alone(train):
    train(AUTO)
    before = content("out")
    result = train(AUTO)
    assert result.code == 0 and "nothing is left to do" in result.out
    assert content("out") == before


@pytest.fixture
def out(trained, tmp_path) -> Path:
    """The folder of a run that is over, as `out`."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


@pytest.mark.parametrize(
    "word",
    [
        *("training.learning_rate=1e-4", "training.batch_size=4", "training.weight_decay=0.2"),
        *("diffusion.weighting=1.0", "system.seed=7", "model.n_layer=1", "training.objective=ar"),
    ],
)
def test_auto_does_not_go_on_with_another_configuration(train, out, word):
    before = content("out")
    result = train(AUTO, "training.max_iters=20", word)
    assert result.code == 2 and word.split("=")[0] in result.err and "another out_dir" in result.err
    assert content("out") == before


def test_auto_notices_a_setting_that_the_first_command_had_and_this_one_has_not(train, out):
    first = state()
    first["config"]["training"]["learning_rate"] = 1e-4
    checkpoint.save("out/ckpt.pt", first)
    result = train(AUTO)
    assert result.code == 2 and "training.learning_rate=0.01" in result.err
    assert "0.0001" in result.err


def test_a_checkpoint_of_a_version_with_fewer_settings_is_resumed(train, out):
    old = state()
    del old["config"]["training"]["activation_checkpointing"], old["config"]["system"]["parallel"]
    old["config"]["training"]["resume"] = False
    old["loss_avg"] = torch.tensor(old.pop("stats")["loss_avg"])
    del old["scaler"]
    checkpoint.save("out/ckpt.pt", old)
    assert train("training.resume=true", "training.max_iters=13").code == 0
    assert state()["step"] == STEPS + 1


# --- Disk ---------------------------------------------------------------------------------------


def saves_with_a_quota(monkeypatch, *which: int) -> None:
    """The saves of these numbers (from 1) of ckpt.pt are made under a quota that is too small."""
    save, count = checkpoint.save, [0]

    def limited(path, *given):
        count[0] += path.name == "ckpt.pt"
        with files_limited_to(2**16 if path.name == "ckpt.pt" and count[0] in which else 2**30):
            save(path, *given)

    monkeypatch.setattr(checkpoint, "save", limited)


def test_a_save_that_fails_says_where_how_much_it_takes_and_how_much_is_free(tmp_path):
    with files_limited_to(2**16), pytest.raises(OSError) as error:
        checkpoint.save(tmp_path / "ckpt.pt", {"weight": torch.zeros(10**6)})
    line = str(error.value)
    assert f"cannot write {tmp_path}/ckpt.pt (File too large)" in line
    assert "4,000,000 bytes" in line and "are free there" in line


def test_training_goes_on_after_a_save_that_failed_and_tries_again(train, monkeypatch):
    saves_with_a_quota(monkeypatch, 2)
    result = train("training.save_interval=3")
    assert result.code == 0 and state()["step"] == STEPS
    assert result.err.count("cannot write out/ckpt.pt (File too large)") == 1


def test_the_checkpoint_of_before_survives_a_save_that_failed(train, monkeypatch, at):
    saves_with_a_quota(monkeypatch, 2)
    at(8, lambda run: kept.append(state()["step"]))
    kept = []
    train("training.save_interval=3")
    assert kept == [3]


def test_a_last_state_that_could_not_be_saved_is_an_error_that_names_what_there_is(
    train, monkeypatch
):
    saves_with_a_quota(monkeypatch, 2, 3)  # the second is tried again
    result = train()
    assert result.code == 1 and state()["step"] == 6
    assert "step 12 is lost" in result.err and "out/ckpt.pt holds step 6" in result.err


def test_a_best_pt_that_could_not_be_written_does_not_end_a_run(train, at):
    at(2, lambda run: Path(f"out/.best.pt.{os.getpid()}.tmp").mkdir())
    result = train()
    assert result.code == 0 and "cannot write out/best.pt" in result.err
    assert state()["step"] == STEPS and state()["best"] == float("inf")


@contextmanager
def nobody():
    """Without the rights of root, which may write everywhere."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_said_to_be_one(tmp_path_factory):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        path = Path(folder, "ckpt.pt")
        checkpoint.save(path, {"step": 1})
        os.chmod(folder, 0o555)
        with nobody(), pytest.raises(OSError, match="Permission denied"):
            checkpoint.save(path, {"step": 2})
        os.chmod(folder, 0o755)
        assert state(path)["step"] == 1 and os.listdir(folder) == ["ckpt.pt"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if mounted.returncode:
        pytest.skip(f"may not mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_run_outlives_a_full_disk(train, at, small_disk):
    def fill(run) -> None:
        with suppress(OSError), open(small_disk / "other", "wb", buffering=0) as file:
            while True:
                file.write(bytes(2**12))

    at(8, fill)
    at(11, lambda run: (small_disk / "other").unlink())
    result = train(f"out_dir={small_disk}/out", "training.save_interval=3")
    assert result.code == 0
    assert result.err.count(f"cannot write {small_disk}/out/ckpt.pt (No space left on device)") == 1
    assert "about " in result.err and " 0 are free there" in result.err
    assert [line["step"] for line in entries(f"{small_disk}/out") if "train/loss" in line] == list(
        range(1, STEPS + 1)
    )
    assert state(small_disk / "out" / "ckpt.pt")["step"] == STEPS


def test_a_run_whose_folder_is_removed_says_that_no_checkpoint_is_left(train, at):
    at(8, lambda run: shutil.rmtree("out"))
    result = train()
    assert result.code == 1 and "cannot write out/ckpt.pt (No such file or directory)" in result.err
    assert result.err.endswith("the state after step 12 is lost: there is no checkpoint\n")


# --- Numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_whose_gradient_is_not_finite_changes_neither_weights_nor_moments(
    train, broken, at, optimizer, value
):
    def remember(run) -> None:
        moments = [part["state"] for part in run.optimizer.state_dict()]
        seen.append(copy.deepcopy([run.model.state_dict(), moments]))

    seen = []
    broken((6,), value)
    for step in (5, 6, 7):
        at(step, remember)
    train(f"training.optimizer={optimizer}", "training.max_iters=7", "training.eval_interval=0")
    assert crash.same(seen[1], seen[2]) and not crash.same(seen[0], seen[1])


def test_a_step_whose_loss_is_not_finite_is_skipped_counted_and_shown(train, scaled):
    scaled(7, float("inf"))
    result = train()
    assert result.code == 0 and result.err.count("1 steps skipped") == STEPS - 6
    assert [line["train/skipped"] for line in entries() if "train/loss" in line] == [0] * 6 + [
        1
    ] * 6
    assert losses()[6] is None and all(loss is not None for loss in losses()[7:])


def test_a_skipped_step_does_not_spoil_the_averages(train, broken):
    broken((3,))
    train()
    averages = [line["train/loss_avg"] for line in entries() if "train/loss" in line]
    good = [loss for step, loss in enumerate(losses(), start=1) if step != 3]
    assert averages[-1] == pytest.approx(sum(good) / len(good))


def test_a_run_that_fails_again_and_again_stops_with_the_last_good_checkpoint_named(
    train, broken, monkeypatch
):
    monkeypatch.setattr(optim, "MAX_SKIPPED", 3)
    broken(range(9, 99))
    result = train("training.max_iters=40")
    assert result.code == 1 and "3 consecutive steps" in result.err
    assert "out/ckpt.pt holds step 6" in result.err and "training.learning_rate" in result.err
    assert state()["step"] == 6


def test_good_steps_in_between_begin_the_count_anew(train, broken, monkeypatch):
    monkeypatch.setattr(optim, "MAX_SKIPPED", 3)
    broken((3, 4, 6, 7, 9, 10))
    assert train().code == 0
    assert entries()[-2]["train/skipped"] == 6


def test_nothing_is_saved_at_the_interval_while_steps_fail(train, broken, at):
    broken(range(6, 11))
    at(12, lambda run: seen.append(Path("out/ckpt.pt").exists()))
    seen = []
    assert train().code == 0
    assert seen == [False] and state()["step"] == STEPS


def test_numbers_that_are_not_finite_are_never_saved(tmp_path):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, {"step": 1})
    with pytest.raises(ValueError, match="not finite"):
        checkpoint.save(path, {"model": {"weight": torch.tensor([1.0, float("nan")])}})
    assert state(path)["step"] == 1


def test_a_spike_between_two_entries_of_the_log_shows(train, scaled):
    scaled(4, 1000)
    train("logging.interval=6")
    first, second = (line for line in entries() if "train/loss" in line)
    assert first["train/loss_max"] > 1000 > 10 > second["train/loss_max"]
    assert first["train/grad_norm_max"] > 100 * second["train/grad_norm_max"] > 0


def test_a_bound_beyond_all_perplexities_does_not_end_a_run(train, monkeypatch):
    monkeypatch.setattr(bounds.NLLSamples, "bound", lambda samples: (1e6, 0.1))
    assert train().code == 0
    assert entries()[-1]["eval/val_loss"] == 1e6


# --- float16 ------------------------------------------------------------------------------------

HALF = "system.dtype=float16"


def test_float16_has_the_losses_of_float32(train):
    train("out_dir=whole")
    assert train(HALF).code == 0
    assert losses() == pytest.approx(losses("whole"), abs=5e-3)


def test_float16_scales_the_loss_and_halves_the_scale_when_gradients_overflow(train, at):
    scales = []
    for step in (4, 5, 6):
        at(step, lambda run: scales.append(run.scaler.get_scale()))
    at(5, lambda run: run.scaler.update(2.0**40))
    result = train(HALF)
    assert scales == [2.0**16, 2.0**40, 2.0**39]
    assert result.code == 1 and "not finite in 8 of 12 steps" in result.err  # until it is small
    assert [line["train/skipped"] for line in entries()[3:5]] == [0, 1]


def test_a_float16_run_resumes_bit_for_bit_its_scale_included(train, at):
    at(3, lambda run: run.scaler.update(2.0**10))
    train(HALF, "out_dir=whole")
    at(3, lambda run: run.scaler.update(2.0**10))
    at(8, lambda run: signal.raise_signal(signal.SIGTERM))
    assert [train(HALF, AUTO).code, train(HALF, AUTO).code] == [143, 0]
    assert crash.same(crash.result(Path("out")), crash.result(Path("whole")))
    assert state()["scaler"]["scale"] == 2.0**10


def test_a_float32_run_goes_on_in_float16(train, out):
    assert train("training.resume=true", HALF, "training.max_iters=13").code == 0
    assert state()["step"] == STEPS + 1 and state()["scaler"]["scale"] > 0


# --- How to repeat a run ------------------------------------------------------------------------


def test_run_json_says_how_to_repeat_a_run(trained, text_file):
    (entry,) = json.loads((trained / "run.json").read_text())
    assert entry["corpus"]["sha256"] == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert entry["config"]["training"]["max_iters"] == STEPS
    assert entry["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert entry["command"] and entry["folder"] and entry["host"] and entry["time"]


def test_what_run_json_says_gives_the_same_weights(run, trained):
    (entry,) = json.loads((trained / "run.json").read_text())

    def words(values: dict, prefix: str = ""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from words(value, f"{prefix}{key}.")
            elif value not in ("", []):
                yield f"{prefix}{key}={str(value).replace(' ', '')}"

    given = {k: v for k, v in entry["config"].items() if k != "out_dir"}
    assert run("train.py", *words(given)).code == 0
    assert crash.same(crash.result(Path("out")), crash.result(trained))


def test_each_start_of_a_run_has_its_entry(train, at):
    at(8, lambda run: signal.raise_signal(signal.SIGTERM))
    train(AUTO)
    train(AUTO, "training.eval_interval=3")
    first, second = json.loads(Path("out/run.json").read_text())
    assert [e["config"]["training"]["eval_interval"] for e in (first, second)] == [6, 3]


# --- Two processes ------------------------------------------------------------------------------


def one_of_two(*words: str) -> None:
    """What torchrun's agent starts twice, and again after a failure: process 1 dies, then hangs."""
    training_step = train_script.training_step
    round = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    def mortal(run):
        if parallel.world().rank == 1 and round == 0 and run.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        if parallel.world().rank == 1 and round == 1 and run.step == 9:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the agent would wait for 30 s
            time.sleep(600)
        return training_step(run)

    torch.set_num_threads(1)
    train_script.training_step = mortal
    parallel.processes, parallel.ANSWER = partial(parallel.processes, minutes=0.06), SECOND
    sys.argv = ["train.py", *words]
    cli.main(train_script.main)


@pytest.fixture(scope="module")
def restarted(tmp_path_factory, text_file, trained):
    """A run of two processes, of which one is killed and then one hangs: its folder and stderr.

    torchrun's own agent restarts them, but forks them, so that each start need not import torch.
    """
    folder = tmp_path_factory.mktemp("restarted")
    words = [*TINY, f"data.path={text_file}", AUTO, "training.save_interval=3"]
    result = subprocess.run(
        [sys.executable, __file__, *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "out", result.stderr


def test_torchrun_restarts_a_run_of_which_a_process_was_killed_from_its_last_checkpoint(restarted):
    entries = json.loads((restarted[0] / "run.json").read_text())
    assert [entry["first_step"] for entry in entries] == [0, 6, 9]


def test_a_process_that_hangs_is_named(restarted):
    (line,) = {ln for ln in restarted[1].splitlines() if "lost each other" in ln and "Ranks" in ln}
    assert "Ranks 1 failed" in line


def test_the_losses_of_a_restarted_run_are_those_of_an_uninterrupted_one(restarted, trained):
    assert losses(restarted[0]) == pytest.approx(losses(trained), rel=1e-5)


if __name__ == "__main__":
    import torch._dynamo  # seconds, which each process would take by itself

    agent = LaunchConfig(
        *(1, 1, 2),  # nodes, at least and at most, and processes
        max_restarts=2,
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="restarts",
    )
    elastic_launch(agent, one_of_two)(*sys.argv[1:])
