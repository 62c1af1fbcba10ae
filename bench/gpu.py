"""Every figure of one GPU in a given time: python -m bench.gpu out=gpu minutes=8.0

check     whether it computes what a CPU does, compiled what eager, torchrun what one process
speed     the 124M preset: tokens/s, MFU, memory, beside nanoGPT; and where the time goes
small     nanoGPT's Shakespeare model: the bound against seconds, and the causal control's
sudoku    9 x 9 grids: the share that is solved, by strategy
sampling  texts/s by strategy; and what held-out text costs in so many calls

Each part is a process of its own, so that one that fails takes no other along. It ends by itself
after its share of the time, or is ended `GRACE` seconds later. gpu.json, and gpu.md from it, are
written anew with every row; a later command replaces the parts that it names. Without a GPU all
parts run in miniature: a rehearsal, whose figures mean nothing.
"""

import gc
import itertools
import json
import math
import re
import shlex
import signal
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
from bench import agreement, recipe, sampling, sudoku, throughput
from bench.score import nll_samples
from model import ModelConfig, Transformer
from nanomdm import bounds, cli, devices, folders, runs, strategies, texts
from nanomdm.checkpoint import Loaded, load_model
from nanomdm.cli import Section
from nanomdm.errors import UserError, as_user_error, check_choice, write_atomically

CHILD = "import json, sys; from bench import gpu; gpu.run_part(**json.loads(sys.argv[1]))"
GRACE = 15  # seconds between the end of a part's time and that of its process
KERNELS = 40  # lines in a table of kernels
MINIATURE = (  # settings of every network where there is no GPU
    *("model.n_layer=2", "model.n_head=2", "model.n_embd=32", "training.batch_size=8"),
    *("training.grad_accum=1", "system.compile=false"),
)


class Part:
    """What a part is given, and its tables: lists of rows by title, a row a dict of cells."""

    def __init__(self, name: str, config: Section, end: float, scratch: str):
        self.name, self.config, self.scratch = name, config, Path(scratch)
        self.end, self.seconds = end, end - time.time()
        self.device = pick_device(config.device)
        self.in_miniature = self.device.type == "cpu"
        self.out, self.tables, self.is_cut = Path(config.out), {}, False

    def left(self, share: float = 0.0) -> float:
        """Seconds, without this share of all of them."""
        return self.end - time.time() - share * self.seconds

    def is_over(self, share: float = 0.0) -> bool:
        """Whether no more than this share is left: then something has to be left out."""
        self.is_cut |= (over := self.left(share) < 0)
        return over

    def compose(self, experiment: str, *words: str, miniature: Sequence[str] = ()) -> Section:
        """Settings of train.py: those of the part and of a rehearsal, then `words`, which win."""
        own = [f"system.device={self.device}", f"system.seed={self.config.seed}", *agreement.QUIET]
        if self.in_miniature:
            own += [*MINIATURE, *miniature]
        return cli.compose([*own, *words], experiment)

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
        self.store()

    def store(self) -> None:
        cut = "Time ended before all of it was measured." if self.is_cut else ""
        store(self.out, self.name, {"tables": self.tables, "cut": cut})


def pick_device(name: str) -> torch.device:
    """A CUDA device, or the CPU: of another GPU nothing is known."""
    found = devices.pick_device(name)
    return found if found.type == "cuda" else torch.device("cpu")


# --- check: does it compute what a CPU does? ------------------------------------------------------


def check(part: Part) -> None:
    """One line for each figure; a check that fails or breaks does not end the rest."""
    failed = 0

    def case(name: str) -> agreement.Case:
        words = ["system.compile=false", "data.dataset=plays"]
        experiment = "" if name == "default" else name
        config = part.compose(experiment, *words, miniature=["model.block_size=64"])
        return agreement.trained(name, config, part.device, 4 if part.in_miniature else 60)

    with agreement.Processes(part.device, part.scratch) as processes:  # beside the others
        for name, lines in agreement.checks(case, processes, part.scratch):
            began = time.time()
            if part.is_over():
                part.row(
                    "Agreement", check=name, figure="", limit="", verdict="no time", seconds=""
                )
                continue
            try:
                for what, figure, limit in lines():
                    verdict = "passed" if figure <= limit else "failed"
                    failed += verdict == "failed"
                    seconds, began = f"{time.time() - began:.1f}", time.time()
                    cells = {"figure": f"{figure:.1e}", "limit": f"{limit:.0e}", "verdict": verdict}
                    part.row("Agreement", check=what, **cells, seconds=seconds)
            except Exception as error:
                traceback.print_exc()
                failed += 1
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                cells = {"figure": said, "limit": "", "verdict": "failed", "seconds": ""}
                part.row("Agreement", check=name, **cells)
    if failed:
        sys.exit(f"{failed} of the checks failed")


# --- speed: whole optimizer steps of the 124M preset ----------------------------------------------

SPEED = {  # the head, as in bench/throughput.py, and settings
    "masked head": ("masked", []),
    "causal control": ("masked", ["training.objective=ar"]),
    "full head, not compiled": ("full", []),
}
KINDS = {  # of kernels, by their names
    "compiled, element by element": "^triton",
    "attention": "cudnn|flash|fmha|sdpa|attention",
    "matrix products": "gemm|nvjet|cutlass|xmma|matmul|::mm",
    "optimizer": "multi_tensor|foreach|adam",
    "other": "",
}


def speed(part: Part) -> None:
    """Tokens/s and the like; then nanoGPT in turn, and the kernels that a step consists of."""
    miniature = ["model.block_size=64", "data.tokenizer=char"]
    rows = 8 if part.in_miniature else 64
    size = [f"training.batch_size={rows}", "training.grad_accum=1"]
    steps, rounds = (1, 2) if part.in_miniature else (8, 5)
    for name, (head, words) in SPEED.items():
        if part.is_over(0.2):
            break
        config = part.compose("openwebtext", *size, *words, miniature=miniature)
        run = throughput.make_run(config, part.scratch / name, part.device)
        if head == "full":
            run.model.forward = partial(throughput.full_head, run.model.forward)
        found = throughput.measure(run, None, steps, rounds, 0)
        found |= throughput.utilisation(run, head, found["tokens_per_second"])
        low, high = found["range"]
        part.row(
            f"Training, {found['parameters'] / 1e6:.0f} M parameters, {rows} x "
            f"{config.model.block_size} tokens a step",
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
            if part.config.nanogpt:
                beside_nanogpt(part, run, steps, rounds)
        del run
        free(part.device)


def optimizer_share(run: train.Run, tokens_per_second: float) -> float:
    """The optimizers' share of the time of a step: gradients stay as they are."""
    settings = run.config.training
    a_step = settings.batch_size * run.model.config.block_size / tokens_per_second
    times = [throughput.seconds(run.optimizer.step, run.device) for _ in range(5)]
    return statistics.median(times) / a_step


def beside_nanogpt(part: Part, run: train.Run, steps: int, rounds: int) -> None:
    cells = {"ours": "", "nanogpt": ""}
    try:
        shape = [run.config, run.model.config.vocab_size, part.device]
        rival = throughput.load_nanogpt(part.config.nanogpt, *shape)
        found = throughput.measure(run, rival, steps, rounds, 0)
        low, middle, high = found["times_nanogpt"]
        cells["ours"] = f"{found['tokens_per_second']:,.0f} tokens/s"
        cells["nanogpt"] = f"{found['nanogpt']:,.0f} tokens/s"
        cells["ratio"] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    except Exception as error:  # a file of somebody else's
        traceback.print_exc()
        cells["ratio"] = f"failed: {type(error).__name__}"
    part.row("Beside nanoGPT's model and AdamW, in turn", **cells)


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
    part.row(
        "Kernels of a step, while it is profiled",
        step=f"{wall / 3 * 1e3:.1f} ms",
        **cells,
        idle=f"{1 - sum(spent.values()) / wall:.0%}",
    )


def free(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    torch.compiler.set_stance("default")  # also where compiling has failed
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- small and sudoku: training for so many seconds -----------------------------------------------

LOOKS = 8  # at the bound while training
TRIAL = 40  # steps, after the first, that tell how many there is time for


def train_for(
    run: train.Run, seconds: float, looks: int = 1, look: Callable | None = None
) -> float:
    """Train for about so many seconds, compilation included; returns how many it took.

    The number of steps, and so the schedule, follows from the speed of the first ones.
    `look(spent)` is called `looks` times, evenly, while the clock stands still.
    """
    settings, step = run.config.training, train.training_step
    if run.compiled:
        step = devices.eager_if_compiling_fails(step, run.model)
    settings.max_iters = 10**9  # as yet
    began = time.perf_counter()
    for _ in range(5):
        step(run)
    throughput.wait(run.device)
    a_step = throughput.seconds(lambda: [step(run) for _ in range(TRIAL)], run.device) / TRIAL
    spent, first = time.perf_counter() - began, run.step
    more = max(looks, int((seconds - spent) / a_step))
    settings.max_iters = first + more
    for number in range(1, looks + 1):
        began = time.perf_counter()
        while run.step < first + more * number // looks:
            step(run)
        throughput.wait(run.device)
        spent += time.perf_counter() - began
        if look:
            look(spent)
    return spent


def small(part: Part) -> None:
    """The bound on validation against seconds, of diffusion and of the causal control."""
    curves, seconds, miniature = {}, math.inf, ["model.block_size=16"]
    for number, objective in enumerate(("diffusion", "ar")):
        name, folder = ("diffusion", "causal control")[number], part.scratch / objective
        folder.mkdir(parents=True, exist_ok=True)
        words = [part.corpus, f"out_dir={folder}", *shlex.split(part.config.words)]
        words += [f"training.objective={objective}"]
        config = part.compose("small", *words, miniature=miniature)
        if part.in_miniature:
            config.eval.tokens = 2000
        run = train.Run(config, part.device)
        curves[name] = points = []

        def look(spent: float, run=run, points=points) -> None:
            found = {}
            log = SimpleNamespace(say=print, metrics=lambda step, values: found.update(values))
            train.evaluate(run, log)
            points.append((spent, found["eval/val_loss"]))

        look(0.0)
        a_look = throughput.seconds(partial(train.evaluate, run, SILENT), run.device)
        time_left = part.left(0.05) / (2 - number) - (LOOKS + 4) * a_look
        seconds = train_for(run, min(seconds, time_left), LOOKS, look)  # of both the same
        runs.save(run, "ckpt.pt")
        part.tables["Curves"] = [
            {"network": name, "seconds": f"{x:.1f}", "nats": f"{y:.4f}"}
            for name, points in curves.items()
            for x, y in points
        ]
        tokens = run.step * config.training.batch_size * config.model.block_size
        part.row(
            "The small preset, nats/token on validation (causal: exact)",
            network=name,
            parameters=f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.1f} M",
            seconds=f"{seconds:.0f}",
            steps=f"{run.step:,}",
            tokens_per_second=f"{tokens / seconds:,.0f}",
            last_on_val=bound(folder / "ckpt.pt", run, config.eval.tokens),
            best_on_val=bound(folder / "best.pt", run, config.eval.tokens),
        )
        try:
            recipe.draw({name: [points] for name, points in curves.items()}, part.out / "small.png")
        except UserError as error:  # without matplotlib
            print(error, file=sys.stderr)
        del run
        free(part.device)


SILENT = SimpleNamespace(say=lambda line: None, metrics=lambda step, values: None)


def bound(path: Path, run: train.Run, tokens: int) -> str:
    """The bound on validation (0 tokens: all of it), nats per token, and its error over masks."""
    model = load_model(path, run.device, Transformer, ModelConfig).model
    rows = [row.ids for row in run.eval_rows["val"].evenly(tokens)]
    value, error = nll_samples(model, rows, seed=0, draws=8).bound()
    return f"{value:.4f}" if math.isnan(error) else f"{value:.4f} ± {error:.4f}"


ORDERS = ("margin", "first_hitting", "threshold", "left_to_right")
BLANKS = (0.5, 0.6, 0.7)  # shares of the cells


def solve(part: Part) -> None:
    """Grids of 9 x 9, blanked, and solved in several orders by one network."""
    dataset, size = ("sudoku4", 4) if part.in_miniature else ("sudoku9", 9)
    folder = part.scratch / "sudoku"
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"data.dataset={dataset}", f"out_dir={folder}", "training.batch_size=256"]
    words += ["training.batch_size=8"] * part.in_miniature
    config = part.compose("sudoku9", *words, miniature=[f"model.block_size={size**2}"])
    run = train.Run(config, part.device)
    seconds = train_for(run, 0.6 * part.left())
    runs.save(run, "ckpt.pt")
    loaded = load_model(folder / "ckpt.pt", part.device, Transformer, ModelConfig)
    rng, number = np.random.default_rng(part.config.seed), 8 if part.in_miniature else 300
    rows = run.corpus.rows("val", size**2).evenly(number * size**2)
    grids = [run.corpus.tokenizer.decode(row.ids.tolist()) for row in rows]
    puzzles = {share: [sudoku.blanked(grid, share, rng) for grid in grids] for share in BLANKS}
    for order, sampler in sudoku.orders(Section(strategies=ORDERS, steps=["0"]), loaded):
        if part.is_over():
            break
        cells = {"order": order}
        for share in BLANKS:
            found = sudoku.measure(loaded, sampler, order, share, puzzles[share], size)
            low, high = found.interval
            solved = f"{found.solved:.1%} ({low:.1%} to {high:.1%})"
            cells[f"{share:.0%} blank"] = f"{solved}, {found.calls:.1f} calls"
        trained = f"{run.step:,} steps of {config.training.batch_size} in {seconds:.0f} s"
        part.row(f"Sudoku {size} x {size}: {trained}; {number} puzzles", **cells)


# --- sampling -------------------------------------------------------------------------------------


def sample(part: Part) -> None:
    """Samples/s, by strategy; between, what held-out text costs in more and more calls."""
    path, miniature = part.scratch / "diffusion" / "ckpt.pt", ["model.block_size=16"]
    vocabulary = 65 if part.in_miniature else 50257
    trained = "trained" if path.is_file() else "untrained"  # by the part small

    def untrained(config: Section, vocabulary: int) -> Transformer:
        return sampling.untrained(vars(config.model), vocabulary, part.config.seed, part.device)

    def small() -> Transformer:
        if path.is_file():
            return load_model(path, part.device, Transformer, ModelConfig).model
        return untrained(part.compose("small", miniature=miniature), 65)

    def large() -> Transformer:
        return untrained(part.compose("openwebtext", miniature=miniature), vocabulary)

    # A call of 64 texts is 19 TFLOP for the large network, in float32: it gets eight.
    networks = {f"small, {trained}": (small, 64), "124M, untrained": (large, 8)}
    others = [name for name in strategies.STRATEGIES if name != "spread"]
    others.sort(key=strategies.is_adaptive)
    for fast, (name, (build, many)) in itertools.product((False, True), networks.items()):
        for batch in (1, 4 if part.in_miniature else many):
            speed_of(part, name, build, fast, batch, ["spread"])
    if path.is_file() and not part.is_over():
        score(part, load_model(path, part.device, Transformer, ModelConfig))
    for name, (build, many) in networks.items():
        for batch in (4 if part.in_miniature else many, 1):
            speed_of(part, name, build, False, batch, others)


def speed_of(
    part: Part, name: str, build: Callable, fast: bool, batch: int, names: Sequence[str]
) -> None:
    """A row for each strategy: 32 steps of it, or as many as it takes."""
    if part.is_over() or fast and part.in_miniature:
        return
    model = build()
    if fast:
        canvases = torch.zeros(batch, model.config.block_size)
        devices.compile_calls(model, "true", canvases, 10**6)
    steps = 4 if part.in_miniature else 32
    for strategy in names:
        if part.is_over():
            break
        settings = Section(steps=steps, rounds=1, seed=part.config.seed)
        found = sampling.measure(model, strategy, True, batch, settings)
        part.row(
            "Sampling in float32",
            network=name,
            compiled="yes" if fast else "no",
            strategy=strategy,
            batch=batch,
            calls=found["calls"],
            texts_per_second=f"{found['samples_per_second']:.2f}",
            tokens_per_second=f"{found['tokens_per_second']:,.0f}",
            network_share=f"{found['network_share']:.0%}",
        )
    free(part.device)


def score(part: Part, loaded: Loaded) -> None:
    """What held-out text costs under samplers in so many calls (`diffusion.score`)."""
    corpus = data.load(cli.stored_data(loaded.config), loaded.tokenizer)
    L = loaded.model.config.block_size
    held_out = texts.cut("", [("", corpus.val)], loaded.tokenizer, L, limit=64 * L)
    for name, steps in itertools.product(("spread", "margin"), (L // 16, L // 4, L)):
        settings = {"strategy": strategies.STRATEGIES[name], "steps": steps}
        sampler = strategies.Sampler(diffusion.sample, name, settings)
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
    return [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in lines]


def stored(out: Path) -> dict:
    """What earlier commands have found, by part. Raises `UserError`."""
    path = out / "gpu.json"
    if not path.is_file():
        return {}
    with as_user_error(f"{path} is damaged, remove it: "):
        return dict(json.loads(path.read_text()))


def store(out: Path, name: str, found: dict, anew: bool = False) -> None:
    """Write gpu.json, and gpu.md from it; what other parts have found stays."""
    parts = stored(out)
    parts[name] = found if anew else parts.get(name, {}) | found
    write_atomically(out / "gpu.json", json.dumps(parts, indent=1).encode())
    lines = []
    for name in filter(parts.__contains__, PARTS):
        lines += [f"# {name}", "", parts[name].get("about", ""), ""]
        for title, rows in parts[name].get("tables", {}).items():
            lines += [f"## {title}", "", *markdown(rows), ""]
        lines += [parts[name][key] + "\n" for key in ("cut", "failed") if parts[name].get(key)]
    write_atomically(out / "gpu.md", "\n".join(lines).encode())


def about(config: Section, device: torch.device, seconds: float) -> str:
    """Where and how a part is run."""
    commit = (folders.git_state(cli.ROOT) or {"revision": "unknown"})["revision"][:7]
    text = Path(config.data.path or "plays").name
    settings = f"seed {config.seed}, words={config.words!r}, text {text}"
    rehearsal = "" if device.type == "cuda" else "A rehearsal in miniature: no figure counts. "
    return (
        f"{rehearsal}{throughput.hardware(device)}; commit {commit}; {seconds:.0f} s; {settings}."
    )


def run_part(name: str, end: float, scratch: str, config: dict) -> None:
    """One part, in a process of its own, which a SIGTERM lets end its own processes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.manual_seed(config["seed"])
    devices.keep_freed_memory()
    part = Part(name, cli.section(config), end, scratch)
    try:
        PARTS[name][0](part)
        part.store()
    except UserError as error:
        sys.exit(f"error: {error}")


def why_it_failed(name: str, given: dict) -> str:
    """Run a part; says why it did not end well, or ""."""
    command = [sys.executable, "-c", CHILD, json.dumps(given | {"name": name})]
    with subprocess.Popen(command) as process:
        try:
            code = process.wait(timeout=max(0.0, given["end"] - time.time()) + GRACE)
            return f"{name} ended with exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            return f"{name} did not end in its time and was stopped"


def main(config: Section) -> None:
    for name in config.parts:
        check_choice("parts", name, PARTS)
    check_choice("device", config.device, ("auto", "cpu", "cuda"))
    if not config.parts or not 0 < config.minutes < math.inf:
        raise UserError(f"minutes={config.minutes} must be positive, and parts not empty")
    with as_user_error("words: "):
        shlex.split(config.words)
    if config.nanogpt:
        throughput.nanogpt_file(config.nanogpt)
    if config.data.path and not Path(config.data.path).exists():
        raise UserError(f"data.path={config.data.path} is not there: name a text file, or none")
    device, out = pick_device(config.device), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    last, failed = time.time() + 60 * config.minutes, []
    shares = {name: PARTS[name][1] for name in PARTS if name in config.parts}
    with tempfile.TemporaryDirectory() as scratch:
        while shares:
            now, whole = time.time(), sum(shares.values())
            name, share = next(iter(shares)), shares.pop(next(iter(shares)))
            end = now + max(0.0, last - now) * share / whole
            said = about(config, device, end - now)
            print(f"\n# {name}\n\n{said}", flush=True)
            store(out, name, {"about": said}, anew=True)
            given = {"end": end, "scratch": scratch, "config": config.as_dict()}
            why = why_it_failed(name, given)
            failed += [why] if why else []
            store(out, name, {"failed": why})
            print(f"\n{why or name}: {time.time() - now:.0f} s", flush=True)
    if failed:
        raise OSError("; ".join(failed))


if __name__ == "__main__":
    cli.main(main, "bench/gpu")
