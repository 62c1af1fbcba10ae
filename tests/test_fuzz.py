"""Damaged files: a short form of the fuzzer, and values that hypothesis generates."""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as some
import pytest
import torch
from conftest import load_model
from hypothesis import HealthCheck, given, settings

import data
from nanomdm import bins, checkpoint, cli
from nanomdm.errors import UserError
from tests.stress import fuzz

CPU = torch.device("cpu")
CASES = 4  # for each part of a kind's share; python -m tests.stress.fuzz does ten thousand
hurried = settings(
    deadline=None,
    max_examples=40,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
values = some.recursive(
    some.none()
    | some.booleans()
    | some.integers()
    | some.floats()
    | some.text(some.characters(), max_size=5)
    | some.sampled_from(fuzz.HOSTILE),
    lambda part: some.lists(part, max_size=3) | some.dictionaries(some.text(max_size=3), part),
    max_leaves=5,
)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damage_is_refused_in_one_line_or_does_no_harm(kind):
    config = cli.section({"seed": 1, "first": 0, "limit": 5.0})
    outcomes = fuzz.run_kind(kind, CASES * fuzz.KINDS[kind].share, config)
    bugs = [outcome for outcome in outcomes if outcome.what == "bug"]
    assert bugs == []


def test_the_fuzzer_finds_a_reader_that_trusts(monkeypatch):
    """Its oracle works: without checksums, flipped bytes are silent corruption."""
    monkeypatch.setattr(bins, "digest", lambda meta: meta.get("check", ""))
    monkeypatch.setattr(bins, "SCANNED", 0)  # longer files are not hashed
    config = cli.section({"seed": 1, "first": 0, "limit": 5.0})
    whys = [outcome.why for outcome in fuzz.run_kind("bins bytes", 60, config)]
    assert any("silent corruption" in why for why in whys)


def test_the_fuzzer_counts(run, monkeypatch, tmp_path):
    words = ("kinds=[texts bytes,nanogpt bytes]", "cases=8", f"output={tmp_path}/fuzz.json")
    assert run("tests.stress.fuzz", *words).code == 0
    assert json.loads((tmp_path / "fuzz.json").read_text())["kinds"][0]["cases"] == 4
    monkeypatch.setattr(fuzz.prompts, "read_lines", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # the valid file has to be readable
        run("tests.stress.fuzz", "kinds=[texts bytes]", "cases=2")


def test_the_fuzzer_reports_bugs(tmp_path):
    kind = fuzz.Kind(1, lambda *_: None, lambda folder: 1 / 0)
    outcome = fuzz.outcome_of(kind, tmp_path, "", limit=1.0)
    assert outcome.what == "bug" and "ZeroDivisionError" in outcome.why


def test_the_fuzzer_ends_a_hang(tmp_path):
    kind = fuzz.Kind(1, lambda *_: None, lambda folder: time.sleep(9))
    assert "a hang" in fuzz.outcome_of(kind, tmp_path, "", limit=0.1).why


@hurried
@given(key=some.sampled_from(sorted(bins.META)), value=values)
def test_any_value_in_a_meta_file_is_refused_or_read(key, value):
    with TemporaryDirectory() as folder:
        for split in data.SPLITS:
            Path(folder, f"{split}.bin").write_bytes(b"\0\0" * 9)
        meta = {"dtype": "uint16", "tokenizer": {"kind": "char", "characters": "ab"}} | {key: value}
        Path(folder, "meta.json").write_text(json.dumps(meta))
        try:
            corpus = data.open_bins(Path(folder))
        except ValueError as error:
            assert isinstance(error, UserError)
        else:
            assert corpus.tokenizer.decode(corpus.train[:3].tolist())


@hurried
@given(
    key=some.sampled_from(("vocab_size", "block_size", "n_layer", "n_embd", "causal")), value=values
)
def test_any_value_in_a_checkpoints_shape_is_refused_or_fits(key, value):
    with TemporaryDirectory() as folder:
        path = Path(folder, "ckpt.pt")
        state = fuzz.valid_state()
        state["model_config"] = dict(state["model_config"]) | {key: value}
        checkpoint.save(path, state)
        try:
            model = load_model(path).model
        except ValueError as error:
            assert isinstance(error, UserError)
        else:
            assert model(torch.zeros(1, 1, dtype=torch.long)).isfinite().all()
