"""The part that talks to an elastic3d server: standard library only, no Blender."""

from __future__ import annotations

import base64
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

POLL_S = 0.3
TIMEOUT_S = 30.0


class ServerError(Exception):
    """What the server, or the way to it, said: one sentence."""


def ask(
    server: str, path: str, body: dict[str, Any] | None = None, token: str = "", method: str = ""
) -> bytes:
    """The bytes of an answer. ServerError for any answer that is none."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    if not server.lower().startswith(("http://", "https://")):
        raise ServerError(f"the server is {server!r}, expected an address such as http://127.0.0.1:8000")
    request = urllib.request.Request(server.rstrip("/") + path, data, headers, method=method or None)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        try:
            message = str(json.loads(error.read())["error"])
        except (ValueError, KeyError, TypeError):
            message = f"the server answered {error.code}"
        raise ServerError(message) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ServerError(
            f"no answer from {server}: {reason}. Is `python scripts/serve.py` running?"
        ) from error


def ask_job(server: str, path: str, body: dict[str, Any] | None = None, token: str = "") -> dict[str, Any]:
    """What is told of a job. ServerError as `ask`, or where somebody else answers."""
    try:
        job = json.loads(ask(server, path, body, token))
        return {"id": str(job["id"]), "state": str(job["state"]), "progress": float(job["progress"])} | {
            "error": str(job.get("error", ""))
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ServerError(f"what answers at {server} is no elastic3d server") from error


class Generation(threading.Thread):
    """A mesh in the making, in the background; `mesh` or `error` is there when the thread has ended."""

    def __init__(self, server: str, token: str, image: Path, options: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._server, self._token, self._image, self._options = server, token, image, options
        self._cancelled = threading.Event()
        self.progress = 0.0
        self.mesh: bytes | None = None
        self.error = ""

    def cancel(self) -> None:
        """Give up; the server is told."""
        self._cancelled.set()

    def run(self) -> None:
        """Send the image, wait, fetch the mesh."""
        try:
            self.mesh = self._generate()
        except ServerError as error:
            self.error = str(error)
        except OSError as error:
            self.error = f"can't read {self._image}: {error.strerror or error}"

    def _generate(self) -> bytes | None:
        if not self._image.name:
            raise ServerError("there is no image yet: choose one")
        image = base64.b64encode(self._image.read_bytes()).decode()
        body = {"image": image, "wait": False, **self._options}
        job = ask_job(self._server, "/v1/meshes", body, self._token)
        where = f"/v1/jobs/{job['id']}"
        try:
            return self._fetched(where)
        finally:  # also of a job that nobody follows any more
            with suppress(ServerError):
                ask(self._server, where, token=self._token, method="DELETE")

    def _fetched(self, where: str) -> bytes | None:
        """The mesh of a job once it is there; None if it is given up before."""
        while not self._cancelled.is_set():
            state = ask_job(self._server, where, token=self._token)
            self.progress = state["progress"]
            if state["state"] in ("failed", "cancelled"):
                raise ServerError(state["error"] or "the server stopped")
            if state["state"] == "done":
                return ask(self._server, f"{where}/mesh", token=self._token)
            time.sleep(POLL_S)
        return None
