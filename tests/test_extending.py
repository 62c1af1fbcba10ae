"""Entries added from outside, used by their names: those of docs/extending.md, and odder ones."""

import io
import json
import re
import tokenize
from collections import Counter
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, load_model
from problems import LOOP, arbitrary_network, chain, cost_over_orders, seeded, z_score

import diffusion
import train as train_script
from nanomdm import checkpoint, strategies
from nanomdm.bounds import BOUNDS, Bound
from nanomdm.optim import OPTIMIZERS, SCHEDULES, Optimizers, build_optimizer
from nanomdm.strategies import LIKELIHOODS, STRATEGIES
from nanomdm.tokenizers import TOKENIZERS, Tokenizer, choices, train_tokenizer

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = dict(re.findall(r"^## An? (\w+)\n.*?^```python\n(.*?)^```", PAGE, flags=re.S | re.M))
CPU = ("system.device=cpu", "system.dtype=float32")


@pytest.fixture(autouse=True)
def as_they_were():
    """Entries are gone after a test."""
    with mock.patch.multiple(train_script, evaluate=train_script.evaluate):
        tables = (STRATEGIES, LIKELIHOODS, BOUNDS, TOKENIZERS, OPTIMIZERS, SCHEDULES)
        before = [dict(table) for table in tables]
        yield
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


def shown(name: str) -> dict:
    """Run a block of the page; returns its names."""
    names = {"__name__": "shown"}
    exec(compile(BLOCKS[name], f"{name} of extending.md", "exec"), names)
    return names


def lines_of_code(code: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
    return len({token.start[0] for token in tokens if token.type not in layout})


@pytest.mark.parametrize("name", ["strategy", "bound", "tokenizer", "optimizer", "schedule"])
def test_an_entry_takes_less_than_fifteen_lines(name):
    assert lines_of_code(BLOCKS[name]) < 15


# --- A strategy ---------------------------------------------------------------------------------


def test_a_strategy_fills_texts_by_its_name_and_with_its_options(run, trained, tmp_path):
    shown("strategy")
    words = ("sampling.strategy=inwards", "sampling.options={pull: 3}", "output=o.jsonl", *CPU)
    result = run("sample.py", f"checkpoint={trained}/ckpt.pt", "sampling.steps=6", *words)
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "o.jsonl").read_text())
    assert (record["strategy"], record["label"]) == ("inwards", strategies.EXACT)
    wrong = run("sample.py", f"checkpoint={trained}/ckpt.pt", "sampling.strategy=mine", *CPU)
    assert wrong.code == 2 and "eb, inwards" in wrong.err


def test_a_strategy_scores_a_text_by_its_name(run, trained):
    shown("strategy")
    words = ("eval.samplers=[inwards]", "sampling.options={pull: 3}", "eval.draws=2", *CPU)
    words += (f"checkpoint={trained}/ckpt.pt", "eval.tokens=64", "sampling.steps=4")
    exact = run("eval.py", *words).out
    assert re.search(r"^inwards +[\d.]+ .* 4 .*  exact likelihood$", exact, flags=re.M)
    del LIKELIHOODS["inwards"]
    bound = run("eval.py", *words).out
    assert re.search(r"^inwards +[\d.]+ ± 0.0000 .*  likelihood not stated$", bound, flags=re.M)


def test_a_strategy_gives_the_samples_of_a_training_run(run, text_file):
    shown("strategy")
    words = (*TINY, f"data.path={text_file}", "sampling.strategy=inwards", "training.max_iters=1")
    assert "--- sample after 1 steps" in run("train.py", *words).out


def test_the_strategy_of_the_page_goes_from_the_ends_inwards():
    inwards, history = partial(shown("strategy")["inwards"], pull=100.0), []
    canvas, is_masked = LOOP.blank(3)
    diffusion.sample(
        arbitrary_network(LOOP),
        canvas,
        is_masked=is_masked,
        mask_id=LOOP.V,
        strategy=inwards,
        steps=2,
        history=history,
    )
    first, second = (event.revealed[0].tolist() for event in history)
    assert (first, second) == ([True, False, False, True], [False, True, True, False])


def test_the_example_of_the_sampling_page_runs_and_its_two_costs_are_one():
    page = (ROOT / "docs" / "sampling.md").read_text()
    block = re.search(r"## As a library\n\n```python\n(.*?)```", page, flags=re.S)[1]
    canvas, is_masked = LOOP.blank(3)
    names = {"canvas": canvas, "is_masked": is_masked, "mask_id": LOOP.V, "generator": seeded(0)}
    names["model"] = arbitrary_network(LOOP)
    exec(compile(block, "sampling.md", "exec"), names)
    torch.testing.assert_close(names["same"], names["nats"])
    assert len(names["history"]) >= 1


def test_the_example_of_the_page_about_blocks_runs():
    page = (ROOT / "docs" / "blocks.md").read_text()
    names = {}
    exec(compile(re.search(r"```python\n(.*?)```", page, re.S)[1], "blocks.md", "exec"), names)
    assert names["filled"].ids.shape == (2, 128)
    assert 3 < names["loss"].item() < 6 and 3 < names["value"] < 6


# --- A bound ------------------------------------------------------------------------------------


def test_the_bound_of_the_page_is_listed_beside_the_others(run, trained, tmp_path):
    shown("bound")
    words = ("eval.bounds=[halves,discrete]", "eval.draws=2", "output=o.json", *CPU)
    result = run("eval.py", f"checkpoint={trained}/ckpt.pt", *words)
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "o.json").read_text())["bounds"]
    assert [(row["name"], row["calls"]) for row in rows[1:2]] == [("halves", 2)]
    assert re.search(r"^halves +\d.* reveals a random half, then the rest$", result.out, re.M)


def test_the_bound_of_the_page_is_the_chain_rule_for_two_tokens():
    halves, pair = shown("bound")["halves"], chain(0.1)
    model = arbitrary_network(pair)
    nll = partial(diffusion.nll_from_logits, model)
    options = {"mask_id": pair.V, "generator": seeded(0), "draws": 500}
    nats, *_ = diffusion.estimate(halves, nll, pair.data, **options)
    for i, row in enumerate(pair.data.tolist()):
        assert z_score(nats[:, i], cost_over_orders(model, row, pair.V)) < 4


def test_a_bound_that_is_exact_takes_one_pass(run, trained, tmp_path):
    def at_once(u, noise):
        """All tokens from nothing: what `discrete` is with one step."""
        hidden = noise < 1
        yield hidden, hidden, torch.ones(len(u))

    BOUNDS["mine"] = Bound(at_once, "reveals all in one call", relation="above", exact=True)
    words = ("eval.bounds=[uniform,mine,discrete]", "sampling.steps=1", "eval.draws=2", *CPU)
    result = run("eval.py", f"checkpoint={trained}/ckpt.pt", *words, "output=o.json")
    assert result.code == 0, result.err
    _, mine, discrete = json.loads((tmp_path / "o.json").read_text())["bounds"]
    assert (mine["name"], mine["draws"], mine["calls"]) == ("mine", 1, 1)
    assert mine["value"] == pytest.approx(discrete["value"], abs=1e-5)
    unknown = run("eval.py", f"checkpoint={trained}/ckpt.pt", "eval.bounds=[yours]", *CPU)
    assert unknown.code == 2 and "left_to_right, mine" in unknown.err


# --- A tokenizer --------------------------------------------------------------------------------


class Words(Tokenizer):
    """One token a word with the space before it, as many as data.vocab_size; the rest is `?`."""

    kind, arguments = "words", ("words",)

    def __init__(self, words: list):
        self.words, self.vocab_size = words, len(words)

    @classmethod
    def train(cls, text: str, split: int, vocab_size: int) -> "Words":
        counts = Counter(re.findall(r"\s?\S*", text[:split]))
        return cls(["?", *(word for word, _ in counts.most_common(vocab_size - 1))])

    def encode(self, text: str) -> np.ndarray:
        ids = {word: i for i, word in enumerate(self.words)}
        return np.array([ids.get(word, 0) for word in re.findall(r"\s?\S*", text)], np.int64)

    def decode_bytes(self, ids) -> bytes:
        return "".join(self.words[i] for i in ids).encode()


def test_a_tokenizer_is_among_the_choices():
    TOKENIZERS["words"] = Words
    assert choices() == ["char", "byte", "ids", "gpt2", "bpe", "words"]
    with pytest.raises(ValueError, match="choose one of char, byte, ids, gpt2, bpe, words$"):
        train_tokenizer("word", "a word", 9, 9)


@pytest.mark.parametrize(("kind", "size"), [("latin1", 256), ("words", 20)])
def test_a_tokenizer_trains_resumes_samples_and_evaluates(kind, size, run, text_file):
    """One that learns from the text, with a state of its own, and that of the page."""
    TOKENIZERS["words"] = Words
    shown("tokenizer")
    data = (f"data.path={text_file}", f"data.tokenizer={kind}", "data.vocab_size=20")
    assert run("train.py", *TINY, *data).code == 0
    tokenizer = load_model("out/ckpt.pt").tokenizer
    assert tokenizer.vocab_size == size and type(tokenizer) is TOKENIZERS[kind]
    assert run("train.py", "training.resume=true", "training.max_iters=13").code == 0
    sampled = run("sample.py", "prompt= of", "sampling.steps=2", *CPU)
    assert sampled.code == 0 and sampled.out.startswith(" of")
    assert run("eval.py", "eval.draws=1", *CPU).code == 0


def test_the_tokenizer_of_the_page_gives_back_its_texts():
    shown("tokenizer")
    tokenizer = TOKENIZERS["latin1"]()
    assert tokenizer.decode(tokenizer.encode("à la carte")) == "à la carte"
    assert tokenizer.decode_bytes(tokenizer.encode("é")) == "é".encode()


# --- An optimizer and a schedule ----------------------------------------------------------------


class Counting(torch.optim.Optimizer):
    """A state as no other optimizer has it: numbers, and tensors of other shapes and types."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"calls": 0, "rows": p.new_zeros(len(p)), "seen": torch.tensor(0)}
                state["calls"] += 1
                state["seen"] += 2
                state["rows"] += p.grad.flatten(1).sum(1) if p.ndim > 1 else p.grad
                scale = group["lr"] / (state["calls"] + state["seen"])
                p -= scale * (p.grad + state["rows"].view(-1, *[1] * (p.ndim - 1)))


def sgd(parameters: dict, learning_rate: float, weight_decay: float) -> list:
    return [torch.optim.SGD(parameters.values(), learning_rate, 0.9, weight_decay=weight_decay)]


def counting(parameters: dict, learning_rate: float, weight_decay: float) -> list:
    return [Counting(parameters.values(), learning_rate)]


@pytest.mark.parametrize("name", ["lion", "sgd", "counting"])
def test_an_optimizer_and_a_schedule_train_and_resume_bit_for_bit(
    name, run, text_file, monkeypatch
):
    def dies(self, skip):
        calls.append(skip)
        if len(calls) == 9:
            raise MemoryError
        step(self, skip)

    calls, step = [], Optimizers.step
    shown("optimizer")
    shown("schedule")
    OPTIMIZERS.update(sgd=sgd, counting=counting)
    words = ["train.py", *TINY, f"data.path={text_file}", "training.learning_rate=0.01"]
    words += [f"training.optimizer={name}", "training.lr_schedule=late"]
    assert run(*words, "out_dir=whole").code == 0
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Optimizers, "step", dies)
        run(*words)
    assert run(*words, "training.resume=true").code == 0
    whole, resumed = (checkpoint.load(f"{folder}/ckpt.pt") for folder in ("whole", "out"))
    assert resumed["config"]["training"]["lr_schedule"] == "late"
    pairs = zip(*(map(checkpoint.tensors, (whole, resumed))), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_schedule_of_the_page_falls_in_the_last_fifth():
    shown("schedule")
    rates = [SCHEDULES["late"](done) for done in (0, 0.5, 0.8, 0.9, 1)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0])


def test_an_optimizer_is_among_the_choices():
    OPTIMIZERS["mine"] = sgd
    with pytest.raises(ValueError, match="muon, adamw.* mine"):
        build_optimizer(torch.nn.Linear(2, 2), "sgd", 0.1, 0.1)


# --- A metric and a network ---------------------------------------------------------------------


def test_the_metric_of_the_page_is_recorded_with_every_evaluation(run, text_file, tmp_path):
    shown("metric")
    assert run("train.py", *TINY, f"data.path={text_file}").code == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    norms = [line["eval/weight_norm"] for line in map(json.loads, lines) if len(line) == 2]
    weights = load_model("out/ckpt.pt").model.parameters()
    assert len(norms) == 2
    assert norms[-1] == pytest.approx(sum(float(p.detach().square().sum()) for p in weights) ** 0.5)


def test_the_network_of_the_page_has_a_loss_a_bound_samples_and_a_checkpoint(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = shown("network")
    assert names["value"] + 4 * names["error"] < 0.75 * np.log(256)
    for name, weight in names["loaded"].model.state_dict().items():
        assert torch.equal(weight, names["model"].state_dict()[name])
    assert names["filled"].ids.max() < 256
    assert capsys.readouterr().out.startswith("at most ")
