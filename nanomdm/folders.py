"""Folders that a run writes into: one process at a time, earlier files kept, how to repeat it."""

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from .errors import UserError, write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf")


@contextmanager
def locked(folder: str | Path, key: str = "out_dir"):
    """Make the folder, and keep every other process out of it while the context lasts.

    The lock is the system's (flock), so that it dies with its owner, whatever ends that. It leaves
    nothing behind, nor a folder that was made for nothing. Raises `UserError`, which names the
    setting `key`, where another process has the lock, and where nothing can be written.
    """
    path, is_new = Path(folder, LOCK), not Path(folder).exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _take(path, key)
    except OSError as error:
        raise UserError(
            f"cannot write into {key}={folder} ({error.strerror}): choose another {key}"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # the folder may have become read-only, or be gone
            path.unlink()  # while the lock is still held: see _take
        file.close()
        if is_new:
            with suppress(OSError):  # it is not empty
                path.parent.rmdir()


def _take(path: Path, key: str) -> TextIO:
    """The locked file, which holds the process id. Raises `UserError` if another has the lock."""
    while True:
        file = path.open("a+")
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{key}={path.parent} is in use by process {file.read() or '(unknown)'}: wait for "
                f"it, stop it, or choose another {key}"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its owner removed it in the meantime: locked, but no longer what others find
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def _lock(file: TextIO) -> None:
    try:
        if fcntl is None:
            raise OSError(0, "no flock on this system")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # some network file systems have none, either
        where = Path(file.name).parent
        print(f"{where} is not locked ({error.strerror}): let one process use it", file=sys.stderr)


def clean(folder: str | Path) -> list[Path]:
    """Remove what was being written when a process died; for the owner of the lock only."""
    left = list(Path(folder).glob(".*.tmp"))
    for path in left:
        path.unlink()
    return left


def set_aside(folder: str | Path, names: tuple[str, ...]) -> list[Path]:
    """Rename the files `names` of an earlier run to name-1, name-2, ...: the first that is free.

    Returns the new paths, empty if there was nothing to rename.
    """
    old = [Path(folder, name) for name in names if Path(folder, name).exists()]
    number = 1
    while any(_numbered(Path(folder, name), number).exists() for name in names):
        number += 1
    return [path.rename(_numbered(path, number)) for path in old]


def _numbered(path: Path, number: int) -> Path:
    return path.with_stem(f"{path.stem}-{number}")


# --- How to repeat a run ------------------------------------------------------------------------


def record(folder: str | Path, about: dict) -> None:
    """Add an entry to run.json: how this process was started, with which code, and `about`."""
    path = Path(folder, "run.json")
    entries = _entries(path)
    started = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.orig_argv),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "git": git_state(ROOT),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_atomically(path, (json.dumps([*entries, started | about], indent=1) + "\n").encode())


def _entries(path: Path) -> list[dict]:
    """What run.json holds; one that is damaged gets another name."""
    try:
        return list(json.loads(path.read_text())) if path.exists() else []
    except (ValueError, TypeError):
        set_aside(path.parent, (path.name,))
        return []


def git_state(root: Path) -> dict | None:
    """The revision of a working tree and the tracked files that differ from it; None if it is none.

    Also None where there is no git.
    """

    def git(*words: str) -> list[str]:
        command = ["git", "-C", str(root), *words]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return result.stdout.splitlines()

    try:
        top, revision = git("rev-parse", "--show-toplevel", "HEAD")
        changed = git("diff", "--name-only", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": revision, "changed": changed} if Path(top) == root else None
