"""Evaluate a checkpoint on its validation split or on any text: python eval.py data.path=TEXT"""

import math
import time

import numpy as np

import bounds
import cli
import data
import runtime
import text
from cli import Section
from runlog import progress_bar
from runtime import Loaded


def main(config: Section, explicit: set[str]) -> None:
    runtime.refuse_what_the_checkpoint_decides(explicit)
    for name, value in vars(config.eval).items():
        if value < 1:
            raise ValueError(f"eval.{name}={value} must be at least 1")
    device = runtime.pick_device(config.system.device)
    loaded = runtime.load(config.checkpoint, device)
    source, tokens = choose_tokens(config, explicit, loaded)
    print(f"{config.checkpoint}: EMA weights after {loaded.state['step']} steps, on {device}")
    print(f"{source}: {len(tokens):,} tokens, {config.eval.draws} passes")
    start = time.perf_counter()
    bound = evaluate(loaded, config, tokens)
    seconds = time.perf_counter() - start
    size = len(loaded.tokenizer.decode_bytes(tokens.tolist()))
    print("\n".join(summary(bound, config.eval.draws, len(tokens), size)))
    print(f"{seconds:.1f} s, {config.eval.draws * len(tokens) / seconds:,.0f} tokens/s")


def choose_tokens(config: Section, explicit: set[str], loaded: Loaded) -> tuple[str, np.ndarray]:
    """What to evaluate, and its name: data.path= as a whole, else a validation split.

    That of data.dir= or data.dataset= if the command names one, or of the run's own data.
    """
    if "data.path" in explicit and config.data.path:
        try:
            return config.data.path, loaded.tokenizer.encode(text.read_text(config.data.path))
        except ValueError as error:
            raise ValueError(f"{config.data.path}: {error}") from error
    named = "data.dataset" in explicit or config.data.dir
    settings = vars(config.data) if named else loaded.config["data"]
    corpus, trained_on = runtime.load_corpus(settings, loaded.tokenizer), loaded.state["corpus"]
    if not named and corpus.sha256 != trained_on["sha256"]:
        raise ValueError(
            f"the text that {config.checkpoint} was trained on ({trained_on['name']}) is not what "
            "it was: bring it back, or name a text by data.path="
        )
    return f"validation split of {corpus.name}", corpus.val


def evaluate(loaded: Loaded, config: Section, tokens: np.ndarray) -> bounds.Bound:
    """The bound over all `tokens`, in blocks of the model's context that do not overlap."""
    device, draws = loaded.model.device, config.eval.draws
    rows = data.blocks(tokens, loaded.model.config.block_size)
    bar = progress_bar(draws * len(tokens), 0, "token")
    with runtime.autocast(device, runtime.pick_dtype(config.system.dtype, device, training=False)):
        return runtime.passes(
            loaded.model,
            rows,
            config.system.seed,
            draws,
            batch_size=config.eval.batch_size,
            **({"progress": bar.update} if bar else {}),
        ).bound()


def summary(bound: bounds.Bound, draws: int, tokens: int, size: int) -> list[str]:
    """The lines to print, for a text of so many `tokens` and `size` bytes.

    The error is that of the mean over the masks, the text being given.
    """
    loss, error = bound
    to_bits = tokens / size / math.log(2)  # from nats per token to bits per byte

    def line(name: str, factor: float, unit: str) -> str:
        spread = f" ± {error * factor:.4f}" if draws > 1 else ""
        return f"{name} {loss * factor:.4f}{spread} {unit}"

    lines = [line("loss", 1.0, "nats/token"), f"perplexity {math.exp(loss):.2f}"]
    lines.append(line("bits", to_bits, "per byte"))
    if draws > 1:
        half = bounds.student_t(draws - 1) * error
        lines.append(f"95% interval {loss - half:.4f} to {loss + half:.4f} nats/token")
    return lines


if __name__ == "__main__":
    cli.main(main)
