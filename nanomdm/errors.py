"""The user's mistakes, and files that are written whole or not at all."""

import importlib
import os
import re
from collections.abc import Callable, Collection
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

# What a terminal takes for a command, or shows in another order than it has in the text.
CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UserError(ValueError):
    """A mistake that the user can correct: one line that names the value, the limit, the remedy.

    `cli.main` catches it, prints the line and exits with code 2.
    """


def check_choice(key: str, value: str, choices: Collection[str]) -> None:
    """Raise `UserError` with the choices for a value that is none of them."""
    if value not in choices:
        raise UserError(f"{key}={value} is unknown: choose one of {', '.join(choices)}")


@contextmanager
def as_user_error(prefix: str = ""):
    """Turn a `ValueError` of model.py or diffusion.py about a user's setting into a `UserError`."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{prefix}{error}") from error


def optional(package: str, needed_by: str = "this"):
    """Import an optional package. Raises `UserError` with the install command if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise UserError(
            f"{needed_by} needs a package that is missing: pip install {name}"
        ) from None


def visible(text: str, stream=None) -> str:
    r"""A text of unknown origin with its control characters written out: ESC becomes \x1b.

    With a `stream` only where that is a terminal: a file or a pipe gets every character.
    """
    if stream is not None and not stream.isatty():
        return text
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def write_atomically(
    path: str | Path, content: bytes | memoryview | Callable[[BinaryIO], None]
) -> None:
    """Write a file that is the old one or the new one whenever the power fails, never a part.

    `content` is its bytes, or a function that writes them to a binary file. A process that is
    killed leaves `.NAME.PID.tmp` at most. Raises `OSError`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # so that the rename survives, too; Windows cannot sync folders
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    finally:
        with suppress(OSError):
            temporary.unlink()
