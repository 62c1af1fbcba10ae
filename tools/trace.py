"""What a reverse process does, step by step, as messages that a page can replay.

The viewer writes the messages of a text into its file, the demo sends each as it happens, and
tools/pages/page.js reconstructs every state from them. The first message of a text gives its
context:

    {"ids", "texts",  the tokens that occur in it,
     "given"}         the number of a token in `texts`, or BLANK, for each position

Each step then has a message of what it did, without the keys of what did not occur:

    {"ids", "texts"   the tokens that occur for the first time, numbered over all messages,
     "set"            triples (position, token, probability x 65535): what the step revealed,
     "mask"           positions that it masked again,
     "best", "p"      the most probable tokens of each position that was masked before the step,
                      position by position, and their probabilities x 65535,
     "entropy"}       the mean entropy of those positions' predictions, in nats

Arrays are little-endian uint16 in base64. Probabilities are those that the sampler draws from,
guidance included, before temperature and filters.
"""

import base64
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffusion import Event, Sampled
from nanomdm import sudoku
from nanomdm.checkpoint import Loaded
from nanomdm.errors import UserError
from nanomdm.prompts import Canvas, make_canvas, parse, require_order
from nanomdm.random import generator
from nanomdm.strategies import Sampler
from nanomdm.tokenizers import EOT

BLANK = LIMIT = 65535  # no position and no token has this number; also the unit of probability
Send = Callable[[int, dict], None]


def canvas_of(prompt: str, length: int, loaded: Loaded, limit: int) -> Canvas:
    """The canvas of a prompt, as sample.py has it, of at most `limit` tokens.

    A `length` (0: the limit) is for a prompt without [MASK]. Raises `UserError`.
    """
    blanks = [piece for piece in parse(prompt) if isinstance(piece, int)]
    size = max(length, sum(blanks))  # checked before a canvas of that length is made
    if size <= limit:
        length = length or (0 if blanks else limit)
        canvas = make_canvas(prompt, length, loaded.tokenizer, limit, loaded.layout)
        size = len(canvas.ids)
    if size > limit:
        raise UserError(f"the text has {size} tokens, and at most {limit} can be shown")
    if not canvas.is_masked.any():
        raise UserError("nothing is masked: write [MASK*n] where tokens are missing")
    require_order(loaded.model.config, canvas.is_masked)
    return canvas


def record(
    loaded: Loaded,
    canvases: list[Canvas],
    sampler: Sampler,
    seed: int,
    send: Send,
    alternatives: int = 5,
) -> Sampled:
    """Fill canvases of one length, as sample.py does, and `send(row, message)` what each step did.

    An exception in `send` ends the sampling.
    """
    recorder = Recorder(loaded, canvases, sampler.guidance, send, alternatives)
    ids, is_masked, _ = (torch.stack(tensors) for tensors in zip(*canvases, strict=True))
    return sampler.fill(
        recorder,
        ids,
        is_masked,
        generator=generator(seed, "sample"),
        history=recorder.events,
        callback=recorder.step,
    )


class Recorder:
    """A model that keeps the logits of a step; `step` is the callback of `diffusion.sample`."""

    def __init__(self, loaded, canvases, guidance: float, send: Send, alternatives: int):
        self.model = loaded.model
        self.device, self.config = loaded.model.device, loaded.model.config
        self.guidance, self.send = guidance, send
        self.alternatives = min(alternatives, self.config.vocab_size)
        self.answers, self.events = [], []
        self.is_masked = torch.stack([canvas.is_masked for canvas in canvases])  # (B, L)
        self.numbers = [Numbers(loaded.tokenizer) for _ in canvases]
        for row, canvas in enumerate(canvases):
            tokens = np.full(len(canvas.ids), BLANK)
            tokens[~canvas.is_masked.numpy()] = self.numbers[row].of(canvas.ids[~canvas.is_masked])
            given = {"given": pack(tokens)} | grid_of(loaded, len(tokens))
            send(row, self.numbers[row].news() | given)

    def __call__(self, xt: Tensor, cache=None) -> Tensor:
        """The logits; of a network with blocks, which answers for the last of them, uniform ones
        stand for those of the blocks after it."""
        logits = whole = self.model(xt) if cache is None else self.model(xt, cache=cache)
        if cache is not None:
            B, L = self.is_masked.shape
            whole = logits.new_zeros(B, L, logits.size(-1))
            whole[:, cache.length : cache.length + xt.size(1)] = logits
        self.answers.append(whole)
        return logits

    def step(self, step: int, s: float, xt: Tensor) -> None:
        """Send each row what this step predicted, revealed and masked again."""
        event, predictions = self.events.pop(), self.predictions()
        for row, message in enumerate(predictions):
            message |= self.change(row, event)
            self.send(row, self.numbers[row].news() | message)
        self.answers.clear()

    def predictions(self) -> list[dict]:
        """For each row, the predictions at its masks, if this step called the network."""
        if not self.answers:
            return [{} for _ in self.is_masked]
        logits, *blind = (a[self.is_masked.to(a.device)].float() for a in self.answers)  # (N, V)
        if blind:  # of the two calls of a step, as in strategies.guided
            logits = logits + self.guidance * (logits - blind[0])
        p = logits.softmax(dim=-1)
        best, counts = p.topk(self.alternatives), self.is_masked.sum(dim=1).tolist()
        entropies = torch.special.entr(p).sum(dim=-1)
        entropies[(logits == 0).all(dim=-1)] = math.nan  # not predicted yet
        parts = (best.indices, best.values, entropies)
        rows = zip(*(part.cpu().split(counts) for part in parts), strict=True)
        return [
            {
                "best": pack(self.numbers[row].of(ids.flatten())),
                "p": pack(values.flatten().double() * LIMIT),
                "entropy": round(entropy.nanmean().item(), 3),
            }
            if entropy.isfinite().any()
            else {}
            for row, (ids, values, entropy) in enumerate(rows)
        ]

    def change(self, row: int, event: Event) -> dict:
        """The message of what an event did to a row; updates `is_masked`."""
        message, revealed = {}, event.revealed[row]  # (L,)
        if revealed.any():
            here = event.revealed.nonzero()[:, 0] == row  # (N,)
            tokens = event.tokens[here]
            p = event.logits[here].softmax(dim=-1).gather(1, tokens[:, None]).squeeze(1)
            positions = revealed.nonzero().squeeze(1)
            columns = (positions.cpu(), self.numbers[row].of(tokens), p.cpu().double() * LIMIT)
            message["set"] = pack(np.stack(columns, axis=1))
            self.is_masked[row] &= ~revealed.cpu()
        if event.again is not None and event.again[row].any():
            again = event.again[row].cpu()
            message["mask"] = pack(again.nonzero().squeeze(1))
            self.is_masked[row] |= again
        return message


class Numbers:
    """Numbers the tokens that occur, so that a message names each by a uint16 and its text once."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known, self.sent = tokenizer, {}, 0

    def of(self, ids: Tensor) -> np.ndarray:
        """The numbers (N,) of tokens (N,). Raises `UserError` if there are too many."""
        numbers = [self.known.setdefault(i, len(self.known)) for i in ids.tolist()]
        if len(self.known) >= LIMIT:
            raise UserError(f"a trace holds at most {LIMIT} distinct tokens: record fewer steps")
        return np.array(numbers, dtype=np.int64)

    def news(self) -> dict:
        """The ids and texts of the tokens that no message has named yet."""
        new, self.sent = list(self.known)[self.sent :], len(self.known)
        return {"ids": new, "texts": [text_of(self.tokenizer, i) for i in new]} if new else {}


def grid_of(loaded: Loaded, length: int) -> dict:
    """How to show a square of rows as one: its columns, and the rows and columns of a box in it."""
    side = math.isqrt(length)
    if loaded.layout != "rows" or side**2 != length or side > 16:
        return {}
    is_sudoku = loaded.state["corpus"]["name"] in sudoku.DATASETS and side in sudoku.BOXES
    return {"grid": [side, *(sudoku.BOXES[side] if is_sudoku else (side, side))]}


def text_of(tokenizer, token: int) -> str:
    r"""The text of a single token; bytes that are a part of a character become \xNN."""
    raw = EOT.encode() if token == tokenizer.eos else tokenizer.decode_bytes([token])
    return raw.decode(errors="backslashreplace")


def pack(values) -> str:
    """Whole numbers, rounded, in 0 ... 65535, as base64 of little-endian uint16."""
    return base64.b64encode(np.rint(np.asarray(values)).astype("<u2").tobytes()).decode()


def unpack(packed: str) -> list[int]:
    """The whole numbers that `pack` packed."""
    return np.frombuffer(base64.b64decode(packed), "<u2").tolist()
