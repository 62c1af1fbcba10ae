"""Device, precision, threads and torch.compile."""

import ctypes
import math
import os
import re
import shutil
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import UserError

CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
WORTH_COMPILING = 2**20  # tokens on a CPU that earn back the start-up time (docs/LOG.md)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` takes the first of cuda, mps, cpu; each process of a machine gets a GPU of its own.

    Raises `UserError` for a device that is not there.
    """
    available = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    name = available[0] if name == "auto" else name
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in available + cards:
        raise UserError(f"system.device={name} is not there: choose auto or {', '.join(available)}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device, training: bool) -> torch.dtype:
    """`auto` is bfloat16 in training where the hardware multiplies it natively, else float32.

    Sampling and evaluation stay in float32, so that a result does not depend on the batch size or
    the machine beyond rounding.
    """
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if training and _multiplies_bfloat16(device) else torch.float32


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # not in every torch 2
        has = torch.cpu.get_capabilities()
        intel = "intel" in str(has.get("cpu_name")).lower()  # half the speed of its float32
        return bool(has.get("amx_bf16") or has.get("avx512_bf16") and not intel)
    return False


def autocast(device: torch.device, dtype: torch.dtype):
    """Mixed precision: matrix products in `dtype`, weights and sums in float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def memory(device: torch.device = torch.device("cpu")) -> float:  # noqa: B008
    """The bytes that a device has, used or free; inf where that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = [math.inf]
    with suppress(AttributeError, ValueError, OSError):  # Windows
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit in CONTAINER:
        with suppress(ValueError, OSError):  # none, or not there
            found.append(int(Path(limit).read_text()))
    return min(found)


def with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU in the place of MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


# --- A CPU's memory and threads ------------------------------------------------------------------

KEPT = 2**30  # bytes of freed memory that stay with the process
LARGE = 2**25  # bytes from which on a tensor does not: the most that glibc takes

LOOK = 0.25  # seconds in which threads spin, and are watched
SLEEP = 4.0  # seconds, at most, between two looks while the cores are crowded
CROWDED = 0.85  # the share of the cores' time below which another process may have the rest


@contextmanager
def considerate_threads() -> Iterator[None]:
    """In this block OpenMP's threads wait for each other asleep whenever the cores are crowded.

    By default they spin, which is fastest alone but several times slower beside a busy process: the
    thread that is waited for has lost its core to it, or to one that spins. No result depends on
    it. A user's OMP_WAIT_POLICY or GOMP_SPINCOUNT is left alone, and so are machines with a GPU and
    other libraries than GNU's.
    """
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & {*os.environ}
    openmp, threads = _gnu_openmp(), torch.get_num_threads()
    if not openmp or threads < 2 or chosen or torch.cuda.is_available():
        yield
        return
    closed = threading.Event()
    watch = threading.Thread(target=_watch, args=(openmp, threads, closed), daemon=True)
    watch.start()
    try:
        yield
    finally:
        closed.set()
        watch.join()


def _gnu_openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP, if this process has loaded it."""
    maps = Path("/proc/self/maps")
    pattern = re.compile(r"/.*/libgomp[^/]*\.so[\d.]*$", re.MULTILINE)
    if found := maps.is_file() and pattern.search(maps.read_text()):
        with suppress(OSError):
            library = ctypes.CDLL(found[0])
            return library if hasattr(library, "GOMP_parallel") else None
    return None


def _watch(openmp: ctypes.CDLL, threads: int, closed: threading.Event) -> None:
    cores, pause = len(os.sched_getaffinity(0)), LOOK

    def crowd() -> None:
        """With more threads than cores, OpenMP puts those that wait to sleep: so start some."""
        openmp.GOMP_parallel(openmp.omp_get_level, None, max(2, cores - threads + 2), 0)
        closed.wait(pause)

    while not closed.is_set():
        used, seconds = time.process_time(), time.perf_counter()
        closed.wait(LOOK)
        used, seconds = time.process_time() - used, time.perf_counter() - seconds
        if used < CROWDED * seconds * min(cores, threads):
            pause = min(2 * pause, SLEEP)
            extra = threading.Thread(target=crowd)  # they end with the thread that starts them
            extra.start()
            extra.join()
        else:
            pause = LOOK


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees: else the next one faults it in again, page by page.

    A user's MALLOC_ variables and GLIBC_TUNABLES are left alone.
    """
    with suppress(AttributeError, TypeError):  # another C library
        if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
            ctypes.CDLL(None).mallopt(-3, LARGE)  # M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(-1, KEPT)  # M_TRIM_THRESHOLD


def move(ids: Tensor, device: torch.device) -> Tensor:
    """ids on the device, by a copy that does not wait for the GPU's queue to run empty."""
    return (
        ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)
    )


def masked_capacity(p_mask: Tensor, L: int, n: int) -> int:
    """How many tokens a part of a batch of n rows masks at most: shapes that never change.

    `p_mask` (B, 1) are the masking probabilities at the middle of the rows' strata. The mean and
    six standard deviations, exceeded once in 1e9 batches (the tokens beyond are then not trained
    on). The variance is that of the masks, L p (1 - p) a row, and that of the times within their
    strata.
    """
    variance = L * (p_mask * (1 - p_mask)).sum() + L**2 * len(p_mask) / 12 / n**2
    return min(len(p_mask) * L, math.ceil(L * p_mask.sum() + 6 * variance.sqrt()))


def block_capacity(blocks: int, size: int) -> int:
    """The same for so many blocks, of which each masks 1, 2 ... `size` tokens, equally often."""
    return masked_capacity(torch.full((blocks, 1), (size + 1) / size / 2), size, 1)


# --- torch.compile -------------------------------------------------------------------------------


def pays_to_compile(setting: str, device: torch.device, tokens: float) -> bool:
    """`auto`: always on a GPU; on a CPU if there is a C++ compiler and the work is long enough."""
    if setting != "auto":
        return setting == "true"
    if device.type != "cpu":
        return device.type == "cuda"
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return bool(compiler) and headers and tokens >= WORTH_COMPILING


def compile_parts(model: nn.Module) -> None:
    """torch.compile, in place, of a block (one compilation serves all) and of a GPU's large head.

    Parts and not the whole: it starts sooner, and leaves the hooks of FSDP and DDP where they are.
    """
    # Else PyTorch 2.11 joins the sums of the taps' gradients with those of an RMSNorm into a GPU's
    # kernels that take two thirds of a step (docs/LOG.md; pytorch/pytorch#179494).
    options = {"triton.mix_order_reduction": False} if model.config.conv_width else None
    for block in model.blocks:
        block.forward = compiled(block.forward, options)
    if model.device.type == "cuda":
        model.cross_entropy = compiled(model.cross_entropy)
        if model.config.block_length and model.config.head_size >= 16:  # which FlexAttention needs
            use_flex_attention(model)


def compiled(function: Callable, options=None) -> Callable:
    from torch._inductor import config  # a second, which few commands need

    if config.cpp.vec_isa_ok is None:
        config.cpp.vec_isa_ok = True  # what the processor has: to try it out takes three seconds
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def compile_calls(
    model: nn.Module, setting: str, texts: Sequence[Tensor], passes: int, rows: int = 64
) -> None:
    """Compile a network that these texts (L_i,) go through `passes` times, `rows` of them at once.

    It is compiled for the length that most tokens are in. What has another shape, as a last batch
    has, is computed without, for each would be compiled anew; and so is what goes on from a cache,
    whose size grows. With `auto`, only on a CPU, and for twice the tokens that earn it in training.
    """
    device, work = model.device, passes * sum(map(len, texts)) / 2
    if device.type != "cpu" and setting == "auto" or not pays_to_compile(setting, device, work):
        return
    length, number = max(Counter(map(len, texts)).items(), key=math.prod)
    B, L = min(rows, number), min(length, model.config.block_size)

    def either(eager: Callable, fast: Callable, x: Tensor, *rest):  # the last one is the cache
        is_usual = len(x) == B and x.size(1) in (L, 2 * L)  # one stream, or two
        return (fast if is_usual and rest[-1] is None else eager)(x, *rest)

    for block in model.blocks:
        block.forward = partial(either, block.forward, compiled(block.forward))
    model.forward = eager_if_compiling_fails(model.forward, model)


def use_flex_attention(model: nn.Module) -> None:
    """Let two streams attend by FlexAttention, which leaves out the tiles in which nothing is seen.

    It is fast where it is compiled, on a GPU. On a CPU it has no backward pass.
    """
    model.dense_mask, size = model.block_mask, model.config.block_length

    def mask(query: Tensor, key: Tensor, streams: int):
        if streams == 1:
            return model.dense_mask(query, key, streams)
        return tiled_attention(len(key), size, key.device)

    model.block_mask = mask


@lru_cache
def tiled_attention(length: int, block_length: int, device: torch.device) -> Callable:
    """Attention of q, k and v that sees what `model.block_mask` of two streams of a length says."""
    # Here: with PyTorch 2.15 it takes half a second.
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(b, h, i, j):
        i_block, j_block = i % length // block_length, j % length // block_length
        is_own = (i < length) == (j < length)
        return is_own & (i_block == j_block) | (j >= length) & (j_block < i_block)

    mask = create_block_mask(sees, None, None, 2 * length, 2 * length, device)
    return partial(flex_attention, block_mask=mask)


def eager_if_compiling_fails(call: Callable, model: nn.Module) -> Callable:
    """A call of the model that goes on without torch.compile from the first failure of it."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    def attempt(*inputs, **options):
        try:
            return call(*inputs, **options)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            print(
                f"torch.compile failed ({type(error).__name__}): going on without", file=sys.stderr
            )
            torch.compiler.set_stance("force_eager")
            model.block_mask = getattr(model, "dense_mask", model.block_mask)
            return call(*inputs, **options)

    return attempt
