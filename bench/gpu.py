"""Every figure of one GPU in a given time: python -m bench.gpu out=gpu minutes=8

check     whether it computes what a CPU does, compiled what eager, torchrun what one process
speed     the 124M preset: tokens/s, MFU, memory, beside nanoGPT; and where the time goes
small     nanoGPT's Shakespeare model: the bound against seconds, and the causal control's
sudoku    9 x 9 grids: the share that is solved, by strategy
sampling  texts/s by strategy; and what held-out text costs in so many calls

Each part is a process of its own, so that one that fails takes no other along, and is cut to its
share of the time. gpu.md and gpu.json are written anew with every row. Without a GPU all parts run
in miniature: a rehearsal, whose figures mean nothing.
"""

import gc
import itertools
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import diffusion
import train
from bench import agreement, sampling, sudoku, throughput
from bench.score import nll_samples
from model import ModelConfig, Transformer
from nanomdm import bounds, cli, devices, runs, strategies, texts
from nanomdm.checkpoint import Loaded, load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError, check_choice, write_atomically

CHILD = "import json, sys; from bench import gpu; gpu.run_part(**json.loads(sys.argv[1]))"
KERNELS = 40  # lines in a table of kernels
QUIET = ("training.eval_interval=0", "training.sample_interval=0", "training.save_interval=0")
MINIATURE = (  # settings of every network where there is no GPU
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=32", "training.batch_size=8"),
    *("training.grad_accum=1", "system.compile=false", "eval.tokens=2000"),
)


class Part:
    """What a part is given, and its tables: lists of rows by title, a row a dict of cells."""

    def __init__(self, name: str, config: Section, seconds: float, scratch: str):
        self.name, self.config, self.scratch = name, config, Path(scratch)
        self.seconds, self.end, self.tables = seconds, time.monotonic() + seconds, {}
        self.device = devices.pick_device(config.device)
        self.in_small = self.device.type == "cpu"
        self.out = Path(config.out)

    def left(self, share: float = 0.0) -> float:
        """Seconds, without this share of all of them."""
        return self.end - time.monotonic() - share * self.seconds

    def compose(self, experiment: str, *words: str, in_small: Sequence[str] = ()) -> Section:
        """Settings of train.py; those of a rehearsal go before all others."""
        own = [f"system.device={self.device}", f"system.seed={self.config.seed}", *QUIET]
        return cli.compose(
            [*own, *words, *((*MINIATURE, *in_small) if self.in_small else ())], experiment
        )

    @property
    def corpus(self) -> str:
        path = self.config.data.path
        return f"data.path={path}" if path else "data.dataset=plays"

    def row(self, title: str, **cells) -> None:
        """Add a row to a table, print it, and write all files anew."""
        rows = self.tables.setdefault(title, [])
        rows.append(cells)
        lines = markdown(rows)
        print("\n".join(["", title, "", *lines] if len(rows) == 1 else lines[-1:]), flush=True)
        store(self.out, self.name, {"seconds": self.seconds, "tables": self.tables}, self.device)


# --- check: does it compute what a CPU does? ------------------------------------------------------


def check(part: Part) -> None:
    """One line for each figure; a check that fails or breaks does not end the rest."""
    processes = agreement.Processes(part.device, part.scratch)  # beside the others
    words = ["system.compile=false", "data.dataset=plays"]
    cases = []
    for name in ("default", "small"):
        config = part.compose(
            "" if name == "default" else name, *words, in_small=["model.block_size=64"]
        )
        cases.append(agreement.trained(name, config, part.device, 4 if part.in_small else 60))
    failed = 0
    for name, lines in agreement.checks(cases, processes, part.scratch):
        began = time.monotonic()
        try:
            if part.left() < 0:
                raise TimeoutError("no time was left")
            for what, figure, limit in lines():
                verdict = "passed" if figure <= limit else "failed"
                failed += verdict == "failed"
                seconds, began = time.monotonic() - began, time.monotonic()
                cells = {"figure": f"{figure:.1e}", "limit": f"{limit:.0e}", "verdict": verdict}
                part.row("Agreement", check=what, **cells, seconds=f"{seconds:.1f}")
        except Exception as error:
            traceback.print_exc()
            failed += 1
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            part.row("Agreement", check=name, figure=said, limit="", verdict="failed", seconds="")
    processes.kill()
    if failed:
        sys.exit(f"{failed} of the checks failed")


# --- speed: whole optimizer steps of the 124M preset ----------------------------------------------

SPEED = {"masked head": ("masked", []), "causal control": ("masked", ["training.objective=ar"])}
SPEED |= {"full head": ("full", [])}
KINDS = {  # of kernels, by their names
    "attention": "cudnn|flash|fmha|sdpa|attention",
    "matrix products": "gemm|nvjet|cutlass|xmma|matmul|::mm",
    "compiled, element by element": "triton",
    "optimizer": "multi_tensor|foreach|FusedAdam|adam",
    "other": "",
}


def speed(part: Part) -> None:
    """Tokens/s and the like; then nanoGPT in turn, and the kernels that a step consists of."""
    in_small = ["model.block_size=64", "data.tokenizer=char", "training.batch_size=8"]
    size = ["training.batch_size=64", "training.grad_accum=1"]
    steps, rounds = (1, 2) if part.in_small else (8, 5)
    for name, (head, words) in SPEED.items():
        if part.left(0.2) < 0:
            break
        config = part.compose("openwebtext", *size, *words, in_small=in_small)
        run = throughput.make_run(config, part.scratch / name, part.device)
        if head == "full":
            run.model.forward = partial(throughput.full_head, run.model.forward)
        found = throughput.measure(run, None, steps, rounds, 0)
        found |= throughput.utilisation(run, head, found["tokens_per_second"])
        low, high = found["range"]
        part.row(
            f"Training, {found['parameters'] / 1e6:.0f} M parameters, "
            f"{config.training.batch_size} x {config.model.block_size} tokens a step",
            network=name,
            tokens_per_second=f"{found['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})",
            MFU=f"{found['mfu']:.1%} of {found['matmul_flops_per_second'] / 1e12:.1f} TFLOP/s",
            memory=f"{found['peak_memory_bytes'] / 2**30:.1f} GiB",
            first_step=f"{found['first_step_seconds']:.1f} s",
            loading=f"{found['loading_share']:.2%}",
            optimizer=f"{optimizer_share(run, found['tokens_per_second']):.1%}",
        )
        if name == "masked head":
            profile(part, run)
        if name == "masked head" and part.config.nanogpt:
            shape = [config, run.model.config.vocab_size, part.device]
            rival = throughput.load_nanogpt(part.config.nanogpt, *shape)
            found = throughput.measure(run, rival, steps, rounds, 0)
            low, middle, high = found["times_nanogpt"]
            part.row(
                "Beside nanoGPT's model and AdamW, in turn",
                ours=f"{found['tokens_per_second']:,.0f} tokens/s",
                nanogpt=f"{found['nanogpt']:,.0f} tokens/s",
                ratio=f"{middle:.2f} ({low:.2f} to {high:.2f})",
            )
            del rival
        del run
        free(part.device)


def optimizer_share(run: train.Run, tokens_per_second: float) -> float:
    """The optimizers' share of the time of a step: gradients stay as they are."""
    settings = run.config.training
    a_step = settings.batch_size * run.model.config.block_size / tokens_per_second
    times = [throughput.seconds(run.optimizer.step, run.device) for _ in range(5)]
    return statistics.median(times) / a_step


def profile(part: Part, run: train.Run) -> None:
    """A file with the kernels of three steps, and a table of their kinds."""
    on_gpu = part.device.type == "cuda"
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CUDA if on_gpu else activities.CPU]) as seen:
        step = partial(train.training_step, run)
        wall = throughput.seconds(lambda: [step() for _ in range(3)], part.device)
    events, clock = seen.key_averages(), "device" if on_gpu else "cpu"
    table = events.table(
        sort_by=f"self_{clock}_time_total", row_limit=KERNELS, max_name_column_width=110
    )
    (part.out / f"kernels-{part.name}.txt").write_text(table)
    spent, kinds = dict.fromkeys(KINDS, 0.0), {k: re.compile(v, re.I) for k, v in KINDS.items()}
    for event in events:
        kind = next(kind for kind, pattern in kinds.items() if pattern.search(event.key))
        spent[kind] += getattr(event, f"self_{clock}_time_total") / 1e6
    cells = {kind: f"{seconds / 3 * 1e3:.1f} ms" for kind, seconds in spent.items()}
    idle = f"{1 - sum(spent.values()) / wall:.0%}"
    part.row(
        "Kernels of a step, while it is profiled",
        step=f"{wall / 3 * 1e3:.1f} ms",
        **cells,
        idle=idle,
    )


def free(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- small and sudoku: training for so many seconds -----------------------------------------------

LOOKS = 8  # at the bound while training
TRIAL = 40  # steps, after the first, that tell how many there is time for


def train_for(run: train.Run, seconds: float, looks: int, look: Callable) -> float:
    """Train for about so many seconds, compilation included; returns how many it took.

    The number of steps, and so the schedule, follows from the speed of the first ones. `look(run,
    spent)` is called before the first and then `looks` times, evenly. It is part of the time, but
    not of what is returned and of `spent`.
    """
    settings, step = run.config.training, train.training_step
    if run.compiled:
        step = devices.eager_if_compiling_fails(step, run.model)
    settings.max_iters = 10**9  # as yet
    seconds -= (looks + 1) * throughput.seconds(lambda: look(run, 0.0), run.device)
    began = time.perf_counter()
    for _ in range(5):
        step(run)
    throughput.wait(run.device)
    a_step = throughput.seconds(lambda: [step(run) for _ in range(TRIAL)], run.device) / TRIAL
    spent = time.perf_counter() - began
    first = run.step
    more = max(looks, int((seconds - spent) / a_step))
    settings.max_iters = first + more
    for number in range(1, looks + 1):
        began = time.perf_counter()
        while run.step < first + more * number // looks:
            step(run)
        throughput.wait(run.device)
        spent += time.perf_counter() - began
        look(run, spent)
    return spent


def small(part: Part) -> None:
    """The bound on validation against seconds, of diffusion and of the causal control."""
    curves, limit, in_small = {}, math.inf, ["model.block_size=16"]
    for number, name in enumerate(("diffusion", "causal control")):
        folder = part.scratch / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        words = [part.corpus, f"out_dir={folder}", *shlex.split(part.config.words)]
        words += ["training.objective=ar"] * number
        config = part.compose("small", *words, in_small=in_small)
        run = train.Run(config, part.device)
        curves[name] = points = []

        def look(run: train.Run, seconds: float, name=name, points=points) -> None:
            found = {}
            log = SimpleNamespace(say=print, metrics=lambda step, values: found.update(values))
            train.evaluate(run, log)
            points.append((seconds, found["eval/val_loss"]))

        limit = min(limit, part.left(0.05) / (2 - number))  # not longer than the other
        limit = seconds = train_for(run, limit, LOOKS, look)
        runs.save(run, "ckpt.pt")
        settings = config.training
        about = {
            "network": name,
            "parameters": f"{count(run.model) / 1e6:.1f} M",
            "seed": part.config.seed,
        }
        about |= {"seconds": f"{seconds:.0f}", "steps": f"{run.step:,}"}
        tokens = run.step * settings.batch_size * config.model.block_size
        about["tokens_per_second"] = f"{tokens / seconds:,.0f}"
        for which, file in (("last", "ckpt.pt"), ("best", "best.pt")):
            value, error = bound(folder / file, run, config.eval.tokens)
            about[f"{which}_on_val"] = f"{value:.4f}" + (
                f" ± {error:.4f}" if error == error else ""
            )
        part.row("The small preset, nats/token on validation (causal: exact)", **about)
        part.tables["Curves"] = [
            {"network": name, "seconds": f"{x:.1f}", "nats": f"{y:.4f}"}
            for name, points in curves.items()
            for x, y in points
        ]
        del run
        free(part.device)
    plot(curves, part.out / "small.png")


def bound(path: Path, run: train.Run, tokens: int) -> tuple[float, float]:
    """The bound on validation (0 tokens: all of it), nats per token, and its error over masks."""
    model = load_model(path, run.device, Transformer, ModelConfig).model
    rows = [row.ids for row in run.blocks["val"].evenly(tokens)]
    return nll_samples(model, rows, seed=0, draws=8).bound()


def count(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def plot(curves: dict[str, list], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name, lw=1, ms=3)
    axes.set(xlabel="seconds of training", ylabel="nats per token on validation")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def solve(part: Part) -> None:
    """Grids of 9 x 9, blanked, and solved in several orders by one network."""
    dataset, size = ("sudoku4", 4) if part.in_small else ("sudoku9", 9)
    folder = part.scratch / "sudoku"
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"data.dataset={dataset}", f"out_dir={folder}", "training.batch_size=256"]
    config = part.compose("sudoku9", *words, in_small=[f"model.block_size={size**2}"])
    run = train.Run(config, part.device)
    seconds = train_for(run, 0.6 * part.left(), 1, lambda run, seconds: None)
    runs.save(run, "ckpt.pt")
    grids = run.step * config.training.batch_size
    print(f"{run.step:,} steps, {grids:,} grids in {seconds:.0f} s", flush=True)
    loaded = load_model(folder / "ckpt.pt", part.device, Transformer, ModelConfig)
    choice = Section(strategies=list(ORDERS), steps=["0"])
    rng, puzzles = np.random.default_rng(part.config.seed), 8 if part.in_small else 300
    rows = run.corpus.rows("val", size**2).evenly(puzzles * size**2)
    grids = [run.corpus.tokenizer.decode(row.ids.tolist()) for row in rows]
    blanked = {share: [sudoku.blanked(grid, share, rng) for grid in grids] for share in SHARES}
    for order, sampler in sudoku.orders(choice, loaded):
        if part.left() < 0:
            break
        cells = {"order": order}
        for share in SHARES:
            found = sudoku.measure(loaded, sampler, order, share, blanked[share], size)
            low, high = found.interval
            cells[f"{share:.0%} blank"] = (
                f"{found.solved:.1%} ({low:.1%} to {high:.1%}), {found.calls:.1f} calls"
            )
        part.row(
            f"Sudoku {size} x {size}, {run.step:,} steps in {seconds:.0f} s, {puzzles} puzzles",
            **cells,
        )


ORDERS = ("margin", "first_hitting", "threshold", "left_to_right")
SHARES = (0.5, 0.6, 0.7)  # of the cells that are blank


# --- sampling -------------------------------------------------------------------------------------


def sample(part: Part) -> None:
    """Samples/s, by strategy; between, what held-out text costs in more and more calls."""
    path, context = part.scratch / "diffusion" / "ckpt.pt", ["model.block_size=16"]
    vocabulary = 65 if part.in_small else 50257

    def small() -> Transformer:
        if path.is_file():  # the part small trained it
            return load_model(path, part.device, Transformer, ModelConfig).model
        return network(part, part.compose("small", in_small=context), 65)

    def large() -> Transformer:
        return network(part, part.compose("openwebtext", in_small=context), vocabulary)

    others = [name for name in strategies.STRATEGIES if name != "spread"]
    batches = (1, 4 if part.in_small else 64)
    for fast, build, batch in itertools.product((False, True), (small, large), batches):
        speed_of(part, build, fast, batch, ["spread"])
    if path.is_file():
        score(part, load_model(path, part.device, Transformer, ModelConfig))
    for build, batch in itertools.product((small, large), batches[::-1]):
        speed_of(part, build, False, batch, sorted(others, key=strategies.is_adaptive))


def speed_of(part: Part, build: Callable, fast: bool, batch: int, names: Sequence[str]) -> None:
    """A row for each strategy: 32 steps of it, or as many as it takes."""
    if part.left() < 0 or fast and part.in_small:
        return
    model = build()
    size = f"{count(model) / 1e6:.0f} M parameters"
    if fast:
        canvases = torch.zeros(batch, model.config.block_size)
        devices.compile_calls(model, "true", canvases, 10**6)
    for strategy in names:
        if part.left() < 0:
            break
        settings = Section(steps=4 if part.in_small else 32, rounds=1, seed=part.config.seed)
        found = sampling.measure(model, strategy, True, batch, settings)
        part.row(
            "Sampling in float32",
            network=size,
            compiled="yes" if fast else "no",
            strategy=strategy,
            batch=batch,
            calls=found["calls"],
            texts_per_second=f"{found['samples_per_second']:.2f}",
            tokens_per_second=f"{found['tokens_per_second']:,.0f}",
            network_share=f"{found['network_share']:.0%}",
        )
    free(part.device)


def network(part: Part, config: Section, vocabulary: int) -> Transformer:
    torch.manual_seed(part.config.seed)
    shape = ModelConfig(vocabulary, attention_gate=True, **vars(config.model))
    return Transformer(shape).to(part.device).eval()


def score(part: Part, loaded: Loaded) -> None:
    """What held-out text costs under samplers in so many calls (`diffusion.score`)."""
    corpus = data.load(cli.section(loaded.config["data"]), loaded.tokenizer)
    L = loaded.model.config.block_size
    held_out = texts.cut("", [("", corpus.val)], loaded.tokenizer, L, limit=64 * L)
    for name in ("spread", "margin"):
        for steps in (L // 16, L // 4, L):
            sampler = strategies.Sampler(
                diffusion.sample, name, {"strategy": strategies.STRATEGIES[name], "steps": steps}
            )
            found = bounds.score(
                sampler, loaded.model, held_out, draws=1, seed=0, advance=lambda n: None
            )
            part.row(
                f"Held-out text under samplers, {held_out.tokens:,} tokens",
                strategy=f"{name}, {steps} steps",
                calls=f"{found.calls:.0f}",
                nats_per_token=f"{found.bound()[0]:.4f}",
                what=sampler.label,
            )


# --- The whole ------------------------------------------------------------------------------------

PARTS = {  # minutes of eight
    "check": (check, 1.0),
    "speed": (speed, 2.0),
    "small": (small, 3.0),
    "sudoku": (solve, 1.5),
    "sampling": (sample, 0.5),
}


def markdown(rows: list[dict]) -> list[str]:
    """A table; words of its head have spaces for underscores."""
    head = [str(name).replace("_", " ") for name in rows[0]]
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row.values()] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def store(out: Path, name: str, found: dict, device: torch.device) -> None:
    """Write gpu.json, and gpu.md from it; what other parts have found stays."""
    path = out / "gpu.json"
    whole = json.loads(path.read_text()) if path.is_file() else {"parts": {}}
    whole["hardware"] = throughput.hardware(device)
    whole["parts"][name] = whole["parts"].get(name, {}) | found
    if device.type == "cpu":
        whole["hardware"] += ": a rehearsal in miniature, whose figures mean nothing"
    write_atomically(path, json.dumps(whole, indent=1).encode())
    lines = [f"# {whole['hardware']}"]
    for part in (whole["parts"][name] for name in PARTS if name in whole["parts"]):
        for title, rows in part.get("tables", {}).items():
            lines += ["", f"## {title}", "", *markdown(rows)]
        lines += ["", part["failed"]] if part.get("failed") else []
    write_atomically(out / "gpu.md", "\n".join([*lines, ""]).encode())


def run_part(name: str, seconds: float, scratch: str, config: dict) -> None:
    """One part, in a process of its own."""
    torch.manual_seed(config["seed"])
    devices.keep_freed_memory()
    try:
        PARTS[name][0](Part(name, cli.section(config), seconds, scratch))
    except UserError as error:
        sys.exit(f"error: {error}")


def main(config: Section) -> None:
    for name in config.parts:
        check_choice("parts", name, PARTS)
    if not config.parts or not 0 < config.minutes < math.inf:
        raise UserError(f"minutes={config.minutes} must be positive, and parts not empty")
    if config.nanogpt:
        throughput.nanogpt_file(config.nanogpt)
    if config.data.path and not Path(config.data.path).exists():
        raise UserError(f"data.path={config.data.path} is not there: name a text file, or none")
    device = devices.pick_device(config.device)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    print(throughput.hardware(device), flush=True)
    if device.type == "cpu":
        print("no GPU: a rehearsal in miniature, whose figures mean nothing", flush=True)
    end, failed = time.monotonic() + 60 * config.minutes, []
    shares = {name: PARTS[name][1] for name in PARTS if name in config.parts}
    with tempfile.TemporaryDirectory() as scratch:
        while shares:
            left, share = end - time.monotonic(), 1 / sum(shares.values())
            name = next(iter(shares))
            seconds = left * share * shares.pop(name)
            given = {"name": name, "seconds": seconds, "scratch": scratch}
            words = json.dumps(given | {"config": config.as_dict()})
            began, why = time.monotonic(), ""
            try:
                code = subprocess.run(
                    [sys.executable, "-c", CHILD, words], timeout=min(left, 1.25 * seconds + 10)
                ).returncode
                why = f"{name} ended with exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                why = f"{name} was stopped after {time.monotonic() - began:.0f} s"
            failed += [why] if why else []
            store(Path(config.out), name, {"failed": why}, device)
            print(f"\n{why or name}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        raise OSError("; ".join(failed))


if __name__ == "__main__":
    cli.main(main, "bench/gpu")
