"""A run's folder: one process writes into it, earlier files stay, run.json."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from nanomdm import folders
from nanomdm.errors import UserError
from nanomdm.folders import (
    begin,
    check_output,
    git_state,
    locked,
    record,
    set_aside,
    write_output,
)

fcntl = pytest.importorskip("fcntl")

# --- One at a time ------------------------------------------------------------------------------


@pytest.fixture
def other_process():
    """other_process(f): run f() in a process of its own, which then waits to be killed; its id."""
    children = []

    def start(function: Callable) -> int:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            with suppress(BaseException):
                function(lambda: (os.write(write, b"."), signal.pause()))
            os._exit(1)
        children.append(child)
        os.close(write)
        assert os.read(read, 1) == b"."  # it is where it waits
        os.close(read)
        return child

    yield start
    for child in children:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def holds(folder: Path) -> Callable:
    def hold(wait: Callable) -> None:
        with locked(folder):
            wait()

    return hold


def test_a_second_process_is_refused_with_the_first_ones_id(other_process, tmp_path):
    first = other_process(holds(tmp_path))
    with pytest.raises(ValueError, match=f"in use by process {first} on {socket.gethostname()}"):
        locked(tmp_path).__enter__()


def test_a_lock_dies_with_its_owner(other_process, tmp_path):
    first = other_process(holds(tmp_path))
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert (tmp_path / folders.LOCK).exists()  # the file is still there: it means nothing
    with locked(tmp_path):
        assert (tmp_path / folders.LOCK).read_text().split()[0] == str(os.getpid())


def test_a_refused_process_changes_nothing(other_process, tmp_path):
    first = other_process(holds(tmp_path))
    for _ in range(2):
        with pytest.raises(ValueError, match=str(first)):
            locked(tmp_path).__enter__()


def test_a_lock_leaves_nothing_behind(tmp_path):
    with locked(tmp_path / "new"):
        (tmp_path / "new" / "ckpt.pt").touch()
    assert os.listdir(tmp_path / "new") == ["ckpt.pt"]


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with suppress(ValueError), locked(tmp_path / "new"):
        raise ValueError
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_that_was_there_stays(tmp_path):
    with locked(tmp_path):
        pass
    assert tmp_path.exists()


def test_a_lock_whose_file_its_owner_removed_is_taken_again(tmp_path, monkeypatch):
    """Between the opening and the locking of the file by the next process."""
    path, flock = tmp_path / folders.LOCK, fcntl.flock

    def late(file, operation) -> None:
        if not removed:
            removed.append(path.unlink())
        flock(file, operation)

    removed = []
    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path), pytest.raises(ValueError, match="in use"):
        locked(tmp_path).__enter__()


def test_the_setting_that_names_the_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.dir=.*choose another data\.dir"):
        locked(tmp_path / "file", key="data.dir").__enter__()


def test_a_file_system_without_locks_is_used_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        assert "cannot be locked ([Errno 38] Function not" in capsys.readouterr().err


def test_a_system_without_locks_is_used_and_a_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with locked(tmp_path):
        assert "cannot be locked" in capsys.readouterr().err


def test_a_second_run_into_the_same_folder_changes_nothing(other_process, run, text_file, tmp_path):
    first = other_process(holds(tmp_path / "out"))
    result = run("train.py", *TINY, f"data.path={text_file}")
    assert result.code == 2 and f"out_dir=out is in use by process {first}" in result.err
    assert os.listdir("out") == [folders.LOCK]


# --- Earlier runs -------------------------------------------------------------------------------

FILES = ("ckpt.pt", "metrics.jsonl")


def folder_of(folder: Path, *names: str) -> list[str]:
    """Make files that contain their name; return what `set_aside` then makes of the folder."""
    for name in names:
        (folder / name).write_text(name)
    set_aside(folder, FILES)
    return sorted(path.name for path in folder.iterdir())


def test_an_earlier_runs_files_get_the_number_1(tmp_path):
    assert folder_of(tmp_path, *FILES) == ["ckpt-1.pt", "metrics-1.jsonl"]


def test_the_next_runs_files_get_the_next_number(tmp_path):
    folder_of(tmp_path, *FILES)
    names = ["ckpt-1.pt", "ckpt-2.pt", "metrics-1.jsonl", "metrics-2.jsonl"]
    assert folder_of(tmp_path, *FILES) == names


def test_files_of_one_run_get_one_number_that_is_free_for_all_of_them(tmp_path):
    names = ["ckpt-2.pt", "metrics-1.jsonl", "metrics-2.jsonl"]
    assert folder_of(tmp_path, *FILES, "metrics-1.jsonl") == names


def test_what_is_not_there_is_not_set_aside(tmp_path):
    assert folder_of(tmp_path, "ckpt.pt") == ["ckpt-1.pt"]


def test_other_files_keep_their_names(tmp_path):
    assert folder_of(tmp_path, "ckpt.pt", "notes.txt") == ["ckpt-1.pt", "notes.txt"]


def test_setting_aside_keeps_the_content_and_returns_the_new_paths(tmp_path):
    for name in FILES:
        (tmp_path / name).write_text(name)
    moved = set_aside(tmp_path, FILES)
    assert [(path.name, path.read_text()) for path in moved] == [
        ("ckpt-1.pt", "ckpt.pt"),
        ("metrics-1.jsonl", "metrics.jsonl"),
    ]


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_nothing_to_set_aside_is_no_path(folder, tmp_path):
    assert set_aside(tmp_path / folder, FILES) == []


# --- The beginning of a run ---------------------------------------------------------------------


@pytest.mark.parametrize("first_step", [0, 6])
def test_what_a_killed_process_was_writing_is_removed(tmp_path, first_step):
    (tmp_path / ".ckpt.pt.1234.tmp").write_bytes(b"half")
    begin(tmp_path, first_step, {})
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_new_run_sets_the_files_of_an_earlier_one_aside(tmp_path):
    for name in folders.FILES:
        (tmp_path / name).write_text("[]")
    kept = [path.name for path in begin(tmp_path, 0, {})]
    assert kept == ["ckpt-1.pt", "best-1.pt", "metrics-1.jsonl", "run-1.json"]
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "run.json"])


def test_a_resumed_run_keeps_the_names_of_its_files_and_adds_an_entry_to_run_json(tmp_path):
    (tmp_path / "ckpt.pt").touch()
    begin(tmp_path, 0, {"seed": 1})
    (tmp_path / "ckpt.pt").touch()
    assert begin(tmp_path, 6, {"seed": 1}) == []
    entries = json.loads((tmp_path / "run.json").read_text())
    assert [(entry["first_step"], entry["seed"]) for entry in entries] == [(0, 1), (6, 1)]
    assert sorted(os.listdir(tmp_path)) == ["ckpt-1.pt", "ckpt.pt", "run.json"]


# --- How to repeat a run ------------------------------------------------------------------------


def test_the_revision_and_what_differs_from_it_are_found(tmp_path):
    def git(*words: str) -> str:
        who = ("-c", "user.name=A", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("init")
    except OSError:
        pytest.skip("no git")
    (tmp_path / "train.py").write_text("1")
    git("add", "train.py")
    git("commit", "-m", "one")
    clean = git_state(tmp_path.resolve())
    (tmp_path / "train.py").write_text("2")
    assert clean == {"revision": git("rev-parse", "HEAD"), "changed": []}
    assert git_state(tmp_path.resolve())["changed"] == ["train.py"]
    (folder := tmp_path.resolve() / "copy").mkdir()
    assert git_state(folder) is None  # the revision would be that of somebody else's code


def test_without_git_the_revision_is_unknown(tmp_path, monkeypatch):
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert git_state(ROOT) is None


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that root cannot write to")
def test_a_folder_that_takes_no_file_is_known_before_the_work():
    with pytest.raises(UserError, match="cannot write output=/proc/o.json .*: choose another"):
        check_output("/proc/o.json")
    check_output("")


def test_an_earlier_output_is_kept_and_that_is_said(tmp_path, capsys):
    path = tmp_path / "new" / "o.json"
    for number in (1, 2):
        write_output(str(path), {"number": number})
    assert json.loads(path.read_text()) == {"number": 2}
    assert json.loads((path.parent / "o-1.json").read_text()) == {"number": 1}
    assert capsys.readouterr().err == f"an earlier file is kept as {path.parent}/o-1.json\n"


def test_a_run_json_that_is_damaged_is_kept_under_another_name(tmp_path):
    (tmp_path / "run.json").write_text("[{")
    record(tmp_path, {"step": 1})
    assert json.loads((tmp_path / "run.json").read_text())[0]["step"] == 1
    assert (tmp_path / "run-1.json").read_text() == "[{"


@pytest.mark.parametrize("content", [b"", b"{", b"7", b"[7]", b"[" * 10**5])
def test_a_run_json_that_is_damaged_has_no_entries(tmp_path, content):
    assert folders.entries(tmp_path) == []
    (tmp_path / "run.json").write_bytes(content)
    assert folders.entries(tmp_path) == []
