"""Generate text from a checkpoint: python sample.py checkpoint=out/ckpt.pt prompt="ROMEO:" """

import sys

import torch
from torch import Tensor

import cli
import diffusion
import runtime
from cli import Section


def main(config: Section, explicit: set[str]) -> None:
    runtime.refuse_what_the_checkpoint_decides(explicit)
    diffusion.check_sampling(**runtime.sampling_settings(config.sampling))
    if config.num_samples < 1:
        raise ValueError(f"num_samples={config.num_samples} must be at least 1")
    device = runtime.pick_device(config.system.device)
    loaded = runtime.load(config.checkpoint, device)
    prompt = torch.from_numpy(loaded.tokenizer.encode(config.prompt))
    canvas, is_masked = make_canvas(
        prompt, config.sampling.length, loaded.model.config.block_size, config.num_samples
    )
    dtype = runtime.pick_dtype(config.system.dtype, device, training=False)
    step = loaded.state["step"]
    print(f"{config.checkpoint}: EMA weights after {step} steps, on {device}", file=sys.stderr)
    with runtime.autocast(device, dtype):
        generator = runtime.generator(config.system.seed, "sample")
        sampled = runtime.fill(loaded.model, canvas, is_masked, config.sampling, generator)
    for number, row in enumerate(sampled.ids.tolist(), start=1):
        title = f"--- sample {number} ---\n" if config.num_samples > 1 else ""
        print(title + loaded.tokenizer.decode(row))


def make_canvas(prompt: Tensor, length: int, block_size: int, rows: int) -> tuple[Tensor, Tensor]:
    """`rows` equal canvases (B, L) that begin with the `prompt` ids, and what of them to fill.

    A `length` of 0 is the whole context. Raises `ValueError` where the prompt does not fit.
    """
    length = length or block_size
    if not 0 < length <= block_size:
        raise ValueError(
            f"sampling.length={length} must lie in 1 ... {block_size}, the checkpoint's context"
        )
    if len(prompt) > length:
        name = "model.block_size" if length == block_size else "sampling.length"
        raise ValueError(
            f"prompt has {len(prompt)} tokens but {name} is {length}: shorten the prompt, or "
            f"{'train with' if length == block_size else 'choose'} a larger {name}"
        )
    row = torch.nn.functional.pad(prompt, (0, length - len(prompt)))  # (L,)
    return row.expand(rows, -1), (torch.arange(length) >= len(prompt)).expand(rows, -1)


if __name__ == "__main__":
    cli.main(main)
