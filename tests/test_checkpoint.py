"""Checkpoints that are whole, and every way in which one can be something else."""

import hashlib
import itertools
import os
import pickle
import stat
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import load_model

from model import ModelConfig, Transformer
from nanomdm import checkpoint
from nanomdm.checkpoint import load, save
from nanomdm.errors import UserError

STATE = {
    "model": {"weight": torch.arange(1.0, 7).view(2, 3), "half": torch.ones(3).bfloat16()},
    "optimizer": [{"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"betas": (0.9, 0.95)}]}],
    "where": torch.tensor([True, False]),
    "step": 12,
    "best": 1.5,
    "corpus": {"name": "plays", "path": None, "ids": torch.tensor([2**40, -1])},
}
STAMP = {"format": "nanomdm", "version": 1}


class Payload:
    """Runs a shell command when it is unpickled without care."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'echo > "{self.marker}"',)


def same(a: object, b: object) -> bool:
    """Equal in type, dtype and every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture
def path(tmp_path) -> Path:
    """A checkpoint of STATE, alone in its folder."""
    path = tmp_path / "out" / "ckpt.pt"
    path.parent.mkdir()
    save(path, STATE)
    return path


# --- Whole --------------------------------------------------------------------------------------


def test_a_state_comes_back_in_every_bit_with_its_stamp(path):
    assert same(load(path), STAMP | STATE)


def test_saving_leaves_nothing_but_the_checkpoint(path):
    assert [file.name for file in path.parent.iterdir()] == ["ckpt.pt"]


def test_saving_replaces_the_checkpoint_that_was_there(path):
    save(path, {"step": 13})
    assert load(path) == STAMP | {"step": 13}


def test_paths_may_be_strings(path):
    save(str(path), {"step": 13})
    assert load(str(path))["step"] == 13


@pytest.mark.skipif(os.name != "posix", reason="this system cannot sync folders")
def test_the_file_and_then_its_folder_are_synced_around_the_rename(path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(*paths) -> None:
        events.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    save(path, STATE)
    assert events == ["file", "rename", "folder"]


# --- Saving fails -------------------------------------------------------------------------------


def fail(*args, **options):
    raise OSError("no space left on device")


@pytest.mark.parametrize("function", ["torch.save", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_the_old_checkpoint_alone(function, path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(function, fail)
        save(path, {"step": 13})
    assert same(load(path), STAMP | STATE)


@pytest.mark.parametrize("function", ["torch.save", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_no_temporary_file(function, path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(function, fail)
        save(path, {"step": 13})
    assert [file.name for file in path.parent.iterdir()] == ["ckpt.pt"]


def save_beyond_the_limit(path: Path) -> None:
    """Save 4 MB where no file may grow beyond 64 KiB, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        save(path, {"weight": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_save_that_runs_out_of_space_leaves_the_old_checkpoint_and_nothing_else(path):
    with pytest.raises((OSError, RuntimeError)):
        save_beyond_the_limit(path)
    assert same(load(path), STAMP | STATE) and len(list(path.parent.iterdir())) == 1


def test_a_save_into_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        save(tmp_path / "nowhere" / "ckpt.pt", STATE)


# --- Something else -----------------------------------------------------------------------------


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")


FOREIGN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("KING:\nNo.\n" * 50),
    "png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(200)),
    "zip": zipped,
    "pickle": lambda path: path.write_bytes(pickle.dumps(STAMP | {"step": 1})),
    "list": lambda path: torch.save([1, 2], path),
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "weights": lambda path: torch.save(STATE["model"], path),
    "another format": lambda path: torch.save(STAMP | {"format": "nanogpt"}, path),
    "another version": lambda path: torch.save(STAMP | {"version": 2}, path),
    "no version": lambda path: torch.save({"format": "nanomdm"}, path),
    "a payload": lambda path: torch.save(STAMP | {"x": Payload(path.parent / "executed")}, path),
    "a legacy payload": lambda path: torch.save(
        STAMP | {"x": Payload(path.parent / "executed")}, path, _use_new_zipfile_serialization=False
    ),
    "missing": Path.unlink,
    "folder": lambda path: path.unlink() or path.mkdir(),
}


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    return str(caught.value)


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_refused_in_one_line_that_names_it(kind, path):
    FOREIGN[kind](path)
    message = refusal(path)
    assert str(path) in message and "\n" not in message and len(message) < len(str(path)) + 200


@pytest.mark.parametrize("kind", ["a payload", "a legacy payload"])
def test_a_payload_is_not_executed(kind, path):
    FOREIGN[kind](path)
    refusal(path)
    assert [file.name for file in path.parent.iterdir()] == ["ckpt.pt"]


def test_the_payload_of_these_tests_is_executed_by_a_careless_reader(path):
    FOREIGN["a payload"](path)
    torch.load(path, weights_only=False)
    assert (path.parent / "executed").exists()


def test_a_missing_checkpoint_is_refused_with_the_command_that_makes_one(tmp_path):
    message = refusal(tmp_path / "ckpt.pt")
    assert "no checkpoint at" in message and "`python train.py`" in message


def test_another_version_is_refused_with_both_numbers(path):
    FOREIGN["another version"](path)
    assert "version 2, this code reads 1" in refusal(path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused_in_one_line(share, path):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert "\n" not in refusal(path)


def differs_silently(path: Path, content: bytes, position: int, flip: int) -> bool:
    """Whether the checkpoint loads, and as something else, once bits of one byte are flipped."""
    damaged = bytearray(content)
    damaged[position] ^= flip
    path.write_bytes(damaged)
    try:
        return not same(load(path), STAMP | STATE)
    except ValueError:
        return False


def test_no_flipped_byte_changes_what_is_loaded(path):
    content = path.read_bytes()
    positions = range(0, len(content), len(content) // 300)
    assert [i for i in positions if differs_silently(path, content, i, 0xFF)] == []


def test_no_flipped_bit_of_a_tensors_directory_entry_changes_what_is_loaded(path):
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    flips = [(i, 1 << bit) for i in range(start, start + 46) for bit in range(8)]
    assert [flip for flip in flips if differs_silently(path, content, *flip)] == []


def test_the_stamp_of_these_tests_is_the_codes():
    assert {"format": checkpoint.FORMAT, "version": checkpoint.VERSION} == STAMP


# --- Untrusted ----------------------------------------------------------------------------------
# Sound archives, their checksums right, of what no run saves.

STRANGE = {
    "a tensor of terabytes that repeats one number": lambda: torch.zeros(1).expand(2**40),
    "a buffer": lambda: bytearray(9),
    "a buffer of two gigabytes out of nothing": lambda: Buffer(),
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "a complex number": lambda: 1j,
    "a set": lambda: {1},
    "a key that is a tuple": lambda: {(1, 2): 3},
    "a tensor with NaN": lambda: torch.tensor([1.0, torch.nan]),
    "a tensor with infinity": lambda: torch.tensor([1.0, torch.inf]),
    "NaN": lambda: float("nan"),
    "a lone surrogate": lambda: "\ud800",
    "a list that unfolds to 3 ** 30 values": lambda: tripled(30),
}


class Buffer:
    def __reduce__(self):
        return bytearray, (2**31,)


def tripled(times: int) -> list:
    return [part := tripled(times - 1), part, part] if times else []


@pytest.mark.parametrize("kind", STRANGE)
def test_what_no_run_would_save_is_refused_at_once(kind, path):
    torch.save(STAMP | {"x": STRANGE[kind]()}, path)
    start = time.perf_counter()
    assert "is damaged or no checkpoint" in refusal(path)
    assert time.perf_counter() - start < 5


def rewritten(path: Path, change) -> None:
    """Make the archive again; change(name, content) gives name, content and compression."""
    with zipfile.ZipFile(path) as old:
        entries = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(path, "w") as new:
        for name, content, kind in itertools.starmap(change, entries):
            new.writestr(zipfile.ZipInfo(name), content, kind)


def test_an_archive_that_inflates_is_refused_before_it_does(path):
    rewritten(path, lambda name, content: (name, bytes(10**7), zipfile.ZIP_DEFLATED))
    start = time.perf_counter()
    assert "larger in memory than on the disk" in refusal(path)
    assert time.perf_counter() - start < 1


def test_an_archive_with_two_entries_of_one_name_is_refused(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/DATA.PKL", b"the other reader's")
    assert "two entries of one name" in refusal(path)


def test_names_in_an_archive_lead_nowhere(path):
    rewritten(path, lambda name, content: (f"../../{name.split('/')[-1]}", content, 0))
    refusal(path)
    assert [file.name for file in path.parent.parent.rglob("*")] == ["out", "ckpt.pt"]


@pytest.mark.parametrize(("claimed", "size"), [(10**9, 6), (6, 10**9), (10**9, 10**9)])
def test_a_tensor_that_claims_more_than_its_entry_is_refused(claimed, size, path):
    """The number of stored elements, and that of the tensor, in place of the true 6."""
    torch.save(STAMP | {"x": torch.arange(6.0)}, path)
    stored, shape = b"K\x06t", b"K\x00K\x06\x85"
    big = {6: b"K\x06", 10**9: b"J" + struct.pack("<i", 10**9)}

    def change(name: str, content: bytes) -> tuple[str, bytes, int]:
        assert not name.endswith("data.pkl") or (content.count(stored), content.count(shape)) == (
            1,
            1,
        )
        content = content.replace(shape, b"K\x00" + big[size] + b"\x85")
        return name, content.replace(stored, big[claimed] + b"t"), 0

    rewritten(path, change)
    assert "tensor" in refusal(path)


def test_a_pickle_that_counts_to_a_billion_is_refused(path):
    bomb = b"\x80\x02}r" + struct.pack("<I", 2**30) + b"."
    rewritten(path, lambda name, content: (name, bomb if "data.pkl" in name else content, 0))
    refusal(path)


def test_tensors_that_share_their_memory_share_it_again(path):
    whole = torch.arange(6.0)
    save(path, {"whole": whole, "part": whole[2:4], "turned": whole.view(2, 3).T})
    state = load(path)
    assert torch.equal(state["turned"], whole.view(2, 3).T)
    assert state["part"].data_ptr() == state["whole"].data_ptr() + 8


def test_torch_load_without_code_reads_the_same(path):
    assert same(torch.load(path, weights_only=True), load(path))


@pytest.mark.parametrize("value", [torch.zeros(0), torch.zeros(2, 0, 3), torch.tensor(5), {}, ()])
def test_what_is_empty_or_a_number_comes_back(value, path):
    save(path, {"x": value})
    assert same(load(path)["x"], value)


# --- A network and its tokenizer ----------------------------------------------------------------

SHAPE = {"vocab_size": 3, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}
LETTERS = {"kind": "char", "characters": "abc"}


@pytest.fixture
def network() -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SHAPE)).eval()


def written(path: Path, network: Transformer, **parts) -> Path:
    """A checkpoint as a run writes it, with these `parts` in place of its own; None leaves out."""
    state = {
        "model_config": SHAPE,
        "tokenizer": LETTERS,
        "config": {"data": {"dataset": "plays"}},
        "corpus": {"name": "abc", "sha256": "0" * 64},
        "step": 3,
        "best": 1.5,
        "ema": network.state_dict(),
        "model": network.state_dict(),
        "stats": {"loss_avg": 2.0, "skipped": 0.0},
        "optimizer": [],
    }
    save(path, {key: part for key, part in (state | parts).items() if part is not None})
    return path


IDS = torch.tensor([[0, 1, 2, 3]])


def test_a_network_is_loaded_with_its_logits_its_tokenizer_and_its_words(network, path):
    loaded = load_model(written(path, network))
    assert torch.equal(loaded.model(IDS), network(IDS)) and not loaded.model.training
    assert (
        loaded.tokenizer.state() == LETTERS | {"ends": False}
        and loaded.config["data"]["dataset"] == "plays"
    )
    assert loaded.weights == "EMA weights after 3 steps"


def test_the_averaged_weights_are_those_in_use(network, path):
    doubled = {name: 2 * weight for name, weight in network.state_dict().items()}
    loaded = load_model(written(path, network, model=doubled), resume=True)
    assert torch.equal(loaded.model(IDS), network(IDS))
    assert torch.equal(loaded.state["model"]["norm.weight"], doubled["norm.weight"])


def test_a_loaded_network_takes_no_second_copy_of_its_weights(network, path):
    loaded = load_model(written(path, network))
    for name, parameter in loaded.model.named_parameters():
        assert parameter.data_ptr() == loaded.state["ema"][name].data_ptr()


def test_weights_in_half_precision_are_used_in_float32_and_stay_as_they_are(network, path):
    halved = {name: weight.bfloat16() for name, weight in network.state_dict().items()}
    loaded = load_model(written(path, network, ema=halved))
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    assert {weight.dtype for weight in loaded.state["ema"].values()} == {torch.bfloat16}


def test_what_a_checkpoint_does_not_say_is_unknown(network, path):
    """The library saves no more than the network and the tokenizer; neither did it before."""
    needed = {"model_config": SHAPE, "tokenizer": LETTERS, "ema": network.state_dict()}
    save(path, needed)
    loaded = load_model(path)
    assert torch.equal(loaded.model(IDS), network(IDS))
    assert loaded.config == {} and loaded.state["corpus"] == {"name": "unknown", "sha256": ""}
    assert loaded.weights == "weights of an unknown run"


def test_imported_weights_say_where_they_come_from(network, path):
    loaded = load_model(written(path, network, origin="them/SMDM (SMDM)"))
    assert loaded.weights == "weights imported from them/SMDM (SMDM)"


ZEROS = {f"w{i}": torch.zeros(1) for i in range(3)}
WRONG = {  # parts, and what is said of them
    "no weights": ({"ema": None}, "expected ema to be of type dict, not NoneType"),
    "no shape": ({"model_config": None}, "expected model_config to be of type dict, not NoneType"),
    "a tokenizer's name": ({"tokenizer": "char"}, "expected tokenizer to be of type dict, not str"),
    "half a step": ({"step": 1.5}, "expected step to be of type int, not float"),
    "settings in a list": ({"config": [1]}, "expected config to be of type dict, not list"),
    "data in a list": ({"config": {"data": [1]}}, "expected config.data to be of type dict"),
    "a nameless corpus": ({"corpus": {"sha256": ""}}, "corpus.name and corpus.sha256 to be"),
    "an escape in a name": ({"corpus": {"name": "\x1b[2J", "sha256": ""}}, "to be printable"),
    "an escape in an origin": ({"origin": "\x1b[2J"}, "expected its origin"),
    "an unknown field": ({"model_config": SHAPE | {"n_legs": 2}}, "n_legs"),
    "a field that is missing": ({"model_config": {"n_layer": 1}}, "vocab_size"),
    "a field that is a number": ({"model_config": {7: 1}}, "keywords must be strings"),
    "no layers": ({"model_config": SHAPE | {"n_layer": 0}}, "model.n_layer=0 must be at least 1"),
    "a billion layers": (
        {"model_config": SHAPE | {"n_layer": 10**9}},
        "no weights for model.n_layer=1000000000",
    ),
    "another width": ({"model_config": SHAPE | {"n_embd": 16}}, "size mismatch for embedding"),
    "a width beyond 64 bits": ({"model_config": SHAPE | {"n_embd": 2**70}}, ""),
    "other names": ({"ema": ZEROS}, "Missing key"),
    "weights by numbers": ({"ema": {i: torch.zeros(1) for i in range(3)}}, ""),
    "weights that are texts": ({"ema": dict.fromkeys(ZEROS, "x")}, ""),
}


@pytest.mark.parametrize("kind", WRONG)
def test_parts_that_make_no_network_are_refused_in_one_line_each(kind, network, path):
    parts, said = WRONG[kind]
    written(path, network, **parts)
    with pytest.raises(UserError) as error:
        load_model(path)
    line = str(error.value)
    assert line.startswith(f"{path} holds no model of this version or class, train again: ")
    assert said in line and "\n" not in line and len(line) < len(str(path)) + 300


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        ({"kind": "char", "characters": "abcd"}, "its tokenizer has 4 tokens, its model 3"),
        ({"kind": "char", "characters": "aba"}, "the alphabet is empty or has duplicates"),
        ({"kind": "char", "characters": "abc", "ends": 1}, "expected ends to be true or false"),
        ({"kind": "word"}, "no tokenizer of this project"),
    ],
)
def test_a_tokenizer_that_does_not_go_with_the_network_is_refused(tokenizer, said, network, path):
    written(path, network, tokenizer=tokenizer)
    with pytest.raises(UserError, match=f"cannot be used: {said}"):
        load_model(path)


NO_RUN = {
    "averages alone": ({"optimizer": None}, "averaged weights only .* training.init_from="),
    "no weights": ({"model": None}, "expected model to be of type dict, not NoneType"),
    "weights of another size": ({"model": ZEROS}, "Missing key"),
    "no best bound": ({"best": None}, "expected best to be of type float, not NoneType"),
    "a bound that is a text": ({"best": "low"}, "expected best to be of type float, not str"),
    "figures in a list": ({"stats": [1.0]}, "expected stats to be of type dict, not list"),
    "a figure that is a text": (
        {"stats": {"skipped": "x"}},
        "expected skipped to be of type float",
    ),
}


@pytest.mark.parametrize("kind", NO_RUN)
def test_what_a_run_cannot_go_on_from_is_refused_to_resume_and_used_otherwise(kind, network, path):
    parts, said = NO_RUN[kind]
    assert load_model(written(path, network, **parts)).state["step"] == 3
    with pytest.raises(UserError, match=said):
        load_model(path, resume=True)


# --- Written before -----------------------------------------------------------------------------

FIGURES = ("loss_avg", "loss_max", "grad_norm_max", "skipped", "in_a_row")
BEFORE = {  # settings as the first version stored them, a few that are gone among them
    "out_dir": "out",
    "model": SHAPE | {"conv_width": 0, "tie_weights": True, "norm_eps": 1e-5},
    "diffusion": {"eps": 1e-3, "masking": "bernoulli", "weighting": 0.5},
    "data": {
        "dataset": "shakespeare",
        "path": "abc.txt",
        "dir": "",
        "tokenizer": "char",
        "vocab_size": 4096,
        "cache_dir": "prepared",
    },
    "training": {
        "max_iters": 3,
        "batch_size": 4,
        "warmup_iters": 1,
        "optimizer": "adamw",
        "min_lr_ratio": 0.0,
        "keep": 0,
        "max_skipped": 50,
        "eval_interval": 0,
        "sample_interval": 0,
    },
    "system": {"device": "cpu", "dtype": "float32", "compile": "false", "timeout": 30.0},
}
del BEFORE["model"]["vocab_size"]


def test_a_checkpoint_of_the_first_version_is_sampled_evaluated_and_resumed(run):
    """Made by hand, key for key what train.py wrote at commit 090e164."""
    network = Transformer(ModelConfig(**SHAPE, attention_gate=False)).eval()
    fields = vars(network.config) | {}
    del fields["attention_gate"]  # a later field
    text = "abc" * 200
    Path("abc.txt").write_text(text)
    moments = [  # matrices first, as the optimizer has them
        {"step": torch.tensor(2.0), "exp_avg": zeros, "exp_avg_sq": zeros}
        for zeros in sorted(map(torch.zeros_like, network.parameters()), key=lambda p: p.ndim < 2)
    ]
    state = {
        "format": "nanomdm",
        "version": 1,
        "model_config": fields,
        "tokenizer": LETTERS,
        "config": BEFORE,
        "corpus": {"name": "abc.txt", "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "step": 2,
        "best": 1.5,
        "ema": network.state_dict(),
        "model": network.state_dict(),
        "meter": dict.fromkeys(FIGURES, 0.0),
        "optimizer": [{"state": dict(enumerate(moments)), "param_groups": []}],
        "scaler": {},
    }
    Path("out").mkdir()
    torch.save(state, "out/ckpt.pt")
    assert torch.equal(load_model("out/ckpt.pt").model(IDS), network(IDS))
    assert run("sample.py", "prompt=ab", "sampling.steps=2", "system.device=cpu").out[:2] == "ab"
    assert run("eval.py", "eval.draws=1", "system.device=cpu").code == 0
    assert run("train.py", "training.resume=true").code == 0
    assert load("out/ckpt.pt")["step"] == 3
