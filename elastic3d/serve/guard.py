"""What a request has to pass before anything of it is read: the token and the size of its body."""

from __future__ import annotations

import asyncio
import hmac
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from elastic3d.serve.config import ServeConfig
    from elastic3d.serve.metrics import Metrics
    from elastic3d.serve.queue import MeshQueue

OPEN_PATHS = ("/healthz",)
BODY_S = 30.0  # that a part of a body may take
ASK_S = 0.25  # after which a body that is waited for hears that the server stops
HELD_BODIES = 10  # of the largest size that all requests together may hold
BODY = "elastic3d.body"  # of a request's scope


class Guard:
    """ASGI middleware: 401 without the token, and a count of all answers.

    Of bodies: 413 for a larger one than allowed, 408 for one that stops arriving, 503 for one that arrives beside too
    many others, or still when the queue is closed.

    No browser may take an answer for another kind of content than it says.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics, queue: MeshQueue) -> None:
        self._app, self._token, self._metrics, self.queue = app, config.token, metrics, queue
        self.limit, self.held = int(config.max_megabytes * 1e6), 0  # bytes of a body, and of all of them
        self.too_large = f"the request is larger than {config.max_megabytes:g} MB"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        body = scope[BODY] = Body(self, receive)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            app = self._refusal(scope["path"], Headers(scope=scope)) or self._app
            await app(scope, body.receive, watched)
        except asyncio.CancelledError:
            if not self.queue.closed:  # else by uvicorn: the answer is not taken within the time to stop
                raise
        finally:
            body.drop()
            self._metrics.answered(scope["path"], status, time.perf_counter() - started)

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        if self._token and path not in OPEN_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not _fits(given.encode("latin-1").strip(), self._token):
                wrong = "the token is missing or wrong, expected the header `Authorization: Bearer TOKEN`"
                return error_response(401, wrong, {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not length.isdigit():
            return error_response(400, f"content-length is {length[:20]!r}, expected a number")
        return error_response(413, self.too_large) if int(length[:20]) > self.limit else None


class Body:
    """The body of a request, whose bytes the guard counts until they are dropped."""

    def __init__(self, guard: Guard, receive: Receive) -> None:
        self._guard, self._receive = guard, receive
        self._taken, self._whole = 0, False

    async def receive(self) -> Message:
        """What the server sends next. HTTPException for a body that is refused: see `Guard`."""
        message = await (self._receive() if self._whole else self._part())
        size, self._whole = len(message.get("body", b"")), not message.get("more_body", False)
        self._taken += size
        self._guard.held += size
        if self._taken > self._guard.limit:
            raise HTTPException(413, self._guard.too_large)
        if self._guard.held > (most := HELD_BODIES * self._guard.limit):
            raise HTTPException(
                503,
                f"more than {most / 1e6:g} MB arrive at once, expected to ask again",
                {"Retry-After": "5"},
            )
        return message

    async def _part(self) -> Message:
        """The next part of it, while the server works."""
        deadline = time.monotonic() + BODY_S
        while time.monotonic() < deadline:
            if self._guard.queue.closed:
                raise HTTPException(503, "the server stops")
            with suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(self._receive(), min(ASK_S, BODY_S))
        raise HTTPException(408, f"the request's body stopped for {BODY_S:g} s")

    def drop(self) -> None:
        """Count it no more: it is whole, and its bytes are not needed."""
        self._guard.held -= self._taken
        self._taken = 0


def _fits(given: bytes, token: str) -> bool:
    """Whether a header has the token, in UTF-8 or Latin-1: clients send either."""
    wanted = token.encode(errors="surrogateescape")  # of bytes that are no UTF-8, these
    return any(hmac.compare_digest(each, wanted) for each in (given, given.decode("latin-1").encode()))


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """`{"error": message}`."""
    return JSONResponse({"error": message}, status, headers)
