"""tools/prepare.py: documents of any size into shards that data.dir reads, whatever happens."""

import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY

import data
from nanomdm import cli, folders
from nanomdm.tokenizers import EOT, BPETokenizer

datasets = pytest.importorskip("datasets")

from tools import prepare, shards, sources  # noqa: E402

DOCS = (ROOT / "docs" / "data.md").read_text()
DOCUMENTS = [
    f"Document {n} of the house of {n % 7}.\n" + "It was told, and is told again. " * (n % 13 + 1)
    for n in range(300)
]
SMALL = ("tokenizer=byte", "val=0.1", "shard_tokens=5000", "processes=1", "out=out")


def write_jsonl(path: Path, documents=DOCUMENTS, column: str = "text") -> Path:
    lines = [json.dumps({"id": n, column: text}) for n, text in enumerate(documents)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_parquet(path: Path, documents=DOCUMENTS) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=70)
    return path


def write_text(path: Path, documents=DOCUMENTS) -> Path:
    path.write_text("\n<|endoftext|>\n".join(documents) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three files of 100 documents."""
    folder = tmp_path_factory.mktemp("documents")
    for number in range(3):
        write_jsonl(folder / f"{number}.jsonl", DOCUMENTS[100 * number : 100 * (number + 1)])
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Batches of some documents, an entry in the journal after each."""
    monkeypatch.setattr(sources, "BATCH", 2000)
    monkeypatch.setattr(prepare, "SAVED", 0.0)


@pytest.fixture
def prepared(run, tmp_path):
    """prepared(dataset, "key=value", ...): the folder that is written."""

    def prepared(dataset: Path, *words: str) -> Path:
        result = run("tools.prepare", f"dataset={dataset}", *SMALL, *words)
        assert result.code == 0, result.err
        out = [word for word in (*SMALL, *words) if word.startswith("out=")][-1]
        return tmp_path / out.removeprefix("out=")

    return prepared


UNINTERRUPTED = {}


@pytest.fixture
def whole(folder, prepared) -> dict[str, bytes]:
    """What one process writes of the folder, undisturbed."""
    if not UNINTERRUPTED:
        UNINTERRUPTED.update(content(prepared(folder, "out=whole")))
    return UNINTERRUPTED


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- What is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_text])
def test_every_document_is_in_one_split_whole_and_in_order(write, prepared, tmp_path):
    suffix = {write_jsonl: "jsonl", write_parquet: "parquet", write_text: "txt"}[write]
    corpus = data.open_bins(prepared(write(tmp_path / f"d.{suffix}")))
    for split in data.SPLITS:
        own = [text for text in DOCUMENTS if (sources.share(text) < 0.1) is (split == "val")]
        assert documents_of(corpus, split) == own and len(own) > 15
    assert corpus.layout == "documents"


def documents_of(corpus: data.Corpus, split: str) -> list[str]:
    """The documents of a split, by their end tokens."""
    ids, tokenizer = getattr(corpus, split)[:].tolist(), corpus.tokenizer
    ends = [-1, *(i for i, token in enumerate(ids) if token == tokenizer.eos)]
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(ids[i + 1 : j]) for i, j in itertools.pairwise(ends)]


def test_what_is_held_out_does_not_depend_on_the_other_documents(prepared, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[::2])
    half = data.open_bins(prepared(tmp_path / "a.jsonl"))
    held = [text for text in DOCUMENTS[::2] if sources.share(text) < 0.1]
    assert documents_of(half, "val") == held


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
@pytest.mark.parametrize("processes", [1, 2])
def test_prompts_and_responses_become_pairs_each_in_one_split(
    tokenizer, processes, prepared, tmp_path
):
    rows = [{"q": f"What is {n}?" * (n % 3), "a": f"It is {n}."} for n in range(200)]
    rows.insert(7, {"q": "no answer", "a": ""})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("column=q", "response=a", f"tokenizer={tokenizer}", "vocab_size=300")
    corpus = data.open_bins(prepared(tmp_path / "p.jsonl", *words, f"processes={processes}"))
    decode, found = corpus.tokenizer.decode, {}
    for split in data.SPLITS:
        for row in corpus.rows(split, 80).evenly():
            first = int(row.predict.int().argmax())
            answer = decode(row.ids[first : first + row.count - 1].tolist())
            found[answer] = (decode(row.ids[: first - 1].tolist()), split)
    assert {answer: prompt for answer, (prompt, _) in found.items()} == {
        row["a"]: row["q"] for row in rows if row["a"]
    }
    held = {a for a, (q, _) in found.items() if sources.share(f"{q}\n{a}") < 0.1}
    assert held == {a for a, (_, split) in found.items() if split == "val"} and len(held) > 5
    assert list(found) == sorted(found, key=lambda a: (found[a][1] == "val", int(a[6:-1])))


def test_pairs_that_were_all_read_are_not_read_beyond_the_limit(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"q": "a", "a": "b"}\n' * 10)
    where = (str(tmp_path / "p.jsonl"), "", "", "train", "q", "a", "", "", 3, 0.5)
    source = sources.Source(*where)
    assert sum(len(batch.pieces) for batch in source.read(source.load())) == 2 * 3
    assert [len(batch.pieces) for batch in source.read(source.load(), 2)] == [2]
    assert list(source.read(source.load(), 3)) == []


def test_the_share_that_is_held_out_is_the_one_asked_for():
    held = sum(sources.share(f"text {n}") < 0.1 for n in range(20_000))
    assert abs(held / 20_000 - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5


def test_shards_have_the_size_asked_for_and_the_last_the_rest(folder, prepared):
    out = prepared(folder)
    meta = json.loads((out / "meta.json").read_text())
    for split in data.SPLITS:
        sizes = [path.stat().st_size // 2 for path in sorted(out.glob(f"{split}_*.bin"))]
        assert sum(sizes) == meta["tokens"][split] and len(sizes) > (split == "train")
        assert set(sizes[:-1]) <= {5000} and 0 < sizes[-1] <= 5000


def test_the_meta_file_has_counts_hashes_and_the_settings(folder, prepared):
    out = prepared(folder)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["shards"] == {p.name: shards.sha256_of(p) for p in sorted(out.glob("*.bin"))}
    assert sum(meta["documents"].values()) == 300
    assert (meta["corpus"], meta["recipe"]["val"]) == (folder.name, 0.1)


def test_a_finished_folder_holds_shards_and_meta_file_alone(folder, prepared):
    assert {path.suffix for path in prepared(folder).iterdir()} == {".bin", ".json"}


def test_a_bpe_ends_documents_with_a_token_that_no_text_becomes(prepared, tmp_path):
    documents = [*DOCUMENTS[:50], "a text with <|endoftext|> in it"]
    write_jsonl(tmp_path / "d.jsonl", documents)
    corpus = data.open_bins(prepared(tmp_path / "d.jsonl", "tokenizer=bpe", "vocab_size=300"))
    eos, ids = corpus.tokenizer.eos, [*corpus.train[:].tolist(), *corpus.val[:].tolist()]
    assert ids.count(eos) == 51 and ids[-1] == eos
    assert "a text with <|endoftext|> in it<|endoftext|>" in corpus.tokenizer.decode(ids)


def test_characters_are_those_of_all_documents(prepared, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", ["ab", *"cdefghijklmnopqrstuvwxyz" * 2])
    corpus = data.open_bins(prepared(tmp_path / "d.jsonl", "tokenizer=char"))
    assert corpus.tokenizer.characters == "\nabcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("form", ["meta.json", "tokenizer.json"])
def test_a_tokenizer_can_come_from_a_file(form, folder, prepared, tmp_path):
    tokenizer = BPETokenizer.train(DOCUMENTS[0], len(DOCUMENTS[0]), 270, ends=True)
    state = tokenizer.state()
    whole = json.dumps({"tokenizer": state}) if form == "meta.json" else state["serialized"]
    (tmp_path / form).write_text(whole)
    assert data.open_bins(prepared(folder, f"tokenizer={form}")).tokenizer.state() == state


def test_rows_that_are_lines_are_put_together_where_a_document_begins(prepared, tmp_path):
    lines = ["", " = One = ", "", " a", " = = Part = = ", " b\n", " = Two = ", " c"]
    write_jsonl(tmp_path / "d.jsonl", lines)
    source = sources.Source(
        str(tmp_path / "d.jsonl"), "", "", "train", "text", "", " = [^=]", "", 0, 0.5
    )
    [batch] = source.read(source.load())
    assert [piece.text for piece in batch.pieces] == [
        "\n",
        " = One = \n\n a\n = = Part = = \n b\n",
        " = Two = \n c\n",
    ]


def test_a_limit_is_a_number_of_documents(folder, prepared):
    meta = json.loads((prepared(folder, "limit=150") / "meta.json").read_text())
    assert sum(meta["documents"].values()) == 150


def test_a_long_text_goes_in_pieces_that_no_token_spans(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 3000)
    long = "It's 12 o'clock,  and\n\n all is well: " * 600
    write_text(tmp_path / "d.txt", ["short", long.strip(), "last"])
    source = sources.Source(str(tmp_path / "d.txt"), "", "", "train", "text", "", "", EOT, 0, 0.5)
    pieces = [piece for batch in source.read(source.load()) for piece in batch.pieces]
    own = [piece for piece in pieces if piece.text not in ("short", "last")]
    assert "".join(piece.text for piece in own) == long.strip() and len(own) > 3
    assert [piece.ends for piece in pieces].count(True) == 3 and max(
        len(p.text) for p in own
    ) < 7000
    assert len({piece.held for piece in own}) == 1
    bpe = BPETokenizer.train(long, len(long), 300)
    assert [i for p in own for i in bpe.encode(p.text)] == bpe.encode(long.strip()).tolist()


def test_training_runs_on_what_was_prepared(folder, prepared, run, tmp_path):
    prepared(folder)
    result = run("train.py", *TINY, "data.dir=out", "out_dir=trained", "training.max_iters=2")
    assert result.code == 0, result.err
    assert (tmp_path / "trained" / "ckpt.pt").is_file()


# --- Processes and kills ------------------------------------------------------------------------


def test_the_number_of_processes_changes_no_byte(folder, prepared, whole):
    assert content(prepared(folder, "processes=3")) == whole


def command(words: tuple[str, ...]) -> None:
    sys.argv = ["tools.prepare", *words]
    cli.main(prepare.main, "tools/prepare")


def start(*words: str) -> multiprocessing.Process:
    """tools.prepare in a process of its own, which has what is patched here."""
    process = multiprocessing.get_context("fork").Process(target=command, args=(words,))
    process.start()
    return process


class Killer:
    """SIGKILL for the process at a certain call of a function, before it does anything."""

    def __init__(self, owner, name: str, call: int):
        self.owner, self.name, self.call, self.real = owner, name, call, getattr(owner, name)

    def __enter__(self):
        calls = []

        def killed(*args, **settings):
            calls.append(args)
            if len(calls) == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.real(*args, **settings)

        setattr(self.owner, self.name, killed)

    def __exit__(self, *error):
        setattr(self.owner, self.name, self.real)


@pytest.mark.parametrize(
    ("owner", "name", "call", "processes"),
    [
        (shards.ShardWriter, "write", 9, 1),  # some shards are written, and one is begun
        (shards.ShardWriter, "write", 9, 2),
        (shards.ShardWriter, "sync", 8, 1),
        (shards.Job, "save", 2, 1),  # written beyond the journal
        (shards.Job, "save", 8, 2),
        (os, "replace", 6, 1),  # the journal's new version is beside the old one
        (prepare, "sha256_of", 1, 1),
        (shards.Job, "finish", 1, 1),
        (shards.shutil, "rmtree", 1, 1),
    ],
)
def test_a_killed_preparation_goes_on_to_the_same_bytes(
    owner, name, call, processes, folder, prepared, whole, tmp_path
):
    with Killer(owner, name, call):
        process = start(f"dataset={folder}", *SMALL, "out=killed", f"processes={processes}")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "meta.json").exists() or name == "rmtree"
    assert content(prepared(folder, "out=killed")) == whole


def test_shards_move_up_again_where_a_kill_came_between_two_of_them(
    folder, prepared, whole, tmp_path
):
    count, real = 0, os.replace

    def replace(source, target):
        nonlocal count
        count += str(target).endswith(".bin")
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        process = start(f"dataset={folder}", *SMALL, "out=killed")
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob("*.bin"))) == 2
    assert content(prepared(folder, "out=killed")) == whole


def test_what_is_in_the_journal_is_not_read_again(folder, prepared, monkeypatch, tmp_path):
    with Killer(shards.Job, "save", 8):
        start(f"dataset={folder}", *SMALL, "out=killed").join(60)
    journal = json.loads((tmp_path / "killed" / "unfinished" / "journal.json").read_bytes())
    done = sum(journal["documents"].values())
    tokenized, encode = [], prepare.encode
    monkeypatch.setattr(prepare, "encode", lambda t, p: tokenized.extend(p) or encode(t, p))
    prepared(folder, "out=killed")
    assert len(tokenized) == 300 - done and done > 0


def test_another_preparation_in_the_same_folder_is_refused_with_what_differs(folder, prepared, run):
    prepared(folder)
    again = run("tools.prepare", f"dataset={folder}", *SMALL)
    assert again.code == 0 and "is prepared" in again.out
    other = run("tools.prepare", f"dataset={folder}", *SMALL, "val=0.2")
    assert (other.code, other.err.count("\n")) == (2, 1) and "val differs" in other.err


def test_a_folder_with_other_bins_is_refused(folder, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"1234")
    result = run("tools.prepare", f"dataset={folder}", *SMALL)
    assert (result.code, result.err.count("\n")) == (2, 1) and "other .bin files" in result.err


@pytest.mark.parametrize("name", ["meta.json", "unfinished/journal.json"])
def test_a_damaged_journal_or_meta_file_is_refused_by_its_name(name, folder, run, tmp_path):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("{")
    result = run("tools.prepare", f"dataset={folder}", *SMALL)
    assert (result.code, result.err.count("\n")) == (2, 1) and f"{name} is damaged" in result.err


def test_a_second_preparation_of_a_folder_at_once_is_refused_with_the_firsts_pid(folder, run):
    with folders.locked("out", "out"):
        result = run("tools.prepare", f"dataset={folder}", *SMALL)
    assert (result.code, result.err.count("\n")) == (
        2,
        1,
    ) and f"process {os.getpid()}" in result.err


def test_workers_end_with_the_process_that_a_kill_ended(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pids").mkdir()
    real = prepare._start

    def begin(state: dict, parent: int) -> None:
        real(state, parent)
        (tmp_path / "pids" / str(os.getpid())).touch()

    with pytest.MonkeyPatch.context() as patch, Killer(shards.Job, "save", 4):
        patch.setattr(prepare, "_start", begin)
        start(f"dataset={folder}", *SMALL, "processes=2").join(60)
    pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
    assert len(pids) == 2 and all(ended(pid) for pid in pids)
    with folders.locked("out", "out"):  # which died with them
        pass


def test_a_worker_that_begins_after_the_end_of_its_parent_ends():
    def begin() -> None:
        prepare._start({"kind": "byte"}, parent=2**30)  # the number of no process
        time.sleep(60)

    worker = multiprocessing.get_context("fork").Process(target=begin)
    worker.start()
    worker.join(30)
    assert worker.exitcode == 1


def ended(pid: int) -> bool:
    """Whether a process is over within five seconds."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("words", re.findall(r"^\| .* \| `(dataset=.*)` \|$", DOCS, re.M))
def test_the_settings_in_the_documentation_exist(words, run, monkeypatch):
    received = []
    monkeypatch.setattr(prepare, "main", lambda config: received.append(config.explicit))
    assert run("tools.prepare", *shlex.split(words.replace("\\|", "|"))).code == 0
    assert received == [{word.split("=")[0] for word in shlex.split(words)}]


# --- Bad input ----------------------------------------------------------------------------------


@pytest.fixture
def refusal(run, tmp_path, folder):
    """refusal("key=value", ...): the line that a mistake ends with."""
    for name, file in {"mixed": "a.txt", "none": "a.csv", "empty": "a.jsonl"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
    (tmp_path / "mixed" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    write_jsonl(tmp_path / "one.jsonl", ["one text"])
    write_jsonl(tmp_path / "other.jsonl", column="body")

    def refusal(*words: str) -> str:
        code, _, err = run("tools.prepare", f"dataset={folder}", *SMALL, *words)
        assert (code, err.count("\n"), err[:7]) == (2, 1, "error: "), (code, err)
        return err

    return refusal


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("dataset=",), "no dataset"),
        (("dataset=./nowhere",), "no file or folder nowhere"),
        (("dataset=nowhere.jsonl",), "no file or folder nowhere.jsonl"),
        (("dataset=none",), "no .parquet, .jsonl, .txt, .md file in none"),
        (("dataset=mixed",), "json and text"),
        (("dataset=empty",), "empty"),
        (("dataset=bad.jsonl",), "cannot read bad.jsonl"),
        (("dataset=latin.txt",), "cannot read latin.txt"),
        (("dataset=one.jsonl",), "raise val=0.1"),
        (("dataset=one.jsonl", "val=0.999"), "lower val=0.999"),
        (("dataset=other.jsonl",), "column=text: choose one of body"),
        (("tokenizer=words",), "choose char, byte, ids, gpt2, bpe or a .json"),
        (("tokenizer=none.json",), "cannot read tokenizer=none.json"),
        (("tokenizer=bpe", "vocab_size=5"), "vocab_size=5"),
        (("val=0",), "val=0.0"),
        (("val=1.5",), "val=1.5"),
        (("begins=(",), "begins=("),
        (("limit=-1",), "limit=-1"),
        (("shard_tokens=0",), "shard_tokens=0"),
        (("processes=-1",), "processes=-1"),
        (("out=/dev/null/x",), "out=/dev/null/x"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_remedy(refusal, words, named):
    assert named in refusal(*words)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_text_that_the_tokenizer_lacks_symbols_for_is_one_line(refusal, tmp_path, processes):
    state = {"kind": "char", "characters": "\nabc"}
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": state}))
    line = refusal("tokenizer=meta.json", f"processes={processes}")
    assert "has no character 'D'" in line


def test_a_preparation_that_cannot_succeed_leaves_nothing(refusal, tmp_path):
    refusal("dataset=one.jsonl")
    assert not (tmp_path / "out").exists()


def test_a_data_set_that_the_hub_does_not_give_is_one_line(refusal, monkeypatch):
    def fail(*names, **settings):
        assert (names, settings["split"], settings["revision"]) == (
            ("some/one", "two"),
            "test",
            "r",
        )
        raise ConnectionError("Couldn't reach 'some/one' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    line = refusal("dataset=some/one", "name=two", "split=test", "revision=r")
    assert "Couldn't reach 'some/one'" in line and "go online" in line


def test_too_little_disk_is_one_line_that_says_how_to_go_on(refusal, monkeypatch):
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    line = refusal()
    assert "free some space" in line and "same command" in line


def test_a_disk_that_fills_up_is_one_line_that_says_how_to_go_on(refusal, monkeypatch, folder):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "write", full)
        assert "same command" in refusal()


def test_without_the_library_the_line_says_what_to_install(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal()
