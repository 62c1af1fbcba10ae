"""Generate text from a checkpoint: python sample.py prompt="ROMEO:" or prompt="To [MASK*9] be" """

import itertools
import json
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import runtime
from diffusion import Sampling
from nanomdm import cli, folders
from nanomdm.cli import Section
from nanomdm.errors import UserError, visible
from runtime import Loaded

READS = (  # keys, or their beginnings, that this script reads, or refuses
    "checkpoint",
    "prompt",
    "num_samples",
    "output",
    "sampling.",
    "system.device",
    "system.dtype",
    "system.seed",
    "model.",
    "data.tokenizer",
    "data.vocab_size",
)
HOLE = re.compile(r"(?<!\\)(\\*)\[MASK(?:\*(\d+))?\]")
FRAME = 1 / 24  # seconds that a state stays on the screen, at least
MASKED, NEW, PLAIN = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"  # dim, bold green


class Canvas(NamedTuple):
    """A text with holes: ids (N,), and what of it is to be filled (N,)."""

    ids: Tensor
    is_masked: Tensor


class Sample(NamedTuple):
    """A text and its tokens; `calls` of the network and `seconds` are those of its batch."""

    text: str
    tokens: list[int]
    calls: int
    seconds: float


def main(config: Section) -> None:
    runtime.refuse_what_the_checkpoint_decides(config.explicit)
    check(config)
    prompts = [
        prompt
        for prompt in read_prompts(config.prompt, config.prompt_file)
        for _ in range(config.num_samples)
    ]
    device = runtime.pick_device(config.system.device)
    loaded = runtime.load(config.checkpoint, device)
    settings = runtime.sampling(config.sampling, loaded.model)
    canvases = [make_canvas(prompt, config.sampling.length, loaded) for prompt in prompts]
    dtype = runtime.pick_dtype(config.system.dtype, device, training=False)
    opened = open_output(config.output)
    print(
        f"{config.checkpoint}: {loaded.weights}, on {device}; "
        f"{settings.strategy} ({settings.label})",
        file=sys.stderr,
    )
    with opened as output, runtime.autocast(device, dtype):
        for number, sample in enumerate(generate(loaded, canvases, settings, config)):
            title = f"--- sample {number + 1} ---\n" if len(canvases) > 1 else ""
            print(title + visible(sample.text, sys.stdout), flush=True)
            if output:
                record = {"sample": number + 1, "prompt": prompts[number], **sample._asdict()}
                record |= {"seed": config.system.seed, "strategy": settings.strategy}
                print(json.dumps(record | {"label": settings.label}), file=output, flush=True)


def check(config: Section) -> None:
    """Raise `UserError` for a setting out of its range."""
    runtime.sampling(config.sampling)
    if config.sampling.watch and not sys.stdout.isatty():
        print("sampling.watch=true shows nothing: this is no terminal", file=sys.stderr)


def open_output(path: str):
    """The file `path` to write to, one that was there kept under a new name; "" is no file."""
    if not path:
        return nullcontext()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_file():
            kept = folders.set_aside(Path(path).parent, (Path(path).name,))
            print(f"an earlier file is kept as {kept[0]}", file=sys.stderr)
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write output={path} ({error.strerror}): choose another file"
        ) from error


# --- Prompts ------------------------------------------------------------------------------------


def read_prompts(prompt: str, path: str) -> list[str]:
    """The one `prompt`, or the lines of the file `path` that are not blank."""
    if not path:
        return [prompt]
    if prompt:
        raise UserError("prompt and prompt_file are both given: leave one of them out")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompt_file={path} ({error}): name a UTF-8 text") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"prompt_file={path} holds no prompt: write one a line")
    return [line for line in lines if line.strip()]


def parse(prompt: str) -> list[str | int]:
    r"""The texts of a prompt and, between them, its holes as their numbers of tokens.

    [MASK] is a hole of one token, [MASK*n] one of n. A backslash before it makes it text, and two
    are one backslash before a hole.
    """
    pieces, text, end = [], "", 0
    for match in HOLE.finditer(prompt):
        slashes, count = match[1], int(match[2] or 1)
        text += prompt[end : match.start()] + slashes[: len(slashes) // 2]
        end = match.end()
        if len(slashes) % 2:
            text += match[0].lstrip("\\")
        elif count:
            pieces, text = [*pieces, text, count], ""
        else:
            raise UserError(f"prompt holds {match[0]}: a hole has at least one token")
    return [*pieces, text + prompt[end:]]


def make_canvas(prompt: str, length: int, loaded: Loaded) -> Canvas:
    """The canvas of a prompt with holes, or of one that is the beginning of a text.

    The latter is filled up to `length` tokens (0: to the model's context). Raises `UserError`
    where it does not fit, and for a length beside holes, which say themselves what is missing.
    """
    *before, last = parse(prompt)
    ids, is_masked = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool)
    for text, count in zip(before[::2], before[1::2], strict=True):
        given = torch.from_numpy(loaded.tokenizer.encode(text))
        ids = F.pad(torch.cat((ids, given)), (0, count))
        is_masked = F.pad(F.pad(is_masked, (0, len(given))), (0, count), value=True)
    given = torch.from_numpy(loaded.tokenizer.encode(last))
    ids, is_masked = torch.cat((ids, given)), F.pad(is_masked, (0, len(given)))
    if before and length:
        raise UserError(
            f"sampling.length={length} does not go with [MASK] in the prompt, which says how many "
            "tokens are missing: leave it out"
        )
    rest = 0 if before else (length or loaded.model.config.block_size) - len(ids)
    if rest < 0:
        name = "sampling.length" if length else "model.block_size"
        raise UserError(
            f"prompt has {len(ids)} tokens but {name} is {len(ids) + rest}: shorten the prompt or "
            "set a larger sampling.length"
        )
    return Canvas(F.pad(ids, (0, rest)), F.pad(is_masked, (0, rest), value=True))


# --- Texts --------------------------------------------------------------------------------------


def generate(
    loaded: Loaded, canvases: list[Canvas], settings: Sampling, config: Section
) -> Iterator[Sample]:
    """The canvases filled, in their order; row i draws from (seed, i) alone.

    A batch holds canvases of one length: attention goes both ways, and would see padding.
    """
    by_length = defaultdict(list)
    for row, canvas in enumerate(canvases):
        by_length[len(canvas.ids)].append(row)
    size, finished, following = 64, {}, 0
    for group in by_length.values():
        for rows in (group[i : i + size] for i in range(0, len(group), size)):
            batch = [canvases[row] for row in rows]
            samples = fill_batch(loaded, batch, torch.tensor(rows), settings, config)
            finished.update(zip(rows, samples, strict=True))
            while following in finished:
                yield finished.pop(following)
                following += 1


def fill_batch(
    loaded: Loaded, batch: list[Canvas], rows: Tensor, settings: Sampling, config: Section
) -> list[Sample]:
    """Canvases of one length, filled window by window where the model's context is shorter."""
    start, calls, mask_id = time.perf_counter(), 0, loaded.model.config.mask_id
    ids, is_masked = (torch.stack(tensors) for tensors in zip(*batch, strict=True))  # (B, N)
    ids = ids.masked_fill(is_masked, mask_id)
    is_tail = is_masked.flip(1).cummin(dim=1).values.flip(1)  # holes with nothing given behind
    eos = -1 if loaded.tokenizer.eos is None else loaded.tokenizer.eos
    ends = torch.zeros_like(is_masked)
    watched = config.sampling.watch and sys.stdout.isatty()
    watch = Watch(loaded.tokenizer, mask_id, ids[0]) if watched else None
    for number, window in enumerate(windows(ids.size(1), loaded.model.config.block_size)):
        if not is_masked[:, window].any():
            continue
        filled = runtime.fill(
            loaded.model,
            ids[:, window],
            is_masked[:, window],
            settings,
            runtime.generator(config.system.seed, "sample", number),
            rows=rows,
            **(watch.options(window) if watch else {}),
        )
        calls += filled.calls
        ids[:, window], is_masked[:, window] = filled.ids.cpu(), False
        ends = is_tail & (ids == eos)
        is_masked &= ~ends.any(dim=1, keepdim=True)
    if watch:
        watch.clear()
    lengths = (ends.cumsum(dim=1) == 0).sum(dim=1)  # up to the first EOS
    texts = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    seconds = time.perf_counter() - start
    return [Sample(loaded.tokenizer.decode(text), text, calls, seconds) for text in texts]


def windows(length: int, context: int) -> list[slice]:
    """The parts of a text in which it is filled, one after the other: each begins with half of
    the one before as its prompt."""
    last, half = max(0, length - context), max(1, context // 2)
    return [slice(min(a, last), min(a, last) + context) for a in range(0, last + half, half)]


# --- Watching -----------------------------------------------------------------------------------


class Watch:
    """Shows on a terminal how the first text of a batch appears: masks as ░, the new in green."""

    def __init__(self, tokenizer, mask_id: int, ids: Tensor):
        self.tokenizer, self.mask_id, self.ids = tokenizer, mask_id, ids
        self.history, self.height, self.shown = [], 0, 0.0

    def options(self, window: slice) -> dict:
        """Arguments of `diffusion.sample` for one window of the text."""
        return {"history": self.history, "callback": partial(self.show, window)}

    def show(self, window: slice, step: int, t: float, xt: Tensor) -> None:
        if not self.history:
            return
        ids, new = self.ids.clone(), set()
        ids[window] = xt[0].cpu()
        for event in self.history:
            columns = event.where[event.where[:, 0] == 0, 1]
            new |= {window.start + column for column in columns.tolist()}
        self.history.clear()
        columns, rows = shutil.get_terminal_size()
        lines = wrap(styled(self.tokenizer, ids.tolist(), new, self.mask_id), columns)
        time.sleep(max(0.0, self.shown + FRAME - time.perf_counter()))
        self.clear()
        self.height = len(lines := lines[-(rows - 1) :])
        print("\n".join(lines), flush=True)
        self.shown = time.perf_counter()

    def clear(self) -> None:
        if self.height:
            print(f"\x1b[{self.height}A\r\x1b[J", end="", flush=True)
        self.height = 0


def styled(tokenizer, ids: list[int], new: set[int], mask_id: int) -> Iterator[tuple[str, str]]:
    """The characters of a text, each with its style."""

    def style(i: int) -> str:
        return MASKED if ids[i] == mask_id else NEW if i in new else PLAIN

    for kind, group in itertools.groupby(range(len(ids)), style):
        run = [ids[i] for i in group]
        text = "░" * len(run) if kind == MASKED else tokenizer.decode(run)
        for character in text:
            yield character if character == "\n" or character.isprintable() else "·", kind


def wrap(characters: Iterator[tuple[str, str]], columns: int) -> list[str]:
    """Lines of at most so many characters."""
    lines, width = [""], 0
    for character, style in characters:
        if character == "\n" or width == columns:
            lines.append("")
            width = 0
        if character != "\n":
            lines[-1] += f"{style}{character}{PLAIN}"
            width += 1
    return lines


if __name__ == "__main__":
    cli.main(main, reads=READS)
