"""Sampling speed: python -m bench.sampling checkpoint=out/ckpt.pt

For every strategy: samples/s, tokens/s, network calls, and the network's share of the time. The
rest is the sampler's own. Sampling in 1,000 calls should cost 1,000 forward passes. A network with
blocks is timed with its cache and without:

python -m bench.sampling words="model.block_length=16 model.block_size=1024" batch_sizes=[1]
"""

import itertools
import json
import shlex
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import diffusion
from bench.throughput import hardware, wait
from model import ModelConfig, Transformer
from nanomdm import cli, devices
from nanomdm.checkpoint import load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.random import generator
from nanomdm.strategies import STRATEGIES, Sampler

UNTRAINED = 65  # symbols


class Timed:
    """A network that adds up the time of its calls."""

    def __init__(self, model: Transformer):
        self.model, self.seconds = model, 0.0
        self.device, self.config = model.device, model.config

    def __call__(self, xt: Tensor, **options) -> Tensor:
        wait(xt.device)
        start = time.perf_counter()
        logits = self.model(xt, **options)
        wait(xt.device)
        self.seconds += time.perf_counter() - start
        return logits


def load(config: Section, device: torch.device) -> Transformer:
    if config.checkpoint:
        return load_model(config.checkpoint, device, Transformer, ModelConfig).model
    shape = vars(cli.compose(shlex.split(config.words)).model)
    return untrained(shape, UNTRAINED, config.seed, device)


def untrained(shape: dict, vocabulary: int, seed: int, device: torch.device) -> Transformer:
    """A network such as train.py begins with, of the settings `model`."""
    torch.manual_seed(seed)
    return Transformer(ModelConfig(vocabulary, attention_gate=True, **shape)).to(device).eval()


def measure(
    model: Transformer, strategy: str, cached: bool, batch_size: int, config: Section
) -> dict:
    """The median over rounds of fully masked canvases.

    A round before them measures the network's share, because its clock waits for the device.
    """
    L, timed = model.config.block_size, Timed(model)
    is_masked = torch.ones(batch_size, L, dtype=torch.bool, device=model.device)
    settings = {"strategy": STRATEGIES[strategy], "steps": config.steps}
    settings |= {} if cached else {"cached": False}
    sampler = Sampler(diffusion.sample, strategy, settings)

    def fill(network) -> tuple[int, float]:
        start, seeded = time.perf_counter(), generator(config.seed, "bench")
        sampled = sampler.fill(network, is_masked.long(), is_masked, generator=seeded)
        wait(model.device)
        return sampled.calls, time.perf_counter() - start

    with torch.no_grad():
        model(is_masked.long())  # which compiles it, where it is to be compiled
    _, whole = fill(timed)
    runs = [fill(model) for _ in range(config.rounds)]
    seconds = statistics.median(taken for _, taken in runs)
    return {
        "strategy": strategy,
        "cached": cached and model.config.block_length > 0,
        "batch_size": batch_size,
        "calls": runs[0][0],
        "samples_per_second": batch_size / seconds,
        "tokens_per_second": batch_size * L / seconds,
        "network_share": timed.seconds / whole,
    }


def main(config: Section) -> None:
    device = devices.pick_device(config.device)
    model, rows = load(config, device), []
    names = config.strategies or [
        name for name in STRATEGIES if not model.config.causal or name == "left_to_right"
    ]
    for name in names:
        if name not in STRATEGIES:
            raise UserError(f"strategies={name} is unknown: choose some of {', '.join(STRATEGIES)}")
    print(f"{hardware(device)}; {model.config.block_size} tokens, seed {config.seed}")
    print("| strategy | batch | calls | samples/s | tokens/s | the network's share |")
    print("| --- | --- | --- | --- | --- | --- |")
    choices = [True, False] if model.config.block_length else [True]
    for batch_size in map(int, config.batch_sizes):
        if config.compile != "false":  # for this batch size alone
            torch.compiler.reset()
            model = load(config, device)
            canvases = torch.zeros(batch_size, model.config.block_size)
            devices.compile_calls(model, config.compile, canvases, config.steps)
        for name, cached in itertools.product(names, choices):
            row = measure(model, name, cached, batch_size, config)
            rows.append(row)
            shown = name + (", no cache" if not cached else ", cache" if len(choices) > 1 else "")
            print(
                f"| {shown} | {batch_size} | {row['calls']} | {row['samples_per_second']:.2f} | "
                f"{row['tokens_per_second']:,.0f} | {row['network_share']:.0%} |",
                flush=True,
            )
    if config.output:
        figures = {"hardware": hardware(device), "rows": rows}
        Path(config.output).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    cli.main(main, "bench/sampling")
