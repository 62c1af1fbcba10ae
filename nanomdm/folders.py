"""A run's folder: one process at a time, the files of earlier runs kept, how to repeat the run."""

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TextIO

from .errors import UserError, write_atomically
from .parallel import world

FILES = ("ckpt.pt", "best.pt", "metrics.jsonl", "run.json")  # of a run
LOCK = ".lock"
PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf")  # whose versions run.json has
ROOT = Path(__file__).resolve().parents[1]


# --- One process at a time ----------------------------------------------------------------------


@contextmanager
def locked(folder: str | Path, key: str = "out_dir"):
    """Make the folder, and keep every other process out of it while the context lasts.

    The lock is the system's (flock), so it ends with its owner, whatever ends that process. The
    context leaves no lock file behind, and no folder that it made and that is still empty. Raises
    `UserError`, which names the setting `key`, if another process has the lock or if the folder
    cannot be written.
    """
    if not world().is_main:
        yield
        return
    path, is_new = Path(folder, LOCK), not Path(folder).exists()
    if not str(folder):
        raise UserError(f"{key} is empty: name a folder, {key}=. for this one")
    with writable(folder, key):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _take(path, key)
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may have become read-only, or have been removed
            path.unlink()  # while this process still has the lock: see _take
        file.close()
        if is_new:
            with suppress(OSError):  # it is not empty
                path.parent.rmdir()


def _take(path: Path, key: str) -> TextIO:
    """The locked file, which holds the process id. Raises `UserError` if another has the lock."""
    while True:
        file = path.open("a+")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{key}={path.parent} is in use by process {file.read() or '(unknown)'}: wait for "
                f"it, stop it, or choose another {key}"
            ) from None
        except (ImportError, OSError) as error:  # Windows, and some network file systems
            print(
                f"{path.parent} cannot be locked ({error}): let one process use it",
                file=sys.stderr,
            )
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the owner removed it before this process locked it: others find a new file
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


@contextmanager
def writable(folder: str | Path, key: str):
    """Turn an `OSError` of writing a file or a folder into a `UserError` that names the setting."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {key}={folder} ({error.strerror}): choose another {key}"
        ) from error


# --- Files of a run -----------------------------------------------------------------------------


def begin(folder: str | Path, first_step: int, about: dict) -> list[Path]:
    """Prepare the folder for a run, which has to hold its lock; `about` goes into run.json.

    Removes what a killed process was writing. A new run (`first_step` 0) sets the files of an
    earlier one aside: returns their new paths.
    """
    for path in Path(folder).glob(".*.tmp"):
        path.unlink()
    kept = [] if first_step else set_aside(folder, FILES)
    record(folder, {"first_step": first_step} | about)
    return kept


def set_aside(folder: str | Path, names: tuple[str, ...]) -> list[Path]:
    """Rename the files `names` to name-1, name-2, ...: the first number that is free for them all.

    Returns the new paths, empty if there was nothing to rename.
    """
    paths, number = [Path(folder, name) for name in names], 1
    while any(numbered(path, number).exists() for path in paths):
        number += 1
    return [path.rename(numbered(path, number)) for path in paths if path.is_file()]


def numbered(path: Path, number: int) -> Path:
    return path.with_stem(f"{path.stem}-{number}")


# --- How to repeat a run ------------------------------------------------------------------------


def record(folder: str | Path, about: dict) -> None:
    """Add an entry to run.json: how this process was started, with which code, and `about`."""
    path = Path(folder, "run.json")
    before = entries(folder)
    if path.exists() and not before:  # it is damaged
        set_aside(folder, (path.name,))
    started = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "git": git_state(ROOT),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_atomically(path, json.dumps([*before, started | about], indent=1).encode() + b"\n")


def entries(folder: str | Path) -> list[dict]:
    """What run.json has of each start of the run in a folder; [] if there is none, or damaged."""
    try:
        found = json.loads(Path(folder, "run.json").read_bytes())
        return [dict(entry) for entry in found]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def git_state(root: Path) -> dict | None:
    """The revision of the working tree `root` and the tracked files that differ from it.

    None if `root` is not the top of a working tree, or without git.
    """

    def git(*words: str) -> list[str]:
        command = ["git", "-C", str(root), *words]
        return subprocess.check_output(
            command, stderr=subprocess.DEVNULL, text=True, timeout=60
        ).splitlines()

    try:
        top, revision = git("rev-parse", "--show-toplevel", "HEAD")
        changed = git("diff", "--name-only", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "changed": changed} if Path(top) == root else None


# --- A file to write -----------------------------------------------------------------------------


def check_output(path: str) -> None:
    """Raise `UserError`, before anything is computed, if no file can be written there.

    Makes its folder. "" is no file.
    """
    if path:
        with writable(path, "output"):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=Path(path).parent).close()


def open_output(path: str):
    """The text file `path`, opened for writing; an earlier one is kept under a new name.

    "" is no file: a context that gives None. Raises `UserError`.
    """
    if not path:
        return nullcontext()
    file = Path(path)
    with writable(file, "output"):
        file.parent.mkdir(parents=True, exist_ok=True)
        for kept in set_aside(file.parent, (file.name,)):
            print(f"an earlier file is kept as {kept}", file=sys.stderr)
        return file.open("w", encoding="utf-8")


def write_output(path: str, figures: dict) -> None:
    """Write figures as JSON, if `path` is not empty; an earlier file is kept under a new name."""
    with open_output(path) as file:
        if file:
            print(json.dumps(figures, indent=1), file=file)
