"""Load test of the demo: it answers, refuses or closes everything, and its memory stays constant.

python -m tests.stress.load seconds=120

It starts `python -m tools.demo` with a tiny model. Threads send it valid and malicious requests
over raw sockets; valid requests are timed. A breach is an answer that an attack must not get, a
connection that stays open too long, or a demo that no longer answers.
"""

import json
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import NamedTuple

from nanomdm import checkpoint, cli
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.tokenizers import ByteTokenizer
from tests.stress.fuzz import valid_state

HUNG = 45.0  # seconds, longer than the demo ever waits
GROWTH = 1.1  # of memory from the middle to the end that counts as constant
SCRIPT = "<script>alert(1)</script>"


# --- Sockets -------------------------------------------------------------------------------------


class Answer(NamedTuple):
    status: str  # a number, "cut off", "hung", "left" (by the client) or "unsafe"
    headers: str = ""
    body: str = ""


class Target(NamedTuple):
    """The port of the demo, and the time at which the test ends."""

    port: int
    until: float

    @contextmanager
    def connection(self):
        with socket.create_connection(("127.0.0.1", self.port), timeout=HUNG) as connection:
            yield connection

    def ask(self, request: bytes) -> Answer:
        """Send bytes and read to the end of the connection."""
        try:
            with self.connection() as connection:
                with suppress(ConnectionError):  # the demo may refuse before all of it is sent
                    connection.sendall(request)
                return read_answer(connection)
        except TimeoutError:
            return Answer("hung")
        except OSError:
            return Answer("cut off")

    def drip(self, request: bytes, more: bytes) -> Answer:
        """Send bytes, then `more` every half second until the demo closes the connection."""
        try:
            with self.connection() as connection:
                connection.sendall(request)
                connection.settimeout(0.5)
                for _ in range(int(2 * HUNG)):
                    if time.monotonic() > self.until:
                        return Answer("left")
                    try:
                        return read_answer(connection)
                    except TimeoutError:
                        connection.sendall(more)
            return Answer("hung")
        except OSError:
            return Answer("cut off")


def read_answer(connection: socket.socket) -> Answer:
    content = bytearray()
    try:
        while part := connection.recv(2**16):
            content += part
    except ConnectionResetError:  # after its answer, because it did not read the body
        pass
    except TimeoutError:
        if not content:
            raise
        return Answer("hung")
    head, _, body = content.decode("latin-1").partition("\r\n\r\n")
    status = re.match(r"HTTP/1\.[01] (\d{3})", head)
    return Answer(status[1] if status else "cut off", head.lower(), body)


def request(method: str = "GET", path: str = "/", body: bytes = b"", **headers: str) -> bytes:
    """An HTTP request; underscores in header names become dashes, empty headers are left out."""
    named = {"host": "127.0.0.1", "content_length": str(len(body)) if body else ""} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in named.items() if value]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, "\r\n"]).encode("latin-1") + body


def post(path: str, values, **headers: str) -> bytes:
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    return request("POST", path, body, **{"content_type": "application/json"} | headers)


# --- Valid requests ------------------------------------------------------------------------------


def page(target: Target, random: Random) -> Answer:
    return target.ask(request())


def generate(target: Target, random: Random) -> Answer:
    answer = target.ask(post("/generate", {"text": "To", "steps": 4, "seed": random.randrange(99)}))
    done = answer.status != "200" or "event: done" in answer.body
    return answer if done else Answer("unsafe")


def tokens(target: Target, random: Random) -> Answer:
    return target.ask(post("/tokens", {"text": "To be"}))


# --- Attacks -------------------------------------------------------------------------------------


def traversal(target: Target, random: Random) -> Answer:
    dots = random.choice(("..", "%2e%2e", "..%2f", "%252e%252e", "..\\", ".%00.", "....//"))
    start = random.choice(("/", "//", "/static/", "/pages/", "/generate/", "\\", "/file:///"))
    answer = target.ask(request(path=f"{start}{dots}/{dots}/{dots}/etc/passwd"))
    return Answer("unsafe") if "root:" in answer.body else answer


def another_host(target: Target, random: Random) -> Answer:
    hosts = (
        "evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1:80@evil.example",
        "0.0.0.0",
        "[::]",
    )
    return target.ask(request(random.choice(("GET", "POST")), host=random.choice(hosts)))


def another_origin(target: Target, random: Random) -> Answer:
    origin = random.choice(("https://evil.example", "null", "http://127.0.0.1:1", "file://"))
    return target.ask(post("/generate", {"text": "To"}, origin=origin))


def no_json_type(target: Target, random: Random) -> Answer:
    """What a form on another page can send without a preflight request."""
    kind = random.choice(("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"))
    return target.ask(post("/generate", {"text": "To"}, content_type=kind))


def large_body(target: Target, random: Random) -> Answer:
    return target.ask(
        post("/generate", b'{"text": "' + b"x" * random.choice((2**17, 2**23)) + b'"}')
    )


def endless_body(target: Target, random: Random) -> Answer:
    chunks = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
    head = post("/generate", b"", transfer_encoding="chunked", content_length="")
    return target.ask(head + chunks * 100)


def bad_values(target: Target, random: Random) -> Answer:
    values = random.choice((
        *({"steps": 10**9}, {"length": 10**12}, {"steps": -1}, {"seed": 2**70}, {"text": 5}),
        *({"temperature": float("nan")}, {"canvas": [None] * 10**4}, {"canvas": [10**6, None]}),
        *({"text": "x" * 30_000}, {"text": "\ud800"}, {"strategy": "__class__"}, {"x": 1}, [], 7),
        *(b"[" * 60_000, b'{"text": ' + b"9" * 60_000 + b"}", b"\xff\xfe", b"{", b'{"a":1e999}'),
    ))  # fmt: skip
    return target.ask(post("/generate", values))


def bad_request(target: Target, random: Random) -> Answer:
    return target.ask(random.choice((
        random.randbytes(random.choice((1, 100, 10**5))) + b"\r\n\r\n",
        request(host="127.0.0.1\r\nhost: evil.example"),
        request(host=""),
        request("POST", "/generate", b"0\r\n\r\n", transfer_encoding="chunked"),
        request("POST", "/generate", content_length="-1"),
        request("POST", "/generate", content_length="9" * 40),
        request(x="y" * 2**20),
        request(path="/" + "x" * 2**20),
        request("TRACE"),
        request("DELETE", "/generate"),
        request(upgrade="websocket", connection="upgrade", sec_websocket_version="13"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    )))  # fmt: skip


def script_in_a_prompt(target: Target, random: Random) -> Answer:
    """If the script comes back, it is data that no browser shows as a page."""
    path = random.choice(("/generate", "/tokens"))
    answer = target.ask(post(path, {"text": SCRIPT, "steps": 2}))
    is_safe = all(word in answer.headers for word in ("nosniff", "content-security-policy"))
    is_safe = is_safe or SCRIPT not in answer.body
    return answer if is_safe and "text/html" not in answer.headers else Answer("unsafe")


def leave(target: Target, random: Random) -> Answer:
    """Ask for a long text and leave."""
    with target.connection() as connection:
        connection.sendall(post("/generate", {"text": "To", "steps": 16}))
        time.sleep(random.choice((0, 0.01)))
    return Answer("left")


# --- Slow attacks --------------------------------------------------------------------------------


def silence(target: Target, random: Random) -> Answer:
    return target.drip(b"", b"")


def slow_headers(target: Target, random: Random) -> Answer:
    return target.drip(b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx: ", b"y")


def slow_body(target: Target, random: Random) -> Answer:
    return target.drip(post("/generate", b"{", content_length="1000"), b" ")


def no_reader(target: Target, random: Random) -> Answer:
    """Ask for a text and do not read it."""
    with target.connection() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.sendall(post("/generate", {"text": "To", "steps": 16}))
        time.sleep(min(5.0, max(0.0, target.until - time.monotonic())))
    return Answer("left")


def flood(target: Target, random: Random) -> Answer:
    """After a pause, open more silent connections than the demo keeps: it must close each."""
    time.sleep(max(0.0, min(20.0, target.until - time.monotonic())))
    if time.monotonic() > target.until:
        return Answer("left")
    opened, start = [], time.monotonic()
    try:
        opened = [socket.create_connection(("127.0.0.1", target.port), HUNG) for _ in range(100)]
        for connection in opened:
            connection.settimeout(max(0.1, min(HUNG, target.until - time.monotonic())))
            connection.recv(1)
    except TimeoutError:
        return Answer("left" if time.monotonic() - start < HUNG else "hung")
    except OSError:
        pass
    finally:
        for connection in opened:
            connection.close()
    return Answer("cut off")


class Attack(NamedTuple):
    """A request and the answers that it may get; 503 means too many at once."""

    run: Callable[[Target, Random], Answer]
    allowed: set[str]
    slow: bool = False


REFUSED, GONE = {"400", "404", "405", "421"}, {"cut off", "503"}
ATTACKS = {
    "page": Attack(page, {"200", "503"}),
    "generate": Attack(generate, {"200", "503"}),
    "tokens": Attack(tokens, {"200", "503"}),
    "traversal": Attack(traversal, REFUSED | GONE),
    "another host": Attack(another_host, {"421", "400"} | GONE),
    "another origin": Attack(another_origin, {"403"} | GONE),
    "no json type": Attack(no_json_type, {"415"} | GONE),
    "large body": Attack(large_body, {"413"} | GONE),
    "endless body": Attack(endless_body, {"413", "400"} | GONE),
    "bad values": Attack(bad_values, {"400", "413"} | GONE),
    "bad request": Attack(bad_request, {*REFUSED, "200", "415", "431"} | GONE),
    "script in a prompt": Attack(script_in_a_prompt, {"200", "400"} | GONE),
    "leave": Attack(leave, {"left"} | GONE),
    "silence": Attack(silence, {"left"} | GONE, slow=True),
    "slow headers": Attack(slow_headers, {"left", "400", "408"} | GONE, slow=True),
    "slow body": Attack(slow_body, {"left", "400", "408"} | GONE, slow=True),
    "no reader": Attack(no_reader, {"left"} | GONE, slow=True),
    "flood": Attack(flood, {"left"} | GONE, slow=True),
}


# --- The load test -------------------------------------------------------------------------------


class Log:
    """The answers to all attacks, from many threads."""

    def __init__(self):
        self.statuses, self.seconds, self.lock = (
            defaultdict(Counter),
            defaultdict(list),
            threading.Lock(),
        )

    def add(self, name: str, answer: Answer, seconds: float) -> None:
        with self.lock:
            self.statuses[name][answer.status] += 1
            if answer.status == "200":
                self.seconds[name].append(seconds)

    def breaches(self) -> dict[str, dict[str, int]]:
        """Answers that an attack must not get, and their counts."""
        wrong = {
            name: {s: n for s, n in counts.items() if s not in ATTACKS[name].allowed}
            for name, counts in self.statuses.items()
        }
        return {name: found for name, found in wrong.items() if found}


def attack(target: Target, log: Log, random: Random, names: list[str]) -> None:
    """One thread: attack after attack until the time is up."""
    while time.monotonic() < target.until:
        name, start = random.choice(names), time.perf_counter()
        try:
            answer = ATTACKS[name].run(target, random)
        except OSError:  # a socket of ours was refused or reset
            answer = Answer("cut off")
        except Exception as error:  # of the load test itself, or an answer that is not HTTP
            answer = Answer(f"unsafe ({error!r})")
        log.add(name, answer, time.perf_counter() - start)


@contextmanager
def demo():
    """A demo of a tiny model on a free port: its process, its port, and the file of its stderr."""
    with TemporaryDirectory() as folder:
        checkpoint.save(Path(folder, "ckpt.pt"), valid_state(ByteTokenizer()))
        words = [f"checkpoint={folder}/ckpt.pt", "port=0", "device=cpu", "seconds=10"]
        command = [sys.executable, "-m", "tools.demo", *words]
        output = Path(folder, "stderr.txt")
        with output.open("w") as stderr:
            process = subprocess.Popen(
                command, cwd=cli.ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        try:
            address = re.search(r":(\d+)", process.stdout.readline())
            if not address:
                raise RuntimeError(f"the demo did not start: {output.read_text()}")
            yield process, int(address[1]), output
        finally:
            process.terminate()
            process.wait(timeout=20)


def memory(process: subprocess.Popen) -> float:
    """The resident memory of a process in MiB (Linux)."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def run_attacks(process: subprocess.Popen, port: int, config: Section) -> tuple[Log, list[float]]:
    """Run the attacks: their log, and the demo's memory at the start, middle and end."""
    log, target = Log(), Target(port, time.monotonic() + config.seconds)
    fast = [name for name, each in ATTACKS.items() if not each.slow]
    slow = [name for name, each in ATTACKS.items() if each.slow and name != "flood"]
    kinds = [fast] * config.clients + [slow] * config.slow + [["flood"]]
    threads = [
        threading.Thread(target=attack, args=(target, log, Random(f"{config.seed}/{i}"), names))
        for i, names in enumerate(kinds)
    ]
    levels = [memory(process)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        time.sleep(config.seconds / 2)
        levels.append(memory(process))
    for thread in threads:
        thread.join(timeout=HUNG)
    return log, levels


def main(config: Section) -> None:
    for name in ("seconds", "clients"):
        if getattr(config, name) <= 0 or config.slow < 0:
            raise UserError(f"{name}={getattr(config, name):g} must be positive")
    if not Path("/proc/self/status").is_file():
        raise UserError("the load test reads a process's memory from /proc: run it on Linux")
    with demo() as (process, port, output):
        warm = Target(port, time.monotonic())
        for _ in range(20):
            generate(warm, Random(0))
        log, levels = run_attacks(process, port, config)
        time.sleep(0.5)
        after = page(warm, Random(0)).status
        if "Traceback" in (errors := output.read_text()):
            print(errors[errors.index("Traceback") :][-3000:], file=sys.stderr)
            log.add("page", Answer("unsafe (a traceback of the demo)"), 0.0)
    print_figures(log, levels, after, config)


def print_figures(log: Log, levels: list[float], after: str, config: Section) -> None:
    """Print and write the figures. Raises `RuntimeError` for a breach."""
    for name, counts in sorted(log.statuses.items()):
        seconds = sorted(log.seconds[name])
        times = ""
        if seconds:
            late = 1e3 * seconds[int(0.99 * (len(seconds) - 1))]
            times = f"  200 in {1e3 * statistics.median(seconds):.0f} ms, 99% in {late:.0f} ms"
        listed = ", ".join(f"{status} {count:,}" for status, count in counts.most_common())
        print(f"{name:<19} {sum(counts.values()):>6,}: {listed}{times}")
    total = sum((counts for counts in log.statuses.values()), Counter())
    memories = ", ".join(f"{level:.0f}" for level in levels)
    print(
        f"{sum(total.values()):,} requests in {config.seconds:g} s; memory {memories} MiB at the "
        f"start, in the middle and at the end; then the page answered {after}"
    )
    if config.output:
        figures = {"answers": log.statuses, "latencies": log.seconds, "memory": levels}
        figures |= {"seconds": config.seconds, "after": after}
        Path(config.output).write_text(json.dumps(figures, indent=1))
    if breaches := log.breaches():
        raise RuntimeError(f"breaches: {breaches}")
    if after != "200" or (config.seconds > 30 and levels[2] > GROWTH * levels[1]):
        raise RuntimeError("the demo failed: its memory grew, or it no longer answers")


if __name__ == "__main__":
    cli.main(main, "stress/load")
