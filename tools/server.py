"""The HTTP interface of the demo.

GET / is the page. POST /generate takes {"text", "length"} or {"canvas": [id or null, ...]}, beside
{"strategy", "steps", "temperature", "guidance", "seed"}, and answers with server-sent events: a
`step` for each message of tools/trace.py, finally `done` {"calls", "seconds", "label", "text"} or
`error` {"error"}. POST /tokens takes {"text"} and answers {"ids", "texts"}. An invalid request is
answered by {"error": a sentence} with a status of 4xx, or 503 if too many run at once.
"""

import concurrent.futures
import contextlib
import json
import time
from typing import NamedTuple

import anyio
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from diffusion import sample
from nanomdm import strategies
from nanomdm.checkpoint import Loaded
from nanomdm.cli import Section
from nanomdm.errors import UserError
from nanomdm.prompts import Canvas, lengths, require_order
from tools import page
from tools.guard import Guard, Patient, Refusal, read_object, refuse
from tools.trace import canvas_of, record, text_of

CONNECTIONS = 64  # open at once
LARGEST = 20  # temperature and guidance
TEXT = 20_000  # characters
KINDS = {int: "a whole number", float: "a number", str: "a text", list: "a list"}
WANTED = {
    "text": "",
    "length": 0,
    "canvas": [],
    "strategy": "spread",
    "steps": 32,
    "temperature": 1.0,
    "guidance": 0.0,
    "seed": 1,
}


class Left(Exception):
    """The client has left: nobody sees the next step."""


class Work(NamedTuple):
    """A generation that a request asks for."""

    canvas: Canvas
    sampler: strategies.Sampler
    seed: int


class Limits(NamedTuple):
    """What the demo shows of its model, and the limits of a request."""

    checkpoint: str
    prompt: str
    length: int  # tokens
    steps: int
    generations: int  # at once
    seconds: float  # of a generation and its transfer to the page


class Demo:
    """A model and its routes."""

    def __init__(self, loaded: Loaded, limits: Limits):
        self.loaded, self.limits, self.running = loaded, limits, 0
        data = {
            "subtitle": f"{limits.checkpoint} · {loaded.state['step']} training steps",
            "strategies": {  # whether they take a number of steps
                name: not strategies.is_adaptive(name) for name in strategies.STRATEGIES
            },
            "limits": {"length": limits.length, "steps": limits.steps, "largest": LARGEST},
            "defaults": WANTED | {"text": limits.prompt, "length": limits.length},
        }
        self.page = page.assemble("demo", "nanoMDM", data, connect="'self'")

    def app(self) -> Guard:
        routes = [
            Route("/", self.show),
            Route("/tokens", self.tokens, methods=["POST"]),
            Route("/generate", self.generate, methods=["POST"]),
        ]
        handlers = {Refusal: refuse, HTTPException: no_such_page}
        return Guard(
            Starlette(routes=routes, exception_handlers=handlers), page.policy_of(self.page)
        )

    async def show(self, request: Request) -> Response:
        return HTMLResponse(self.page)

    async def tokens(self, request: Request) -> Response:
        text = read_values(await read_object(request))["text"]
        ids = await anyio.to_thread.run_sync(refusing, self.loaded.tokenizer.encode, text)
        ids = ids.tolist()[: self.limits.length]
        return JSONResponse({"ids": ids, "texts": [text_of(self.loaded.tokenizer, i) for i in ids]})

    async def generate(self, request: Request) -> Response:
        values = read_values(await read_object(request))
        work = await anyio.to_thread.run_sync(refusing, self.plan, values)
        if self.running >= self.limits.generations:
            raise Refusal(503, "other generations are running: try again in a moment")
        return Stream(self, work)

    def plan(self, values: dict) -> Work:
        """The generation that a request asks for. Raises `ValueError` for a value out of range."""
        largest = {"steps": self.limits.steps, "temperature": LARGEST, "guidance": LARGEST}
        for name, high in (largest | {"seed": 2**53 - 1}).items():
            low = 1 if name == "steps" else 0
            if not low <= values[name] <= high:
                raise UserError(f"{name}={values[name]} must lie in {low} ... {high}")
        sampling = {name: values[name] for name in ("strategy", "steps", "temperature")}
        sampling |= {"options": {"guidance": values["guidance"]}}
        shape = self.loaded.model.config
        sampler = strategies.from_config(
            Section(**sampling), sample, shape.causal, shape.block_length
        )
        if values["canvas"]:
            canvas = self.edited(values["canvas"])
        else:
            canvas = canvas_of(values["text"], values["length"], self.loaded, self.limits.length)
        return Work(canvas, sampler, values["seed"])

    def edited(self, cells: list) -> Canvas:
        """The canvas of ids and nulls. Raises `UserError`."""
        V = self.loaded.model.config.vocab_size
        if len(cells) > self.limits.length:
            raise UserError(
                f"canvas has {len(cells)} tokens, at most {self.limits.length} are possible"
            )
        for cell in cells:
            if cell is not None and (type(cell) is not int or not 0 <= cell < V):
                raise UserError(f"canvas may hold null and whole numbers from 0 to {V - 1}")
        if None not in cells:
            raise UserError("canvas holds no null: nothing is left to generate")
        is_masked = torch.tensor([cell is None for cell in cells])
        require_order(self.loaded.model.config, is_masked)
        return Canvas(torch.tensor([cell or 0 for cell in cells]), is_masked)


def make_server(demo: Demo) -> uvicorn.Server:
    config = uvicorn.Config(
        demo.app(),
        http=Patient,
        ws="none",
        lifespan="off",
        log_level="warning",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    return uvicorn.Server(config)


class Stream(Response):
    """The events of a generation, which ends when it is done, out of time, or without a reader."""

    def __init__(self, demo: Demo, work: Work):
        self.demo, self.work = demo, work
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]

    async def __call__(self, scope, receive, send) -> None:
        """A thread samples while this sends; the slot is released when the thread has ended."""
        seconds, self.demo.running = self.demo.limits.seconds, self.demo.running + 1
        try:
            with anyio.move_on_after(seconds) as limit:
                await self.stream(receive, send)
            with anyio.move_on_after(1):
                if limit.cancelled_caught:
                    sentence = f"stopped after {seconds:g} seconds: ask for fewer steps or tokens"
                    await send(chunk("error", {"error": sentence}))
                await send({"type": "http.response.body", "body": b""})
        finally:
            self.demo.running -= 1

    async def stream(self, receive, send) -> None:
        outbox, inbox = anyio.create_memory_object_stream(8)  # a slow reader slows the sampler

        async def sample() -> None:
            with outbox, contextlib.suppress(Left, anyio.BrokenResourceError):
                await outbox.send(await anyio.to_thread.run_sync(self.sample, outbox))

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(sample)
            group.start_soon(leave)
            with inbox:  # after it is closed, no step can be posted
                start = {"type": "http.response.start", "status": 200}
                await send(start | {"headers": self.raw_headers})
                async for message in inbox:
                    await send(message)
            group.cancel_scope.cancel()

    def sample(self, outbox) -> dict:
        """In a thread: sample, post each step, and return the last event."""

        def post(row: int, message: dict) -> None:
            try:
                anyio.from_thread.run(outbox.send, chunk("step", message))
            except (anyio.BrokenResourceError, concurrent.futures.CancelledError):
                raise Left from None

        start, loaded = time.perf_counter(), self.demo.loaded
        canvas, sampler, seed = self.work
        filled = record(loaded, [canvas], sampler, seed, post)
        end = {"calls": filled.calls, "seconds": time.perf_counter() - start}
        ids, tokenizer = filled.ids.cpu(), loaded.tokenizer
        length = lengths(ids, canvas.is_masked[None], tokenizer.eos)
        text = tokenizer.decode(ids[0, canvas.start : length].tolist())
        return chunk("done", end | {"label": sampler.label, "text": text})


def chunk(event: str, data: dict) -> dict:
    body = f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()
    return {"type": "http.response.body", "body": body, "more_body": True}


def refusing(function, *arguments):
    """Call the function, and turn its `ValueError` into a `Refusal`."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise Refusal(400, str(error).replace("sampling.", "")) from None


def read_values(wanted: dict) -> dict:
    """The request's values, with checked types, over the defaults. Raises `Refusal`."""
    for name, value in wanted.items():
        if name not in WANTED:
            raise Refusal(400, f"no setting {name[:40]!r}: there are {', '.join(WANTED)}")
        kind = type(WANTED[name])
        if kind is float and type(value) is int and abs(value) < 2**53:
            value = wanted[name] = float(value)
        if type(value) is not kind:
            raise Refusal(400, f"{name} must be {KINDS[kind]}")
    values = WANTED | wanted
    if len(values["text"]) > TEXT:
        raise Refusal(400, f"the text is longer than {TEXT} characters: shorten it")
    if any("\ud800" <= character <= "\udfff" for character in values["text"]):
        raise Refusal(400, "the text contains a lone surrogate (half a UTF-16 character)")
    return values


async def no_such_page(request: Request, error: HTTPException) -> JSONResponse:
    sentence = "not found: the page is /" if error.status_code == 404 else error.detail
    return JSONResponse({"error": sentence}, error.status_code, error.headers)
