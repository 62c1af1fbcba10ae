"""Converts a data set of any size into the shards that data.dir reads (docs/data.md).

python -m tools.prepare dataset=Skylion007/openwebtext
python -m tools.prepare dataset=FOLDER tokenizer=bpe out=prepared/mine

One process reads documents in their order, others tokenize them, and the first writes the tokens in
the same order, so the result does not depend on the number of processes. A journal records how far
the shards are complete. When the same command is given again, what a kill left beyond is cut off.
"""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import data
from nanomdm import cli, folders, runlog
from nanomdm.bins import dtype_of
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.tokenizers import CharTokenizer, choices, load_tokenizer, train_tokenizer
from tools import sources
from tools.shards import AGAIN, Job, ShardWriter, read_json, refuse_other, sha256_of

SAVED = 5.0  # seconds between two entries of the journal, at least
NO_RECIPE = ("out", "processes")  # settings that do not change the result


# --- Tokens -------------------------------------------------------------------------------------


def make_tokenizer(config: Section, source: sources.Source, dataset):
    """The tokenizer that the settings name. Raises `UserError`."""
    kind = config.tokenizer
    if kind.endswith(".json"):
        return read_tokenizer(Path(kind))
    if kind not in choices():
        raise UserError(f"tokenizer={kind} is unknown: choose {', '.join(choices())} or a .json")
    if kind in ("gpt2", "byte"):  # there is nothing to train
        return train_tokenizer(kind, "", 0, 0, ends=True)
    pieces = (piece for batch in source.read(dataset) for piece in batch.pieces)
    if kind == "char":
        characters = set("\n").union(*(piece.text for piece in pieces))
        return CharTokenizer("".join(sorted(characters)), ends=True)
    sample = head((piece.text for piece in pieces if not piece.held), config.sample)
    return train_tokenizer(kind, sample, len(sample), config.vocab_size, ends=True)


def head(texts: Iterable[str], characters: int) -> str:
    """The first texts, until they have this many characters."""
    found, size = [], 0
    for text in texts:
        found.append(text)
        size += len(text)
        if size >= characters:
            break
    return "\n".join(found)


def read_tokenizer(path: Path):
    """The tokenizer of a meta.json or a Hugging Face tokenizer.json. Raises `UserError`."""
    try:
        content = path.read_text()
        found = json.loads(content)
        own = found.get("tokenizer")  # a tokenizer.json has no such key
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read tokenizer={path} ({error}): check the name") from None
    return load_tokenizer(own or {"kind": "bpe", "serialized": content})


def encode(tokenizer, pieces: list[sources.Piece]) -> dict[str, np.ndarray]:
    """The ids of each split; a text ends with the tokenizer's end, or else with a newline."""
    end = tokenizer.encode("\n") if tokenizer.eos is None else np.array([tokenizer.eos])
    dtype, found = dtype_of(tokenizer.vocab_size), {split: [] for split in data.SPLITS}
    for piece in pieces:
        ids = found["val" if piece.held else "train"]
        ids.append(tokenizer.encode(piece.text).astype(dtype))
        if piece.ends or piece.asks:
            ids.append(end.astype(dtype))
    return {split: np.concatenate(ids or [end[:0].astype(dtype)]) for split, ids in found.items()}


class Workers:
    """Processes that tokenize; they end with this one, however it ends."""

    def __init__(self, count: int, tokenizer):
        context = get_context("fork" if sys.platform == "linux" else "spawn")
        settings = tokenizer.state(), os.getpid()
        self.window, self.tokenizer = 2 * count, tokenizer  # batches in progress
        self.pool = ProcessPoolExecutor(count, context, _start, settings) if count > 1 else None

    def map(self, batches: Iterable[sources.Batch]) -> Iterator[tuple[sources.Batch, dict]]:
        """(batch, its ids by split) in the order of the batches."""
        if self.pool is None:
            yield from ((batch, encode(self.tokenizer, batch.pieces)) for batch in batches)
            return
        waiting: deque[tuple[sources.Batch, Future]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, self.pool.submit(_encode, batch.pieces)))
                if len(waiting) == self.window:
                    batch, future = waiting.popleft()
                    yield batch, future.result()
            for batch, future in waiting:
                yield batch, future.result()
        except BrokenProcessPool:
            dead = f"a tokenizing process died: take fewer processes; {AGAIN}"
            raise RuntimeError(dead) from None
        except ValueError as error:  # of a tokenizer, in another process
            raise UserError(str(error)) from error

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def _start(state: dict, parent: int) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it and ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _tokenizer = load_tokenizer(state)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _encode(pieces: list[sources.Piece]) -> dict[str, np.ndarray]:
    return encode(_tokenizer, pieces)


# --- The preparation ----------------------------------------------------------------------------


def run(job: Job, source: sources.Source, config: Section) -> None:
    """Read, tokenize and write everything that the journal does not record yet."""
    dataset, journal = source.load(), job.journal
    if "tokenizer" not in journal:
        tokenizer = make_tokenizer(config, source, dataset)
        layout = "stream" if tokenizer.eos is None else "documents"
        if config.response:
            layout = "pairs"
            if tokenizer.eos is None:
                raise UserError(f"tokenizer={config.tokenizer} has no end token, which pairs need")
        width = dtype_of(tokenizer.vocab_size)
        job.save(tokenizer=tokenizer.state(), dtype=width, layout=layout)
    tokenizer, documents = load_tokenizer(journal["tokenizer"]), dict(journal["documents"])
    if "state" in journal:
        dataset.load_state_dict(journal["state"])
    size = min(config.shard_tokens, source.bytes() or config.shard_tokens)
    shards = ShardWriter(job.folder, journal["dtype"], config.shard_tokens, journal["tokens"], size)
    batches, saved = source.read(dataset, sum(documents.values())), time.monotonic()
    count = config.processes or os.cpu_count() or 1
    counted = runlog.progress(None, "token", done=sum(shards.tokens.values()))
    with closing(Workers(count, tokenizer)) as workers, counted as advance:
        for batch, ids in workers.map(batches):
            for split in data.SPLITS:
                shards.write(split, ids[split])
                documents[split] += batch.documents(held=split == "val")
            advance(sum(map(len, ids.values())))
            if batch.state and time.monotonic() - saved >= SAVED:
                shards.sync()
                job.save(tokens=shards.tokens, documents=documents, state=batch.state)
                saved = time.monotonic()
    shards.sync()
    try:
        check_documents(documents, source)
    except ValueError:  # the same settings would fail again
        shutil.rmtree(job.folder)
        raise
    hashes = {path.name: sha256_of(path) for path in sorted(job.folder.glob("*.bin"))}
    job.save(tokens=shards.tokens, documents=documents, shards=hashes)


def check_documents(documents: dict[str, int], source: sources.Source) -> None:
    if not sum(documents.values()):
        raise UserError(f"{source.dataset} holds no text: check dataset, split and column")
    for split, other in zip(data.SPLITS, ("lower", "raise"), strict=True):
        if not documents[split]:
            raise UserError(
                f"none of {sum(documents.values())} documents of {source.dataset} is for {split}: "
                f"{other} val={source.val}, or divide the text (separator, begins); equal "
                "documents stay together"
            )


def main(config: Section) -> None:
    if config.shard_tokens < 1:
        raise UserError(f"shard_tokens={config.shard_tokens} must be at least 1")
    if not 0 <= config.processes <= 1024:
        raise UserError(f"processes={config.processes} must be 0 (one for each core) to 1024")
    where = (config.dataset, config.name, config.revision, config.split)
    where += (config.column, config.response)
    cut = (config.begins, config.separator, config.limit, config.val)
    source = sources.Source(*where, *cut)
    recipe = {k: v for k, v in config.as_dict().items() if k not in NO_RECIPE}
    recipe["files"] = source.fingerprint()
    if not config.response:
        del recipe["response"]  # preparations of earlier versions have none
    out = Path(config.out or Path("prepared", Path(config.dataset).resolve().name))
    with folders.locked(out, "out"):
        if (out / "meta.json").is_file():
            refuse_other(recipe, read_json(out / "meta.json"), out)
            shutil.rmtree(out / "unfinished", ignore_errors=True)  # a kill came before this removal
            print(f"{out} is prepared: python train.py data.dir={out}")
            return
        job = Job(out, recipe)
        try:
            if "shards" not in job.journal:
                run(job, source, config)
            meta = job.finish()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f"the disk of {out} is full: free some space and {AGAIN}") from error
    for split in data.SPLITS:
        print(f"{split}: {meta['documents'][split]:,} documents, {meta['tokens'][split]:,} tokens")
    print(f"{out} is prepared: python train.py data.dir={out}")


if __name__ == "__main__":
    cli.main(main, "tools/prepare")
