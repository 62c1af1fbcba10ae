"""The benches of speed and recipe."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT, TINY
from torch.utils.flop_counter import FlopCounterMode

from bench import blocks, recipe, throughput
from model import ModelConfig, Transformer
from nanomdm import checkpoint, devices

WORDS = "words=" + " ".join(word for word in TINY if not word.startswith("sampling"))


@pytest.fixture(autouse=True)
def in_miniature(monkeypatch):
    monkeypatch.setattr(throughput, "TOKENS", 2**14)
    monkeypatch.setattr(throughput, "SQUARE", 256)
    monkeypatch.setattr(devices, "SLEEP", 0.1)


@pytest.fixture
def trained_in_here(monkeypatch):
    """The runs of bench.recipe and bench.blocks, which have processes of their own, in this one."""

    def train(command, **options):
        python, script, *words = command
        settings = {"words": words, "experiment": "", "fields": {}}
        recipe.run(**json.loads(words[-1]) if script == "-c" else settings)
        return SimpleNamespace(returncode=0)

    for bench in (recipe, blocks):
        monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=train))


# --- bench.throughput ---------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_operations_are_those_that_pytorch_counts(share):
    """FlopCounterMode looks at every product of a forward and a backward pass."""
    B, L = 4, 32
    model = Transformer(ModelConfig(40, L, n_layer=3, n_head=2, n_embd=48))
    xt = torch.randint(40, (B, L))
    where = torch.rand(B, L).argsort().argsort() < share * L
    with FlopCounterMode(display=False) as counter:
        model(xt, targets=xt, where=where, capacity=int(share * B * L)).sum().backward()
    assert counter.get_total_flops() == B * L * throughput.flops_per_token(model, share)


def test_a_causal_network_does_half_of_the_attention():
    full, causal = (
        throughput.flops_per_token(Transformer(ModelConfig(40, 32, 3, 2, 48, causal=causal)), 1.0)
        for causal in (False, True)
    )
    assert full - causal == 6 * 3 * 32 * 48


def test_throughput_takes_a_preset_that_names_its_tokenizer(run):
    """The random tokens have one of their own."""
    words = (f"{WORDS} training.grad_accum=1", "presets=[openwebtext]", "steps=1", "rounds=1")
    result = run("bench.throughput", *words, "device=cpu")
    assert result.code == 0, result.err
    assert "| openwebtext, masked head, float32 |" in result.out


def test_throughput_prints_a_row_for_each_head_and_writes_what_it_prints(run, tmp_path):
    result = run(
        *("bench.throughput", WORDS, "heads=[masked,full]", "steps=1", "rounds=3", "device=cpu"),
        "output=speed.json",
    )
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["head"] for row in rows] == ["masked", "full"]
    for row in rows:
        low, high = row["range"]
        assert 0 < low <= row["tokens_per_second"] <= high
        assert 0 < row["mfu"] < 1 and 0 < row["loading_share"] < 1
        assert f"{row['tokens_per_second'] / 1e3:,.1f}k" in result.out


RIVAL = """
import torch
from dataclasses import dataclass

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head = torch.nn.Embedding(config.vocab_size, config.vocab_size)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)

    def forward(self, x, y):
        logits = self.head(x)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


def test_throughput_times_a_rival_in_turn(run, tmp_path):
    (tmp_path / "rival").mkdir()
    (tmp_path / "rival" / "model.py").write_text(RIVAL)
    words = (WORDS, "steps=1", "rounds=2", "device=cpu", "nanogpt=rival")
    result = run("bench.throughput", *words)
    assert result.code == 0, result.err
    assert "times as fast" in result.out


def test_throughput_times_itself_beside_a_busy_process(run, tmp_path):
    words = (WORDS, "steps=2", "rounds=1", "device=cpu", "busy=1", "output=speed.json")
    result = run("bench.throughput", *words)
    assert result.code == 0, result.err
    (row,) = json.loads((tmp_path / "speed.json").read_text())["rows"]
    share = row["share_beside_others"][1]
    assert f"beside 1 busy process(es), in turn: {row['beside_others'] / 1e3:,.1f}k" in result.out
    assert f"{share:.0%} of the speed alone" in result.out and share > 0


def test_throughput_refuses_fewer_processes_than_none(run):
    result = run("bench.throughput", "busy=-1")
    assert (result.code, result.err.count("\n")) == (2, 1) and "busy=-1" in result.err


def test_throughput_says_where_the_rival_is_missing(run):
    result = run("bench.throughput", WORDS, "nanogpt=nowhere", "device=cpu")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "nowhere/model.py" in result.err


# --- bench.sampling -----------------------------------------------------------------------------


def test_sampling_counts_the_calls_of_every_strategy(run, trained, tmp_path):
    words = (f"checkpoint={trained}/ckpt.pt", "batch_sizes=[2]", "steps=4", "device=cpu")
    result = run("bench.sampling", *words, "output=speed.json")
    assert result.code == 0, result.err
    rows = {
        row["strategy"]: row for row in json.loads((tmp_path / "speed.json").read_text())["rows"]
    }
    assert rows["confidence"]["calls"] == 4
    assert rows["first_hitting"]["calls"] == 32  # the context of the tiny model
    assert all(0 < row["network_share"] < 1 for row in rows.values())


def test_sampling_compiles_each_batch_size_by_itself(run, trained, monkeypatch):
    seen = set()

    def stand_in(function):
        return lambda x, *rest: seen.add(tuple(x.shape[:2])) or function(x, *rest)

    monkeypatch.setattr(devices, "compiled", stand_in)
    words = (f"checkpoint={trained}/ckpt.pt", "batch_sizes=[1,2]", "steps=2", "device=cpu")
    result = run("bench.sampling", *words, "strategies=[spread]", "compile=true")
    assert result.code == 0, result.err
    assert seen == {(1, 32), (2, 32)}


# --- bench.recipe -------------------------------------------------------------------------------


def test_recipe_trains_a_run_once_and_draws_its_curve(run, trained_in_here, tmp_path, text_file):
    words = ["variations=[no convolution]", "seeds=[2]", "steps=6", "curve=3", WORDS]
    first = run("bench.recipe", *words, f"path={text_file}")
    assert first.code == 0, first.err
    results = json.loads((tmp_path / "out-recipe" / "results.json").read_text())
    (row,) = results["no convolution"]
    assert row["seed"] == 2 and f"{row['bound']:.4f}" in first.out
    assert (tmp_path / "out-recipe" / "curve.png").stat().st_size > 10_000
    path = tmp_path / "out-recipe" / "no-convolution-2" / "ckpt.pt"
    trained = path.stat().st_mtime_ns
    run("bench.recipe", *words, f"path={text_file}")
    assert path.stat().st_mtime_ns == trained


def test_blocks_are_trained_once_scored_and_drawn(run, trained_in_here, tmp_path, text_file):
    words = ["lengths=[1,4,16]", "seeds=[2]", "steps=3", "tokens=64", WORDS, f"path={text_file}"]
    first = run("bench.blocks", *words)
    assert first.code == 0, first.err
    results = json.loads((tmp_path / "out-blocks" / "results.json").read_text())["results"]
    assert list(results) == ["1", "4", "16", "causal"]
    assert f"| 4 | 3 | {results['4']['runs'][0]['bound']:.4f} |" in first.out
    calls = [[round(each["calls"]) for each in found["scores"]] for found in results.values()]
    assert calls == [[32], [8, 16, 32], [2, 4, 8, 16, 32], []]  # of a text of 32 tokens
    assert results["1"]["scores"][0]["nats"] == pytest.approx(
        results["1"]["runs"][0]["bound"], abs=0.5
    )
    assert (tmp_path / "out-blocks" / "blocks-dark.svg").stat().st_size > 10_000
    path = tmp_path / "out-blocks" / "4-3-2" / "ckpt.pt"
    trained = path.stat().st_mtime_ns
    run("bench.blocks", *words)
    assert path.stat().st_mtime_ns == trained


def test_blocks_take_as_many_steps_as_their_seconds_hold(run, trained_in_here, tmp_path, text_file):
    words = ["lengths=[4]", "seeds=[2]", "tokens=0", WORDS, f"path={text_file}", "control=false"]
    result = run("bench.blocks", *words, "seconds=1")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out-blocks" / "results.json").read_text())["results"]["4"]
    assert found["steps"] > 5 and found["scores"] == []


def test_recipe_varies_what_is_a_field_of_the_network_alone(
    run, trained_in_here, tmp_path, text_file
):
    words = ("variations=[no QK-norm]", "seeds=[2]", "steps=2", WORDS, f"path={text_file}")
    result = run("bench.recipe", *words)
    assert result.code == 0, result.err
    state = checkpoint.load(tmp_path / "out-recipe" / "no-QK-norm-2" / "ckpt.pt")
    assert state["model_config"]["qk_norm"] == 0 and state["step"] == 2


def test_recipe_says_why_a_run_failed(run, text_file):
    result = run("bench.recipe", "words=model.n_head=5", "seeds=[2]", f"path={text_file}")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "recipe, seed 2 failed" in result.err and "model.n_head=5" in result.err


def test_recipe_compares_seed_by_seed():
    """The differences are 0.3 and 0.1: mean 0.2, standard error 0.1."""
    ours = [{"bound": 2.0, "seconds": 3.0}, {"bound": 3.0, "seconds": 3.0}]
    other = [{"bound": 2.3, "seconds": 4.0}, {"bound": 3.1, "seconds": 4.0}]
    line = recipe.line("other", other, ours)
    assert line == "| other | 2.7000 ± 0.4000 | +0.2000 ± 0.1000 | 4 |"


def test_recipe_chooses_on_text_that_is_no_part_of_the_validation_split(tmp_path, text_file):
    written = recipe.write_corpus(str(text_file), str(tmp_path), validation=False)
    assert written.read_text() == TEXT[: int(0.9 * len(TEXT))]


def test_recipe_names_the_variations_that_there_are(run):
    result = run("bench.recipe", "variations=[nothing]")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "weight of the bound" in result.err
