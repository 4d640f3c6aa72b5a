"""What a request has to pass before anything of it is read: the token and the size of its body."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from fastapi import HTTPException

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from elastic3d.serve.config import ServeConfig
    from elastic3d.serve.metrics import Metrics
    from elastic3d.serve.queue import MeshQueue

OPEN_PATHS = ("/healthz",)
BODY_S = 30.0  # that a part of a body may take
ASK_S = 0.25  # after which a body that is waited for hears that the server stops


class Guard:
    """ASGI middleware: 401 without the token, 413 for a larger body than allowed, 408 for one that stops
    arriving, 503 for one that arrives still when the queue is closed, and a count of all answers.

    No browser may take an answer for another kind of content than it says.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics, queue: MeshQueue) -> None:
        self._app, self._config, self._metrics, self._queue = app, config, metrics, queue
        self._limit = int(config.max_megabytes * 1e6)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            await send(message)

        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            if refusal := self._refusal(scope["path"], headers):
                await _answer(watched, *refusal)
                return
            await self._app(scope, self._limited(receive), watched)
        except (
            asyncio.CancelledError
        ):  # by uvicorn, of who has not taken the answer when the time to stop is over
            if not self._queue.closed:
                raise
        finally:
            self._metrics.answered(scope["path"], status, time.perf_counter() - started)

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        token = self._config.token
        if token and path not in OPEN_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not _fits(given.encode("latin-1").strip(), token):
                return 401, "the token is missing or wrong, expected the header `Authorization: Bearer TOKEN`"
        length = headers.get("content-length", "0")
        if not length.isdigit():
            return 400, f"content-length is {length[:20]!r}, expected a number"
        if int(length[:20]) > self._limit:
            return 413, self._too_large()
        return None

    def _too_large(self) -> str:
        return f"the request is larger than {self._config.max_megabytes:g} MB"

    def _limited(self, receive: Receive) -> Receive:
        """`receive` that stops a body without a stated length at the limit, and one that does not arrive."""
        taken, whole = 0, False

        async def limited() -> Message:
            nonlocal taken, whole
            message = await (receive() if whole else self._part(receive))
            taken, whole = taken + len(message.get("body", b"")), not message.get("more_body", False)
            if taken > self._limit:
                raise HTTPException(413, self._too_large())
            return message

        return limited

    async def _part(self, receive: Receive) -> Message:
        """The next part of a body. HTTPException where none comes in time, or the server stops before."""
        deadline = time.monotonic() + BODY_S
        while time.monotonic() < deadline:
            if self._queue.closed:
                raise HTTPException(503, "the server stops")
            with suppress(asyncio.TimeoutError):
                return await asyncio.wait_for(receive(), min(ASK_S, BODY_S))
        raise HTTPException(408, f"the request's body stopped for {BODY_S:g} s")


def _fits(given: bytes, token: str) -> bool:
    """Whether a header has the token, in UTF-8 or Latin-1: clients send either."""
    wanted = token.encode(errors="surrogateescape")  # of bytes that are no UTF-8, these
    return any(hmac.compare_digest(each, wanted) for each in (given, given.decode("latin-1").encode()))


async def _answer(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
