"""Protects a page on 127.0.0.1 from other pages and from the network.

Every page that a browser shows can reach a server on the same machine. It can send requests, which
carry its Origin, or point its own host name at 127.0.0.1, which the requests carry as Host. Both
are refused.
"""

import json
import re

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

BODY = 2**16  # bytes of a request's body, at most
PATIENCE = 10.0  # seconds for the headers of a request, and again for its body
HOST = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "connection": "close",  # so that no connection waits for a second request
}


class Refusal(Exception):
    """A request that is answered by a status (4xx, 503) and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


async def refuse(request: Request, error: Refusal) -> JSONResponse:
    headers = {"retry-after": "1"} if error.status == 503 else {}
    return JSONResponse({"error": error.sentence}, error.status, headers)


class Guard:
    """ASGI middleware: refuses other hosts and origins, and adds security headers."""

    def __init__(self, app, policy: str):
        self.app = app
        named = HEADERS | {"content-security-policy": f"{policy}; frame-ancestors 'none'"}
        self.headers = [(name.encode(), value.encode()) for name, value in named.items()]

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.headers]
            await send(message)

        if scope["type"] != "http":
            return
        try:
            check_origin(scope)
        except Refusal as error:
            response = await refuse(Request(scope), error)
            await response(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)


def check_origin(scope) -> None:
    """Raise `Refusal` for a request from any page but this server's own."""

    def values(name: bytes) -> list[str]:
        return [value.decode("latin-1") for key, value in scope["headers"] if key == name]

    hosts = values(b"host")
    if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
        raise Refusal(421, "this server answers to the names 127.0.0.1 and localhost only")
    if any(origin != f"http://{hosts[0]}" for origin in values(b"origin")):
        raise Refusal(403, "a page of another origin may not use this server")
    elsewhere = set(values(b"sec-fetch-site")) - {"same-origin", "none"}
    if elsewhere and scope["method"] not in ("GET", "HEAD"):
        raise Refusal(403, "a page of another site may not use this server")


async def read_object(request: Request) -> dict:
    """The JSON object in a request's body, limited in size and time. Raises `Refusal`."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise Refusal(415, "the body must be application/json")
    body = bytearray()
    try:
        with anyio.move_on_after(PATIENCE) as patience:
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY:
                    raise Refusal(413, f"the body is larger than {BODY} bytes: shorten the text")
    except ClientDisconnect:
        raise Refusal(400, "the visitor left before the body had arrived") from None
    if patience.cancelled_caught:
        raise Refusal(408, f"the body took longer than {PATIENCE:g} seconds to arrive")
    try:
        wanted = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON") from None
    if not isinstance(wanted, dict):
        raise Refusal(400, "the body must be a JSON object")
    return wanted


class Patient(H11Protocol):
    """uvicorn's HTTP with a time limit for the headers of a request."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(PATIENCE, self.hang_up)

    def hang_up(self) -> None:
        if self.cycle is None:
            self.transport.abort()
