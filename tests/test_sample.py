"""sample.py as a user sees it: prompts and blanks, files of prompts, windows, EOS, output."""

import json
import re

import pytest
import torch
from conftest import TEXT, load_model

import diffusion
from nanomdm import checkpoint, devices, prompts, strategies
from nanomdm.texts import windows
from nanomdm.tokenizers import CharTokenizer

CPU = "system.device=cpu"
CONTEXT = 32  # of the tiny model


@pytest.fixture
def texts(run, trained):
    """texts("key=value", ...): the samples that sample.py prints for the tiny model."""

    def texts(*words: str) -> list[str]:
        words = (f"checkpoint={trained}/ckpt.pt", "sampling.steps=6", CPU, *words)
        result = run("sample.py", *words)
        assert result.code == 0, result.err
        parts = re.split(r"--- sample \d+ ---\n", result.out)
        return [part.removesuffix("\n") for part in parts[1:] or parts]

    return texts


@pytest.fixture
def prompt_file(tmp_path):
    """prompt_file("one", "two", ...): the setting that names a file of these lines."""

    def prompt_file(*lines: str) -> str:
        (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
        return f"prompt_file={tmp_path}/prompts.txt"

    return prompt_file


# --- Samples ------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text(texts):
    assert texts("system.seed=3") == texts("system.seed=3")


def test_another_seed_gives_another_text(texts):
    assert texts("system.seed=3") != texts("system.seed=4")


def test_the_samples_of_one_call_differ_and_the_first_is_that_of_a_call_for_one(texts):
    five = texts("num_samples=5")
    assert len(set(five)) == 5 and five[:1] == texts()


def test_one_sample_has_no_title_and_several_are_numbered(run, trained):
    words = ("sample.py", f"checkpoint={trained}/ckpt.pt", "sampling.steps=2", CPU)
    assert "--- sample" not in run(*words).out
    numbered = re.findall("^--- sample (.) ---$", run(*words, "num_samples=3").out, flags=re.M)
    assert numbered == ["1", "2", "3"]


@pytest.mark.parametrize("strategy", ["stochastic", "confidence"])
def test_a_sample_begins_with_its_prompt_and_has_the_length_that_was_asked_for(texts, strategy):
    (text,) = texts("prompt=KING 3:", "sampling.length=20", f"sampling.strategy={strategy}")
    assert text.startswith("KING 3:") and len(text) == 20


def test_a_prompt_of_the_whole_length_is_printed_as_it_is(texts):
    assert texts("prompt=KING 3:", "sampling.length=7") == ["KING 3:"]


def test_samples_come_from_the_averaged_weights(texts, trained, tmp_path):
    state = checkpoint.load(trained / "ckpt.pt")
    state["model"] = {k: torch.zeros_like(v) for k, v in state["model"].items()}
    checkpoint.save(tmp_path / "ckpt.pt", state)
    assert texts(f"checkpoint={tmp_path}/ckpt.pt") == texts()


def test_the_checkpoint_and_what_is_known_of_the_likelihood_are_said_on_stderr(run, trained):
    words = (f"checkpoint={trained}/ckpt.pt", "sampling.strategy=first_hitting", CPU)
    line = run("sample.py", *words, "sampling.steps=6").err
    assert "ckpt.pt: EMA weights after 12 steps, on cpu; first_hitting" in line
    assert "(bound on the likelihood)" in line


# --- Blanks -------------------------------------------------------------------------------------


def test_blanks_are_filled_and_what_is_around_them_stays(texts):
    (text,) = texts("prompt=KING [MASK]:\nThe [MASK*6] and")
    assert re.fullmatch(r"KING .:\nThe .{6} and", text, flags=re.S)


@pytest.mark.parametrize(("prompt", "said"), [("KING", 1), ("KI.G", 0), ("", 0)])
def test_a_blank_that_no_prompt_has_is_said(run, trained, prompt, said):
    words = (f"checkpoint={trained}/ckpt.pt", f"prompt={prompt}", "sampling.steps=2", "blank=.")
    assert run("sample.py", *words).err.count("blank has no effect: no prompt has .") == said


def test_a_blank_may_be_the_whole_prompt(texts):
    assert len(texts("prompt=[MASK*9]")[0]) == 9


def test_a_prompt_without_blanks_is_a_beginning_as_before(texts):
    (text,) = texts("prompt=KING 3:")
    assert text.startswith("KING 3:") and len(text) == CONTEXT


# --- Files of prompts ---------------------------------------------------------------------------


def test_every_line_of_a_prompt_file_is_a_prompt(texts, prompt_file):
    lines = ["KING", "The rose of roses, and", "", "s"]
    found = texts(prompt_file(*lines))
    assert [len(text) for text in found] == [CONTEXT] * 3  # a blank line is none
    assert all(text.startswith(p) for text, p in zip(found, filter(None, lines), strict=True))


def test_every_prompt_gets_as_many_samples_as_asked_for(texts, prompt_file):
    found = texts(prompt_file("KING", "The"), "num_samples=3")
    assert [text[:3] for text in found] == ["KIN"] * 3 + ["The"] * 3 and len(set(found)) == 6


@pytest.mark.parametrize("strategy", ["stochastic", "remask", "eb"])
def test_a_text_of_a_batch_does_not_depend_on_the_others(texts, prompt_file, strategy):
    """At temperature 1, whatever the lengths of the others; the second prompt is row 1 in both."""
    words = ["sampling.temperature=1.0", f"sampling.strategy={strategy}", "sampling.length=24"]
    first = texts(prompt_file("KING 1:", "The rose", "s and 5"), *words)
    other = texts(prompt_file("The sword of swords,", "The rose"), *words)
    assert first[1] == other[1]
    assert first[0] == texts("prompt=KING 1:", *words)[0]


def test_texts_of_different_lengths_come_in_the_order_of_their_prompts(texts, prompt_file):
    lines = ["K[MASK*3]", "Th[MASK*9]", "s[MASK*3]", "K[MASK*20]", "T[MASK*10]"]
    found = texts(prompt_file(*lines))
    assert [(text[0], len(text)) for text in found] == [
        ("K", 4), ("T", 11), ("s", 4), ("K", 21), ("T", 11),
    ]  # fmt: skip


def test_a_blank_is_filled_alone_as_it_is_beside_a_longer_text(texts, prompt_file):
    alone = texts(prompt_file("KING", "The [MASK*9] of"))
    beside = texts(prompt_file("KING[MASK*5]", "The [MASK*9] of", "s[MASK*11]"))
    assert alone[1] == beside[1]


def test_the_batch_size_changes_no_text(texts, monkeypatch):
    together = texts("num_samples=5")
    monkeypatch.setattr(prompts.batches, "__defaults__", (2,))
    assert texts("num_samples=5") == together


# --- Beyond the context -------------------------------------------------------------------------


def test_compiled_calls_give_the_same_texts(texts, monkeypatch):
    words, seen = ("num_samples=3", "sampling.length=40"), []
    expected = texts(*words)

    def stand_in(function):
        return lambda x, *rest: seen.append(tuple(x.shape[:2])) or function(x, *rest)

    monkeypatch.setattr(devices, "compiled", stand_in)
    assert texts(*words, "system.compile=true") == expected and set(seen) == {(3, CONTEXT)}


@pytest.mark.parametrize("strategy", ["stochastic", "first_hitting", "entropy", "remask"])
def test_a_text_may_be_longer_than_the_context(texts, strategy):
    (text,) = texts("prompt=KING", "sampling.length=90", f"sampling.strategy={strategy}")
    assert text.startswith("KING") and len(text) == 90


def test_a_long_text_begins_like_a_short_one(texts):
    assert texts("sampling.length=90")[0].startswith(texts()[0])


def test_a_prompt_may_be_longer_than_the_context_of_a_longer_text(texts):
    (text,) = texts(f"prompt={TEXT[:70]}", "sampling.length=80")
    assert text.startswith(TEXT[:70]) and len(text) == 80


def test_a_prompt_with_blanks_may_be_longer_than_the_context(texts):
    (text,) = texts(f"prompt={TEXT[:50]}[MASK*8]{TEXT[58:90]}")
    assert (text[:50], text[58:]) == (TEXT[:50], TEXT[58:90])


# --- EOS ----------------------------------------------------------------------------------------


@pytest.fixture
def newline_ends(monkeypatch):
    """The tokenizer of the tiny model, as if a newline were its EOS."""
    characters = "".join(sorted(set(TEXT)))
    eos = property(lambda self: characters.index("\n"), lambda self, value: None)
    monkeypatch.setattr(CharTokenizer, "eos", eos)


def test_eos_ends_a_text(texts, newline_ends, monkeypatch):
    short = texts("num_samples=20", "sampling.length=60")
    monkeypatch.setattr(CharTokenizer, "eos", property(lambda self: None, lambda self, value: None))
    long = texts("num_samples=20", "sampling.length=60")
    assert any(len(text) < 32 for text in short)
    for ended, whole in zip(short, long, strict=True):
        assert "\n" not in ended and whole.startswith(ended)


def test_eos_in_the_prompt_ends_nothing(texts, newline_ends):
    (text,) = texts("prompt=KING\nKING[MASK*3]\nThe [MASK*4] of")
    assert re.fullmatch(r"KING\nKING.{3}\nThe .{4} of", text, flags=re.S)


def test_texts_that_have_ended_cost_no_more_calls(texts, newline_ends, tmp_path):
    texts("prompt=KING", "sampling.length=2000", f"output={tmp_path}/o.jsonl")
    record = json.loads((tmp_path / "o.jsonl").read_text())
    assert len(record["tokens"]) < 1000 and record["calls"] < 6 * len(record["tokens"])


# --- The output file ----------------------------------------------------------------------------


def test_the_output_holds_one_object_a_sample(texts, prompt_file, tmp_path):
    printed = texts(
        prompt_file("KING", "The [MASK*7]"), "num_samples=2", "sampling.strategy=confidence",
        f"output={tmp_path}/deep/o.jsonl", "system.seed=5",
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "deep/o.jsonl").read_text().splitlines()]
    assert [record["text"] for record in records] == printed
    tokenizer = CharTokenizer("".join(sorted(set(TEXT))))
    for number, record in enumerate(records, start=1):
        assert record["sample"] == number and record["prompt"] in ("KING", "The [MASK*7]")
        assert tokenizer.decode(record["tokens"]) == record["text"]
        assert (record["seed"], record["strategy"]) == (5, "confidence")
        assert (
            record["label"] == "exact likelihood" and record["calls"] == 6 and record["seconds"] > 0
        )


def test_the_output_has_the_cost_of_a_sample_where_it_is_exact(texts, trained, tmp_path):
    """The same as diffusion.score says of its tokens, over the windows of a long text."""
    words = (f"output={tmp_path}/o.jsonl", "sampling.length=40", "sampling.steps=4")
    texts("sampling.strategy=margin", *words)
    record = json.loads((tmp_path / "o.jsonl").read_text())
    loaded = load_model(trained / "ckpt.pt")
    ids, cost = torch.tensor([record["tokens"]]), 0.0
    for start, stop, first in windows(40, CONTEXT):
        cost += diffusion.score(
            loaded.model,
            ids[:, start:stop],
            is_masked=torch.arange(start, stop)[None] >= first,
            mask_id=loaded.model.config.mask_id,
            strategy=strategies.margin,
            steps=4,
        ).item()
    assert record["nats"] == pytest.approx(cost, rel=1e-4)
    texts("sampling.strategy=spread", *words)
    assert json.loads((tmp_path / "o.jsonl").read_text())["nats"] is None


def test_equal_samples_at_temperature_0_are_said(run, trained):
    words = (f"checkpoint={trained}/ckpt.pt", "sampling.temperature=0", CPU, "num_samples=3")
    equal = run("sample.py", *words, "sampling.strategy=margin")
    assert "only 1 of 3 samples are distinct: at temperature 0" in equal.err
    assert "distinct" not in run("sample.py", *words, "num_samples=1").err


def test_an_earlier_output_is_kept(texts, tmp_path):
    (tmp_path / "o.jsonl").write_text("precious")
    texts(f"output={tmp_path}/o.jsonl")
    assert (tmp_path / "o-1.jsonl").read_text() == "precious"


def test_canvases_of_one_length_share_a_batch_whatever_their_prompts(texts, prompt_file, tmp_path):
    words = ("sampling.strategy=first_hitting", f"output={tmp_path}/o.jsonl")
    texts(prompt_file("KING", "The rose of roses", "s"), *words)
    calls = [json.loads(line)["calls"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert calls == [CONTEXT - 1] * 3  # those of the row with the most masks
