"""Where text comes from: the user's files, a download, or the corpus that is shipped."""

import hashlib
import http.client
import json
import sys
import time
import urllib.request
from pathlib import Path

from .devices import memory
from .errors import UserError, write_atomically

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HERE = Path(__file__).resolve().parent
PLAYS = HERE / "corpora/plays.txt"  # in a wheel
if not PLAYS.exists():
    PLAYS = HERE.parent / "corpora/plays.txt"  # in a checkout
SUFFIXES = (".txt", ".md", ".jsonl")
MEMORY = 12  # bytes that each byte of a text takes while it is turned into ids (docs/LOG.md)


def find_text(dataset: str, path: str, cache: str | Path) -> tuple[str, str]:
    """(name, text) of the file or folder `path`, or, if that is empty, of a `dataset`.

    Downloads are kept in the folder `cache`. Raises `UserError` for an unknown dataset and whatever
    `read_text` raises.
    """
    if path:
        return Path(path).resolve().name, read_text(path)
    if dataset == "shakespeare":
        return shakespeare(Path(cache))
    if dataset == "plays":
        return dataset, read_text(PLAYS)
    raise UserError(
        f"data.dataset={dataset} is unknown: choose shakespeare or plays, or set data.path"
    )


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, of a .jsonl file's "text" fields, or of all such in a folder.

    Documents are joined by a newline. Raises `UserError` for a path that is missing, empty, not
    UTF-8 or without a text field.
    """
    return "\n".join(text for _, text in documents(path))


def documents(path: str | Path) -> list[tuple[str, str]]:
    """(name, text) of a file, or of each in a folder, in the order of their names."""
    path, files = Path(path), [Path(path)]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"no {', '.join(SUFFIXES)} file in {path}: name another folder or file")
    size, has = sum(file.stat().st_size for file in files if file.is_file()), memory()
    if MEMORY * size > has:
        raise UserError(
            f"reading {path} takes {MEMORY} times its {size / 2**30:.1f} GiB, and the memory has "
            f"{has / 2**30:.1f} GiB: make shards for data.dir, by `python -m tools.prepare "
            f"dataset={path}`"
        )
    if not path.is_dir():
        return [(path.name, _read_file(path))]
    return [(file.relative_to(path).as_posix(), _read_file(file)) for file in files]


def _read_file(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"no file or folder {path}: check data.path")
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")  # of Windows
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from None
    if path.suffix.lower() == ".jsonl":
        text = _jsonl_text(path, text)
    if not text:
        raise UserError(f"{path} is empty: name a file with text in it")
    return text


def _jsonl_text(path: Path, lines: str) -> str:
    texts = []
    for number, line in enumerate(lines.split("\n"), 1):
        if line.strip():
            try:
                texts.append(json.loads(line)["text"])
                texts[-1].encode()  # raises for a lone surrogate
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(
                    f'{path}, line {number}: expected a JSON object with a "text" field'
                ) from None
    return "\n".join(texts)


def download(url: str, path: Path, sha256: str, timeout: float = 10.0, limit: int = 2**26) -> None:
    """Fetch `url` to `path`, which appears only once it is whole and has the right hash.

    `timeout` seconds bound each wait for the server, six times as much the reading, `limit` bytes
    the size. Raises `OSError`.
    """
    body, deadline = bytearray(), time.monotonic() + 6 * timeout
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            while chunk := response.read1(2**16):
                body += chunk
                if len(body) > limit:
                    raise OSError(f"more than {limit:,} bytes")
                if time.monotonic() > deadline:
                    raise OSError(f"not finished after {6 * timeout:g} seconds")
    except http.client.HTTPException as error:
        raise OSError(f"broken answer: {error!r}") from error
    if hashlib.sha256(body).hexdigest() != sha256:
        raise OSError(f"its {len(body):,} bytes do not match the pinned SHA-256")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, body)


def shakespeare(cache: Path, url: str = SHAKESPEARE_URL) -> tuple[str, str]:
    """(name, text) of tiny Shakespeare, downloaded on first use.

    Where that fails, one line on stderr says so, and the shipped corpus takes its place, under its
    own name.
    """
    path = cache / "shakespeare.txt"
    try:
        cached = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
        if cached != SHAKESPEARE_SHA256:
            download(url, path, SHAKESPEARE_SHA256)
        return "shakespeare", read_text(path)
    except OSError as error:
        print(
            f"cannot download tiny Shakespeare ({getattr(error, 'reason', error)}): using the "
            "shipped corpus `plays`, whose loss does not compare with published numbers",
            file=sys.stderr,
        )
        return "plays", read_text(PLAYS)
