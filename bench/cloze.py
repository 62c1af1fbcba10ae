"""Score parts of texts given the rest: the conditional bound, last words, multiple choice.

python -m bench.cloze checkpoint=out/best.pt path=lambada_test.jsonl
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import diffusion
from bench.score import nll_samples
from model import ModelConfig, Transformer
from nanomdm import bounds, cli, devices, report
from nanomdm.checkpoint import Loaded, load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.strategies import STRATEGIES, Sampler
from nanomdm.texts import Texts

TASKS = ("last_word", "choices")


class Fill(NamedTuple):
    """A text, of which `target` is to be predicted, given the rest."""

    before: str
    target: str
    after: str = ""


class Item(NamedTuple):
    """A question: one fill, or several, of which the one at index `answer` is correct."""

    fills: list[Fill]
    answer: int = 0


def as_texts(fills: Sequence[Fill], tokenizer, context: int, source: str = "") -> Texts:
    """A row for each fill: its target, and as much of its surroundings as the context holds.

    The three parts are tokenized separately, so that the predicted tokens do not depend on their
    surroundings. A target longer than the context takes several rows of half a context each, with
    the text before them as context; `document` says which fill a row belongs to. Raises `UserError`
    for an empty target.
    """
    rows, predict, document, sizes = [], [], [], []
    for number, fill in enumerate(fills):
        before, target, after = (tokenizer.encode(part) for part in fill)
        if not len(target):
            raise UserError("there is nothing to predict: a target is empty")
        size = context if len(target) <= context else max(1, context // 2)
        for start in range(0, len(target), size):
            piece, rest = target[start : start + size], target[start + size :]
            known = np.concatenate((before, target[:start]))
            room = context - len(piece)
            behind = () if len(rest) else after[: max(room // 2, room - len(known))]
            known = known[max(0, len(known) - room + len(behind)) :]
            ids = np.concatenate((known, piece, behind)).astype(np.int64)
            place = torch.arange(len(ids))
            rows.append(torch.from_numpy(ids))
            predict.append((place >= len(known)) & (place < len(known) + len(piece)))
            document.append(number)
            sizes.append(len(tokenizer.decode_bytes(piece.tolist())))
    names = [str(number) for number in range(len(fills))]
    counts = torch.tensor([int(where.sum()) for where in predict])
    return Texts(source, names, rows, predict, torch.tensor(document), torch.tensor(sizes), counts)


def costs(loaded: Loaded, texts: Texts, *, seed: int, draws: int, batch_size: int) -> Tensor:
    """The conditional bound of every fill in nats (draws, fills)."""
    samples = nll_samples(
        loaded.model,
        texts.rows,
        seed=seed,
        draws=draws,
        predict=texts.predict,
        batch_size=batch_size,
    )
    return by_fill(samples.nats, texts)


def by_fill(values: Tensor, texts: Texts) -> Tensor:
    """Values (..., rows) added up over the rows of each fill (..., fills)."""
    sums = values.new_zeros(*values.shape[:-1], len(texts.names))
    return sums.index_add(-1, texts.document, values)


@torch.no_grad()
def greedy(loaded: Loaded, texts: Texts, batch_size: int = 64) -> list[bool]:
    """Whether the most probable tokens, filled in by decreasing confidence, equal each row.

    One token per call; in blocks, block by block. An autoregressive model goes from left to right.
    """
    model, right = loaded.model, [False] * len(texts.rows)
    strategy = STRATEGIES["left_to_right" if model.config.causal else "confidence"]
    shapes = [
        (len(row), int(where.sum())) for row, where in zip(texts.rows, texts.predict, strict=True)
    ]
    for length, masked in sorted(set(shapes)):
        same = [i for i, shape in enumerate(shapes) if shape == (length, masked)]
        for start in range(0, len(same), batch_size):
            part = same[start : start + batch_size]
            x0 = torch.stack([texts.rows[i] for i in part]).to(model.device)
            is_masked = torch.stack([texts.predict[i] for i in part]).to(model.device)
            settings = {"strategy": strategy, "steps": masked, "temperature": 0.0}
            sampler = Sampler(diffusion.sample, "", settings)
            filled = sampler.fill(model, x0, is_masked)
            for i, same_ids in zip(part, (filled.ids == x0).all(dim=1).tolist(), strict=True):
                right[i] = same_ids
    return right


def greedy_fills(loaded: Loaded, texts: Texts, batch_size: int = 64) -> list[bool]:
    """Whether all rows of each fill are right, by `greedy`."""
    wrong = ~torch.tensor(greedy(loaded, texts, batch_size))
    return (by_fill(wrong.long(), texts) == 0).tolist()


# --- Tasks --------------------------------------------------------------------------------------


def read_items(path: str, task: str) -> list[Item]:
    """The items of a .jsonl file. Raises `UserError` for any other line."""
    if task not in TASKS:
        raise UserError(f"task={task} is unknown: choose one of {', '.join(TASKS)}")
    if not Path(path).is_file():
        raise UserError(f"no file {path!r}: name a .jsonl file by path=")
    items = []
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        try:
            items.append((last_word if task == "last_word" else choices)(json.loads(line)))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(f"{path}, line {number} is not an item of task={task}") from None
    return items


def last_word(values: dict) -> Item:
    """The last word of a text, with the space before it, given the text before it (LAMBADA)."""
    before, word = values["text"].rstrip().rsplit(" ", 1)
    return Item([Fill(before, " " + word)])


def choices(values: dict) -> Item:
    """Several fills of one blank. `answer` counts from 0."""
    after = values.get("after", "")
    fills = [Fill(values["context"], choice, after) for choice in values["choices"]]
    fills[answer := int(values["answer"])]
    return Item(fills, answer)


def fit_for(items: Sequence[Item], tokenizer) -> list[Item]:
    """The items whose characters the tokenizer knows."""

    def known(item: Item) -> bool:
        try:
            return bool([tokenizer.encode(part) for fill in item.fills for part in fill])
        except ValueError:
            return False

    return [item for item in items if known(item)]


def share(hits: Sequence[bool]) -> dict:
    """A share of items and its binomial standard error."""
    n, rate = len(hits), sum(hits) / len(hits)
    return {"value": rate, "standard_error": math.sqrt(rate * (1 - rate) / n)}


def score_last_words(nats: Tensor, right: Sequence[bool], sizes: Tensor) -> dict:
    """Accuracy, perplexity of a word, bits per byte, from nats (draws, N) of words."""
    per_word, word_error = bounds.ratio(nats.mean(dim=0), torch.ones(nats.size(1)))
    bits, bits_error = bounds.ratio(nats.mean(dim=0) / math.log(2), sizes)
    return {
        "accuracy": share(right),
        "nats_per_word": {"value": per_word, "standard_error": word_error},
        "perplexity": math.exp(per_word),
        "bits_per_byte": {"value": bits, "standard_error": bits_error},
    }


def score_choices(nats: Tensor, items: Sequence[Item], sizes: Tensor) -> dict:
    """Accuracy by cost and by cost per byte, and the share of undecided answers.

    nats (draws, fills) holds the fills of all items in order. An answer is undecided if the two
    cheapest choices differ by less than two standard errors over the passes.
    """
    right, right_per_byte, undecided, start = [], [], [], 0
    for item in items:
        part = slice(start, start := start + len(item.fills))
        mean = nats[:, part].mean(dim=0)
        right.append(int(mean.argmin()) == item.answer)
        right_per_byte.append(int((mean / sizes[part]).argmin()) == item.answer)
        if len(item.fills) > 1:
            best, second = mean.argsort()[:2].tolist()
            gaps = nats[:, part][:, second] - nats[:, part][:, best]
            gap, error = bounds.mean_and_error(gaps)
            undecided.append(not gap > 2 * error)
    figures = {"accuracy": share(right), "accuracy_per_byte": share(right_per_byte)}
    return figures | {"undecided": share(undecided)} if undecided else figures


def main(config: Section) -> None:
    items = read_items(config.path, config.task)
    device = devices.pick_device(config.device)
    loaded = load_model(config.checkpoint, device, Transformer, ModelConfig)
    if loaded.layout == "pairs":
        raise UserError(f"{config.checkpoint} answers prompts, and knows no texts: name another")
    known = fit_for(items, loaded.tokenizer)
    if not known:
        raise UserError(f"every item of {config.path} has symbols that the tokenizer lacks")
    keep = min(config.limit or len(known), len(known))
    chosen = [known[i * len(known) // keep] for i in range(keep)]
    fills = [fill for item in chosen for fill in item.fills]
    texts = as_texts(fills, loaded.tokenizer, loaded.model.config.block_size, config.path)
    print(
        f"{config.path}: {len(chosen):,} of {len(items):,} items ({len(items) - len(known):,} have "
        "symbols that the tokenizer lacks)"
    )
    start = time.perf_counter()
    nats = costs(loaded, texts, seed=config.seed, draws=config.draws, batch_size=config.batch_size)
    seconds = time.perf_counter() - start
    sizes = by_fill(texts.sizes, texts)
    if config.task == "last_word":
        figures = score_last_words(nats, greedy_fills(loaded, texts, config.batch_size), sizes)
    else:
        figures = score_choices(nats, chosen, sizes)
    for name, value in figures.items():
        print(f"{name:<18} {report.text_of(value) if isinstance(value, dict) else f'{value:.2f}'}")
    print(f"{seconds:.1f} s")
    if config.output:
        about = {"checkpoint": config.checkpoint, "path": config.path, "task": config.task}
        about |= {"items": len(chosen), "draws": len(nats), "seed": config.seed}
        each = nats.mean(dim=0).tolist()
        figures |= about | {"nats": each, "seconds": seconds}
        Path(config.output).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    cli.main(main, "bench/cloze")
