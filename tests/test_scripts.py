"""What sample.py and eval.py print, seen as a user sees it."""

import math
import re

import pytest
import torch
from conftest import TEXT, TINY

from nanomdm import checkpoint

CPU = "system.device=cpu"


@pytest.fixture
def sampled(run, trained):
    """sampled("key=value", ...): what sample.py prints for the tiny model."""

    def sampled(*words: str) -> str:
        result = run("sample.py", f"checkpoint={trained}/ckpt.pt", "sampling.steps=6", CPU, *words)
        assert result.code == 0, result.err
        return result.out

    return sampled


@pytest.fixture
def evaluated(run, trained):
    """evaluated("key=value", ...): what eval.py prints for the tiny model."""

    def evaluated(*words: str) -> str:
        result = run("eval.py", f"checkpoint={trained}/ckpt.pt", CPU, *words)
        assert result.code == 0, result.err
        return result.out

    return evaluated


def loss_of(output: str) -> float:
    return float(re.search(r"^loss (\S+)", output, flags=re.M)[1])


def test_the_same_seed_gives_the_same_text(sampled):
    assert sampled("system.seed=3") == sampled("system.seed=3")


def test_another_seed_gives_another_text(sampled):
    assert sampled("system.seed=3") != sampled("system.seed=4")


def test_the_first_of_five_samples_is_the_one_of_one(sampled):
    first = sampled("num_samples=5").split("--- sample 2 ---\n")[0]
    assert first == "--- sample 1 ---\n" + sampled()


def test_the_samples_of_one_call_differ(sampled):
    texts = re.split(r"--- sample \d ---\n", sampled("num_samples=5"))[1:]
    assert len(set(texts)) == 5


@pytest.mark.parametrize("strategy", ["stochastic", "confidence"])
def test_a_sample_begins_with_its_prompt_and_has_the_length_that_was_asked_for(sampled, strategy):
    text = sampled("prompt=KING 3:", "sampling.length=20", f"sampling.strategy={strategy}")
    assert text.startswith("KING 3:") and len(text.removesuffix("\n")) == 20


def test_a_prompt_of_the_whole_length_is_printed_as_it_is(sampled):
    assert sampled("prompt=KING 3:", "sampling.length=7") == "KING 3:\n"


def test_samples_come_from_the_averaged_weights(sampled, run, trained, tmp_path):
    state = checkpoint.load(trained / "ckpt.pt")
    state["model"] = {k: torch.zeros_like(v) for k, v in state["model"].items()}
    checkpoint.save(tmp_path / "ckpt.pt", state)
    assert sampled(f"checkpoint={tmp_path}/ckpt.pt") == sampled()


def test_the_bound_is_that_of_the_whole_validation_split(evaluated):
    split = TEXT[int(0.9 * len(TEXT)) :]
    assert f"kings.txt: {len(split):,} tokens" in evaluated()


def test_perplexity_and_bits_per_byte_follow_from_the_loss(evaluated, tmp_path):
    (tmp_path / "other.txt").write_text(TEXT[:500])
    output = evaluated("data.path=other.txt", "eval.draws=2")
    loss = loss_of(output)
    perplexity = float(re.search(r"^perplexity (\S+)", output, flags=re.M)[1])
    bits = float(re.search(r"^bits (\S+) ± \S+ per byte", output, flags=re.M)[1])
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3)
    assert bits == pytest.approx(loss / math.log(2), rel=1e-3)  # one byte a character here


def test_bits_are_per_byte_where_a_character_has_two(run, tmp_path):
    """Every é is two bytes: the same nats are spread over twice the bytes."""
    (tmp_path / "accents.txt").write_text("éèêë" * 200)
    assert run("train.py", *TINY, "data.path=accents.txt").code == 0
    output = run("eval.py", CPU).out
    bits = float(re.search(r"^bits (\S+)", output, flags=re.M)[1])
    assert bits == pytest.approx(loss_of(output) / math.log(2) / 2, rel=1e-3)


def test_the_bound_does_not_depend_on_the_batch_size(evaluated):
    one, many = evaluated("eval.batch_size=1"), evaluated("eval.batch_size=50")
    assert loss_of(one) == pytest.approx(loss_of(many), abs=1e-4)


def test_an_evaluation_repeats_to_the_last_digit(evaluated):
    first, second = evaluated().splitlines(), evaluated().splitlines()
    assert first[:-1] == second[:-1]  # the last line is the time
