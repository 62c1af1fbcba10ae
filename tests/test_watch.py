"""nanomdm/watch.py: how a text is shown on a terminal while it appears."""

import subprocess
import sys

import pytest
import torch
from conftest import environment

from nanomdm import watch
from nanomdm.tokenizers import ByteTokenizer

STEPS = ("sampling.steps=6", "system.device=cpu")


@pytest.fixture
def sampled(run, trained):
    """sampled("key=value", ...): what sample.py prints for the tiny model."""

    def sampled(*words: str) -> str:
        result = run("sample.py", f"checkpoint={trained}/ckpt.pt", *STEPS, *words)
        assert result.code == 0, result.err
        return result.out

    return sampled


@pytest.fixture
def watched(sampled, monkeypatch):
    """watched("key=value", ...): all that is written to a terminal."""

    def watched(*words: str) -> str:
        monkeypatch.setattr(watch, "FRAME", 0.0)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return sampled("sampling.watch=true", *words)

    return watched


def test_a_watched_text_is_on_the_screen_once_in_the_end(watched, sampled):
    """All else is on the alternate screen, which the terminal forgets."""
    written = watched("prompt=KING", "num_samples=3")
    assert written.count(watch.ENTER) == written.count(watch.LEAVE) == 1
    before, rest = written.split(watch.ENTER)
    _, after = rest.split(watch.LEAVE)
    assert before + after == sampled("prompt=KING", "num_samples=3")


def test_a_watched_text_shows_its_masks_and_what_is_new(watched):
    written = watched("prompt=KING 1", "sampling.strategy=confidence")
    frames = written.split(watch.LEAVE)[0].split(watch.CLEAR)[1:]
    masks = [frame.count("░") for frame in frames]
    assert masks[0] > 0 and masks[-1] == 0 and masks == sorted(masks, reverse=True)
    assert len(frames) == 6 and all(watch.NEW in frame for frame in frames)


def test_new_tokens_alone_are_green(monkeypatch, capsys):
    monkeypatch.setattr(watch, "FRAME", 0.0)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    ids = torch.full((1, 4), 256)
    screen = watch.Watch(ByteTokenizer(), 256, ids[0])
    for step, (column, letter) in enumerate(((1, "b"), (2, "c")), start=1):
        ids[0, column] = ord(letter)
        screen.show(slice(0, 4), step, 0.5, ids)
    screen.show(slice(0, 4), 3, 0.0, ids)  # nothing is new, and nothing is shown
    screen.close()
    M, N, P = watch.MASKED, watch.NEW, watch.PLAIN
    frames = f"{M}░{N}b{M}░░{P}", f"{M}░{P}b{N}c{M}░{P}"
    written = watch.ENTER + "".join(watch.CLEAR + frame for frame in frames) + watch.LEAVE
    assert capsys.readouterr().out == written


def test_the_screen_of_before_comes_back_after_an_error(tmp_path):
    """Also after Ctrl-C: when the process ends."""
    code = (
        "import sys, torch; sys.stdout.isatty = lambda: True\n"
        "from nanomdm.tokenizers import ByteTokenizer\n"
        "from nanomdm.watch import Watch\n"
        "ids = torch.full((1, 3), 256)\n"
        "Watch(ByteTokenizer(), 256, ids[0]).show(slice(0, 3), 1, 0.5, ids - 190)\n"
        "raise KeyboardInterrupt\n"
    )
    python = [sys.executable, "-c", code]
    result = subprocess.run(
        python, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert result.stdout.startswith(watch.ENTER) and result.stdout.endswith(watch.LEAVE)


def test_nothing_is_shown_when_piped(run, trained):
    words = (f"checkpoint={trained}/ckpt.pt", *STEPS)
    plain, piped = run("sample.py", *words), run("sample.py", *words, "sampling.watch=true")
    assert piped.out == plain.out and "no terminal" in piped.err


def test_control_characters_never_reach_the_terminal():
    ids = list(b"a\x1b[2Jb\x07\nc")
    shown = watch.styled(ByteTokenizer(), ids, [False] * len(ids), mask_id=256)
    assert shown == f"{watch.PLAIN}a\\x1b[2Jb\\x07\nc{watch.PLAIN}"
