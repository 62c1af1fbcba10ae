"""Two processes on the CPU, started by torchrun's agent, against one: the same losses and files.

One pair of processes does all the runs of `RUNS`. The agent forks them from this file, so that they
need not import torch.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, environment
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train as train_script
from nanomdm import checkpoint, cli, parallel

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
KILLED_AT = 6
ADAMW, DDP, FSDP = "training.optimizer=adamw", "system.parallel=ddp", "system.parallel=fsdp"
SPLIT, RESUME = "training.grad_accum=2", "training.resume=true"
RUNS = {  # of two processes
    "ddp-adamw": (DDP, ADAMW),
    "ddp-adamw-split": (DDP, ADAMW, SPLIT),
    "ddp-muon-split": (DDP, SPLIT),
    "ddp-killed": (DDP,),
    "ddp-resumed": (DDP, RESUME),
    "ddp-pairs": (DDP, ADAMW, SPLIT),
    "ddp-blocks": (DDP, ADAMW, SPLIT, "model.block_length=4"),
    "fsdp-pairs": (FSDP, ADAMW, "model.learned_positions=true"),
    "fsdp-blocks": (FSDP, ADAMW, "model.block_length=4", "model.conv_width=3"),
    "fsdp-adamw": (FSDP, ADAMW),
    "fsdp-adamw-split": (FSDP, ADAMW, SPLIT),
    "fsdp-muon-split": (FSDP, SPLIT, "training.activation_checkpointing=true"),
    "fsdp-killed": (FSDP,),
    "fsdp-resumed": (FSDP, RESUME),
}
FLOAT32 = {"rel": 1e-6}  # sums in another order: 1.5e-7 was measured over twelve steps
MUON = {"rel": 1e-5}  # orthogonal factors may multiply that: 1.7e-7 was measured
BOTH = pytest.mark.parametrize("kind", ["ddp", "fsdp"])


# --- What each process does ---------------------------------------------------------------------


class Killed(Exception):
    pass


def train(folder: Path, name: str, *words: str) -> None:
    """One run into folder/name; killed after its checkpoint at `KILLED_AT`, if the name says so."""
    save = train_script.runs.save

    def saves_and_dies(run, file):
        written = save(run, file)
        if run.step == KILLED_AT and file == "ckpt.pt":
            raise Killed
        return written

    rare = ("training.eval_interval=12", "training.sample_interval=12")
    sys.argv = ["train.py", *TINY, *rare, *words, f"out_dir={folder / name}"]
    sys.argv += [f"data.path={folder}/{'pairs.jsonl' if 'pairs' in name else 'kings.txt'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOMDM_CACHE", f"{folder}/cache")
        if name.endswith("killed"):
            patch.setattr(train_script.runs, "save", saves_and_dies)
        with suppress(Killed):
            cli.main(train_script.main)


def watched(patch: pytest.MonkeyPatch) -> dict:
    """What a run does from now on: its masks by step and row, its averages of gradients."""
    seen = {"masks": {}, "averages": 0}
    loss_of, distribute = train_script.masked_diffusion_loss, parallel.distribute
    training_step, steps = train_script.training_step, []
    by = "reduce_scatter_single"  # what FSDP2 averages by; PyTorch 2.10 has another name for it
    by = by if hasattr(dist, by) else "reduce_scatter_tensor"
    scatter = getattr(dist, by)

    def watched_step(run):
        steps.append(run.step)
        return training_step(run)

    def watched_loss(model, x0, *, nll, share, **settings):
        def watched_nll(xt, x0, is_masked):
            for row, mask in zip(share[0].tolist(), is_masked.int().tolist(), strict=True):
                seen["masks"][f"{steps[-1]}/{row}"] = mask
            return nll(xt, x0, is_masked)

        return loss_of(model, x0, nll=watched_nll, share=share, **settings)

    def count(*given, **options):
        seen["averages"] += 1
        return scatter(*given, **options)

    def watched_distribute(kind, model, *rest):
        result = distribute(kind, model, *rest)
        if result is not model:
            result.register_comm_hook(None, average)
        return result

    def average(state, bucket):
        seen["averages"] += 1
        mean = bucket.buffer().div_(2)
        return dist.all_reduce(mean, async_op=True).get_future().then(lambda f: f.value()[0])

    patch.setattr(train_script, "training_step", watched_step)
    patch.setattr(train_script, "masked_diffusion_loss", watched_loss)
    patch.setattr(parallel, "distribute", watched_distribute)
    patch.setattr(dist, by, count)
    return seen


def one_of_two(folder: Path) -> None:
    """What the agent starts twice: all runs, one after the other."""
    torch.set_num_threads(1)
    rank, seen = parallel.world().rank, {}
    with parallel.processes(torch.device("cpu")):
        for name, words in RUNS.items():
            with pytest.MonkeyPatch.context() as patch:
                seen[name] = watched(patch)
                train(folder, name, *words)
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


# --- The runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_file) -> Path:
    """A folder of the runs of one process (adamw, muon, killed, ...) and of those of two."""
    folder = tmp_path_factory.mktemp("parallel")
    shutil.copy(text_file, folder / "kings.txt")
    pairs = ({"prompt": f"KING {n % 9}", "response": "crown " * (n % 4 + 1)} for n in range(60))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        seen = watched(patch)
        train(folder, "adamw", ADAMW)
        (folder / "alone.json").write_text(json.dumps(seen))
        train(folder, "muon")
        train(folder, "killed")
        train(folder, "pairs-ddp", ADAMW)
        train(folder, "pairs-fsdp", ADAMW, "model.learned_positions=true")
        train(folder, "blocks-ddp", ADAMW, "model.block_length=4")
        train(folder, "blocks-fsdp", ADAMW, "model.block_length=4", "model.conv_width=3")
        for kind in ("ddp", "fsdp"):
            shutil.copytree(folder / "killed", folder / f"{kind}-resumed")
        shutil.rmtree(folder / "cache")  # so that two processes have to prepare the text
        result = subprocess.run(
            [sys.executable, __file__, str(folder)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        (folder / "out.txt").write_text(result.stdout)
        for kind in ("ddp", "fsdp"):
            shutil.copytree(folder / f"{kind}-killed", folder / f"{kind}-alone")
            train(folder, f"{kind}-alone", RESUME, "system.parallel=auto")
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path, key: str = "train/loss") -> list[float]:
    return [line[key] for line in metrics(folder) if key in line]


def seen_by(folder: Path, name: str) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text())[name] for rank in (0, 1)]


# --- Claims -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("split", ["", "-split"])
def test_two_processes_have_the_losses_of_one_to_float32_rounding_with_adamw(folder, kind, split):
    expected = curve(folder / "adamw")
    assert curve(folder / f"{kind}-adamw{split}") == pytest.approx(expected, **FLOAT32)


@BOTH
def test_two_processes_have_the_losses_of_one_to_a_hundred_thousandth_with_muon(folder, kind):
    """In two micro-batches each, and with shards whose activations are computed again."""
    assert curve(folder / f"{kind}-muon-split") == pytest.approx(curve(folder / "muon"), **MUON)


@BOTH
@pytest.mark.parametrize("what", ["pairs", "blocks"])
@pytest.mark.parametrize("key", ["train/loss", "eval/val_loss"])
def test_two_processes_learn_pairs_and_blocks_as_one_does(folder, kind, key, what):
    """Also with learned positions, and in micro-batches: rows of unequal numbers of answers."""
    expected = curve(folder / f"{what}-{kind}", key)
    assert expected and curve(folder / f"{kind}-{what}", key) == pytest.approx(expected, rel=1e-5)


@BOTH
def test_two_processes_find_the_gradient_norms_of_one(folder, kind):
    norms = [curve(folder / name, "train/grad_norm") for name in (f"{kind}-adamw", "adamw")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@BOTH
def test_two_processes_find_the_bounds_of_one(folder, kind):
    for key in ("eval/train_loss", "eval/val_loss"):
        two, one = (curve(folder / name, key) for name in (f"{kind}-adamw", "adamw"))
        assert one and two == pytest.approx(one, rel=1e-5)


@BOTH
def test_two_processes_average_weights_as_one_does(folder, kind):
    two, one = (checkpoint.load(folder / n / "ckpt.pt")["ema"] for n in (f"{kind}-adamw", "adamw"))
    assert two.keys() == one.keys()
    for name, weights in two.items():
        torch.testing.assert_close(weights, one[name], rtol=1e-3, atol=1e-4, msg=name)


@BOTH
def test_what_one_process_began_two_go_on_with_to_the_same_losses(folder, kind):
    assert curve(folder / f"{kind}-resumed") == pytest.approx(curve(folder / "muon"), **MUON)


@BOTH
def test_what_two_processes_began_one_goes_on_with_to_the_same_losses(folder, kind):
    assert len(curve(folder / f"{kind}-killed")) == KILLED_AT
    assert curve(folder / f"{kind}-alone") == pytest.approx(curve(folder / "muon"), **MUON)


@BOTH
def test_each_row_of_the_global_batch_is_masked_as_it_is_in_one_process(folder, kind):
    alone = json.loads((folder / "alone.json").read_text())["masks"]
    first, second = (seen["masks"] for seen in seen_by(folder, f"{kind}-adamw-split"))
    assert not first.keys() & second.keys()
    assert first | second == {key: alone[key] for key in first | second} == alone


@BOTH
def test_micro_batches_cost_no_further_averages_of_gradients(folder, kind):
    for whole, split in zip(
        seen_by(folder, f"{kind}-adamw"), seen_by(folder, f"{kind}-adamw-split"), strict=True
    ):
        assert whole["averages"] == split["averages"] > 0


@pytest.mark.parametrize("name", RUNS)
def test_each_step_is_recorded_once(folder, name):
    steps = [line["step"] for line in metrics(folder / name) if "train/loss" in line]
    assert steps == list(range(1, 1 + (KILLED_AT if name.endswith("killed") else 12)))


def test_nothing_but_what_one_process_writes_is_in_the_folder_of_two(folder):
    files = {path.name for path in (folder / "ddp-adamw").iterdir()}
    assert files == {"ckpt.pt", "best.pt", "metrics.jsonl", "run.json"}


def test_only_one_process_speaks(folder):
    text = (folder / "out.txt").read_text()
    assert text.count("corpus kings.txt") + text.count("corpus pairs.jsonl") == len(RUNS)
    assert text.count("in 2 processes (shards)") == len(RUNS) / 2


def same(a, b, compare: Callable) -> bool:
    """Whether two nested states have the same keys, and `compare` says so of each value."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], compare) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y, compare) for x, y in zip(a, b, strict=True))
    return compare(a, b)


@BOTH
def test_a_checkpoint_has_the_form_that_one_process_gives_it(folder, kind):
    def alike(a, b) -> bool:
        return type(a) is type(b) and getattr(a, "shape", ()) == getattr(b, "shape", ())

    two, one = (checkpoint.load(folder / n / "ckpt.pt") for n in (f"{kind}-muon-split", "muon"))
    assert all(same(two[key], one[key], alike) for key in ("model", "ema", "optimizer"))


def test_a_batch_that_the_processes_do_not_divide_ends_in_one_line(tmp_path, text_file):
    words = (*TINY, f"data.path={text_file}", "training.batch_size=7")
    result = subprocess.run(
        [*TORCHRUN, str(ROOT / "train.py"), *words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    (line,) = (ln for ln in result.stderr.splitlines() if ln.startswith("error: "))
    assert "training.batch_size=7 is not divisible by" in line and "2 processes" in line
    assert "exitcode: 2" in result.stderr.replace("exitcode  :", "exitcode:")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_process_by_itself_neither_copies_nor_shards_and_says_so(run, text_file, kind):
    result = run("train.py", *TINY, f"data.path={text_file}", f"system.parallel={kind}")
    assert result.code == 2 and "torchrun" in result.err and "parallel=auto" in result.err


# --- Errors of one process ----------------------------------------------------------------------

CPU = torch.device("cpu")


@pytest.fixture
def announced(monkeypatch):
    """announced(size): this process is the first of `size`, as torchrun says it."""

    def announced(size: int) -> None:
        names = {"RANK": 0, "WORLD_SIZE": size, "LOCAL_RANK": 0, "MASTER_PORT": 0}
        for name, value in (names | {"MASTER_ADDR": "localhost"}).items():
            monkeypatch.setenv(name, str(value))

    return announced


def test_the_first_process_of_a_machine_names_its_gpu_by_number(announced, monkeypatch):
    """PyTorch refuses a device without one in both calls, and `auto` gives the first one none."""
    announced(size=1)
    named = []
    monkeypatch.setattr(torch.cuda, "set_device", named.append)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, device_id, **_: named.append(device_id)
    )
    for device in ("cuda", "cuda:1"):
        parallel.join(torch.device(device), timedelta(seconds=5))
    assert [device.index for device in named] == [0, 0, 1, 1]


def test_an_error_stays_what_it_is_where_all_processes_answer(announced):
    announced(size=1)
    with pytest.raises(RuntimeError, match="^a bug$"), parallel.processes(CPU):
        raise RuntimeError("a bug")
    assert not dist.is_initialized()


def test_a_process_that_waits_in_vain_for_another_says_so(announced):
    announced(size=2)
    lost = pytest.raises(ConnectionError, match="lost each other")
    with lost, parallel.processes(CPU, minutes=0.01):
        pass


def test_a_tensor_of_another_shape_is_not_sharded_like_it():
    with pytest.raises(ValueError, match="in the place of"):
        parallel.shard_like(torch.zeros(2), torch.zeros(1, 2))


if __name__ == "__main__":
    import torch._dynamo  # seconds, which each process would take by itself

    agent = LaunchConfig(
        *(1, 1, 2),  # nodes, at least and at most, and processes
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="two",
    )
    elastic_launch(agent, one_of_two)(Path(sys.argv[1]))
