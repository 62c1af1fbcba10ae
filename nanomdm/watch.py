"""A terminal shows how a text appears: masks as ░, the new tokens in green."""

import itertools
import shutil
import sys
import time
from collections.abc import Iterator

from torch import Tensor

FRAME = 1 / 24  # seconds that a state stays on the screen, at least
MASKED, NEW, PLAIN = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"  # dim, bold green


class Watch:
    """Draws the first text of a batch after each step that changed it, on a terminal alone."""

    def __init__(self, tokenizer, mask_id: int, ids: Tensor):
        self.tokenizer, self.mask_id, self.ids = tokenizer, mask_id, ids.clone()
        self.height, self.shown, self.on_terminal = 0, 0.0, sys.stdout.isatty()
        if not self.on_terminal:
            print("sampling.watch=true shows nothing: this is no terminal", file=sys.stderr)

    def show(self, window: slice, step: int, s: float, xt: Tensor) -> None:
        """Draw the text, of which a `window` is now the first row of `xt` (B, N)."""
        before, self.ids[window] = self.ids.clone(), xt[0].cpu()
        new = set((self.ids != before).nonzero().flatten().tolist())
        if not (new and self.on_terminal):
            return
        columns, rows = shutil.get_terminal_size()
        lines = wrap(styled(self.tokenizer, self.ids.tolist(), new, self.mask_id), columns)
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
    """Lines of at most that many characters."""
    lines, width = [""], 0
    for character, style in characters:
        if character == "\n" or width == columns:
            lines.append("")
            width = 0
        if character != "\n":
            lines[-1] += f"{style}{character}{PLAIN}"
            width += 1
    return lines
