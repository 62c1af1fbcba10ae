"""Checkpoints that are whole, and every way in which one can be something else."""

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

from nanomdm import checkpoint
from nanomdm.checkpoint import load, save

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


# --- Made by a stranger -------------------------------------------------------------------------
# Sound archives, their checksums right, of what no honest run would save.

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
    "half a character": lambda: "\ud800",
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
