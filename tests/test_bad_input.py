"""Bad input: one line that names key, value and remedy, exit code 2, and nothing touched."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY

from nanomdm import checkpoint
from nanomdm.strategies import STRATEGIES

NO_FOLDER = "/dev/null/x"  # a file as parent: not even root can make it


@pytest.fixture
def out(trained, tmp_path) -> Path:
    """An out_dir in the working directory that holds an earlier run: `out`, the default."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


@pytest.fixture
def refusal(run, out, text_file):
    """refusal(command, "key=value", ...): the line that a mistake ends with.

    It has to be the only one on stderr, with exit code 2, and to leave everything in `out` alone.
    """
    data = f"data.path={text_file}"
    training = [word for word in (*TINY, data) if not word.startswith("model.")]
    commands = {
        "train": ["train.py", *TINY, data],
        "resume": ["train.py", "training.resume=true", "out_dir=out", "training.max_iters=13"],
        "init_from": ["train.py", *training, f"training.init_from={out}/ckpt.pt"],
        "sample": ["sample.py", "system.device=cpu", "sampling.steps=2"],
        "eval": ["eval.py", "system.device=cpu", "eval.draws=1"],
    }

    def refusal(command: str, *words: str, codes: tuple = (2,)) -> str:
        script, *start = commands[command]
        before = content(out)
        code, _, err = run(script, *start, *words)
        assert (code in codes, err.count("\n"), err[:7]) == (True, 1, "error: "), (code, err)
        assert content(out) == before
        return err.removeprefix("error: ")

    return refusal


def content(folder: Path) -> dict[str, str]:
    """The files below a folder by their paths, as hashes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(line: str, parts: str) -> bool:
    """Whether a line holds each of the `parts`, which " | " divides."""
    return all(part in line for part in parts.split(" | "))


# --- Settings -----------------------------------------------------------------------------------
# What is typed, and what the line has to name: key, value, limit and remedy.


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("model.n_head=3", "model.n_embd=32 | model.n_head=3 | multiple of 3"),
        ("model.n_embd=6", "model.n_embd | model.n_head | 3 is odd | even head width"),
        ("model.n_layer=0", "model.n_layer=0 | at least 1"),
        ("model.block_size=9145", "kings.txt | 9144 | model.block_size=9145 | longer text"),
        ("model.dropout=1", "model.dropout=1.0 | [0, 1)"),
        ("model.dropout=-0.1", "model.dropout=-0.1 | [0, 1)"),
        ("diffusion.weighting=1.5", "diffusion.weighting=1.5 | [0, 1]"),
        ("training.max_iters=0", "training.max_iters=0 | positive"),
        ("training.batch_size=0", "training.batch_size=0 | positive"),
        ("training.grad_accum=3", "training.batch_size=8 | training.grad_accum=3 | change one"),
        ("training.learning_rate=0", "training.learning_rate=0.0 | positive"),
        ("training.grad_clip=-1", "training.grad_clip=-1.0 | 0 or more"),
        ("training.ema_decay=1", "training.ema_decay=1.0 | less than 1"),
        ("training.warmup_iters=-1", "training.warmup_iters=-1 | 0 or more"),
        ("training.eval_tokens=-1", "eval.tokens=-1 | 0 or more"),
        ("training.optimizer=sgd", "training.optimizer=sgd | adamw | muon"),
        ("training.lr_schedule=step", "training.lr_schedule=step | cosine | linear"),
        ("sampling.steps=0", "sampling.steps=0 | positive"),
        ("logging.interval=0", "logging.interval=0 | positive"),
        ("training.resume=maybe", "training.resume=maybe | auto, true, false"),
        ("training.objective=gpt", "training.objective=gpt | diffusion, ar"),
        ("system.parallel=tp", "system.parallel=tp | auto, ddp, fsdp"),
        ("system.device=tpu", "system.device=tpu | auto | cpu"),
        ("system.device=cuda:99", "system.device=cuda:99 | auto | cpu"),
        ("system.device=cpu:", "system.device=cpu: | auto | cpu"),
        ("system.dtype=float64", "system.dtype=float64 | float32 | bfloat16 | float16"),
        ("system.compile=maybe", "system.compile=maybe | auto, true, false"),
        ("data.tokenizer=word", "data.tokenizer=word | char, byte, ids, gpt2, bpe"),
        ("data.path= data.dataset=wikipedia", "data.dataset=wikipedia | shakespeare | plays"),
        ("data.tokenizer=bpe data.vocab_size=-5", "data.vocab_size=-5 | 256"),
        ("data.tokenizer=bpe data.vocab_size=255", "data.vocab_size=255 | 256"),
        ("model.n_embd=1000000", "training takes at least | GiB for the model | cpu has | lower"),
        ("model.n_layer=1000000000", "training takes at least | GiB for the model | lower"),
        ("training.batch_size=100000000", "100,000,000 rows | training.batch_size | grad_accum"),
        ("training.resume=true out_dir=elsewhere", "elsewhere/ckpt.pt | train one"),
        ("training.init_from=nowhere.pt", "no checkpoint at nowhere.pt | check the name"),
        ("data.dir=bins", "data.path and data.dir | leave one"),
    ],
)
def test_a_setting_that_train_cannot_use(refusal, words, named):
    assert names(refusal("train", *words.split()), named)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["prompt=" + "K" * 33], "prompt has 33 tokens | model.block_size is 32 | shorten"),
        (
            ["prompt=KING", "sampling.length=3"],
            "prompt has 4 tokens | sampling.length is 3 | shorten",
        ),
        (["prompt=KING Ω"], "no character 'Ω' (position 5) | data.tokenizer=byte"),
        (["prompt=KING\t"], "no character '\\t' (position 4) | data.tokenizer=byte"),
        (["num_samples=0"], "num_samples=0 | positive"),
        (["num_samples=100000000"], "3,200,000,000 tokens | num_samples"),
        (["sampling.length=10000000000"], "10,000,000,000 tokens | lower sampling.length"),
        (["prompt=K[MASK*10000000000]"], "10,000,000,000 tokens | lower"),
        (["sampling.steps=0"], "sampling.steps=0 | positive"),
        (["sampling.temperature=-1"], "sampling.temperature=-1.0 | 0 or more"),
        (["sampling.top_p=0"], "sampling.options.top_p=0 | (0, 1]"),
        (["sampling.top_p=1.5"], "sampling.options.top_p=1.5 | (0, 1]"),
        (["sampling.length=-1"], "sampling.length=-1 | 0 or more"),
        (["sampling.strategy=greedy"], "sampling.strategy=greedy | stochastic | remask"),
        (["sampling.threshold=2"], "sampling.options.threshold=2 | [0, 1]"),
        (["sampling.options.threshold=x"], "sampling.options.threshold=x | [0, 1]"),
        (["sampling.options={remask_rate: -1}"], "sampling.options.remask_rate=-1 | [0, 1]"),
        (["sampling.options={gamma: -1}"], "sampling.options.gamma=-1 | 0 or more"),
        (["sampling.options={gamma: inf}"], "sampling.options.gamma=inf | 0 or more"),
        (["sampling.options.top_k=-1"], "sampling.options.top_k=-1 | 0 or more"),
        (["sampling.options.guidance=-1"], "sampling.options.guidance=-1 | [0, 100]"),
        (["sampling.options.block_length=-1"], "sampling.options.block_length=-1 | 0 or more"),
        (["sampling.options.speed=1"], "sampling.options.speed | no option of spread | top_k"),
        (["prompt=KING[MASK*0]"], "[MASK*0] | at least one token"),
        (["prompt=KI[MASK]", "sampling.length=2"], "3 tokens | sampling.length is 2 | shorten"),
        (
            ["prompt=KI [mask]"],
            "[mask] is no blank, which is written [MASK] or [MASK*n]: | no character '['",
        ),
        (["prompt=KI <Mask>"], "<Mask> is no blank, which is written [MASK] | no character '<'"),
        (["prompt_file=nowhere.txt"], "prompt_file=nowhere.txt | No such file | UTF-8 text"),
        (["prompt_file=out"], "prompt_file=out | directory | UTF-8 text"),
        (["prompt_file=blank.txt"], "prompt_file=blank.txt | no prompt | one a line"),
        (["prompt_file=latin.txt"], "prompt_file=latin.txt | UTF-8 text"),
        (["prompt=K", "prompt_file=blank.txt"], "prompt and prompt_file | leave one"),
        (["output=out"], "output=out is a folder | name a file"),
        (["system.dtype=float64"], "system.dtype=float64 | float32 | bfloat16 | float16"),
        (["model.n_layer=2"], "model.n_layer | checkpoint | leave it out"),
        (["checkpoint=nowhere.pt"], "no checkpoint at nowhere.pt | check the name"),
        (["checkpoint=out"], "no checkpoint at out | name a file in it, such as out/ckpt.pt"),
    ],
)
def test_a_setting_that_sample_cannot_use(refusal, words, named):
    Path("latin.txt").write_bytes(b"\xe9")
    Path("blank.txt").write_text(" \n\n")
    assert names(refusal("sample", *words), named)


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("eval.draws=0", "eval.draws=0 | positive"),
        ("eval.bounds=[uniform,exact]", "eval.bounds=exact | choose one of uniform"),
        ("output=.", "output=. is a folder | name a file"),
        ("output=./out/ckpt.pt", "output=./out/ckpt.pt and checkpoint are one file | another"),
        ("eval.against=none.pt", "no checkpoint at none.pt | check the name"),
        ("eval.tokens=-1", "eval.tokens=-1 | 0 or more"),
        ("system.dtype=float64", "system.dtype=float64 | float32 | bfloat16 | float16"),
        ("model.n_layer=2", "model.n_layer | checkpoint | leave it out"),
        ("data.path=nowhere.txt", "nowhere.txt | data.path"),
        ("data.path=latin.txt", "latin.txt is not UTF-8 (byte 0)"),
        ("data.dir=nowhere", "nowhere | data.dir"),
        ("data.dataset=wikipedia", "data.dataset=wikipedia | shakespeare | plays"),
        ("data.dataset=plays", "no character 'F'"),
        ("data.tokenizer=byte", "data.tokenizer | checkpoint | leave it out"),
        ("data.vocab_size=300", "data.vocab_size | checkpoint | leave it out"),
        ("checkpoint=nowhere.pt", "no checkpoint at nowhere.pt | check the name"),
    ],
)
def test_a_setting_that_eval_cannot_use(refusal, word, named):
    Path("latin.txt").write_bytes(b"\xe9")
    assert names(refusal("eval", word), named)


def test_an_empty_path_is_no_path_and_not_the_working_directory(run, out):
    Path("other.md").write_text("KING 1")
    words = ("system.device=cpu", "eval.draws=1")
    by_default, with_empty_path = run("eval.py", *words), run("eval.py", *words, "data.path=")
    assert by_default.out.splitlines()[1:3] == with_empty_path.out.splitlines()[1:3]


@pytest.mark.parametrize("place", [NO_FOLDER, "text.txt", "text.txt/out"])
def test_an_out_dir_that_cannot_be_written(refusal, place):
    Path("text.txt").write_text("a file, not a folder")
    assert names(refusal("train", f"out_dir={place}"), f"out_dir={place} | choose another out_dir")


@pytest.mark.parametrize(
    ("command", "key"),
    [
        *(("train", "data.path"), ("train", "data.dir"), ("train", "training.init_from")),
        *(("train", "out_dir"), ("sample", "checkpoint"), ("eval", "data.path")),
    ],
)
def test_a_path_longer_than_any_file_name(refusal, command, key):
    instead = ["data.path="] if key == "data.dir" else []
    assert "x" * 300 in refusal(command, *instead, f"{key}={'x' * 300}", codes=(1, 2))


def test_a_cache_that_cannot_be_written(refusal, monkeypatch):
    monkeypatch.setenv("NANOMDM_CACHE", NO_FOLDER)
    assert NO_FOLDER in refusal("train", codes=(1, 2))


@pytest.mark.parametrize(
    "words", [["model.n_head=3"], ["system.compile=maybe"], ["data.path=nowhere"], ["nope=1"]]
)
def test_a_mistake_makes_no_out_dir(run, text_file, words):
    assert run("train.py", *TINY, f"data.path={text_file}", *words).code == 2
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["train", "eval"])
def test_wandb_that_is_not_installed_is_found_out_before_anything_is_touched(
    refusal, command, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert names(refusal(command, "logging.wandb=true"), "logging.wandb=true | pip install wandb")


# --- Texts and bins -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("mark.txt", b"\xef\xbb\xbf", "mark.txt is empty"),
        ("latin.txt", b"KING 1\n\xe9", "latin.txt is not UTF-8 (byte 7) | convert"),
        ("wide.txt", "KING 1".encode("utf-16"), "wide.txt is not UTF-8 (byte 0) | convert"),
        ("lines.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "lines.jsonl, line 2 | text"),
        ("broken.jsonl", b"KING 1\n", "broken.jsonl, line 1 | JSON"),
    ],
)
def test_a_text_that_cannot_be_read(refusal, name, data, named):
    Path(name).write_bytes(data)
    assert names(refusal("train", f"data.path={name}"), named)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("K", "short.txt has 1 char"),
        ("KING 1", "short.txt has 5 tokens | model.block_size=32 | longer text"),
        ("K" * 35, "short.txt has 31 tokens | model.block_size=32 | longer text"),
    ],
)
def test_a_text_that_is_shorter_than_a_block(refusal, text, named):
    Path("short.txt").write_text(text)
    assert names(refusal("train", "data.path=short.txt"), named)


@pytest.mark.parametrize(
    ("path", "named"),
    [("nowhere.txt", "nowhere.txt | data.path"), ("folder", "folder | .txt, .md")],
)
def test_a_text_that_is_not_there(refusal, path, named):
    Path("folder").mkdir()
    assert names(refusal("train", f"data.path={path}"), named)


def test_a_text_with_characters_that_the_checkpoint_lacks(refusal):
    Path("other.txt").write_text("KING 1\nΩ")
    line = refusal("eval", "data.path=other.txt")
    assert names(line, "other.txt | no character 'Ω' (position 7) | data.tokenizer=byte")


AB = {"dtype": "uint16", "tokenizer": {"kind": "char", "characters": "ab"}}


@pytest.fixture
def bins(tmp_path):
    """Write the folder `bins` of two splits, each of these token ids, with this meta.json."""

    def bins(ids: list[int], meta: object) -> None:
        (tmp_path / "bins").mkdir()
        for split in ("train", "val"):
            np.array(ids, np.uint16).tofile(tmp_path / "bins" / f"{split}.bin")
        if meta is not None:
            (tmp_path / "bins" / "meta.json").write_text(json.dumps(meta))

    return bins


@pytest.mark.parametrize(
    ("ids", "meta", "named"),
    [
        ([0, 1, 2] * 50, AB, "train.bin | token 2 | vocabulary of 2 | another tokenizer"),
        ([0] * 31, AB, "31 tokens | model.block_size=32 | set model.block_size=31 or less"),
        ([], AB, "train.bin | empty | prepare"),
        ([0] * 99, AB | {"dtype": "float16"}, "meta | uint16 or uint32 | prepare"),
        ([0] * 99, AB | {"tokenizer": {"kind": "word"}}, "bins | word | prepare"),
        ([0] * 99, {"dtype": "uint16"}, "meta | bins | prepare"),
        ([0] * 99, [], "meta | bins | prepare"),
        ([0] * 99, None, "bins has no meta | data.tokenizer=gpt2 | data.tokenizer=byte"),
    ],
    ids=["id beyond vocabulary", "short", "empty", "dtype", "kind", "keys", "list", "no meta"],
)
def test_bins_that_cannot_be_used(refusal, bins, ids, meta, named):
    bins(ids, meta)
    assert names(refusal("train", "data.path=", "data.dir=bins"), named)


def test_bins_of_which_one_is_cut_within_a_token(refusal, bins):
    bins([0] * 99, AB)
    Path("bins/val.bin").write_bytes(b"\0" * 99)
    assert names(refusal("train", "data.path=", "data.dir=bins"), "val.bin | cut | prepare")


def test_bins_of_which_one_is_missing(refusal, bins):
    bins([0] * 99, AB)
    Path("bins/val.bin").unlink()
    line = refusal("train", "data.path=", "data.dir=bins")
    assert names(line, "val.bin is missing | data.dir")


def test_bins_without_meta_and_a_tokenizer_that_does_not_exist(refusal, bins):
    bins([0] * 99, None)
    line = refusal("train", "data.path=", "data.dir=bins", "data.tokenizer=word")
    assert names(line, "data.tokenizer=word | gpt2 | byte")


def test_bins_that_were_made_with_another_tokenizer_than_the_checkpoint_has(refusal, bins):
    bins([0] * 99, AB)
    assert names(refusal("eval", "data.dir=bins"), "bins | another tokenizer")


# --- Checkpoints --------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop(key: str, path: Path) -> None:
    """Leave out an entry of a checkpoint that is sound otherwise."""
    state = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != key}, path)


DAMAGES = {
    "missing": (Path.unlink, "no checkpoint at"),
    "a text": (lambda path: path.write_text("KING"), "is damaged or no checkpoint | train again"),
    "cut": (cut, "is damaged or no checkpoint | train again"),
    "one byte flipped": (flip_a_byte, "is damaged | checksum | train again"),
    "foreign": (
        lambda path: torch.save({"model": {}}, path),
        "is not a checkpoint of this project",
    ),
    "of another version": (
        lambda path: torch.save({"format": checkpoint.FORMAT, "version": 99}, path),
        "version 99 | 1",
    ),
    "without weights": (lambda path: drop("ema", path), "train"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["sample", "resume", "init_from"])
def test_a_checkpoint_that_cannot_be_used(refusal, out, command, damage):
    spoil, named = DAMAGES[damage]
    spoil(out / "ckpt.pt")
    assert names(refusal(command), f"out/ckpt.pt | {named}")


# --- Resuming and starting from weights ---------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.n_layer=3"], "model.n_layer=3 | 2 | leave it out"),
        (["model.n_embd=64"], "model.n_embd=64 | 32 | leave it out"),
        (["model.dropout=0.5"], "model.dropout=0.5 | 0.0 | leave it out"),
        (["data.tokenizer=byte"], "data.tokenizer=byte | char | leave it out"),
        (["data.path=other.txt"], "other.txt | another out_dir"),
        (["training.optimizer=adamw"], "training.optimizer=adamw | muon | leave it out"),
        (["experiment=small"], "experiment | leave it out"),
        (["training.grad_accum=3"], "training.grad_accum=3 | training.batch_size=8"),
        (["training.init_from=out/best.pt"], "training.init_from | training.resume | choose"),
    ],
)
def test_an_interrupted_run_is_not_resumed_as_another(refusal, text_file, words, named):
    Path("other.txt").write_text(text_file.read_text() + "more")
    assert names(refusal("resume", *words), named)


def test_a_run_is_not_resumed_when_its_text_has_changed(refusal, out):
    state = checkpoint.load(out / "ckpt.pt")
    state["corpus"]["sha256"] = "0" * 64
    checkpoint.save(out / "ckpt.pt", state)
    assert names(refusal("resume"), "kings.txt | new run in another out_dir")


def test_a_run_is_not_resumed_from_averaged_weights_alone(refusal, out):
    shutil.copy(out / "best.pt", out / "ckpt.pt")
    assert names(refusal("resume"), "out/ckpt.pt | training.init_from")


@pytest.mark.parametrize("word", ["training.learning_rate=1", "training.weight_decay=9"])
def test_what_is_named_on_resuming_is_not_silently_ignored(run, trained, word):
    weights = []
    for words in ([], [word]):
        out = shutil.copytree(trained, f"out{len(weights)}")
        start = ("training.resume=true", f"out_dir={out}", "training.max_iters=14")
        code = run("train.py", *start, *words).code
        weights.append(checkpoint.load(f"{out}/ckpt.pt")["model"]["embedding.weight"])
    assert code == 2 or not torch.equal(*weights)


def test_a_run_whose_folder_was_moved_is_resumed_where_it_is(run, out):
    state = checkpoint.load(out / "ckpt.pt")
    state["config"]["out_dir"] = "before"
    checkpoint.save(out / "ckpt.pt", state)
    assert run("train.py", "training.resume=true", "training.max_iters=13").code == 0
    assert not Path("before").exists() and checkpoint.load(out / "ckpt.pt")["step"] == 13


@pytest.mark.parametrize("word", ["data.path=kings.txt", "out_dir=out"])
def test_a_run_is_resumed_when_its_text_lies_elsewhere_and_is_the_same(
    run, out, text_file, word, monkeypatch
):
    shutil.copy(text_file, "kings.txt")
    monkeypatch.setenv("NANOMDM_CACHE", "elsewhere")
    words = ("training.resume=true", "out_dir=out", "training.max_iters=13", word)
    assert run("train.py", *words).code == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.n_layer=3"], "model.n_layer=3 | checkpoint | 2 | leave it out"),
        (["model.n_embd=64"], "model.n_embd=64 | checkpoint | 32 | leave it out"),
        (["model.block_size=16"], "model.block_size=16 | checkpoint | 32 | leave it out"),
        (["model.conv_width=3"], "model.conv_width=3 | checkpoint | leave it out"),
        (["data.tokenizer=byte"], "data.tokenizer=byte | checkpoint"),
        (["experiment=small"], "checkpoint"),
        (["data.path=other.txt"], "no character 'Ω' (position 0)"),
    ],
)
def test_weights_are_not_started_from_as_another_network(refusal, words, named):
    Path("other.txt").write_text("Ω" * 99)
    assert names(refusal("init_from", *words), named)


def test_the_folder_of_an_export_is_answered_with_the_way_to_import_it(refusal):
    Path("hub").mkdir()
    Path("hub/config.json").write_text("{}")
    line = refusal("sample", "checkpoint=hub")
    assert names(line, "no checkpoint at hub | python -m tools.import_weights from=hub to=")


def test_another_tokenizer_than_the_bins_have_is_refused(refusal, bins):
    bins([0, 1] * 50, AB)
    line = refusal("train", "data.path=", "data.dir=bins", "data.tokenizer=byte")
    assert names(line, "data.tokenizer=byte | bins has (char) | leave it out")


def test_a_folder_without_bins_is_answered_with_the_way_for_texts(refusal):
    Path("texts").mkdir()
    line = refusal("train", "data.path=", "data.dir=texts")
    assert names(line, "no .bin file in data.dir=texts | data.path=texts")


def test_an_output_in_the_place_of_the_checkpoint_is_refused(refusal):
    line = refusal("sample", "output=out/ckpt.pt")
    assert names(line, "output=out/ckpt.pt and checkpoint are one file | another")


def test_an_empty_out_dir_is_refused(refusal):
    assert names(refusal("train", "out_dir="), "out_dir is empty | out_dir=.")


def test_a_cache_that_cannot_be_written_is_named(refusal, monkeypatch):
    monkeypatch.setenv("NANOMDM_CACHE", NO_FOLDER)
    line = refusal("train", "data.tokenizer=byte")
    assert names(line, f"NANOMDM_CACHE={NO_FOLDER} | choose another")


def test_an_option_of_another_type_is_refused_with_the_type(refusal, monkeypatch):
    def mine(state, pull: float = 1.0):
        raise AssertionError

    monkeypatch.setitem(STRATEGIES, "mine", mine)
    words = ("sampling.strategy=mine", "sampling.options={pull: abc}")
    assert names(refusal("sample", *words), "sampling.options.pull=abc | not of type float")


def test_a_misspelt_blank_that_is_text_is_said(run, text_file):
    words = ("data.tokenizer=byte", f"data.path={text_file}", "training.max_iters=1")
    assert run("train.py", *TINY, *words).code == 0
    result = run("sample.py", "prompt=a [mask] b", "sampling.steps=2")
    assert result.out.startswith("a [mask] b")
    assert "[mask] is no blank, which is written [MASK] or [MASK*n]\n" in result.err
    assert "is no blank" not in run("sample.py", "prompt=\\[MASK]", "sampling.steps=2").err


def test_what_an_autoregressive_network_ignores_is_said(run, text_file):
    words = ("training.objective=ar", f"data.path={text_file}", "training.sample_interval=0")
    assert run("train.py", *TINY[:-4], *TINY[-2:], *words).code == 0
    sampled = run("sample.py", "sampling.strategy=margin", "sampling.steps=3")
    for key in ("sampling.steps", "sampling.strategy"):
        assert f"{key} has no effect: out/ckpt.pt is autoregressive" in sampled.err
    scored = run("eval.py", "eval.draws=3")
    assert "eval.draws has no effect: out/ckpt.pt is autoregressive, scored exactly" in scored.err
