"""The demo over HTTP: what it answers, what it refuses, and that nobody can keep it busy."""

import asyncio
import json
import re
import socket
import threading
import time
from contextlib import contextmanager

import pytest
from conftest import load_model

from nanomdm.checkpoint import Loaded
from nanomdm.prompts import make_canvas
from nanomdm.random import generator
from nanomdm.strategies import STRATEGIES

pytest.importorskip("starlette", reason="the demo is an extra: pip install starlette uvicorn")
pytest.importorskip("uvicorn", reason="the demo is an extra: pip install starlette uvicorn")
from starlette.testclient import TestClient
from test_view import sampler

from tools import guard
from tools.demo import listen
from tools.server import Demo, Limits, make_server
from tools.trace import unpack

HERE = "http://127.0.0.1:8000"
LIMITS = Limits("ckpt.pt", "KING", length=32, steps=64, generations=1, seconds=20)
SLOWLY = {"text": "", "strategy": "first_hitting"}  # 32 calls


@pytest.fixture(scope="module")
def loaded(trained) -> Loaded:
    return load_model(trained / "ckpt.pt")


@pytest.fixture
def demo(loaded) -> Demo:
    return Demo(loaded, LIMITS)


@pytest.fixture
def client(demo) -> TestClient:
    return TestClient(demo.app(), base_url=HERE, raise_server_exceptions=False)


def events(body: str) -> list[tuple[str, dict]]:
    parts = [part.split("\n") for part in body.split("\n\n") if part]
    return [(a.removeprefix("event: "), json.loads(b.removeprefix("data: "))) for a, b in parts]


# --- What it answers -----------------------------------------------------------------------------


def test_the_page_comes_with_the_headers_of_safety(client):
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "connect-src 'self'" in policy


def test_a_generation_is_the_one_that_sample_py_would_draw(client, loaded):
    wanted = {"text": "The [MASK*12] night", "steps": 6, "temperature": 0.7, "seed": 5}
    *steps, (last, done) = events(client.post("/generate", json=wanted).text)
    assert last == "done" and {name for name, _ in steps} == {"step"} and len(steps) == 7
    canvas = make_canvas(wanted["text"], 0, loaded.tokenizer, 32)
    settings = sampler("spread", steps=6, temperature=0.7)
    ids, is_masked = canvas.ids[None], canvas.is_masked[None]
    expected = settings.fill(loaded.model, ids, is_masked, generator=generator(5, "sample"))
    assert done["text"] == loaded.tokenizer.decode(expected.ids[0].tolist())
    assert done["calls"] == expected.calls and done["seconds"] > 0
    assert done["label"] == settings.label


def test_what_is_kept_stays_when_the_rest_is_generated_again(client, loaded):
    cells = [None, 3, None, None, 7, *[None] * 20, 1]
    *steps, (_, done) = events(client.post("/generate", json={"canvas": cells, "steps": 4}).text)
    filled = loaded.tokenizer.encode(done["text"]).tolist()
    assert len(filled) == len(cells)
    assert [filled[i] for i in (1, 4, 25)] == [3, 7, 1]
    written = {i for _, message in steps for i in unpack(message.get("set", ""))[::3]}
    assert written == {i for i, cell in enumerate(cells) if cell is None}


def test_tokens_of_a_text_come_with_their_texts(client, loaded):
    answer = client.post("/tokens", json={"text": "crown"}).json()
    assert answer == {"ids": loaded.tokenizer.encode("crown").tolist(), "texts": list("crown")}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_of_the_menu_generates(client, strategy):
    answer = client.post("/generate", json={"text": "KING", "strategy": strategy, "steps": 9})
    assert events(answer.text)[-1][0] == "done"


# --- What it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"steps": 65}, "steps=65 must lie in 1 ... 64"),
        ({"steps": 0}, "steps=0 must lie in 1 ... 64"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number"),
        ({"temperature": -1}, "temperature=-1.0 must lie in 0 ... 20"),
        ({"temperature": 21}, "temperature=21.0 must lie in 0 ... 20"),
        ({"guidance": 1e9}, "guidance=1000000000.0 must lie in 0 ... 20"),
        ({"strategy": "best"}, "strategy=best is unknown: choose stochastic"),
        ({"seed": -1}, "seed=-1 must lie in"),
        ({"seed": 2**64}, "must lie in 0 ... 9007199254740991"),
        ({"length": 33}, "the text has 33 tokens, and at most 32 can be shown"),
        ({"length": -1}, "prompt has 0 tokens but length is -1"),
        ({"text": "[MASK*999999999999]"}, "and at most 32 can be shown"),
        ({"text": "[MASK]" * 33}, "the text has 33 tokens"),
        ({"text": "n" * 33}, "prompt has 33 tokens but length is 32"),
        ({"text": "n" * 32}, "nothing is masked"),
        ({"text": "[MASK*0]"}, "a blank has at least one token"),
        ({"text": "ß"}, "the tokenizer has no character 'ß'"),
        ({"text": "\ud800"}, "lone surrogate"),
        ({"text": "n" * 20_001}, "longer than 20000 characters"),
        ({"text": ["KING"]}, "text must be a text"),
        ({"canvas": [None] * 33}, "canvas has 33 tokens, at most 32 are possible"),
        ({"canvas": [1, 2]}, "nothing is left to generate"),
        ({"canvas": [None, 35]}, "whole numbers from 0 to 34"),
        ({"canvas": [None, True]}, "whole numbers from 0 to 34"),
        ({"canvas": "no"}, "canvas must be a list"),
        ({"<img>": 1}, "no setting '<img>'"),
        ([], "the body must be a JSON object"),
    ],
    ids=str,
)
def test_a_bad_request_is_told_why(client, wanted, sentence):
    answer = client.post(
        "/generate", content=json.dumps(wanted), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400 and sentence in answer.json()["error"]
    assert answer.headers["content-type"] == "application/json"  # no HTML, whatever is in it
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_text_of_backslashes_takes_no_time(client):
    start = time.monotonic()  # 4 seconds before blanks were looked for from a run's first one only
    assert client.post("/generate", json={"text": "\\" * 20_000}).status_code == 400
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b'{"steps": NaN', b"[" * 50_000, b'{"seed": ' + b"9" * 5000 + b"}"]
)
def test_what_is_no_json_is_told_so(client, body):
    answer = client.post("/generate", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()) == (400, {"error": "the body is not JSON"})


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_form_of_another_page_could_send_is_refused(client, kind):
    answer = client.post("/generate", content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 415 and "application/json" in answer.json()["error"]


def test_a_large_body_is_refused(client):
    headers = {"content-type": "application/json"}
    answer = client.post("/generate", content=b" " * (guard.BODY + 1), headers=headers)
    assert answer.status_code == 413 and "larger than 65536 bytes" in answer.json()["error"]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "", "127.0.0.1:80:80"]
    + ["127.0.0.1@evil.example", "localhost.", "0.0.0.0", "[::1]", "127.0.0.1:8000\t"],
)
def test_another_host_is_refused(client, host):
    answer = client.get("/", headers={"host": host})
    assert answer.status_code == 421 and "localhost only" in answer.json()["error"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost:9000"])
def test_its_own_names_are_let_in_through_a_tunnel_too(client, host):
    headers = {"host": host, "origin": f"http://{host}"}
    assert client.get("/", headers=headers).status_code == 200
    assert client.post("/tokens", json={"text": "a"}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "https://127.0.0.1:8000"},
        {"origin": "http://127.0.0.1:9000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
    ids=str,
)
def test_a_page_of_another_origin_is_refused(client, headers):
    answer = client.post("/generate", json={"text": "KING"}, headers=headers)
    assert answer.status_code == 403 and "another" in answer.json()["error"]
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "path",
    ["/../README.md", "/%2e%2e/README.md", "/..%2f..%2fetc/passwd", "//etc/passwd", "/page.js"]
    + ["/tools/pages/page.js", "/favicon.ico", "/%00", "/docs", "/openapi.json"],
)
def test_there_is_no_other_path(client, path):
    answer = client.get(HERE + path)
    assert (answer.status_code, answer.json()) == (404, {"error": "not found: the page is /"})


def test_other_methods_are_refused(client):
    for method, path in (("GET", "/generate"), ("PUT", "/generate"), ("POST", "/")):
        assert client.request(method, path).status_code == 405


# --- Who keeps it busy ---------------------------------------------------------------------------


class Slow:
    """A network that counts its calls, and takes its time."""

    def __init__(self, model, seconds: float = 0.003):
        self.model, self.seconds, self.calls = model, seconds, 0
        self.device, self.config = model.device, model.config

    def __call__(self, xt):
        self.calls += 1
        time.sleep(self.seconds)
        return self.model(xt)


def slow(loaded, seconds: float = 0.003, **limits) -> tuple[Demo, Slow]:
    model = Slow(loaded.model, seconds)
    return Demo(loaded._replace(model=model), LIMITS._replace(**limits)), model


class Visit:
    """One POST to an app, over ASGI: `wait` (of the visitor's) is awaited before each chunk."""

    def __init__(self, app, wanted: dict, path: str = "/generate", sends_body: bool = True):
        self.app, self.path, self.sends_body = app, path, sends_body
        self.body, self.left = json.dumps(wanted).encode(), asyncio.Event()
        self.status, self.chunks = 0, []

    async def receive(self):
        if self.sends_body:
            self.sends_body = False
            return {"type": "http.request", "body": self.body}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        self.chunks.append(message.get("body", b"").decode())
        await self.read()

    async def read(self) -> None:
        pass

    async def go(self) -> "Visit":
        headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": self.path, "headers": headers}
        scope |= {"query_string": b"", "root_path": "", "http_version": "1.1"}
        await self.app(scope, self.receive, self.send)
        return self


def test_a_visitor_who_leaves_stops_the_sampler(loaded):
    demo, model = slow(loaded)

    class Leaver(Visit):
        async def read(self):
            if len(self.chunks) == 3:
                self.left.set()

    asyncio.run(Leaver(demo.app(), SLOWLY).go())
    calls = model.calls
    time.sleep(0.05)
    assert calls == model.calls < 20 and demo.running == 0


def test_a_visitor_who_stops_reading_holds_the_sampler_up_and_is_left(loaded):
    demo, model = slow(loaded, seconds=0.001)
    demo.limits = demo.limits._replace(seconds=0.2)

    class Sleeper(Visit):
        async def read(self):
            if len(self.chunks) == 3:
                await asyncio.Event().wait()

    start = time.monotonic()
    asyncio.run(Sleeper(demo.app(), SLOWLY).go())
    assert time.monotonic() - start < 3 and demo.running == 0
    assert model.calls < 20  # of 32: what fits between the two


def test_a_generation_that_takes_too_long_ends_with_a_sentence(loaded):
    demo, model = slow(loaded)
    model.seconds = 0.02
    demo.limits = demo.limits._replace(seconds=0.2)
    visit = asyncio.run(Visit(demo.app(), SLOWLY).go())
    name, last = events("".join(visit.chunks))[-1]
    assert (name, last["error"][:25]) == ("error", "stopped after 0.2 seconds")
    assert 0 < model.calls < 32 and demo.running == 0


def test_a_generation_too_many_is_asked_to_come_again(loaded):
    demo, model = slow(loaded, generations=2)
    app = demo.app()

    async def crowd() -> list[Visit]:
        visits = await asyncio.gather(*(Visit(app, SLOWLY).go() for _ in range(5)))
        return [*visits, await Visit(app, SLOWLY).go()]

    *visits, later = asyncio.run(crowd())
    assert sorted(visit.status for visit in visits) == [200, 200, 503, 503, 503]
    refused = next(visit for visit in visits if visit.status == 503)
    assert json.loads(refused.chunks[0])["error"].startswith("other generations are running")
    assert later.status == 200 and model.calls == 3 * 32


def test_a_body_that_does_not_arrive_is_not_waited_for(demo, monkeypatch):
    monkeypatch.setattr(guard, "PATIENCE", 0.05)
    visit = asyncio.run(Visit(demo.app(), {}, sends_body=False).go())
    assert visit.status == 408 and "took longer" in json.loads(visit.chunks[0])["error"]


# --- Over a real connection ----------------------------------------------------------------------


@contextmanager
def serving(demo: Demo):
    """The port of a server in a thread."""
    listening, server = listen(0), make_server(demo)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listening.close()
    assert not thread.is_alive()


def request_of(wanted: dict) -> bytes:
    body = json.dumps(wanted).encode()
    head = "POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_a_connection_that_closes_stops_the_sampler(loaded):
    demo, model = slow(loaded, seconds=0.02)
    with serving(demo) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(request_of(SLOWLY))
            received = b""
            while received.count(b"event: step") < 3:
                received += connection.recv(4096)
        deadline = time.monotonic() + 5
        while demo.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert demo.running == 0 and 2 <= model.calls < 20
    assert re.match(rb"HTTP/1.1 200 .*connection: close", received, flags=re.S)


def test_headers_that_do_not_arrive_are_not_waited_for(demo, monkeypatch):
    monkeypatch.setattr(guard, "PATIENCE", 0.2)
    deadline = time.monotonic() + 5
    with serving(demo) as port, socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow:")
        with pytest.raises(ConnectionError):
            while time.monotonic() < deadline:
                connection.sendall(b" a")  # a drop now and then does not help
                time.sleep(0.05)


# --- The command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=0", "steps=0 must be at least 1"),
        ("generations=0", "generations=0 must be at least 1"),
        ("seconds=0", "seconds=0 must be at least 1"),
        ("length=33", "length=33 must be at most model.block_size, 32"),
        ("length=-1", "length=-1 must be 0"),
        ("port=70000", "port=70000 must lie in 0 ... 65535"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(run, trained, word, message):
    result = run("tools.demo", f"checkpoint={trained}/ckpt.pt", word)
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1


def test_a_port_that_is_taken_is_said_so(run, trained):
    with listen(0) as taken:
        port = taken.getsockname()[1]
        result = run("tools.demo", f"checkpoint={trained}/ckpt.pt", f"port={port}")
    assert result.code == 2 and f"cannot serve on port={port}" in result.err
