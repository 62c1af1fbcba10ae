"""What a run tells while it goes on: metrics.jsonl, the bar or lines, its clock, and Ctrl-C."""

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, environment

from nanomdm import checkpoint, runlog
from nanomdm.runlog import Clock, Interrupt, RunLog


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until `now.seconds` is moved."""
    now = SimpleNamespace(seconds=100.0)
    read = SimpleNamespace(perf_counter=lambda: now.seconds, monotonic=lambda: now.seconds)
    monkeypatch.setattr(runlog, "time", read)
    return now


@contextmanager
def terminal():
    """Stderr as a terminal: gives a function that tells what it has shown since the last call."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    with open(slave, "w") as stderr, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)

        def shown() -> str:
            stderr.flush()
            content = b""
            while select.select([master], [], [], 0.2)[0]:
                content += os.read(master, 2**16)
            return content.decode()

        yield shown
    os.close(master)


# --- metrics.jsonl ------------------------------------------------------------------------------


def entries(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_one_json_object_a_line_with_the_step(log, tmp_path):
    with log() as open_log:
        open_log.metrics(1, {"train/loss": 4.25})
        open_log.metrics(2, {"train/loss": 4.0, "train/lr": 1e-3})
    assert entries(tmp_path) == [
        {"step": 1, "train/loss": 4.25},
        {"step": 2, "train/loss": 4.0, "train/lr": 1e-3},
    ]


def test_metrics_can_be_read_while_the_run_goes_on(log, tmp_path):
    with log() as open_log:
        open_log.metrics(1, {"train/loss": 4.25})
        assert entries(tmp_path) == [{"step": 1, "train/loss": 4.25}]


def test_a_run_records_its_steps_and_its_evaluations(trained):
    steps = {"train/loss": [], "eval/val_loss": []}
    for entry in entries(trained):
        for key in steps.keys() & entry.keys():
            steps[key].append(entry["step"])
    assert steps == {"train/loss": list(range(1, 13)), "eval/val_loss": [6, 12]}


def test_a_run_records_losses_rate_gradients_skipped_steps_and_time(trained):
    recorded = {frozenset(entry) for entry in entries(trained)}
    names = ("loss", "loss_avg", "loss_max", "grad_norm", "grad_norm_max", "skipped", "lr")
    assert {"step", "train/time_ms", *(f"train/{name}" for name in names)} in recorded


def write(folder: Path, *lines: str) -> None:
    (folder / "metrics.jsonl").write_text("".join(lines))


LINES = [json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in (5, 10, 10, 15)]


def test_a_resumed_run_keeps_what_was_recorded_up_to_its_first_step(log, tmp_path):
    write(tmp_path, *LINES)
    with log(10) as open_log:
        open_log.metrics(11, {"train/loss": 0.5})
    assert [entry["step"] for entry in entries(tmp_path)] == [5, 10, 10, 11]


def test_a_resumed_run_drops_a_line_that_was_cut(log, tmp_path):
    write(tmp_path, *LINES[:2], LINES[2][:-9])
    with log(10):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(LINES[:2])


def test_a_resumed_run_goes_on_without_the_metrics_of_before(log, tmp_path):
    with log(10) as open_log:
        open_log.metrics(11, {})
    assert entries(tmp_path) == [{"step": 11}]


def test_a_new_run_starts_with_no_metrics(log, tmp_path):
    write(tmp_path, *LINES)
    with log():
        pass
    assert entries(tmp_path) == []


# --- Progress -----------------------------------------------------------------------------------


def test_without_a_terminal_progress_is_a_line_with_the_time_left(log, now, capsys):
    with log() as open_log:
        now.seconds += 10
        open_log.progress(5, "loss 2.0")
    assert capsys.readouterr().err == "step     5/20 | loss 2.0 | 10 s, 30 s left\n"


def test_the_time_left_of_a_resumed_run_follows_from_its_own_steps(log, now, capsys):
    with log(10) as open_log:
        now.seconds += 6
        open_log.progress(12, "")
    assert capsys.readouterr().err.endswith("| 6 s, 24 s left\n")


def test_with_a_terminal_but_no_tqdm_progress_is_lines(log, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with terminal() as shown, log() as open_log:
        open_log.progress(5, "loss 2.0")
        open_log.progress(10, "loss 1.0")
        starts = [line[:14] for line in shown().splitlines()]
    assert starts == ["step     5/20 ", "step    10/20 "]


def test_on_a_terminal_progress_is_a_bar(log):
    pytest.importorskip("tqdm")
    with terminal() as shown, log() as open_log:
        open_log.progress(5, "loss 2.0")
        open_log.bar.refresh()
        bar = shown()
    assert all(part in bar for part in ("25%|", "5/20", "loss 2.0")) and "\n" not in bar


def test_the_bar_of_a_resumed_run_starts_where_the_run_does(log):
    pytest.importorskip("tqdm")
    with terminal() as shown, log(10):
        assert "50%|" in shown()


def test_what_is_said_beside_the_bar_goes_to_stdout_as_it_is(log, capsys):
    pytest.importorskip("tqdm")
    with terminal(), log() as open_log:
        open_log.say("step 5: bound 2.0")
    assert capsys.readouterr().out == "step 5: bound 2.0\n"


def test_samples_are_shown_with_their_step(log, capsys):
    with log() as open_log:
        open_log.samples(5, ["To be\nor not", "to be"])
    first = "--- sample after 5 steps ---\nTo be\nor not\n---\n"
    assert capsys.readouterr().out == first + "--- sample after 5 steps ---\nto be\n---\n"


def test_progress_goes_to_stderr_and_results_to_stdout(run, text_file):
    result = run("train.py", *TINY, f"data.path={text_file}", "training.max_iters=6")
    assert all(line.startswith("step ") and " left" in line for line in result.err.splitlines())
    assert result.err.count("\n") == 6 and "step 6: bound " in result.out


# --- Time ---------------------------------------------------------------------------------------


def test_the_clock_gives_the_mean_time_of_a_step_since_the_last_call(now):
    clock = Clock(step=10)
    now.seconds += 3
    assert clock.milliseconds_per_step(12) == 1500
    now.seconds += 1
    assert clock.milliseconds_per_step(16) == 250


def test_the_clock_leaves_pauses_out(now):
    clock = Clock(step=0)
    now.seconds += 1
    with clock.paused():
        now.seconds += 60
    now.seconds += 1
    assert clock.milliseconds_per_step(2) == 1000


# --- Ctrl-C -------------------------------------------------------------------------------------


def test_nothing_is_asked_before_ctrl_c():
    with Interrupt() as interrupt:
        assert not interrupt.asked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_ask_and_tell_which_of_them_it_was(number):
    with Interrupt() as interrupt:
        signal.raise_signal(number)
        assert interrupt.asked == number


def test_a_second_ctrl_c_ends_nothing():
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked == signal.SIGINT


def test_a_third_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), Interrupt():
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)


def test_sigterm_never_ends_at_once():
    with Interrupt():
        for _ in range(9):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_afterwards_signals_do_what_they_did_before(times):
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        with Interrupt():
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        assert times == 3
    assert [signal.getsignal(number) for number in numbers] == handlers


def test_ctrl_c_before_the_first_step_promises_no_checkpoint_that_is_not_there(
    run, text_file, monkeypatch
):
    start = RunLog.__init__

    def start_slowly(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        start(self, *arguments)

    monkeypatch.setattr(RunLog, "__init__", start_slowly)
    result = run("train.py", *TINY, f"data.path={text_file}")
    assert result.code == 130 and ("saved" not in result.out or Path("out/ckpt.pt").exists())


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, text_file, trained):
    """A run that Ctrl-C reached after its first line of progress: folder, exit code and output."""
    folder = tmp_path_factory.mktemp("interrupted")
    data = (f"data.path={text_file}", f"data.cache_dir={trained.parent}/cache")
    words = (*TINY, *data, "training.max_iters=100000", "training.eval_interval=0")
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *words],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr.readline().startswith("step ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return folder, process.returncode, out, err


def test_ctrl_c_ends_a_run_with_exit_code_130_and_without_a_traceback(interrupted):
    _, code, _, err = interrupted
    assert code == 130 and "Traceback" not in err


def test_ctrl_c_says_at_which_step_it_saved_and_how_to_go_on(interrupted):
    folder, _, out, _ = interrupted
    step = checkpoint.load(folder / "out" / "ckpt.pt")["step"]
    assert f"saved after step {step}" in out and "training.resume=true" in out


def test_ctrl_c_leaves_metrics_up_to_the_step_that_was_saved(interrupted):
    folder, *_ = interrupted
    step = checkpoint.load(folder / "out" / "ckpt.pt")["step"]
    assert [entry["step"] for entry in entries(folder / "out")] == list(range(1, step + 1))
