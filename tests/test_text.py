"""Text from files and from a server on this machine that behaves as badly as servers do."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import environment

from nanomdm import text
from nanomdm.errors import UserError
from nanomdm.text import download, find, read_text, shakespeare

ROOT = Path(__file__).resolve().parent.parent
BODY = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 20
SHA256 = hashlib.sha256(BODY).hexdigest()


# --- Files --------------------------------------------------------------------------------------


def written(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.any"])
def test_a_file_is_read_as_it_is_but_for_line_ends_of_windows(name, tmp_path):
    content = "Ünï\r\n\n😀\r \t"
    assert read_text(written(tmp_path / name, content)) == "Ünï\n\n😀\r \t"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert read_text(written(tmp_path / "a.txt", b"\xef\xbb\xbfHi")) == "Hi"


def test_the_texts_of_a_jsonl_are_joined_by_a_newline(tmp_path):
    lines = '{"text": "one\\ntwo"}\n\n{"id": 7, "text": "\\u00fc"}\r\n'
    assert read_text(written(tmp_path / "a.jsonl", lines)) == "one\ntwo\nü"


def test_a_line_separator_within_a_jsonl_string_is_text(tmp_path):
    line = json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False)
    assert read_text(written(tmp_path / "a.jsonl", line)) == "one\u2028two\x85three"


def test_a_folder_is_its_texts_in_the_order_of_their_paths(tmp_path):
    for name in ("c/a.txt", "b.md", "a.txt"):
        written(tmp_path / name, name)
    written(tmp_path / "b.jsonl", '{"text": "b.jsonl"}')
    assert read_text(tmp_path) == "a.txt\nb.jsonl\nb.md\nc/a.txt"


def test_other_files_of_a_folder_are_left_out(tmp_path):
    written(tmp_path / "a.txt", "text")
    written(tmp_path / "image.png", b"\x89PNG")
    assert read_text(tmp_path) == "text"


def test_a_folder_whose_name_ends_like_a_file_is_read_once(tmp_path):
    written(tmp_path / "plays.txt" / "a.txt", "once")
    assert read_text(tmp_path) == "once"


def test_a_missing_path_is_refused_with_its_key(tmp_path):
    with pytest.raises(ValueError, match=r"no file or folder .*nowhere\.txt: check data\.path"):
        read_text(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused_by_its_name(content, tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        read_text(written(tmp_path / "a.txt", content))


def test_a_jsonl_without_documents_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl is empty"):
        read_text(written(tmp_path / "a.jsonl", "\n\n"))


def test_a_file_in_another_encoding_is_refused_with_the_place(tmp_path):
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 \(byte 4\): convert it"):
        read_text(written(tmp_path / "a.txt", b"f\xc3\xbcr\xfc"))


def test_a_folder_without_text_is_refused_with_what_it_should_have(tmp_path):
    with pytest.raises(ValueError, match=r"no \.txt, \.md, \.jsonl file in "):
        read_text(tmp_path)


@pytest.mark.parametrize(
    "line", ['{"text": "cut', "{}", "[1]", '"text"', "7", '{"text": null}', '{"body": "x"}']
)
def test_a_jsonl_line_without_text_is_refused_with_its_number(line, tmp_path):
    path = written(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected .* \"text\" field"):
        read_text(path)


def found(dataset: str, path: str, cache: str) -> tuple[str, str]:
    content = find(dataset, path, cache)
    return content.name, content.text


def test_a_path_goes_before_a_dataset_and_gives_its_own_name(tmp_path):
    path = written(tmp_path / "mine.txt", "words")
    assert found("shakespeare", str(path), str(tmp_path)) == ("mine.txt", "words")


def test_a_folder_given_with_a_slash_keeps_its_name(tmp_path):
    written(tmp_path / "mine" / "a.txt", "words")
    assert found("plays", f"{tmp_path}/mine/", "")[0] == "mine"


def test_plays_is_the_shipped_file():
    shipped = (ROOT / "corpora" / "plays.txt").read_bytes().decode()
    assert found("plays", "", "") == ("plays", shipped)


def test_an_unknown_dataset_is_refused_with_the_choices():
    message = r"data\.dataset=moby is unknown: choose shakespeare, plays, sudoku4, .* data\.path"
    with pytest.raises(ValueError, match=message):
        find("moby", "", "")


# --- Downloads ----------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Each path is a way to answer; `stop` ends the slow ones."""

    def do_GET(self):
        self.server.requests.append(self.path)
        getattr(self, self.path.strip("/"))()

    def answer(self, body: bytes, length: int | None = None) -> None:
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def right(self) -> None:
        self.answer(BODY, len(BODY))

    def unsized(self) -> None:  # ends where the connection does
        self.answer(BODY)

    def wrong(self) -> None:
        self.answer(BODY[::-1], len(BODY))

    def cut(self) -> None:
        self.answer(BODY[:-1], len(BODY))

    def empty(self) -> None:
        self.answer(b"", 0)

    def silent(self) -> None:
        self.server.stop.wait(20)

    def stuck(self) -> None:  # falls silent within the body
        self.answer(BODY[:9], len(BODY))
        self.server.stop.wait(20)

    def drip(self) -> None:
        self.answer(b"", 10**6)
        while not self.server.stop.wait(0.02):
            try:
                self.wfile.write(b"x")
            except OSError:  # the client has gone
                return

    def endless(self) -> None:
        self.answer(b"")
        while not self.server.stop.is_set():
            try:
                self.wfile.write(b"x" * 2**16)
            except OSError:
                return

    def gone(self) -> None:
        self.send_error(404)

    def garbage(self) -> None:
        self.wfile.write(b"\x00\x01 this is not HTTP\r\n\r\n")

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch, ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        patch.setenv("no_proxy", "127.0.0.1")
        s.requests, s.stop, s.daemon_threads = [], threading.Event(), True
        s.url = f"http://127.0.0.1:{s.server_address[1]}"
        threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
        yield s
        s.stop.set()
        s.shutdown()


SLOW = {"silent", "stuck", "drip"}
FAILURES = ["wrong", "cut", "empty", "silent", "stuck", "drip", "endless", "gone", "garbage"]


def fetch(server, answer: str, path: Path, **options) -> None:
    options = {"timeout": 0.2 if answer in SLOW else 9.0, "limit": 2**20} | options
    download(f"{server.url}/{answer}", path, SHA256, **options)


@pytest.mark.parametrize("answer", ["right", "unsized"])
def test_the_right_file_arrives_whole_in_a_folder_made_for_it(answer, server, tmp_path):
    fetch(server, answer, tmp_path / "new" / "a.txt")
    assert (tmp_path / "new" / "a.txt").read_bytes() == BODY


def test_the_right_file_leaves_nothing_beside_it(server, tmp_path):
    fetch(server, "right", tmp_path / "a.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("answer", FAILURES)
def test_a_failed_download_is_an_os_error_and_leaves_nothing(answer, server, tmp_path):
    with pytest.raises(OSError):
        fetch(server, answer, tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", ["wrong", "silent"])
def test_a_failed_download_leaves_the_file_that_was_there(answer, server, tmp_path):
    written(tmp_path / "a.txt", "old")
    with pytest.raises(OSError):
        fetch(server, answer, tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_server_that_is_not_there_is_an_os_error(server, tmp_path):
    with pytest.raises(OSError):
        download("http://127.0.0.1:1/right", tmp_path / "a.txt", SHA256, timeout=0.5)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("wrong", f"its {len(BODY):,} bytes do not match the pinned SHA-256"),
        ("endless", "more than 1,048,576 bytes"),
        ("silent", "timed out"),
        ("gone", "404"),
        ("garbage", "broken answer"),
    ],
)
def test_a_failed_download_says_why(answer, message, server, tmp_path):
    with pytest.raises(OSError, match=message):
        fetch(server, answer, tmp_path / "a.txt")


def test_a_file_of_the_limit_arrives(server, tmp_path):
    fetch(server, "right", tmp_path / "a.txt", limit=len(BODY))
    assert (tmp_path / "a.txt").exists()


def test_a_file_beyond_the_limit_does_not_arrive(server, tmp_path):
    with pytest.raises(OSError, match=f"more than {len(BODY) - 1:,} bytes"):
        fetch(server, "right", tmp_path / "a.txt", limit=len(BODY) - 1)


@pytest.mark.parametrize("answer", ["silent", "stuck"])
def test_silence_is_waited_for_as_long_as_the_timeout(answer, server, tmp_path):
    start = time.monotonic()
    with pytest.raises(OSError):
        fetch(server, answer, tmp_path / "a.txt", timeout=0.3)
    assert 0.25 < time.monotonic() - start < 3


def test_an_answer_that_drips_is_given_up_after_six_timeouts(server, tmp_path):
    start = time.monotonic()
    with pytest.raises(OSError, match="not finished after 1.2 seconds"):
        fetch(server, "drip", tmp_path / "a.txt", timeout=0.2)
    assert 1.15 < time.monotonic() - start < 5


def test_a_file_that_cannot_be_put_in_place_leaves_nothing(server, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        fetch(server, "right", tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


# --- Tiny Shakespeare ---------------------------------------------------------------------------


@pytest.fixture
def pinned(monkeypatch):
    """The server's text is tiny Shakespeare."""
    monkeypatch.setattr(text, "SHAKESPEARE_SHA256", SHA256)


def read(named: tuple[str, Path]) -> tuple[str, str]:
    return named[0], read_text(named[1])


def test_shakespeare_is_downloaded_into_the_cache_on_first_use(server, pinned, tmp_path):
    named = read(shakespeare(tmp_path, f"{server.url}/right"))
    assert named == ("shakespeare", BODY.decode()) and len(list(tmp_path.iterdir())) == 1


def test_shakespeare_is_downloaded_once(server, pinned, tmp_path):
    server.requests.clear()
    for _ in range(2):
        shakespeare(tmp_path, f"{server.url}/right")
    assert server.requests == ["/right"]


def test_a_wrong_file_in_the_cache_is_fetched_again(server, pinned, tmp_path):
    shakespeare(tmp_path, f"{server.url}/right")
    (cached,) = tmp_path.iterdir()
    cached.write_bytes(BODY[:100])
    assert read(shakespeare(tmp_path, f"{server.url}/right")) == ("shakespeare", BODY.decode())


@pytest.mark.parametrize("answer", ["wrong", "gone", "garbage"])
def test_the_shipped_plays_stand_in_under_their_own_name(answer, server, pinned, tmp_path):
    shipped = (ROOT / "corpora" / "plays.txt").read_bytes().decode()
    assert read(shakespeare(tmp_path, f"{server.url}/{answer}")) == ("plays", shipped)


@pytest.mark.parametrize(("answer", "reason"), [("wrong", "SHA-256"), ("gone", "Not Found")])
def test_the_stand_in_is_announced_in_one_line_on_stderr(
    answer, reason, server, pinned, tmp_path, capsys
):
    shakespeare(tmp_path, f"{server.url}/{answer}")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and reason in err and "plays" in err


def test_shakespeare_that_arrives_is_not_announced(server, pinned, tmp_path, capsys):
    shakespeare(tmp_path, f"{server.url}/right")
    assert capsys.readouterr() == ("", "")


def test_the_documents_of_a_folder_are_named_by_their_paths_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.md").write_text("1")
    (tmp_path / "a.txt").write_text("2")
    found = text.read(tmp_path)
    assert found.files == [("a.txt", ["2"]), ("b/one.md", ["1"])]
    assert found.layout == "documents"


def test_a_text_that_the_memory_cannot_hold_is_answered_with_the_way_that_can(
    tmp_path, monkeypatch
):
    path = written(tmp_path / "a.txt", "x" * 100)
    monkeypatch.setattr(text, "memory", lambda: 1200)
    assert read_text(path) == "x" * 100
    monkeypatch.setattr(text, "memory", lambda: 1199)
    for each in (path, tmp_path):
        with pytest.raises(UserError, match=rf"tools\.prepare dataset={each}"):
            read_text(each)


def test_the_memory_that_a_text_takes_is_what_the_limit_says(tmp_path):
    """In a process of its own, whose peak it is; the text is large beside what Python needs."""
    (tmp_path / "a.txt").write_text("The crown.\n" * (2**25 // 11))
    code = r"""
import re
from pathlib import Path
from types import SimpleNamespace
import data
status = Path("/proc/self/status")
peak = lambda: 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])
before = peak()
settings = dict(dir="", path="a.txt", dataset="", tokenizer="char", vocab_size=0, rows=False)
data.load(SimpleNamespace(**settings))
print((peak() - before) / 2**25)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from Linux's /proc")
    env = environment(NANOMDM_CACHE=str(tmp_path))
    command = [sys.executable, "-c", code]
    taken = float(subprocess.check_output(command, cwd=tmp_path, env=env, text=True))
    assert text.MEMORY - 3 < taken < text.MEMORY
