"""Text from a checkpoint: python sample.py prompt="ROMEO:" or prompt="To [MASK*9] be"."""

import json
import sys
import time
from functools import partial

import torch
from torch import Tensor

import diffusion
from model import ModelConfig, Transformer
from nanomdm import checkpoint, cli, devices, folders, prompts, strategies, texts
from nanomdm.errors import as_user_error, visible
from nanomdm.random import generator
from nanomdm.watch import Watch


def main(config: cli.Section) -> None:
    device = devices.pick_device(config.system.device)
    loaded = checkpoint.load_model(config.checkpoint, device, Transformer, ModelConfig)
    shape = loaded.model.config
    with as_user_error():
        sampler = strategies.from_config(
            config.sampling, diffusion.sample, shape.causal, shape.block_length
        )
    cli.decided_by_shape(config, shape)
    lines, canvases = prompts.read(config, loaded.tokenizer, shape, loaded.layout)
    at_once = prompts.rows_at_once(shape.block_size, shape.vocab_size)
    if shape.block_length:
        why = f"{config.checkpoint} has blocks and a cache, whose calls are not compiled"
        cli.ignored(config, {"system.compile"}, why)
    devices.compile_calls(
        loaded.model,
        config.system.compile,
        [canvas.ids for canvas in canvases],
        config.sampling.steps,
        at_once,
    )
    dtype = devices.pick_dtype(config.system.dtype, device, training=False)
    with folders.open_output(config.output) as output, devices.autocast(device, dtype):
        about = f"{loaded.weights}, on {device}; {sampler.name} ({sampler.label})"
        print(f"{config.checkpoint}: {about}", file=sys.stderr)
        finished, number, different = {}, 0, set()
        for rows, *batch in prompts.batches(canvases, at_once):  # each of canvases of one length
            samples = fill(loaded, sampler, config, rows, *batch)
            finished.update(zip(rows, samples, strict=True))
            while number in finished:  # printed in the order of the prompts
                sample = finished.pop(number)
                different.add((lines[number], sample["text"]))
                title = f"--- sample {number + 1} ---\n" if len(lines) > 1 else ""
                print(title + visible(sample["text"], sys.stdout), flush=True)
                if output:
                    record = {"sample": number + 1, "prompt": lines[number], **sample}
                    print(json.dumps(record), file=output, flush=True)
                number += 1
        if not config.sampling.temperature and len(different) < len(lines):
            equal = f"only {len(different)} of {len(lines)} samples are distinct: at temperature 0"
            print(f"{equal} nothing but the choice of positions can vary", file=sys.stderr)


def fill(
    loaded: checkpoint.Loaded,
    sampler: strategies.Sampler,
    config: cli.Section,
    rows: list[int],
    ids: Tensor,
    is_masked: Tensor,
    starts: Tensor,
) -> list[dict]:
    """Fill canvases (B, N) of one length; `rows` (B,) are their numbers among all canvases.

    A canvas longer than the context is filled window by window, and each window block by block if
    the network has blocks. A sample runs from its start (B,) to the first end token after which the
    prompt has no text. calls and seconds are those of the batch. nats is -log p, or None where that
    is not exact or an end token was found.
    """
    began, calls = time.perf_counter(), 0
    model, tokenizer = loaded.model, loaded.tokenizer
    mask_id, left = model.config.mask_id, is_masked.clone()
    ids = ids.masked_fill(is_masked, mask_id)
    nats = torch.zeros(len(rows), dtype=torch.float64)
    watch = Watch(tokenizer, mask_id, ids[0]) if config.sampling.watch else None

    def ended(window: slice, xt: Tensor) -> Tensor:
        """(B,): which texts have ended, with xt (B, n) in this window of theirs."""
        whole = ids.clone()
        whole[:, window] = xt.cpu()
        return prompts.lengths(whole, is_masked, tokenizer.eos) < ids.size(1)

    shape = model.config
    windows = texts.windows(ids.size(1), shape.block_size, unit=shape.block_length)
    for number, (start, stop, _) in enumerate(windows):
        window = slice(start, stop)
        if not left[:, window].any():
            continue
        filled = sampler.fill(
            model,
            ids[:, window],
            left[:, window],
            generator=generator(config.system.seed, "sample", number),
            rows=torch.tensor(rows),
            callback=watch and partial(watch.show, window),
            ended=partial(ended, window),
        )
        calls, nats = calls + filled.calls, nats + filled.costs.sum(dim=1).cpu()
        left[ended(window, filled.ids)] = False  # rows that have ended are filled no further
        ids[:, window] = filled.ids.cpu()
        left[:, window] = False
    if watch:
        watch.close()
    lengths = prompts.lengths(ids, is_masked, tokenizer.eos)
    about = {"calls": calls, "seconds": time.perf_counter() - began}
    about |= {"seed": config.system.seed, "strategy": sampler.name, "label": sampler.label}
    exact = (lengths == ids.size(1)) & (sampler.label == strategies.EXACT)
    samples = []
    found = zip(ids, starts, lengths, nats.tolist(), exact, strict=True)
    for row, begin, end, cost, known in found:
        tokens = row[begin:end].tolist()
        sample = {"text": tokenizer.decode(tokens), "tokens": tokens, **about}
        samples.append(sample | {"nats": cost if known else None})
    return samples


if __name__ == "__main__":
    cli.main(main)
