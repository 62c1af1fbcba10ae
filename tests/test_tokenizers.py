"""Tokenizers: what they give back, their numbers, and what is refused of untrusted ones."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanomdm.errors import UserError
from nanomdm.tokenizers import (
    TOKENIZERS,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    HFTokenizer,
    IdTokenizer,
    choices,
    load_tokenizer,
    train_tokenizer,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
DATA = Path(os.environ.get("NANOMDM_DATA", SHARED))
SHAKESPEARE = DATA / "tinyshakespeare" / "input.txt"
GPT2 = {  # the names under which tiktoken looks for its tables
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}
needs_shakespeare = pytest.mark.skipif(
    not SHAKESPEARE.is_file(), reason="no tiny Shakespeare: set NANOMDM_DATA to a folder of it"
)
POEM = "The owl and the pussycat went to sea in a beautiful pea-green boat.\n" * 20
anything = given(st.text(max_size=40))
few = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    pytest.importorskip("tokenizers")
    return BPETokenizer.train(POEM, len(POEM), 280)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    pytest.importorskip("tiktoken")
    if not (DATA / "gpt2-bpe").is_dir():
        pytest.skip("no GPT-2 tables: set NANOMDM_DATA to a folder of them")
    folder = tmp_path_factory.mktemp("tiktoken")  # a copy: tiktoken deletes what it distrusts
    for name, cached in GPT2.items():
        shutil.copyfile(DATA / "gpt2-bpe" / name, folder / cached)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
        yield GPT2Tokenizer()


@few
@anything
def test_bytes_give_any_text_back(text):
    assert ByteTokenizer().decode(ByteTokenizer().encode(text).tolist()) == text


@few
@anything
def test_a_bpe_gives_any_text_back(bpe, text):
    assert bpe.decode(bpe.encode(text).tolist()) == text


@few
@anything
def test_the_bytes_of_a_bpe_are_those_of_the_text(bpe, text):
    assert bpe.decode_bytes(bpe.encode(text).tolist()) == text.encode()


@few
@given(st.text(alphabet="añ\n€😀", max_size=40))
def test_characters_give_a_text_of_known_ones_back(text):
    tokenizer = CharTokenizer("\nañ€😀")
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_gpt2_gives_a_text_with_its_special_words_back(gpt2):
    text = "Ünï <|endoftext|> 😀\r\n"
    assert gpt2.decode(gpt2.encode(text).tolist()) == text


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "gpt2"])
def test_what_encode_returns_decodes_as_it_is(kind, request):
    if kind in ("bpe", "gpt2"):
        tokenizer = request.getfixturevalue(kind)
    else:
        tokenizer = {"char": CharTokenizer(" Thelow"), "byte": ByteTokenizer()}[kind]
    assert tokenizer.decode(tokenizer.encode("The owl")) == "The owl"


@pytest.mark.parametrize("tokenizer", [CharTokenizer("añ"), ByteTokenizer()], ids=["char", "byte"])
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer):
    assert tokenizer.decode_bytes(tokenizer.encode("ñañ").tolist()) == b"\xc3\xb1a\xc3\xb1"


def test_characters_are_numbered_by_their_place():
    assert CharTokenizer("abc").encode("cab").tolist() == [2, 0, 1]


def test_bytes_are_numbered_by_their_value():
    assert ByteTokenizer().encode("é").tolist() == [0xC3, 0xA9]


def test_gpt2_numbers_tokens_as_gpt2_does(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995]


def test_no_text_becomes_gpt2s_special_token(gpt2):
    assert 50256 not in gpt2.encode("<|endoftext|>")


def test_half_a_character_is_its_bytes(bpe):
    half = bpe.encode("\N{SNOWMAN}").tolist()[:1]
    assert (ByteTokenizer().decode_bytes([0xE2]), bpe.decode_bytes(half)) == (b"\xe2", b"\xe2")


def test_half_a_character_reads_as_a_replacement_character(bpe):
    half = bpe.encode("\N{SNOWMAN}").tolist()[:1]
    assert (ByteTokenizer().decode([0xE2]), bpe.decode(half)) == ("\ufffd", "\ufffd")


def test_an_unknown_character_is_refused_with_its_place_and_a_remedy():
    message = r"no character 'ü' \(position 2\), only the 3 of .* data\.tokenizer=byte"
    with pytest.raises(ValueError, match=message):
        CharTokenizer("abc").encode("abüc")


def test_ids_are_int64(bpe):
    tokenizers = (CharTokenizer("ab"), ByteTokenizer(), bpe)
    assert [t.encode("ab").dtype for t in tokenizers] == [np.int64] * 3


def test_no_text_is_no_tokens(bpe):
    tokenizers = (CharTokenizer("ab"), ByteTokenizer(), bpe)
    assert [t.encode("").shape for t in tokenizers] == [(0,)] * 3


def test_a_vocabulary_of_characters_has_one_symbol_each():
    assert CharTokenizer("añ€").vocab_size == 3


def test_a_vocabulary_of_bytes_has_256_symbols():
    assert ByteTokenizer().vocab_size == 256


def test_a_bpe_has_the_vocabulary_asked_for(bpe):
    assert bpe.vocab_size == 280


def test_gpt2_has_50257_tokens(gpt2):
    assert gpt2.vocab_size == 50257


def test_a_bpe_writes_its_training_text_with_fewer_tokens_than_bytes(bpe):
    assert len(bpe.encode(POEM)) < 0.6 * len(POEM)


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "gpt2"])
def test_a_tokenizer_comes_back_from_its_state_written_as_json(kind, request):
    if kind in ("bpe", "gpt2"):
        tokenizer = request.getfixturevalue(kind)
    else:
        tokenizer = {"char": CharTokenizer("\nTa ehlow"), "byte": ByteTokenizer()}[kind]
    again = load_tokenizer(json.loads(json.dumps(tokenizer.state())))
    assert again.encode("The\nowl").tolist() == tokenizer.encode("The\nowl").tolist()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"kind": "word"},
        {"kind": "char"},
        {"kind": "byte", "size": 3},
        {"kind": "char", "characters": 5},
        {"kind": "bpe", "serialized": "{"},
        "byte",
    ],
    ids=str,
)
def test_a_state_that_is_no_tokenizers_is_refused(state):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="no tokenizer of this project"):
        load_tokenizer(state)


@pytest.mark.parametrize(("kind", "package"), [("gpt2", "tiktoken"), ("bpe", "tokenizers")])
def test_a_missing_package_is_named_with_its_install_command(kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # so that importing it fails
    with pytest.raises(ValueError, match=f"pip install {package}$"):
        train_tokenizer(kind, POEM, len(POEM), 300)


def test_tables_that_tiktoken_cannot_fetch_are_an_error_with_a_remedy(monkeypatch):
    def get_encoding(name: str):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding=get_encoding))
    with pytest.raises(ValueError, match=r"ConnectionError.*TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer()


@needs_shakespeare
def test_tiny_shakespeare_has_nanogpts_counts_of_gpt2_tokens(gpt2):
    text = SHAKESPEARE.read_bytes().decode()
    split = int(0.9 * len(text))
    assert [len(gpt2.encode(part)) for part in (text[:split], text[split:])] == [301_966, 36_059]


# --- Damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("characters", ["", "aba", "a\ud800", 5, None, ["a", "a"]])
def test_an_alphabet_that_is_none_is_refused(characters):
    with pytest.raises(UserError):
        load_tokenizer({"kind": "char", "characters": characters})


def test_an_alphabet_with_duplicates_is_named_as_one():
    with pytest.raises(UserError, match="the alphabet is empty or has duplicates"):
        CharTokenizer("aba")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("model", "continuing_subword_prefix", "longer than any token"),
        ("model", "type", "WordPiece"),
        ("pre_tokenizer", "add_prefix_space", True),
        ("pre_tokenizer", "type", "Split"),
        ("model", "vocab", {"a": 4_000_000_000}),
        ("model", "vocab", {"a": 0, "b": 0}),
        ("model", "vocab", {}),
    ],
)
def test_a_bpe_that_could_crash_hang_or_count_without_limit_is_refused(bpe, part, key, value):
    spec = json.loads(bpe.state()["serialized"])
    spec[part][key] = value
    with pytest.raises(ValueError, match="byte-level BPE|the ids of its . tokens to be 0, 1, 2"):
        load_tokenizer({"kind": "bpe", "serialized": json.dumps(spec)})


@pytest.mark.parametrize("change", [{"mask": 281}, {"vocab_size": "280"}, {"eos": -1}], ids=str)
def test_numbers_that_are_no_ids_of_an_imported_tokenizer_are_refused(bpe, change):
    arguments = {"serialized": bpe.serialized, "vocab_size": 280, "mask": 280, "eos": None}
    assert HFTokenizer(**arguments).vocab_size == 280
    with pytest.raises(UserError, match="mask and eos to be integers from 0 to vocab_size"):
        HFTokenizer(**(arguments | change))


def test_a_bpe_with_a_regular_expression_from_outside_is_refused(bpe):
    spec = json.loads(bpe.state()["serialized"])
    spec["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""}
    with pytest.raises(ValueError, match="expected a plain byte-level BPE"):
        load_tokenizer({"kind": "bpe", "serialized": json.dumps(spec)})


@pytest.mark.parametrize(
    ("key", "value"), [("type", "WordPiece"), ("continuing_subword_prefix", "longer than a token")]
)
def test_an_imported_tokenizer_that_would_end_the_process_is_refused(bpe, key, value):
    spec = json.loads(bpe.serialized)
    spec["model"][key] = value
    with pytest.raises(UserError, match="expected a BPE without continuing_subword_prefix"):
        HFTokenizer(json.dumps(spec), 280, 280)


def test_a_bpe_of_256_tokens_has_one_for_each_byte():
    pytest.importorskip("tokenizers")
    assert train_tokenizer("bpe", "ab" * 20, 40, 256).vocab_size == 256
    with pytest.raises(UserError, match="vocab_size=255 must be at least 256"):
        train_tokenizer("bpe", "ab" * 20, 40, 255)


def test_a_bpe_whose_tokens_stand_for_no_bytes_is_refused(bpe):
    spec = json.loads(bpe.state()["serialized"])
    spec["model"]["vocab"]["\N{SNOWMAN}"] = len(spec["model"]["vocab"])
    with pytest.raises(UserError, match="its tokens hold characters that stand for no byte"):
        load_tokenizer({"kind": "bpe", "serialized": json.dumps(spec)})


def test_what_only_imported_weights_bring_is_no_choice():
    assert "hf" in TOKENIZERS and "hf" not in choices()


# --- Ids without text -----------------------------------------------------------------------------


def test_ids_are_written_as_numbers():
    ids = IdTokenizer(1500)
    assert ids.encode(" 7  1499\n0").tolist() == [7, 1499, 0]
    assert ids.decode([7, 1499, 0]) == "7 1499 0 "
    assert not ids.has_text and ids.vocab_size == 1500
    assert load_tokenizer(ids.state()).encode("3 ").tolist() == [3]


@pytest.mark.parametrize("text", ["1500", "-1", "x", "1.5", "7 x"])
def test_what_is_no_id_is_refused_with_the_limit(text):
    with pytest.raises(UserError, match=f"'{text.split()[-1]}' is no id from 0 to 1499"):
        IdTokenizer(1500).encode(text)


@pytest.mark.parametrize("vocab_size", [0, -3, 2.5, "9"])
def test_ids_need_a_vocabulary(vocab_size):
    with pytest.raises(UserError, match=f"data.vocab_size={vocab_size} must be positive"):
        IdTokenizer(vocab_size)


@pytest.fixture(scope="module")
def spaced() -> BPETokenizer:
    """Blanks and line ends have tokens in common."""
    pytest.importorskip("tokenizers")
    text = "owl  \n\nsea. \n\nowl\n\n\nsea.\t\n\n" * 50
    bpe = BPETokenizer.train(text, len(text), 290)
    assert len(bpe.encode("  \n")) == len(bpe.encode(" \n")) == 1
    return bpe


@few
@given(st.lists(st.sampled_from(["\n", " ", "  \n", "owl", "sea.", "\n\n", "\t", "é"])))
def test_a_bpe_gives_a_text_line_by_line_the_ids_of_the_whole(spaced, pieces):
    text = "".join(pieces)
    assert spaced.encode(text).tolist() == spaced.tokenizer.encode(text).ids
