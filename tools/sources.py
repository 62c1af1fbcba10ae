"""Documents from the Hugging Face hub or local files, in their order, from any position on."""

import glob
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanomdm.errors import UserError

KINDS = {".parquet": "parquet", ".jsonl": "json", ".txt": "text", ".md": "text"}
BATCH = 2**20  # characters that are tokenized at once, at least
PIECE = 2**22  # characters of a document that are held at once: a longer one is split


class Piece(NamedTuple):
    """A document, or a part of a very long one."""

    text: str
    ends: bool  # whether the document ends with it
    held: bool  # whether the document is for validation
    asks: bool = False  # whether it is the prompt of a pair, whose response follows


class Batch(NamedTuple):
    """Pieces that are tokenized at once."""

    pieces: list[Piece]
    state: dict | None  # where reading continues after it; None within a document

    def documents(self, held: bool) -> int:
        return sum(piece.ends and piece.held is held for piece in self.pieces)


@dataclass(frozen=True)
class Source:
    """Where documents come from; the fields are settings of tools.prepare."""

    dataset: str
    name: str
    revision: str
    split: str
    column: str
    response: str
    begins: str
    separator: str
    limit: int
    val: float

    def __post_init__(self):
        if not self.dataset:
            raise UserError("no dataset: name one of the hub or a folder, as in dataset=my-texts")
        if not 0 < self.val < 1:
            raise UserError(f"val={self.val} must lie between 0 and 1: a share of the documents")
        if self.begins and self.response:
            raise UserError("begins= is for documents, response= for pairs: leave one of them out")
        if self.limit < 0:
            raise UserError(f"limit={self.limit} must be 0 (all) or more")
        try:
            re.compile(self.begins)
        except re.error as error:
            raise UserError(f"begins={self.begins} is not a regular expression ({error})") from None

    def files(self) -> list[Path]:
        """The local files, in the order of their names; none for a data set of the hub."""
        path = Path(self.dataset)
        if not path.exists():
            if self.dataset.startswith((".", "/", "~")) or path.suffix in KINDS:
                raise UserError(f"no file or folder {path}: check dataset=")
            return []
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in found if file.is_file() and file.suffix.lower() in KINDS]
        if not found:
            raise UserError(f"no {', '.join(KINDS)} file in {path}: name another file or folder")
        if len(kinds := {KINDS[file.suffix.lower()] for file in found}) > 1:
            raise UserError(
                f"{path} holds files of {' and '.join(sorted(kinds))}: prepare one kind"
            )
        return found

    def bytes(self) -> int:
        """The size of all local files; 0 for a data set of the hub."""
        return sum(file.stat().st_size for file in self.files())

    def fingerprint(self) -> str:
        """A hash of the names and sizes of local files."""
        files = [f"{file} {file.stat().st_size}" for file in self.files()]
        return hashlib.sha256("\n".join(files).encode()).hexdigest() if files else ""

    def load(self):
        """The data set as a stream whose position can be saved. Raises `UserError`."""
        try:
            import datasets
        except ImportError:
            raise UserError("preparing data needs a package: pip install datasets") from None
        datasets.disable_progress_bars()
        files = [str(file) for file in self.files()]
        kind = KINDS[Path(files[0]).suffix.lower()] if files else ""
        if kind == "text":
            settings = {"files": files, "separator": self.separator, "begins": self.begins}
            return datasets.IterableDataset.from_generator(read_texts, gen_kwargs=settings)
        names = (kind,) if files else (self.dataset, self.name or None)
        settings = {"split": self.split, "revision": self.revision or None}
        if files:
            settings = {"split": "train", "data_files": [glob.escape(file) for file in files]}
        try:
            return datasets.load_dataset(*names, streaming=True, **settings)
        except Exception as error:  # the hub, the network and the files have dozens of errors
            raise UserError(
                f"cannot load {self.dataset} ({first_line(error)}): check its name, name= and "
                "split=, go online, or name a local folder"
            ) from error

    def raw(self, dataset) -> Iterator[dict]:
        """Every row as it is. Raises `UserError`."""
        rows = iter(dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise UserError(
                    f"cannot read {self.dataset} ({first_line(error)}): repair it or go online, "
                    "and give the same command again"
                ) from error
            yield row

    def text_of(self, row: dict, column: str) -> str | None:
        text = row.get(column, b"")
        if not isinstance(text, str | None):
            columns = ", ".join(name for name, value in row.items() if isinstance(value, str))
            raise UserError(
                f"{self.dataset} has no text in column={column}: choose one of {columns}"
            )
        return text

    def rows(self, dataset) -> Iterator[tuple[str, bool]]:
        """(text, whether a document begins with it) of every row. Raises `UserError`."""
        for row in self.raw(dataset):
            if row.keys() == {"text", "begins"}:  # of read_texts
                yield row["text"], row["begins"]
                continue
            text = self.text_of(row, self.column)
            if self.begins:
                text = text or ""
                yield text + "\n" * (not text.endswith("\n")), bool(re.match(self.begins, text))
            elif text:
                yield text, True

    def read(self, dataset, done: int = 0) -> Iterator[Batch]:
        """Batches of documents, `done` of which were read before. Raises `UserError`."""
        if self.response:
            yield from self.read_pairs(dataset, done)
            return
        pieces, size, state, parts, length, held = [], 0, None, [], 0, None

        def cut(ends: bool) -> None:
            nonlocal parts, length, held
            text, parts, length = "".join(parts), [], 0
            held = share(text) < self.val if held is None else held
            pieces.append(Piece(text, ends, held))
            held = None if ends else held

        for text, begins in self.rows(dataset):
            if begins and (parts or held is not None):
                cut(ends=True)
                done += 1
                if done == self.limit:
                    break
                if size >= BATCH:
                    yield Batch(pieces, state)
                    pieces, size = [], 0
            parts.append(text)
            size, length = size + len(text), length + len(text)
            if length >= PIECE and not begins:
                cut(ends=False)
                yield Batch(pieces, None)
                pieces, size = [], 0
            if size >= BATCH:
                state = dataset.state_dict()
        else:
            if parts or held is not None:
                cut(ends=True)
        if pieces:
            yield Batch(pieces, None)

    def read_pairs(self, dataset, done: int) -> Iterator[Batch]:
        """Batches of prompts and responses, which stay together; empty responses are left out."""
        pieces, size = [], 0
        if self.limit and done >= self.limit:
            return
        for row in self.raw(dataset):
            prompt, response = (self.text_of(row, name) for name in (self.column, self.response))
            if not response:
                continue
            held = share(f"{prompt}\n{response}") < self.val
            pieces += [Piece(prompt or "", False, held, asks=True), Piece(response, True, held)]
            size, done = size + len(prompt or "") + len(response), done + 1
            if size >= BATCH or done == self.limit:
                yield Batch(pieces, dataset.state_dict())
                pieces, size = [], 0
            if done == self.limit:
                return
        if pieces:
            yield Batch(pieces, None)


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: equal documents are in one split."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def read_texts(files: list[str], separator: str, begins: str) -> Iterator[dict]:
    """The documents of text files, or parts of them: lines if `begins` is given, else pieces."""
    for name in files:
        with open(name, encoding="utf-8-sig", newline="") as file:
            if begins:
                for number, line in enumerate(file):
                    yield {"text": line, "begins": not number or bool(re.match(begins, line))}
            else:
                yield from _divide(file, separator)


def _divide(file, separator: str) -> Iterator[dict]:
    """The texts between the separators, without the line ends around them."""
    rest, begins = "", True
    while chunk := file.read(BATCH):
        *documents, rest = (rest + chunk).split(separator) if separator else (rest + chunk,)
        for text in documents:
            text = text.rstrip("\r\n")
            yield from _row(text.lstrip("\r\n") if begins else text, begins)
            begins = True
        place = seam(rest) if len(rest) >= BATCH else 0
        if place:
            yield from _row(rest[:place].lstrip("\r\n") if begins else rest[:place], begins)
            rest, begins = rest[place:], False
    rest = rest.rstrip("\r\n")
    yield from _row(rest.lstrip("\r\n") if begins else rest, begins)


def _row(text: str, begins: bool) -> Iterator[dict]:
    if text:
        yield {"text": text, "begins": begins}


def seam(text: str) -> int:
    """Where to cut without cutting a token: before the last single space; 0 where there is none.

    In GPT-2's pattern, which byte-level BPEs share, a space between two other characters always
    begins a token.
    """
    place = len(text) - 1
    while (place := text.rfind(" ", 1, place)) > 0:
        if not (text[place - 1].isspace() or text[place + 1].isspace()):
            return place
    return len(text) if len(text) >= 16 * BATCH else 0
