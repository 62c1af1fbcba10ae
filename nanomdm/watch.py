"""A terminal shows how a text appears: masks as ░, new tokens in green."""

import atexit
import itertools
import sys
import time

from torch import Tensor

from .errors import visible

FRAME = 1 / 24  # seconds that a state stays on the screen, at least
ENTER, CLEAR, LEAVE = "\x1b[?1049h", "\x1b[H\x1b[J", "\x1b[?1049l"  # the alternate screen
MASKED, NEW, PLAIN = "\x1b[2m", "\x1b[1;32m", "\x1b[0m"  # dim, bold green


class Watch:
    """Shows the first text of a batch after each step that changed it, on the alternate screen."""

    def __init__(self, tokenizer, mask_id: int, ids: Tensor):
        self.tokenizer, self.mask_id, self.ids, self.shown = tokenizer, mask_id, ids.clone(), None
        self.on_terminal = sys.stdout.isatty()
        if not self.on_terminal:
            print("sampling.watch=true shows nothing: this is no terminal", file=sys.stderr)
        atexit.register(self.close)  # also after Ctrl-C

    def show(self, window: slice, step: int, s: float, xt: Tensor) -> None:
        """Show the text, of which a `window` is now the first row of `xt` (B, N)."""
        before, self.ids[window] = self.ids.clone(), xt[0].cpu()
        is_new = self.ids != before
        if not (is_new.any() and self.on_terminal):
            return
        if self.shown is None:
            print(ENTER, end="")
        else:
            time.sleep(max(0.0, self.shown + FRAME - time.perf_counter()))
        text = styled(self.tokenizer, self.ids.tolist(), is_new.tolist(), self.mask_id)
        print(CLEAR + text, end="", flush=True)
        self.shown = time.perf_counter()

    def close(self) -> None:
        """Back to the screen that was there before."""
        if self.shown is not None:
            print(LEAVE, end="", flush=True)
            self.shown = None


def styled(tokenizer, ids: list[int], is_new: list[bool], mask_id: int) -> str:
    """The text with the escape sequences of its colours, and without any other."""

    def style(i: int) -> str:
        return MASKED if ids[i] == mask_id else NEW if is_new[i] else PLAIN

    text = ""
    for colour, group in itertools.groupby(range(len(ids)), style):
        run = [ids[i] for i in group]
        text += colour + ("░" * len(run) if colour == MASKED else visible(tokenizer.decode(run)))
    return text + PLAIN
