"""data.py: .bin files and batches; what is read from outside is never trusted."""

import hashlib
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_tokenizers import POEM, SHAKESPEARE, needs_shakespeare

import data
from data import Corpus, open_bins
from nanomdm import bins
from nanomdm import text as texts
from nanomdm.tokenizers import TOKENIZERS, ByteTokenizer, CharTokenizer, Tokenizer

# --- Preparation --------------------------------------------------------------------------------


def prepare(cache: Path, text: str = POEM, kind: str = "char", vocab_size: int = 300) -> Corpus:
    return data.prepare(content(text), kind, vocab_size, cache)


def content(text: str) -> texts.Content:
    return texts.Content("poem", "stream", [("poem", [text])])


def folder_in(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


class Large(Tokenizer):
    """A tokenizer of more symbols than uint16 can number; each character is the last one."""

    kind, arguments, size = "large", ("vocab_size",), 70_000

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    @classmethod
    def train(cls, text: str, split: int, vocab_size: int) -> "Large":
        return cls(cls.size)

    def encode(self, text: str) -> np.ndarray:
        return np.full(len(text), self.vocab_size - 1, dtype=np.int64)


def test_an_unknown_tokenizer_is_refused_with_the_choices(tmp_path):
    message = r"data\.tokenizer=word is unknown: choose one of char, byte, ids, gpt2, bpe"
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, kind="word")


def test_nine_tenths_of_the_characters_are_for_training(tmp_path):
    corpus = prepare(tmp_path, "é" * 20, kind="byte")  # two bytes each
    assert (len(corpus.train), len(corpus.val)) == (36, 4)


def test_the_splits_put_together_are_the_text(tmp_path):
    corpus = prepare(tmp_path)
    ids = [*corpus.train.tolist(), *corpus.val.tolist()]
    assert corpus.tokenizer.decode(ids) == POEM


def test_a_text_is_tokenized_anew_for_the_tokenizer_of_a_checkpoint(tmp_path):
    prepare(tmp_path)
    tokenizer = CharTokenizer("".join(sorted({*POEM, "~", "!"})))
    corpus = data.prepare(content(POEM), "char", 300, tmp_path, tokenizer)
    assert corpus.tokenizer.state() == tokenizer.state()
    ids = [*corpus.train.tolist(), *corpus.val.tolist()]
    assert tokenizer.decode(ids) == POEM


@pytest.mark.parametrize(("path", "named"), [("", "poem"), ("poem.txt", "shakespeare")])
def test_the_text_that_stands_in_for_a_dataset_is_named_in_the_settings(path, named, monkeypatch):
    monkeypatch.setattr(texts, "find", lambda *_: content(POEM))
    settings = {"dir": "", "path": path, "dataset": "shakespeare", "rows": False}
    settings = SimpleNamespace(**settings, tokenizer="char", vocab_size=300)
    data.load(settings)
    assert settings.dataset == named


def test_characters_of_the_whole_text_are_symbols_in_the_order_of_their_code_points(tmp_path):
    corpus = prepare(tmp_path, "b" * 9 + "a")  # the split for training has no "a"
    assert corpus.tokenizer.characters == "ab"


def test_a_bpe_is_trained_on_the_training_part_alone(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = prepare(tmp_path, "abab " * 180 + "xyxy " * 20, kind="bpe").tokenizer
    assert (len(tokenizer.encode("abab")), len(tokenizer.encode("xyxy"))) == (1, 4)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_too_short_to_split_is_refused_with_its_length(text, tmp_path):
    with pytest.raises(ValueError, match=f"poem has {len(text)} characters: too few"):
        prepare(tmp_path, text)


def test_small_vocabularies_are_written_as_uint16(tmp_path):
    prepare(tmp_path, "ab" * 50)
    ids = np.frombuffer((folder_in(tmp_path) / "train.bin").read_bytes(), dtype="<u2")
    assert ids.tolist() == [0, 1] * 45


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_vocabularies_beyond_65536_are_written_as_uint32(vocab_size, dtype, tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENIZERS, "large", Large)
    monkeypatch.setattr(Large, "size", vocab_size)
    prepare(tmp_path, "x" * 10, kind="large")
    ids = np.frombuffer((folder_in(tmp_path) / "train.bin").read_bytes(), dtype=dtype)
    assert ids.tolist() == [vocab_size - 1] * 9


def test_uint32_bins_are_read_back_whole(tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENIZERS, "large", Large)
    assert prepare(tmp_path, "x" * 10, kind="large").train.tolist() == [69_999] * 9


def test_the_meta_file_says_what_the_bins_hold(tmp_path):
    prepare(tmp_path, "ab" * 50)
    meta = json.loads((folder_in(tmp_path) / "meta.json").read_text())
    assert meta.pop("check")
    hashes = {
        f"{split}.bin": hashlib.sha256(
            (folder_in(tmp_path) / f"{split}.bin").read_bytes()
        ).hexdigest()
        for split in data.SPLITS
    }
    assert meta.pop("shards") == hashes
    assert meta == {
        "corpus": "poem",
        "sha256": hashlib.sha256(b"ab" * 50).hexdigest(),
        "dtype": "uint16",
        "tokens": {"train": 90, "val": 10},
        "tokenizer": {"kind": "char", "characters": "ab", "ends": False},
        "layout": "stream",
        "row_length": 0,
    }


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_is_prepared_is_used_again_as_it_is(tmp_path):
    prepare(tmp_path)
    folder = folder_in(tmp_path)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    before = times(folder)
    prepare(tmp_path)
    assert times(folder) == before and len(list(tmp_path.iterdir())) == 1


def test_a_preparation_that_was_interrupted_is_done_again(tmp_path):
    prepare(tmp_path)
    folder = folder_in(tmp_path)
    (folder / "meta.json").unlink()
    (folder / "train.bin").write_bytes(b"")
    assert len(prepare(tmp_path).train) == 0.9 * len(POEM)


@pytest.mark.parametrize("change", [{"text": POEM + "\n"}, {"kind": "byte"}])
def test_another_text_or_tokenizer_is_prepared_beside_the_first(change, tmp_path):
    prepare(tmp_path)
    prepare(tmp_path, **change)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_given_tokenizer_is_used_instead_of_a_new_one(tmp_path):
    trained = CharTokenizer("".join(sorted(set(POEM + "xyz"))))
    corpus = data.prepare(content(POEM), "char", 300, tmp_path, trained)
    assert corpus.tokenizer.characters == trained.characters


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def full(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        bins.write_atomically(tmp_path / "train.bin", b"12")
    assert list(tmp_path.iterdir()) == []


@needs_shakespeare
def test_tiny_shakespeare_has_nanogpts_65_characters_and_token_counts(tmp_path):
    corpus = prepare(tmp_path, SHAKESPEARE.read_bytes().decode())
    counts = corpus.tokenizer.vocab_size, len(corpus.train), len(corpus.val)
    assert counts == (65, 1_003_854, 111_540)


# --- Folders of bins ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layout": "columns"}, "its layout is unknown"),
        ({"layout": "rows", "row_length": -1}, "its row_length cannot be"),
        ({"layout": "stream", "row_length": 2}, "its row_length cannot be"),
        ({"dtype": "float16"}, "expected a tokenizer, and dtype to be uint16 or uint32"),
    ],
)
def test_a_meta_file_that_cannot_be_is_refused(change, says, tmp_path):
    meta = {"dtype": "uint16", "tokenizer": {"kind": "byte"}} | change
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=f"is damaged .{says}.: prepare again"):
        data.open_bins(tmp_path)


def test_a_token_is_found_in_every_part_that_is_read_at_once(monkeypatch):
    monkeypatch.setattr(bins, "SCANNED", 3)
    tokens = np.array([7, 1, 7, 7, 2, 3, 4, 7])
    assert bins.find(tokens, 7).tolist() == [0, 2, 3, 7]
    assert bins.find(bins.Shards([tokens[:5], tokens[5:]]), 7).tolist() == [0, 2, 3, 7]


def nanogpt(folder: Path, meta: object | None = None, train: tuple = (0, 1, 2, 1)) -> Path:
    """A folder as nanoGPT's data/*/prepare.py leaves it; without `meta`, there is no meta.pkl."""
    folder.mkdir(exist_ok=True)
    np.array(train, dtype=np.uint16).tofile(folder / "train.bin")
    np.array([2, 0], dtype=np.uint16).tofile(folder / "val.bin")
    if meta is not None:
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


CHARACTERS = {"vocab_size": 3, "itos": dict(enumerate("abc")), "stoi": {"a": 0, "b": 1, "c": 2}}


def test_a_folder_of_nanogpt_opens_with_its_characters(tmp_path):
    corpus = open_bins(nanogpt(tmp_path, CHARACTERS))
    assert corpus.tokenizer.decode(corpus.train) == "abcb"


class Payload:
    """Runs a shell command when it is unpickled without care."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_meta_file_that_runs_code_is_refused_before_it_runs(tmp_path):
    marker = tmp_path / "executed"
    payload = Payload(f'echo > "{marker}"')
    folder = nanogpt(tmp_path / "bins", CHARACTERS | {"more": payload})
    with pytest.raises(ValueError, match=r"meta file in .*bins is damaged \(it wants to load"):
        open_bins(folder)
    assert not marker.exists()


def test_bins_without_a_meta_file_need_to_be_told_their_tokenizer(tmp_path):
    message = r"no meta\.json or meta\.pkl, .*=gpt2, .*=byte or, for ids .*=ids data\.vocab_size=V"
    with pytest.raises(ValueError, match=message):
        open_bins(nanogpt(tmp_path))


def test_bins_without_a_meta_file_open_with_the_tokenizer_that_they_are_told(tmp_path):
    corpus = open_bins(nanogpt(tmp_path, train=(72, 105)), without_meta={"kind": "byte"})
    assert corpus.tokenizer.decode(corpus.train.tolist()) == "Hi"


def test_bins_of_another_tokenizer_than_the_trained_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="made with another tokenizer than the checkpoint has"):
        open_bins(nanogpt(tmp_path, CHARACTERS), tokenizer=ByteTokenizer())


def test_a_missing_folder_is_refused_with_its_name_and_key(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*nowhere: check data\.dir"):
        open_bins(tmp_path / "nowhere")


def test_bins_are_memory_mapped(tmp_path):
    corpus = prepare(tmp_path)
    assert isinstance(corpus.train, np.memmap) and isinstance(corpus.val, np.memmap)


def test_bins_cannot_be_written_to(tmp_path):
    with pytest.raises(ValueError, match="read-only"):
        prepare(tmp_path).train[0] = 1


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: path.write_bytes(b"\xff\xff" + path.read_bytes()[2:]),
            "holds the token 65535",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut"),
        (lambda path: path.write_bytes(path.read_bytes()[:-2]), "cut"),
        (lambda path: path.write_bytes(b""), "empty"),
        (Path.unlink, "missing"),
    ],
    ids=["other ids", "cut within a token", "cut between tokens", "empty", "missing"],
)
def test_a_damaged_bin_is_refused_by_its_name(split, damage, message, tmp_path):
    prepare(tmp_path)
    damage(folder_in(tmp_path) / f"{split}.bin")
    with pytest.raises(ValueError, match=rf"{split}\.bin.*{message}"):
        prepare(tmp_path)


def test_the_masks_id_in_a_bin_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds the token 3, beyond its vocabulary of 3"):
        open_bins(nanogpt(tmp_path, CHARACTERS, train=(0, 3)))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float64"},
        {"dtype": None},
        {"tokenizer": None},
        {"tokenizer": {"kind": "word"}},
        {"tokenizer": {"kind": "char"}},
    ],
    ids=str,
)
def test_a_meta_file_with_a_wrong_field_is_refused_with_its_folder(change, tmp_path):
    prepare(tmp_path)
    path = folder_in(tmp_path) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=path.parent.name):
        prepare(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"dtype": "uint16"}'])
def test_a_meta_json_that_is_none_is_refused_with_its_folder(content, tmp_path):
    prepare(tmp_path)
    (folder_in(tmp_path) / "meta.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder_in(tmp_path).name} is damaged"):
        prepare(tmp_path)


@pytest.mark.parametrize("meta", [[], {}, {"itos": {1: "a"}}, {"itos": {0: 5}}], ids=str)
def test_a_meta_pkl_without_characters_is_refused_with_its_folder(meta, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name} is damaged"):
        open_bins(nanogpt(tmp_path, meta))


# --- Shards -------------------------------------------------------------------------------------

SIZES = (1, 40, 3, 100, 56)


def sharded(folder: Path, sizes: tuple[int, ...] = SIZES, **meta) -> Path:
    """A folder whose train split counts 0 ... 199 in shards of these sizes; val is 7, 8, 9, 10."""
    folder.mkdir(exist_ok=True)
    ends = np.cumsum(sizes).tolist()
    for i, end in enumerate(ends):
        ids = np.arange(end - sizes[i], end, dtype=np.uint16)
        ids.tofile(folder / f"train_{i:02}.bin")
    for i in range(2):
        np.array([7 + 2 * i, 8 + 2 * i], dtype=np.uint16).tofile(folder / f"val_{i}.bin")
    about = {"dtype": "uint16", "tokenizer": {"kind": "byte"}} | meta
    (folder / "meta.json").write_text(json.dumps(about))
    return folder


def test_shards_give_the_batches_of_the_one_file_that_they_are_cut_from(tmp_path):
    shards = open_bins(sharded(tmp_path / "shards"))
    whole = open_bins(sharded(tmp_path / "one", (200,)))
    for seed in range(20):
        batches = [batch(corpus, 8, 50, seed) for corpus in (shards, whole)]
        assert torch.equal(*batches)


def test_every_slice_of_shards_is_that_of_the_whole(tmp_path):
    train = open_bins(sharded(tmp_path)).train
    for start in range(0, 201, 3):
        for stop in range(start, 201, 7):
            assert train[start:stop].tolist() == list(range(start, stop))


def test_blocks_of_shards_cover_every_token_once_and_in_order(tmp_path):
    corpus = open_bins(sharded(tmp_path))
    blocks = [row.ids for row in corpus.rows("train", 32).evenly()]
    assert torch.cat(blocks).tolist() == list(range(200)) and len(corpus.train) == 200


def test_the_validation_split_may_be_in_shards_too(tmp_path):
    assert open_bins(sharded(tmp_path)).val[:].tolist() == [7, 8, 9, 10]


def test_shards_are_memory_mapped(tmp_path):
    assert all(isinstance(part, np.memmap) for part in open_bins(sharded(tmp_path)).train.parts)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"\0\1" + path.read_bytes()), "holds the token 256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut"),
        (lambda path: path.write_bytes(b""), "empty"),
    ],
    ids=["other ids", "cut within a token", "empty"],
)
def test_a_damaged_shard_is_refused_by_its_name(damage, message, tmp_path):
    damage(sharded(tmp_path) / "train_03.bin")
    with pytest.raises(ValueError, match=rf"train_03\.bin.*{message}"):
        open_bins(tmp_path)


def test_a_shard_that_is_missing_from_the_count_of_the_meta_file_is_noticed(tmp_path):
    (sharded(tmp_path, tokens={"train": 200, "val": 4}) / "train_03.bin").unlink()
    with pytest.raises(ValueError, match=r"train_\*\.bin has 100 tokens, the meta file says 200"):
        open_bins(tmp_path)


def test_shards_beside_a_whole_file_are_refused(tmp_path):
    (sharded(tmp_path) / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match=r"both train\.bin and train_00\.bin: remove one"):
        open_bins(tmp_path)


# --- Batches ------------------------------------------------------------------------------------


def counting(length: int, vocab_size: int = 1000) -> Corpus:
    """A train split that counts from 0, so that a block shows where it starts, and other values
    for val."""
    train, val = np.arange(length, dtype=np.uint16), np.full(length, 999, dtype=np.uint16)
    return Corpus("count", "", SimpleNamespace(vocab_size=vocab_size), train, val)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(corpus: Corpus, batch_size: int, L: int, seed: int = 0, rows=None) -> torch.Tensor:
    x0, predict = corpus.rows("train", L, overlap=True).batch(batch_size, generator(seed), rows)
    assert predict.all()
    return x0


def test_a_batch_is_int64_rows_of_one_block_each():
    found = batch(counting(100), 5, 8)
    assert (found.shape, found.dtype) == ((5, 8), torch.int64)


def test_every_row_of_a_batch_is_a_stretch_of_the_train_split():
    found = batch(counting(100), 50, 8)
    assert torch.equal(found, found[:, :1] + torch.arange(8)) and found.max() < 100


def test_the_same_generator_draws_the_same_batch():
    batches = [batch(counting(100), 5, 8, seed) for seed in (1, 1)]
    assert torch.equal(*batches)


def test_another_generator_draws_another_batch():
    batches = [batch(counting(900), 5, 8, seed) for seed in (1, 2)]
    assert not torch.equal(*batches)


def test_rows_are_those_of_the_whole_batch():
    whole, rows = batch(counting(900), 6, 8), torch.tensor([4, 1])
    assert torch.equal(batch(counting(900), 6, 8, rows=rows), whole[rows])


def test_every_start_is_drawn_up_to_the_last():
    starts = batch(counting(12), 400, 8)[:, 0]
    assert starts.unique().tolist() == [0, 1, 2, 3, 4]


def test_a_split_of_one_block_is_the_only_row():
    found = batch(counting(8), 3, 8)
    assert torch.equal(found, torch.arange(8).expand(3, 8))


def test_ids_beyond_what_was_scanned_are_refused_when_they_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "SCANNED", 2)
    corpus = open_bins(nanogpt(tmp_path, CHARACTERS, train=(0, 1, 7)))
    with pytest.raises(ValueError, match="train split holds the token 7, beyond .* of 3"):
        batch(corpus, 1, 3)


@pytest.mark.parametrize("length", [1, 8, 10, 16])
def test_blocks_cover_every_token_once_and_in_order(length):
    rows = counting(length).rows("train", 8).evenly()
    assert torch.cat([row.ids for row in rows]).tolist() == list(range(length))


def test_only_the_last_block_is_shorter():
    rows = [row.ids for row in counting(20).rows("train", 8).evenly()]
    assert [(len(row), row.dtype) for row in rows] == [
        (8, torch.int64), (8, torch.int64), (4, torch.int64)
    ]  # fmt: skip


def test_a_limit_spreads_the_blocks_evenly():
    rows = [row.ids for row in counting(1000, 1001).rows("train", 10).evenly(limit=50)]
    assert [row.tolist() for row in rows] == [
        list(range(start, start + 10)) for start in (0, 200, 400, 600, 800)
    ]


@pytest.mark.parametrize(("limit", "count"), [(0, 3), (19, 2), (20, 3), (99, 3), (1, 1)])
def test_a_limit_is_a_number_of_tokens(limit, count):
    assert len(counting(20).rows("train", 8).evenly(limit)) == count


# --- Damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_a_letter_that_became_another_is_noticed(name, tmp_path):
    prepare(tmp_path)
    path = folder_in(tmp_path) / name
    content = path.read_bytes()
    old, new = (b'"char"', b'"byte"') if name == "meta.json" else (content[:2], b"\0\0")
    path.write_bytes(content.replace(old, new, 1) if content[:2] != new else b"\1" + content[1:])
    with pytest.raises(ValueError, match="checksum"):
        open_bins(path.parent)


def test_bins_without_checksums_are_read_as_they_are(tmp_path):
    prepare(tmp_path)
    path = folder_in(tmp_path) / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in meta.items() if k not in ("shards", "check")}))
    assert len(open_bins(path.parent).train)


def test_every_token_of_val_is_checked_however_long_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(bins, "SCANNED", 4)
    meta = {"dtype": "uint16", "tokenizer": {"kind": "char", "characters": "ab"}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "train.bin").write_bytes(b"\0\0" * 9)
    (tmp_path / "val.bin").write_bytes(b"\0\0" * 8 + b"\2\0")
    with pytest.raises(ValueError, match=r"val\.bin holds the token 2"):
        open_bins(tmp_path)
