"""Judge samples: bits per byte, always reported with entropy and distinct n-grams.

python -m bench.judge judge=out-ar/ckpt.pt samples=samples.jsonl

The judge is an autoregressive checkpoint of this project or any Hugging Face causal model. A judge
that does not order three controls (held-out text, its words shuffled, one line repeated) is
refused.
"""

import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from model import ModelConfig, Transformer
from nanomdm import bounds, cli, devices
from nanomdm import text as texts_of
from nanomdm.checkpoint import load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.texts import windows

NGRAMS = (2, 4)  # lengths, in tokens of the judge


# --- Judges --------------------------------------------------------------------------------------


class Judge:
    """An autoregressive network that scores texts.

    `nll(x0)` gives the cross-entropies (B, L) in nats of ids (B, L), every token given those before
    it and the first given the beginning of a text.
    """

    name: str
    context: int  # the longest sequence that the network takes
    device: torch.device

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def nll(self, x0: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def nats(self, texts: Sequence[str], batch_size: int = 32) -> list[float]:
        """-log p of each text in nats, over all of its tokens.

        A text longer than the context is read in windows that move by half a context. Each token is
        scored once; those beyond the first window have at least half a context before them.
        """
        total, found = [0.0] * len(texts), []
        for number, text in enumerate(texts):
            ids = torch.tensor(self.encode(text), dtype=torch.long)
            for start, stop, first in windows(len(ids), self.context, self.context // 2):
                found.append((number, ids[start:stop], first - start))
        found.sort(key=lambda window: len(window[1]))
        for part in _runs_of_equal_length(found, batch_size):
            costs = self.nll(torch.stack([ids for _, ids, _ in part]).to(self.device)).double()
            for (number, _, given), cost in zip(part, costs.cpu(), strict=True):
                total[number] += float(cost[given:].sum())
        return total


class OwnJudge(Judge):
    """A checkpoint of training.objective=ar."""

    def __init__(self, path: str, device: torch.device):
        self.loaded = load_model(path, device, Transformer, ModelConfig)
        if not self.loaded.model.config.causal:
            raise UserError(
                f"{path} is not autoregressive: train a judge with training.objective=ar"
            )
        self.name, self.device = path, device
        self.context = self.loaded.model.config.block_size

    def encode(self, text: str) -> list[int]:
        return self.loaded.tokenizer.encode(text).tolist()

    def nll(self, x0: Tensor) -> Tensor:
        return self.loaded.model(x0, x0, torch.ones_like(x0, dtype=torch.bool))


class HuggingFaceJudge(Judge):
    """Any causal language model that `transformers` loads, by name or folder.

    The text begins with the tokenizer's token for the beginning (or, as GPT-2 has it, the end) of a
    text, so that the first token is scored, too.
    """

    def __init__(self, name: str, device: torch.device):
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise UserError(
                f"{name} is not a .pt checkpoint, and a Hugging Face judge needs a package: "
                "pip install transformers"
            ) from None
        try:
            trusted = {"trust_remote_code": False}  # otherwise it asks at a terminal
            self.tokenizer = AutoTokenizer.from_pretrained(name, **trusted)
            self.model = AutoModelForCausalLM.from_pretrained(name, **trusted).to(device).eval()
        except Exception as error:  # a hub, a folder or a configuration can fail in any way
            reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"cannot load judge {name}, neither a checkpoint nor a causal model ({reason})"
            ) from error
        self.name, self.device = name, device
        starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        self.start = next((token for token in starts if token is not None), None)
        if self.start is None:
            raise UserError(f"the tokenizer of {name} has no token for the beginning of a text")
        self.context = getattr(self.model.config, "max_position_embeddings", 1025) - 1

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def nll(self, x0: Tensor) -> Tensor:
        xt = F.pad(x0[:, :-1], (1, 0), value=self.start)
        rows = zip(self.model(input_ids=xt).logits, x0, strict=True)  # (L, V) and (L,), B times
        return torch.stack(
            [F.cross_entropy(row.float(), ids, reduction="none") for row, ids in rows]
        )


def load_judge(name: str, device: torch.device) -> Judge:
    """The judge `name`: a checkpoint file of this project, else a Hugging Face name or folder.

    Raises `UserError` if it is neither.
    """
    kind = OwnJudge if Path(name).suffix == ".pt" else HuggingFaceJudge
    return kind(name, device)


def _runs_of_equal_length(windows: list, batch_size: int):
    part: list = []
    for window in windows:
        if part and (len(part) == batch_size or len(window[1]) != len(part[0][1])):
            yield part
            part = []
        part.append(window)
    if part:
        yield part


# --- Figures -------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """The figures of a set of texts, which are always reported together."""

    bits_per_byte: float
    error: float  # its standard error over the texts
    entropy: float  # nats, of the tokens of a text, on average
    distinct: dict[int, float]  # share of n-grams in a text that are distinct, on average

    def __str__(self) -> str:
        grams = " ".join(f"{n}-grams {share:.3f}" for n, share in self.distinct.items())
        bits = f"{self.bits_per_byte:.4f} ± {self.error:.4f} bits/byte"
        return f"{bits} | entropy {self.entropy:.3f} | distinct {grams}"


def judge_texts(judge: Judge, texts: Sequence[str], batch_size: int = 32) -> Verdict:
    """Judge texts, none of them empty. Bits are divided by the exact bytes of UTF-8."""
    if not texts or not all(texts):
        raise UserError("there is nothing to judge: no text, or an empty one")
    tokens = [judge.encode(text) for text in texts]
    bits = torch.tensor(judge.nats(texts, batch_size), dtype=torch.float64) / math.log(2)
    value, error = bounds.ratio(bits, torch.tensor([len(text.encode()) for text in texts]))
    distinct = {n: statistics.fmean(distinct_ngrams(ids, n) for ids in tokens) for n in NGRAMS}
    return Verdict(value, error, statistics.fmean(map(entropy, tokens)), distinct)


def entropy(ids: Sequence) -> float:
    """The entropy, in nats, of how often each token occurs in one text (Zheng et al.)."""
    return -sum(n / len(ids) * math.log(n / len(ids)) for n in Counter(ids).values()) + 0.0


def distinct_ngrams(ids: Sequence, n: int) -> float:
    """The share of the n-grams of one text that differ: 1 if none occurs twice."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


# --- Controls ------------------------------------------------------------------------------------


def cut(text: str, size: int, count: int, seed: int) -> list[str]:
    """At most `count` texts of `size` characters, spread over `text` without overlap."""
    pieces = [text[i : i + size] for i in range(0, len(text) - size + 1, size)] or [text]
    return random.Random(seed).sample(pieces, min(count, len(pieces)))


def control_texts(held_out: Sequence[str], seed: int) -> dict[str, list[str]]:
    """The three controls: held-out texts, their words shuffled, one line of each repeated."""
    shuffler = random.Random(seed)

    def shuffled(text: str) -> str:
        words = text.split(" ")
        return " ".join(shuffler.sample(words, len(words)))

    def repeated(text: str) -> str:
        line = max(text.splitlines(keepends=True), key=len)
        line = (line if line.endswith("\n") else line + " ")[: max(1, len(text) // 4)]
        return (line * (len(text) // len(line) + 1))[: len(text)]

    return {
        "held-out text": list(held_out),
        "its words shuffled": [shuffled(text) for text in held_out],
        "one line repeated": [repeated(text) for text in held_out],
    }


def controls(
    judge: Judge, held_out: Sequence[str], seed: int = 0, batch_size: int = 32
) -> dict[str, Verdict]:
    """The verdicts on the three controls.

    Raises `UserError` for a judge that does not rank held-out text above its shuffled words by
    more than two standard errors, or texts whose repetition does not lower the entropy.
    """
    rows = {
        name: judge_texts(judge, texts, batch_size)
        for name, texts in control_texts(held_out, seed).items()
    }
    real, shuffled, repeated = rows.values()
    gap = shuffled.bits_per_byte - real.bits_per_byte
    if not gap > 2 * math.hypot(real.error, shuffled.error):
        raise UserError(
            f"{judge.name} cannot judge: held-out text costs {real.bits_per_byte:.3f} bits/byte "
            f"and its words shuffled {shuffled.bits_per_byte:.3f}: train it longer or take another"
        )
    if not repeated.entropy < min(real.entropy, shuffled.entropy):
        raise UserError(
            f"one line repeated has the entropy {repeated.entropy:.3f}, no less than real text "
            f"({real.entropy:.3f}): choose longer texts"
        )
    return rows


def held_out_text(judge: Judge, path: str) -> str:
    """The text of `path`, or the validation split of the judge's own run."""
    if path:
        return texts_of.read_text(path)
    if not isinstance(judge, OwnJudge) or "data" not in judge.loaded.config:
        raise UserError(f"{judge.name} has no validation split: name a text by held_out=")
    corpus = data.load(cli.stored_data(judge.loaded.config), judge.loaded.tokenizer)
    return corpus.tokenizer.decode(corpus.val[:].tolist())


def read_samples(path: str, length: int) -> list[str]:
    """The texts of a .jsonl (field "text"), or a text file cut into pieces of `length`."""
    if Path(path).suffix != ".jsonl":
        return cut(texts_of.read_text(path), length, 10**9, 0)
    texts_of.read_text(path)  # raises for a file that is not text
    lines = Path(path).read_text().splitlines()
    return [json.loads(line)["text"] for line in lines if line.strip()]


def main(config: Section) -> None:
    judge = load_judge(config.judge, devices.pick_device(config.device))
    held_out = cut(held_out_text(judge, config.held_out), config.length, config.texts, config.seed)
    rows = controls(judge, held_out, config.seed, config.batch_size)
    if config.samples:
        texts = read_samples(config.samples, config.length)
        rows[config.samples] = judge_texts(judge, texts, config.batch_size)
    print(f"judge {judge.name}: {len(held_out)} texts of {config.length} characters per control")
    for name, verdict in rows.items():
        print(f"{name:<20} {verdict}")
    if config.output:
        figures = {name: verdict._asdict() for name, verdict in rows.items()}
        Path(config.output).write_text(json.dumps({"judge": judge.name, "rows": figures}, indent=1))


if __name__ == "__main__":
    cli.main(main, "bench/judge")
