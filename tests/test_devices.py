"""nanomdm/devices.py: the rules that measurements led to, and the capacity of a batch."""

import math
import subprocess
import sys
import threading

import pytest
import torch
from conftest import environment
from problems import seeded

import diffusion
from model import ModelConfig, Transformer, block_mask
from nanomdm import devices

# --- Precision and torch.compile ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
        ({}, False),
    ],
)
def test_a_cpu_trains_in_bfloat16_where_that_is_faster(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    expected = torch.bfloat16 if fast else torch.float32
    assert devices.pick_dtype("auto", torch.device("cpu"), training=True) == expected


CPU, GPU = torch.device("cpu"), torch.device("cuda")
LONG = devices.WORTH_COMPILING


@pytest.mark.parametrize(
    ("setting", "device", "steps", "pays"),
    [
        *(("auto", CPU, LONG, True), ("auto", CPU, LONG - 1, False), ("auto", GPU, 1, True)),
        *(("true", CPU, 1, True), ("false", GPU, LONG, False), ("false", CPU, LONG, False)),
        *(("auto", torch.device("mps"), LONG, False), ("true", torch.device("mps"), 1, True)),
    ],
)
def test_a_cpu_compiles_a_run_that_is_long_enough(monkeypatch, setting, device, steps, pays):
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    monkeypatch.setattr(devices.Path, "exists", lambda path: True)
    assert devices.pays_to_compile(setting, device, steps) == pays


@pytest.mark.parametrize("width", [0, 5])
def test_the_sums_of_a_convolution_are_compiled_apart(monkeypatch, width):
    """PyTorch refuses an option that it has not."""
    seen, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: seen.append(options) or f)
    network = Transformer(ModelConfig(5, 8, n_layer=2, n_head=2, n_embd=8, conv_width=width))
    devices.compile_parts(network)
    apart = {"triton.mix_order_reduction": False} if width else None
    assert [options["options"] for options in seen] == [apart, apart]
    real(network.norm, **seen[0])


@pytest.mark.parametrize(
    ("shape", "is_tiled"),
    [
        ({"block_length": 4, "n_embd": 32}, True),
        ({"block_length": 4, "n_embd": 28}, False),  # heads of 14, which FlexAttention lacks
        ({"block_length": 0, "n_embd": 32}, False),
    ],
)
def test_a_gpu_compiles_the_head_and_attends_blocks_tile_by_tile(shape, is_tiled, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: seen.append(f.__name__) or f)
    network = Transformer(ModelConfig(5, 8, n_layer=2, n_head=2, **shape))
    monkeypatch.setattr(Transformer, "device", GPU)
    devices.compile_parts(network)
    assert seen == ["forward", "forward", "cross_entropy"]
    assert (network.block_mask is not block_mask) == is_tiled


@pytest.mark.parametrize(
    ("device", "setting", "texts", "compiles"),
    [
        *((GPU, "auto", 9, False), (GPU, "true", 9, True), (GPU, "false", 9, False)),
        *((CPU, "auto", LONG // 4, True), (CPU, "auto", LONG // 4 - 1, False)),
        (CPU, "true", 9, True),
    ],
)
def test_calls_are_compiled_for_the_usual_batch_if_the_work_is_long(
    device, setting, texts, compiles, monkeypatch
):
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    monkeypatch.setattr(devices.Path, "exists", lambda path: True)
    monkeypatch.setattr(Transformer, "device", device)
    monkeypatch.setattr(devices, "compiled", lambda function: lambda *inputs: "compiled")
    network = Transformer(ModelConfig(5, 8, n_layer=1, n_head=2, n_embd=32))
    [block] = network.blocks
    block.forward = lambda *inputs: "eager"
    devices.compile_calls(network, setting, [range(4)] * texts, 2, rows=6)
    for rows, length, cache, is_usual in (
        *((6, 4, None, True), (6, 8, None, True)),  # one stream, or two
        *((5, 4, None, False), (6, 3, None, False), (6, 4, "cache", False)),
    ):
        found = block.forward(torch.zeros(rows, length, 32), None, None, None, 1, cache)
        assert found == ("compiled" if compiles and is_usual else "eager")


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_a_cpu_without_what_a_compiler_needs_does_not_compile(monkeypatch, missing):
    found = "" if missing == "compiler" else "g++"
    monkeypatch.setattr(devices.shutil, "which", lambda name: found or None)
    monkeypatch.setattr(devices.Path, "exists", lambda path: missing != "headers")
    assert not devices.pays_to_compile("auto", CPU, LONG)


# --- Capacity ------------------------------------------------------------------------------------


def masked_in_a_batch(rows: range, L: int, n: int, seed: int, eps: float = 1e-3) -> int:
    """How many tokens of these rows of a batch of n the training loss masks."""
    seen = []
    diffusion.masked_diffusion_loss(
        None,
        torch.zeros(len(rows), L, dtype=torch.long),
        mask_id=1,
        generator=seeded(seed),
        eps=eps,
        share=(torch.tensor(rows), n),
        nll=lambda xt, x0, is_masked: seen.append(int(is_masked.sum())) or x0.float(),
    )
    return seen[0]


def capacity(rows: range, L: int, n: int, eps: float = 1e-3) -> int:
    times = (torch.tensor(rows)[:, None].double() + 0.5) / n
    return devices.masked_capacity(diffusion.mask_probability(times, eps), L, n)


def test_no_batch_masks_more_tokens_than_the_capacity():
    most = max(masked_in_a_batch(range(32), 128, 32, seed) for seed in range(2000))
    assert most <= capacity(range(32), 128, 32)


def test_the_capacity_is_little_more_than_half_of_a_batch():
    assert capacity(range(32), 128, 32) < 0.6 * 32 * 128


def test_the_capacity_is_never_more_than_there_are_tokens():
    assert capacity(range(1), 2, 1) == 2


@pytest.mark.parametrize("part", [0, 7])
def test_no_interleaved_part_of_a_batch_masks_more_tokens_than_its_capacity(part):
    rows = range(part, 32, 8)
    most = max(masked_in_a_batch(rows, 128, 32, seed) for seed in range(500))
    assert most <= capacity(rows, 128, 32)


def test_a_larger_eps_masks_no_more_tokens_than_its_capacity():
    most = max(masked_in_a_batch(range(32), 128, 32, seed, eps=0.1) for seed in range(500))
    assert most <= capacity(range(32), 128, 32, eps=0.1)


@pytest.mark.parametrize(("content", "limit"), [("max", math.inf), ("1000", 1000)])
def test_the_memory_is_that_of_the_container(tmp_path, monkeypatch, content, limit):
    (tmp_path / "limit").write_text(f"{content}\n")
    monkeypatch.setattr(devices, "CONTAINER", ())
    machine = devices.memory()
    monkeypatch.setattr(devices, "CONTAINER", (str(tmp_path / "limit"), str(tmp_path / "none")))
    assert machine > 2**28 and devices.memory() == min(machine, limit)


# --- Threads and memory of a CPU -----------------------------------------------------------------

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="about GNU's libraries")
WAITING = """
import time, torch
from nanomdm import devices

def cost():  # CPU seconds of threads that have nothing to do but wait for the next operation
    x, used = torch.ones(2**22), time.process_time()
    for _ in range(50):
        x.add_(1)
        time.sleep(0.004)
    return time.process_time() - used

devices.LOOK = 0.01
before = cost()
with devices.considerate_threads():
    time.sleep(0.3)  # the process uses no core: another might
    crowded = cost()
print(before, crowded, cost())
"""
FREED = """
import torch
from pathlib import Path
from nanomdm import devices

devices.keep_freed_memory()
tensors = [torch.ones(2**20) for _ in range(64)]
del tensors
print(4096 * int(Path("/proc/self/statm").read_text().split()[1]))
"""


def printed(code: str, **changes: str) -> list[float]:
    variables = environment(**changes)
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={name: value for name, value in variables.items() if value},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return [float(word) for word in result.stdout.split()]


@LINUX
def test_threads_sleep_while_the_cores_are_crowded_and_only_then():
    two = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "", "GOMP_SPINCOUNT": ""}
    before, crowded, after = printed(WAITING, **two)
    assert crowded < 0.6 * before and crowded < 0.6 * after


@LINUX
@pytest.mark.parametrize(
    ("threads", "policy", "watched"), [(2, "", 1), (2, "ACTIVE", 0), (1, "", 0)]
)
def test_threads_are_watched_if_there_are_several_and_the_user_has_no_policy(
    monkeypatch, threads, policy, watched
):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    before = threading.active_count()
    with devices.considerate_threads():
        assert threading.active_count() == before + watched


@LINUX
def test_freed_memory_stays_unless_the_user_has_settings_of_their_own():
    kept, given_back = printed(FREED), printed(FREED, MALLOC_TRIM_THRESHOLD_="131072")
    assert kept[0] > given_back[0] + 2**27  # half of what was freed
