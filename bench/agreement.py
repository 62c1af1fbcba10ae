"""Whether a GPU computes what a CPU does: the checks of `python -m bench.gpu parts=[check]`.

Each check yields lines (what, figure, limit): it has passed where the figure is at most the limit.
"""

import copy
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import lru_cache, partial
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import diffusion
import train
from model import ModelConfig, Transformer
from nanomdm import checkpoint, cli, devices, optim, strategies
from nanomdm.random import generator

CPU = torch.device("cpu")
ROUNDING = 1e-5  # relative, of float32 without TF32
HALF = 2e-2  # relative, of bfloat16 in a gradient
TOGETHER = 1e-3  # of logits, where two devices choose differently
MAGNIFIED = 1e-3  # relative, of Muon's updates: what small singular values make of rounding
ORTHOGONAL = 0.3  # the same in bfloat16, which rounds them away
STEPS = 16  # of each sampler

Line = tuple[str, float, float]


class Case(NamedTuple):
    """A network that was trained for a moment on the device, and some of its text."""

    name: str
    run: train.Run
    x0: Tensor  # (B, L)

    def model(self, device: torch.device, block_length: int = 0) -> Transformer:
        """The trained weights in a network of its own, without dropout."""
        shape = vars(self.run.model.config) | {"dropout": 0.0, "block_length": block_length}
        model = Transformer(ModelConfig(**shape))
        model.load_state_dict(self.run.ema.state_dict())
        return model.to(device)


def relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """||found - expected|| / ||expected|| of all the tensors together."""
    found, expected = (
        torch.cat([tensor.detach().to(CPU, torch.float64).flatten() for tensor in tensors])
        for tensors in (found, expected)
    )
    return float((found - expected).norm() / expected.norm())


def gradient(model: Transformer) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def learn(model: Transformer, x0: Tensor, dtype: torch.dtype = torch.float32) -> tuple:
    """(cross-entropies (B, L), loss, gradients) of a training step, the masks always the same."""
    model.zero_grad()
    kept = []

    def nll(*inputs) -> Tensor:
        kept.append(model(*inputs, capacity=x0.numel()))
        return kept[0]

    with devices.autocast(x0.device, dtype):
        loss = diffusion.masked_diffusion_loss(
            model, x0, mask_id=model.config.mask_id, generator=generator(0, "check"), nll=nll
        )
    loss.backward()
    return kept, [loss], gradient(model)


# --- The checks ---------------------------------------------------------------------------------


def numbers(case: Case) -> Iterator[Line]:
    """Cross-entropies, loss, gradients and the bound, on the device against the CPU."""
    device, found = case.run.device, {}
    for place in (CPU, device):
        model, x0 = case.model(place), case.x0.to(place)
        options = {"mask_id": model.config.mask_id, "nll": model, "draws": 2}
        bound, _ = diffusion.nelbo(model, x0, generator=generator(0, "check"), **options)
        found[place] = *learn(model, x0), [torch.tensor(bound, dtype=torch.float64)]
    for number, name in enumerate(("cross-entropies", "loss", "gradient", "bound")):
        error = relative(found[device][number], found[CPU][number])
        yield f"{case.name}: {name}, float32, {device} against cpu", error, ROUNDING
    model, x0 = case.model(device), case.x0.to(device)
    for name, halved, whole in zip(
        ("cross-entropies", "loss", "gradient"),
        learn(model, x0, torch.bfloat16),
        found[device],
        strict=False,
    ):
        yield f"{case.name}: {name}, bfloat16 against float32", relative(halved, whole), HALF


def compiled(case: Case) -> Iterator[Line]:
    """torch.compile against eager."""
    device = case.run.device
    x0 = case.x0.to(device)
    for dtype, limit in ((torch.float32, ROUNDING), (torch.bfloat16, HALF)):
        eager, fast = case.model(device), case.model(device)
        devices.compile_parts(fast)
        expected, found = learn(eager, x0, dtype), learn(fast, x0, dtype)
        for name, a, b in zip(("loss", "gradient"), found[1:], expected[1:], strict=True):
            yield (
                f"{case.name}: {name}, {str(dtype)[6:]}, compiled against eager",
                relative(a, b),
                limit,
            )


def blocks(case: Case) -> Iterator[Line]:
    """FlexAttention's tiles, compiled, against a mask of booleans."""
    device = case.run.device
    x0, size = case.x0.to(device), case.x0.size(1) // 8
    plain, tiled = (case.model(device, block_length=size) for _ in range(2))
    devices.compile_parts(tiled)
    expected, found = learn(plain, x0), learn(tiled, x0)
    for name, a, b in zip(("loss", "gradient"), found[1:], expected[1:], strict=True):
        yield f"{case.name}: {name}, blocks of {size}, compiled against eager", relative(a, b), 1e-4


def samplers(case: Case) -> Iterator[Line]:
    """The same texts from every strategy; else how far the logits differ where the first does."""
    models = [case.model(place).eval() for place in (CPU, case.run.device)]
    canvas = torch.zeros_like(case.x0[:2])
    for name, strategy in strategies.STRATEGIES.items():
        sampler = strategies.Sampler(diffusion.sample, name, {"strategy": strategy, "steps": STEPS})
        histories, texts = [], []
        for model in models:
            histories.append([])
            filled = sampler.fill(
                model, canvas, canvas == 0, generator=generator(0, "s"), history=histories[-1]
            )
            texts.append(filled.ids.cpu())
        what = f"{case.name}: {name}, float32, the same texts on cpu and {case.run.device}"
        if torch.equal(*texts):
            yield what, 0.0, 0.0
        else:
            step, difference = first_difference(*histories)
            yield f"{what}: logits where step {step} differs", difference, TOGETHER


def first_difference(ours: list, theirs: list) -> tuple[int, float]:
    """The step that revealed something else, and how far its logits, or those before, differ."""
    difference = math.inf
    for a, b in zip(ours, theirs, strict=False):
        same = torch.equal(a.revealed.cpu(), b.revealed.cpu())
        if same and a.logits is not None:
            difference = float((a.logits.cpu() - b.logits.cpu()).abs().max())
        if not same or a.tokens is not None and not torch.equal(a.tokens.cpu(), b.tokens.cpu()):
            return a.step, difference
    return 0, math.inf


def optimizers(case: Case) -> Iterator[Line]:
    """Fused AdamW, and Muon in two precisions, against the CPU in float32: three steps on the same
    gradients.
    """
    learn(start := case.model(CPU), case.x0)
    full, half = torch.float32, torch.bfloat16
    compared = [("adamw", full, ROUNDING), ("muon", full, MAGNIFIED), ("muon", half, ORTHOGONAL)]
    for name, dtype, limit in compared:
        moved = []
        for place, products in ((CPU, full), (case.run.device, dtype)):
            model = copy.deepcopy(start).to(place)
            for ours, theirs in zip(model.parameters(), start.parameters(), strict=True):
                ours.grad = theirs.grad.to(place)
            optimizer = optim.build_optimizer(model, name, 1e-2, 0.1, products)
            for _ in range(3):
                optimizer.step(skip=torch.zeros((), device=place))
            pairs = zip(model.parameters(), start.parameters(), strict=True)
            moved.append([ours.detach().to(CPU) - theirs.detach() for ours, theirs in pairs])
        title = f"{case.name}: three steps of {name} in {str(dtype)[6:]}"
        yield title, relative(moved[1], moved[0]), limit


def waiting(case: Case) -> Iterator[Line]:
    """A step that no line of ours makes wait for the device; a skipped one changes no weight."""
    run = case.run
    train.training_step(run)
    waits = 0.0
    if run.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            train.training_step(run)
        except RuntimeError as error:
            waits, where = 1.0, str(error).splitlines()[0]
            print(f"a step waits: {where}", file=sys.stderr)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    yield f"{case.name}: waits of a training step for the device", waits, 0.0
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    run.optimizer.step(skip=torch.ones((), device=run.device))
    changed = sum(int((a != b).sum()) for a, b in zip(before, run.model.parameters(), strict=True))
    yield f"{case.name}: weights that a skipped step changes", changed, 0.0


QUIET = ("training.eval_interval=0", "training.sample_interval=0", "training.save_interval=0")
TINY = (
    *QUIET,
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=64", "model.block_size=64"),
    *("training.batch_size=8", "training.warmup_iters=2", "training.optimizer=adamw"),
    *("data.dataset=plays", "logging.interval=1", "system.compile=false", "system.dtype=float32"),
    "training.learning_rate=1e-3",
)


def resumes(case: Case, folder: Path) -> Iterator[Line]:
    """A checkpoint of one device, gone on from on the other, against a run on the CPU alone."""
    ends, device = [], case.run.device
    for number, (first, second) in enumerate([(CPU, CPU), (device, CPU), (CPU, device)]):
        out = f"out_dir={folder / str(number)}"
        begin = [*TINY, "training.max_iters=6", f"system.device={first}"]
        go_on = ["training.max_iters=12", "training.resume=true", f"system.device={second}"]
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            for words in (begin, go_on):
                train.main(cli.compose([out, *words]))
        ends.append(checkpoint.load(folder / str(number) / "ckpt.pt")["model"].values())
        if number:
            what = f"resumed: {first}, then {second}, against cpu alone"
            yield what, relative(ends[number], ends[0]), 1e-3


class Processes:
    """One process of torchrun, copies or shards (NCCL on a GPU), against train.py without it."""

    def __init__(self, device: torch.device, folder: Path):
        """Start them, to run beside the other checks."""
        self.device, self.folder, self.running = device, folder, {}
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        start += ["--local-addr=127.0.0.1"]  # a machine without a network may not know its own name
        for kind in ("ddp", "fsdp"):
            with self.log(kind).open("w") as log:
                self.running[kind] = subprocess.Popen(
                    [sys.executable, *start, str(cli.ROOT / "train.py"), *self.words(kind)],
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                )

    def words(self, kind: str) -> list[str]:
        words = [*TINY, "training.max_iters=6", f"out_dir={self.folder / kind}"]
        words += [f"system.parallel={kind}", f"system.device={self.device.type}"]
        return [*words, "training.optimizer=muon"]  # and AdamW for what is no hidden matrix

    def log(self, kind: str) -> Path:
        return self.folder / f"{kind}.log"

    def losses(self, kind: str) -> Tensor:
        lines = (self.folder / kind / "metrics.jsonl").read_text().splitlines()
        return torch.tensor([json.loads(line)["train/loss"] for line in lines])

    def check(self) -> Iterator[Line]:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            train.main(cli.compose(self.words("auto")))
        for kind, process in self.running.items():
            if code := process.wait(timeout=100):
                log = self.log(kind).read_text()
                print(log, file=sys.stderr)
                raise RuntimeError(f"exit code {code}: {error_in(log)}")
            error = relative([self.losses(kind)], [self.losses("auto")])
            yield f"{kind}: losses of one process of torchrun, against none", error, MAGNIFIED

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_) -> None:
        """End those that still run: torchrun ends its own where it is asked to."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()


def error_in(log: str) -> str:
    """The line of a log that names an error; torchrun writes many lines behind it."""
    errors = re.findall(r"^(?:\[rank\d+]: *)?(\w*(?:Error|Exception)\b.*)", log, re.MULTILINE)
    return errors[0] if errors else log[-300:]


def checks(
    case: Callable[[str], Case], processes: Processes, folder: Path
) -> Iterator[tuple[str, Callable]]:
    """(name, check), the most telling first: time may end before the last. `case` makes a case."""
    default = case("default")
    yield "numbers", partial(numbers, default)
    yield "optimizers", partial(optimizers, default)
    yield "waiting", partial(waiting, default)
    yield "resumes", partial(resumes, default, folder)
    yield "processes", processes.check
    yield "blocks", partial(blocks, default)
    yield "compiled", partial(compiled, default)
    yield "samplers", partial(samplers, default)
    small = lru_cache(1)(partial(case, "small"))
    yield "numbers, small", lambda: numbers(small())
    yield "compiled, small", lambda: compiled(small())


def trained(name: str, config: cli.Section, device: torch.device, steps: int) -> Case:
    """A case: the network of this configuration after so many steps."""
    config.training.max_iters, config.training.warmup_iters = 10 * steps, steps // 4
    run = train.Run(config, device)
    for _ in range(steps):
        train.training_step(run)
    x0, _ = run.train_rows.batch(4, generator(0, "check"))
    return Case(name, run, x0)
