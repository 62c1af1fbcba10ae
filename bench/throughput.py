"""Training speed on this machine: tokens/s, MFU, peak memory, time to the first step, loading.

python -m bench.throughput presets=[default,small]
python -m bench.throughput nanogpt=../nanoGPT
python -m bench.throughput busy=1

It times whole optimizer steps as train.py takes them, on random tokens in a memory-mapped file. The
model FLOPs utilisation (MFU) is the rate of the operations that are done, relative to that of
matrix products timed in the same run.
"""

import importlib.util
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import train
from model import Transformer
from nanomdm import cli, devices, parallel
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.random import generator
from nanomdm.tokenizers import CharTokenizer

VOCABULARY = {"char": 65, "byte": 256, "gpt2": 50257}
TOKENS = 2**24  # in the file that batches are cut from
LETTERS = 256  # code point of the first letter of an alphabet of any size
SQUARE = 2048  # rows of the matrices whose product is the reference; four times as many on a GPU


# --- The machine ---------------------------------------------------------------------------------


def hardware(device: torch.device) -> str:
    """One line that names the machine and the versions."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {versions}"
    models = [
        line.split(":", 1)[1].strip()
        for line in (
            Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else ()
        )
        if line.startswith("model name")
    ]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads; {versions}"


def wait(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products, the best of 10: the reference of the MFU."""
    n = SQUARE * (4 if device.type == "cuda" else 1)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return max(2 * n**3 / seconds(lambda: a @ b, device) for _ in range(10))


def seconds(call: Callable, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def flops_per_token(model: Transformer, rows: float) -> float:
    """Operations of forward and backward; the head counts for the share `rows` of the tokens.

    Six for each weight of a block's matrices and 12 n_layer L D for full attention (PaLM, arXiv
    2204.02311, appendix B), half of it for a causal one.
    """
    c = model.config
    blocks = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    attention = 12 * c.n_layer * c.block_size * c.n_embd / (1 + c.causal)
    return 6 * blocks + attention + 6 * c.n_embd * c.vocab_size * rows


# --- What is timed -------------------------------------------------------------------------------


def make_run(config: Section, folder: Path, device: torch.device) -> train.Run:
    """A run as train.py assembles it, but on random tokens."""
    vocabulary = VOCABULARY.get(config.data.tokenizer, 65)
    tokens = np.random.default_rng(config.system.seed).integers(vocabulary, size=TOKENS)
    tokenizer = CharTokenizer("".join(map(chr, range(LETTERS, LETTERS + vocabulary))))
    about = {"corpus": "random tokens", "sha256": "0" * 64}
    data.write_bins(folder, {"train": tokens, "val": tokens[:1]}, tokenizer, about)
    config.data.dir, config.data.path, config.out_dir = str(folder), "", str(folder / "out")
    config.explicit = config.explicit - {"data.tokenizer"}  # which a preset may name
    return train.Run(config, device)


def full_head(forward, xt, targets, where, capacity=None):
    """`Transformer.forward` as it is usually written: logits of every position, then the mask."""
    logits = forward(xt).flatten(0, 1).float()  # (B L, V)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets) * where


def nanogpt_file(folder: str) -> Path:
    """nanoGPT's model.py in a folder. Raises `UserError` if it is not there."""
    path = Path(folder, "model.py")
    if not path.is_file():
        raise UserError(f"no file {path}: nanogpt= must be a folder with nanoGPT's model.py")
    return path


def load_nanogpt(folder: str, config: Section, vocabulary: int, device: torch.device) -> Callable:
    """A training step of nanoGPT at the same size and batch: its model and its own optimizer."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt_file(folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shape = {k: getattr(config.model, k) for k in ("n_layer", "n_head", "n_embd", "block_size")}
    rows = vocabulary + -vocabulary % (64 if device.type == "cuda" else 1)  # as its default has
    torch.manual_seed(config.system.seed)
    gpt = module.GPT(module.GPTConfig(vocab_size=rows, dropout=0.0, bias=False, **shape))
    gpt = gpt.to(device)
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
    if device.type == "cuda" and config.system.compile != "false":
        gpt = torch.compile(gpt)  # as its train.py does
    size = (config.training.batch_size, config.model.block_size + 1)
    ids = torch.randint(vocabulary, size, device=device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    dtype = devices.pick_dtype("auto" if device.type == "cuda" else "float32", device, True)

    def step() -> None:
        with devices.autocast(device, dtype):
            _, loss = gpt(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@contextmanager
def busy_machine(processes: int) -> Iterator[None]:
    """Run so many busy processes beside the block."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(processes)]
    try:
        time.sleep(1)  # until they do, and until our threads have noticed
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(run: train.Run, rival: Callable | None, steps: int, rounds: int, busy: int) -> dict:
    """Tokens/s of `rounds` rounds of `steps` steps, alternating with those of a rival, if any.

    And with those beside `busy` other processes.
    """
    device, settings = run.device, run.config.training
    tokens = settings.batch_size * run.model.config.block_size
    step = train.training_step
    if run.compiled:
        step = devices.eager_if_compiling_fails(step, run.model)
    step = partial(step, run)

    def one_round(step: Callable) -> float:
        return steps * tokens / seconds(lambda: [step() for _ in range(steps)], device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = seconds(step, device)
    for warm_up in [step, step] + ([rival] if rival else []):
        warm_up()
    wait(device)
    ours, theirs, beside = [], [], []
    for _ in range(rounds):
        ours.append(one_round(step))
        theirs += [one_round(rival)] if rival else []
        if busy:
            with busy_machine(busy):
                beside.append(one_round(step))
            until = time.perf_counter() + devices.SLEEP + devices.LOOK
            while time.perf_counter() < until:  # our threads notice that they are alone
                step()
    ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
    shares = [b / a for a, b in zip(ours, beside, strict=False)]
    return {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "dtype": str(run.dtype)[6:],
        "compiled": run.compiled,
        "tokens_per_second": statistics.median(ours),
        "range": [min(ours), max(ours)],
        "first_step_seconds": first,
        "loading_share": loading_share(run, tokens / statistics.median(ours)),
        "peak_memory_bytes": peak_memory(device),
        "nanogpt": statistics.median(theirs) if rival else None,
        "times_nanogpt": spread(ratios) if rival else None,
        "beside_others": statistics.median(beside) if busy else None,
        "share_beside_others": spread(shares) if busy else None,
    }


def spread(values: list[float]) -> list[float]:
    return [min(values), statistics.median(values), max(values)]


def loading_share(run: train.Run, step_seconds: float) -> float:
    """The time to read a step's batches, as a share of the step."""
    B = run.config.training.batch_size
    times = [
        seconds(lambda i=i: run.train_rows.batch(B, generator(0, "data", i)), run.device)
        for i in range(20)
    ]
    return statistics.median(times) / step_seconds


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator since the run began, or of this process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows, where other benches import this module

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else 1024 * kib


# --- The table -----------------------------------------------------------------------------------


def bench(config: Section, preset: str, head: str, device: torch.device, folder: Path) -> dict:
    words = [*shlex.split(config.words), f"system.seed={config.seed}"]
    settings = cli.compose(words, "" if preset == "default" else preset)
    run = make_run(settings, folder, device)
    vocabulary = run.model.config.vocab_size
    rival = load_nanogpt(config.nanogpt, settings, vocabulary, device) if config.nanogpt else None
    if head == "full":
        run.model.forward = partial(full_head, run.model.forward)
    figures = measure(run, rival, config.steps, config.rounds, config.busy)
    return figures | {"preset": preset} | utilisation(run, head, figures["tokens_per_second"])


def utilisation(run: train.Run, head: str, tokens_per_second: float) -> dict:
    """The operations of a token, and the share of the rate of matrix products that is reached."""
    processes, training = parallel.world().size, run.config.training
    tokens = training.batch_size * run.model.config.block_size / training.grad_accum / processes
    rows = 1.0 if head == "full" or run.model.config.causal else run.capacity / tokens
    flops = flops_per_token(run.model, rows)
    peak = matmul_peak(run.device, run.dtype)
    return {
        "head": head,
        "flops_per_token": flops,
        "matmul_flops_per_second": peak,
        "mfu": flops * tokens_per_second / peak / processes,
    }


def line(row: dict) -> str:
    low, high = row["range"]
    speed = f"{row['tokens_per_second'] / 1e3:,.1f}k ({low / 1e3:,.1f} to {high / 1e3:,.1f})"
    name = f"{row['preset']}, {row['head']} head, {row['dtype']}{', compiled' * row['compiled']}"
    return (
        f"| {name} | {row['parameters'] / 1e6:.1f} M | {speed} | {row['mfu']:.0%} of "
        f"{row['matmul_flops_per_second'] / 1e12:.2f} TFLOP/s | "
        f"{row['peak_memory_bytes'] / 2**30:.2f} GiB | {row['first_step_seconds']:.1f} s | "
        f"{row['loading_share']:.1%} |"
    )


def main(config: Section) -> None:
    for name, least in (("steps", 1), ("rounds", 1), ("busy", 0)):
        if getattr(config, name) < least:
            raise UserError(f"{name}={getattr(config, name)} must be at least {least}")
    for head in config.heads:
        if head not in ("masked", "full"):
            raise UserError(f"heads=[{head}] is unknown: choose masked, full or both")
    device = devices.pick_device(config.device, parallel.world().local_rank)
    is_main, rows = parallel.world().is_main, []
    with parallel.processes(device), tempfile.TemporaryDirectory() as folder:
        if is_main:
            print(f"{hardware(device)}; {parallel.world().size} process(es), seed {config.seed}")
            print("| size | parameters | tokens/s | MFU | peak memory | first step | loading |")
            print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for preset in config.presets:
            for head in config.heads:
                row = bench(config, preset, head, device, Path(folder))
                rows.append(row)
                if is_main:
                    print(line(row), flush=True)
                if is_main and row["nanogpt"]:
                    low, middle, high = row["times_nanogpt"]
                    print(
                        f"\nnanoGPT at this size, in turn: {row['nanogpt'] / 1e3:,.1f}k tokens/s; "
                        f"ours is {middle:.2f} times as fast ({low:.2f} to {high:.2f})"
                    )
                if is_main and config.busy:
                    low, middle, high = row["share_beside_others"]
                    print(
                        f"\nbeside {config.busy} busy process(es), in turn: "
                        f"{row['beside_others'] / 1e3:,.1f}k tokens/s, {middle:.0%} of the speed "
                        f"alone ({low:.0%} to {high:.0%})"
                    )
    if config.output and is_main:
        Path(config.output).write_text(
            json.dumps({"hardware": hardware(device), "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    cli.main(main, "bench/throughput")
