"""The log of a run: metrics.jsonl, the bar or lines, the time per step; and Ctrl-C."""

import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, environment, files_limited_to

from nanomdm import checkpoint, runlog
from nanomdm.runlog import Interrupt, Log, NullLog, progress, ranking, start_message


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until `now.seconds` changes."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(runlog, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


FIGURES = {"loss": 2.5, "loss_avg": 2.0, "skipped": 0.0}


@contextmanager
def terminal():
    """Stderr as a terminal: gives a function that returns what was shown since the last call."""
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


def test_a_figure_that_is_not_finite_is_null(log, tmp_path):
    with log() as open_log:
        open_log.metrics(1, {"train/loss": math.nan, "train/grad_norm": math.inf})
    assert entries(tmp_path) == [{"step": 1, "train/loss": None, "train/grad_norm": None}]


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


@pytest.mark.parametrize(
    "line",
    ['{"step": "5"}', '{"loss": 5}', "[5]", "{5}", '{"step": 1e999}', "[" * 10**5 + "}", "\xff}"],
)
def test_a_resumed_run_drops_a_line_that_is_damaged(log, tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(line.encode("latin-1") + b"\n" + LINES[0].encode())
    with log(10):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == LINES[0]


def test_a_crash_while_metrics_are_cut_costs_nothing_that_was_recorded(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 9)))
    before = path.read_bytes()

    def dies(*args):
        raise MemoryError

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(MemoryError):
        runlog.open_metrics(path, first_step=5)
    assert path.read_bytes() == before


def test_what_could_not_be_logged_follows_as_soon_as_there_is_room(log, tmp_path, capsys):
    with log() as open_log:
        open_log.metrics(1, {"train/loss": 4.0})
        with files_limited_to((tmp_path / "metrics.jsonl").stat().st_size + 9):  # a part fits
            open_log.metrics(2, {"train/loss": 3.0})
            open_log.metrics(3, {"train/loss": 2.0})
        assert "metrics.jsonl (File too large)" in capsys.readouterr().err
        open_log.metrics(4, {"train/loss": 1.0})
    assert [entry["step"] for entry in entries(tmp_path)] == [1, 2, 3, 4]


def test_a_long_time_without_room_costs_no_entry(log, tmp_path):
    with log() as open_log, files_limited_to(100):
        for step in range(1, 1000):  # more than a file's buffer holds
            open_log.metrics(step, {"train/loss": 4.0})
    assert [entry["step"] for entry in entries(tmp_path)] == list(range(1, 1000))


# --- Progress -----------------------------------------------------------------------------------


def test_without_a_terminal_progress_is_a_line_with_the_time_left(log, now, capsys):
    with log() as open_log:
        now.seconds += 10
        open_log.step(5, **FIGURES)
    line = "step     5/20 | loss 2.000 | 0.0k tokens/s | 10 s, 30 s left\n"
    assert capsys.readouterr().err == line


def test_progress_gives_the_speed_over_all_steps_since_the_last_line(log, now, capsys):
    with log() as open_log:
        for step in (5, 10):
            now.seconds += 0.001 * step  # 4 rows of 8 tokens a step
            open_log.step(step, **FIGURES)
    first, second = capsys.readouterr().err.splitlines()
    assert "| 32.0k tokens/s |" in first and "| 16.0k tokens/s |" in second


def test_progress_gives_the_number_of_skipped_steps_if_there_are_any(log, capsys):
    with log() as open_log:
        open_log.step(5, **FIGURES)
        open_log.step(6, **FIGURES | {"skipped": 2.0})
    first, second = capsys.readouterr().err.splitlines()
    assert "skipped" not in first and "| 2 steps skipped |" in second


def test_the_time_left_of_a_resumed_run_follows_from_its_own_steps(log, now, capsys):
    with log(10) as open_log:
        now.seconds += 6
        open_log.step(12, **FIGURES)
    assert capsys.readouterr().err.endswith("| 6 s, 24 s left\n")


def test_with_a_terminal_but_no_tqdm_progress_is_lines(log, monkeypatch):
    monkeypatch.setattr(runlog, "tqdm", None)
    with terminal() as shown, log() as open_log:
        open_log.step(5, **FIGURES)
        open_log.step(10, **FIGURES)
        starts = [line[:14] for line in shown().splitlines()]
    assert starts == ["step     5/20 ", "step    10/20 "]


def test_on_a_terminal_progress_is_a_bar(log):
    pytest.importorskip("tqdm")
    with terminal() as shown, log() as open_log:
        time.sleep(0.2)  # tqdm draws at most every 0.1 s
        open_log.step(5, **FIGURES)
        bar = shown()
    assert all(part in bar for part in ("25%|", "5/20", "loss 2.000")) and "\n" not in bar


def test_the_bar_of_a_resumed_run_starts_where_the_run_does(log):
    pytest.importorskip("tqdm")
    with terminal() as shown, log(10):
        assert "50%|" in shown()


def test_a_line_beside_the_bar_goes_to_stdout_as_it_is(log, capsys):
    pytest.importorskip("tqdm")
    with terminal(), log() as open_log:
        open_log.say("step 5: bound 2.0")
    assert capsys.readouterr().out == "step 5: bound 2.0\n"


@pytest.mark.parametrize("bar", [False, True])
def test_a_closed_pipe_behind_stdout_does_not_end_a_run(log, monkeypatch, bar):
    if bar:
        pytest.importorskip("tqdm")
    read, write = os.pipe()
    os.close(read)
    with terminal() if bar else nullcontext(), log() as open_log, open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        open_log.say("nobody reads this")
        with suppress(BrokenPipeError):
            pipe.close()


def test_samples_are_printed_with_their_step(log, capsys):
    with log() as open_log:
        open_log.samples(5, ["To be\nor not", "to be"])
    first = "--- sample after 5 steps ---\nTo be\nor not\n---\n"
    assert capsys.readouterr().out == first + "--- sample after 5 steps ---\nto be\n---\n"


def test_progress_goes_to_stderr_and_results_to_stdout(run, text_file):
    result = run("train.py", *TINY, f"data.path={text_file}", "training.max_iters=6")
    assert all(line.startswith("step ") and " left" in line for line in result.err.splitlines())
    assert result.err.count("\n") == 6 and "step 6: bound " in result.out


def test_without_a_terminal_a_long_task_prints_a_line_every_ten_seconds(now, capsys):
    with progress(200, "token") as advance:
        for seconds in (3.0, 8.0, 4.0, 5.0, 2.0):
            now.seconds += seconds
            advance(40)
    assert capsys.readouterr().err.splitlines() == [
        "token    80/200 | 7 tokens/s | 11 s, 16 s left",
        "token   200/200 | 9 tokens/s | 22 s, 0 s left",
    ]


def test_a_task_of_unknown_length_has_no_time_left(now, capsys):
    with progress(None, "token", done=1000) as advance:
        now.seconds += 10
        advance(500)
    assert capsys.readouterr().err == "token  1500/? | 50 tokens/s | 10 s\n"


# --- Time per step ------------------------------------------------------------------------------


def times(folder: Path) -> list[float]:
    return [entry["train/time_ms"] for entry in entries(folder)]


def test_the_time_per_step_is_the_mean_since_the_last_entry(log, now, tmp_path):
    with log(10) as open_log:
        now.seconds += 3
        open_log.step(12, **FIGURES)
        now.seconds += 1
        open_log.step(16, **FIGURES)
    assert times(tmp_path) == [1500, 250]


def test_the_time_per_step_leaves_pauses_out(log, now, tmp_path):
    with log() as open_log:
        now.seconds += 1
        with open_log.paused():
            now.seconds += 60
        now.seconds += 1
        open_log.step(2, **FIGURES)
    assert times(tmp_path) == [1000]


# --- Other processes, first lines ---------------------------------------------------------------


def test_another_process_has_a_log_with_the_same_methods_and_without_effect(capfd):
    def methods(kind: type) -> set[str]:
        return {name for name in vars(kind) if name[0] != "_"}

    assert methods(NullLog) == methods(Log) - {"flush"}
    with NullLog() as null_log, null_log.paused():
        null_log.step(1, **FIGURES)
        null_log.metrics(1, {"eval/val_loss": 2.0})
        null_log.samples(1, ["text"])
        null_log.say("line")
    assert capfd.readouterr() == ("", "")


ABOUT = {
    "parameters": 12_345,
    "architecture": {"vocab_size": 65},
    "corpus": {"name": "kings.txt", "sha256": "0123456789abcdef"},
    "tokens": {"train": 9_000, "val": 1_000},
    "processes": 1,
    "device": "cpu",
    "dtype": "float32",
    "compiled": False,
}


@pytest.mark.parametrize(
    ("first_step", "parallel", "warmup", "changes", "expected"),
    [
        (0, "auto", 2, {}, "on cpu, float32; steps 0 to 20, results in out"),
        (5, "auto", 2, {"compiled": True}, "on cpu, float32, compiled; steps 5 to 20"),
        (0, "auto", 2, {"processes": 2}, "on cpu in 2 processes (copies), float32"),
        (0, "fsdp", 2, {"processes": 2}, "on cpu in 2 processes (shards), float32"),
        (20, "auto", 2, {}, "nothing is left to do: raise training.max_iters"),
        (0, "auto", 11, {}, "the warm-up takes half of the run, 10 steps"),
        (0, "auto", 2, {"tokens": {"train": 9_000, "val": 63}}, "63 tokens to validate are few"),
    ],
)
def test_the_first_lines_describe_corpus_model_and_run(
    first_step, parallel, warmup, changes, expected
):
    config = SimpleNamespace(
        training=SimpleNamespace(max_iters=20, warmup_iters=warmup, eval_interval=5),
        model=SimpleNamespace(block_size=8),
        system=SimpleNamespace(parallel=parallel),
        out_dir="out",
    )
    message = start_message(config, first_step, ABOUT | changes)
    assert message.startswith("corpus kings.txt (sha256 0123456789ab): 9,000 tokens to train on")
    assert "model of 12,345 parameters on cpu" in message and expected in message
    assert ("warm-up" in message, "are few" in message) == (warmup > 10, "tokens" in changes)


# --- Ctrl-C -------------------------------------------------------------------------------------


def test_nothing_is_asked_before_ctrl_c():
    with Interrupt() as interrupt:
        assert not interrupt.asked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_ask_with_their_number(number):
    with Interrupt() as interrupt:
        signal.raise_signal(number)
        assert interrupt.asked == number


def test_one_process_alone_stops_after_its_step_and_several_where_they_compare(monkeypatch):
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(runlog.parallel, "world", lambda: SimpleNamespace(size=2))
        interrupt.agree(False, torch.device("cpu"))
        assert not interrupt.stop
        monkeypatch.undo()
        interrupt.agree(False, torch.device("cpu"))
        assert interrupt.stop == signal.SIGTERM


def test_a_second_ctrl_c_ends_nothing_and_the_first_one_says_so(capfd):
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err.endswith("Ctrl-C twice more ends without it\n")
        signal.raise_signal(signal.SIGINT)
        assert not capfd.readouterr().err
        assert interrupt.asked == signal.SIGINT


def test_a_third_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), Interrupt():
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)


def test_a_fourth_ctrl_c_ends_what_is_done_after_the_third():
    with Interrupt(), pytest.raises(KeyboardInterrupt):
        try:
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            pytest.fail("this is reached")


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
    start = Log.__init__

    def start_slowly(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        start(self, *arguments)

    monkeypatch.setattr(Log, "__init__", start_slowly)
    result = run("train.py", *TINY, f"data.path={text_file}")
    assert result.code == 130 and ("saved" not in result.out or Path("out/ckpt.pt").exists())


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, text_file, trained):
    """A run that Ctrl-C reached after its first line of progress: folder, exit code and output."""
    folder = tmp_path_factory.mktemp("interrupted")
    data = (f"data.path={text_file}",)
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


def test_a_ranking_leaves_out_losses_that_were_not_finite(tmp_path):
    for name, losses in (("a", [None, 2.5]), ("b", [None]), ("c", [2.0, 3.0])):
        rows = [
            {"step": i, "eval/val_loss": x, "eval/val_error": 0.1} for i, x in enumerate(losses)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    _, *lines = ranking({str(tmp_path / name): f"run={name}" for name in "abc"})
    values = ["2.0000 ± 0.1000", "2.5000 ± 0.1000", "not evaluated"]
    assert [line[:16].rstrip() for line in lines] == values
    assert [line[-1] for line in lines] == ["c", "a", "b"]
