"""Where text comes from: the user's files, a download, a generator, or what is shipped."""

import hashlib
import http.client
import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

from . import folders, sudoku
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
PAIR = ("prompt", "response")  # the fields of a .jsonl that make it one of pairs


class Content(NamedTuple):
    """What was found: one text, or several that are kept apart.

    The texts of a `layout`: the one that is a stream; documents; prompts and answers, in turn, for
    pairs; rows of one length.
    """

    name: str
    layout: str
    files: list[tuple[str, list[str]]]  # the texts of each, in the order of their names

    @property
    def texts(self) -> list[str]:
        return [text for _, texts in self.files for text in texts]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def sha256(self) -> str:
        """A hash of the text of a stream; else of all texts, each by itself."""
        content = self.text if self.layout == "stream" else json.dumps(self.texts)
        return hashlib.sha256(content.encode()).hexdigest()

    def for_tokenizer(self, tokenizer, sha256: str = "") -> "Content":
        """As one stream, if it is one document or for a tokenizer that cannot end documents.

        Also if `sha256` is that of the stream: checkpoints of earlier versions knew no documents.
        """
        cannot = tokenizer is not None and tokenizer.eos is None
        if self.layout == "pairs" and cannot:
            raise UserError(
                f"{self.name} holds pairs, and the checkpoint's tokenizer has no end token: start "
                "from one that was trained on documents or pairs"
            )
        is_one = cannot or len(self.texts) == 1
        if self.layout != "documents" or not (is_one or sha256):
            return self
        stream = self._replace(layout="stream", files=[(self.name, [self.text])])
        return stream if is_one or stream.sha256 == sha256 else self


def find(dataset: str, path: str, cache: str | Path, rows: bool = False) -> Content:
    """What the file or folder `path` holds or, if that is empty, a `dataset`.

    Downloads, and what is generated, are kept in the folder `cache`. Raises `UserError` for an
    unknown dataset and whatever `read` raises.
    """
    if path:
        return read(path, rows)
    if dataset == "shakespeare":
        dataset, path = shakespeare(Path(cache))
    elif dataset == "plays":
        path = PLAYS
    elif dataset in sudoku.DATASETS:
        path = Path(cache, f"{dataset}.txt")
        if not path.is_file():
            with folders.writable(path.parent, "NANOMDM_CACHE"):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, sudoku.lines(*sudoku.DATASETS[dataset]).encode())
    else:
        known = ("shakespeare", "plays", *sudoku.DATASETS)
        raise UserError(
            f"data.dataset={dataset} is unknown: choose {', '.join(known)}, or set data.path"
        )
    return read(path, rows)._replace(name=dataset)


def read_text(path: str | Path) -> str:
    """All of `read`, joined by newlines."""
    return read(path).text


def read(path: str | Path, rows: bool = False) -> Content:
    """A UTF-8 file, a .jsonl file's fields, or all such in a folder; by line, if they are `rows`.

    A .jsonl or a folder holds documents, or pairs if the .jsonl has the fields of `PAIR`. Raises
    `UserError` for a path that is missing, empty, not UTF-8 or without these fields.
    """
    path = Path(path)
    files, is_folder = [path], path.is_dir()
    if is_folder:
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
    found, kinds = [], set()
    for file in files:
        kind, texts = _read_file(file)
        if rows:
            texts = [line for text in texts for line in text.split("\n") if line]
        kinds.add(kind)
        found.append((file.relative_to(path).as_posix() if is_folder else path.name, texts))
    if not any(texts for _, texts in found):
        raise UserError(f"{path} has no line with text: name another file")
    if "pairs" in kinds and (len(kinds) > 1 or rows):
        raise UserError(f"{path} holds pairs: leave out data.rows, and files without pairs")
    layout = "documents" if is_folder and "pairs" not in kinds else kinds.pop()
    return Content(path.resolve().name, "rows" if rows else layout, found)


def _read_file(path: Path) -> tuple[str, list[str]]:
    """The layout of a file, and its texts."""
    if not path.is_file():
        raise UserError(f"no file or folder {path}: check data.path")
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")  # of Windows
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it first") from None
    layout, texts = _jsonl(path, text) if path.suffix.lower() == ".jsonl" else ("stream", [text])
    if not any(texts):
        raise UserError(f"{path} is empty: leave it out, or write a text into it")
    return layout, texts


def _jsonl(path: Path, lines: str) -> tuple[str, list[str]]:
    texts, fields = [], ()
    for number, line in enumerate(lines.split("\n"), 1):
        if line.strip():
            try:
                found = json.loads(line)
                fields = fields or (PAIR if "text" not in found and PAIR[0] in found else ("text",))
                texts += [found[field] for field in fields]
                "".join(texts[-2:]).encode()  # raises for a lone surrogate
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                wanted = '"text" field, or in every line with "prompt" and "response"'
                if fields == PAIR:
                    wanted = '"prompt" and a "response" field'
                raise UserError(
                    f"{path}, line {number}: expected a JSON object with a {wanted}"
                ) from None
            if not texts[-1] and fields == PAIR:
                raise UserError(f"{path}, line {number}: the response is empty: leave it out")
    return "pairs" if fields == PAIR else "documents", texts


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


def shakespeare(cache: Path, url: str = SHAKESPEARE_URL) -> tuple[str, Path]:
    """(name, path) of tiny Shakespeare, downloaded on first use.

    Where that fails, one line on stderr says so, and the shipped corpus takes its place, under its
    own name.
    """
    path = cache / "shakespeare.txt"
    try:
        cached = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
        if cached != SHAKESPEARE_SHA256:
            download(url, path, SHAKESPEARE_SHA256)
        return "shakespeare", path
    except OSError as error:
        print(
            f"cannot download tiny Shakespeare ({getattr(error, 'reason', error)}): using the "
            "shipped corpus `plays`, whose loss does not compare with published numbers",
            file=sys.stderr,
        )
        return "plays", PLAYS
