"""What the server does with hostile or unlucky requests: each is answered, nothing is left behind."""

from __future__ import annotations

import asyncio
import base64
import io
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
from PIL.PngImagePlugin import PngInfo  # noqa: E402
from tiny_pipeline import image, tiny_pipeline  # noqa: E402

from elastic3d.serve import guard  # noqa: E402
from elastic3d.serve.api import create_app  # noqa: E402
from elastic3d.serve.config import ServeConfig  # noqa: E402
from elastic3d.serve.metrics import Metrics  # noqa: E402
from elastic3d.serve.queue import MeshQueue  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = {"steps": "1", "resolution": "16"}
HOSTILE = "<script>alert(1)</script>\r\nSet-Cookie: a=b"


class Running:
    """A server on a port of this machine."""

    def __init__(self, pipeline, **options) -> None:
        self.queue = MeshQueue(pipeline)
        app = create_app(self.queue, ServeConfig(**options), Metrics())
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def post(self, data: bytes | None = None, name: str = "a.png", **fields: str) -> httpx.Response:
        upload = {"image": (name, png() if data is None else data)}
        return self.client.post("/v1/meshes", files=upload, data={**SMALL, **fields})

    @property
    def files(self) -> list[str]:
        return [path.name for path in self.queue._folder.iterdir()]

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()


@contextmanager
def running(**options) -> Iterator[Running]:
    server = Running(tiny_pipeline(), **options)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as started:
        yield started


def png(comment: str = "") -> bytes:
    buffer, entries = io.BytesIO(), PngInfo()
    entries.add_text("comment", comment)
    image().save(buffer, "PNG", pnginfo=entries)
    return buffer.getvalue()


def as_json(data: bytes) -> bytes:
    return b'{"image": "' + base64.b64encode(data) + b'"}'


def head(path: str, length: int, kind: str = "application/json") -> bytes:
    """Of a request whose body is sent by itself."""
    lines = (f"POST {path} HTTP/1.1", "Host: a", f"Content-Type: {kind}", f"Content-Length: {length}")
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()


def bomb(side: int) -> bytes:
    """A valid PNG of a few kilobytes that unpacks to `side` x `side` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_bombs_and_huge_images_are_refused_unopened(server: Running, side: int) -> None:
    data = bomb(side)
    assert len(data) < 300_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = server.post(data)
    assert answer.status_code == 400
    size = f"{side} x {side}" if side < 14_000 else "far too many"  # where PIL says no by itself
    assert answer.json()["error"] == f"the image has {size} pixels, expected at most 25,000,000"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes of memory"


def test_an_image_of_many_frames_is_its_first(server: Running) -> None:
    buffer = io.BytesIO()
    frames = [image(colour).convert("P") for colour in ("maroon", "navy")] * 200
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], transparency=0)
    assert server.post(buffer.getvalue()).status_code in (200, 400)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\x00b.png", "C:\\a.png", HOSTILE])
def test_a_files_name_means_nothing(server: Running, name: str) -> None:
    answer = server.post(name=name)
    assert answer.status_code == 200 and answer.content[:4] == b"glTF"
    assert answer.headers["content-disposition"] == 'attachment; filename="mesh.glb"'
    assert "set-cookie" not in answer.headers and server.files == []


def test_paths_lead_to_no_files(server: Running) -> None:
    for path in (
        "/v1/jobs/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/jobs/%2e%2e/mesh",
        "/docs/assets/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/docs/assets/%2e%2e/%2e%2e/METADATA",
        "/status/..%2f..%2fetc%2fpasswd",
    ):
        answer = server.client.get(path)
        assert b"root:" not in answer.content
        assert answer.status_code == 404 or answer.json() == {
            "status": "error",
            "message": "there is no such job",
        }


def test_what_is_said_of_a_value_is_no_page(server: Running) -> None:
    """The value comes back in JSON, cut short, never as HTML or a header."""
    for answer in (
        server.post(format=HOSTILE),
        server.post(seed=HOSTILE),
        server.post(**{HOSTILE * 100: "1"}),
        server.client.get("/v1/jobs/" + "%3Cscript%3Ealert(1)%3C%2Fscript%3E"),
        server.client.post("/v1/meshes", content=HOSTILE, headers={"content-type": "text/html"}),
    ):
        assert answer.status_code in (400, 404, 415)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in answer.headers and len(answer.json()["error"]) < 400
    assert "script" not in server.client.get("/metrics").text


def test_many_clients_at_once_each_get_their_own(server: Running) -> None:
    """The same name from all of them; every answer is the mesh of its seed."""
    seeds = [0, 1, 2, 3] * 2
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: server.post(seed=str(seed), format="stl"), seeds))
    sizes = {
        seed: {len(a.content) for a, s in zip(answers, seeds, strict=True) if s == seed} for seed in seeds
    }
    assert all(answer.status_code == 200 for answer in answers)
    assert all(len(found) == 1 for found in sizes.values()) and len({s.pop() for s in sizes.values()}) == 4
    assert server.files == []


def test_a_client_that_goes_away_costs_nothing(server: Running) -> None:
    """Killed while it waits, and killed in the middle of its upload."""
    with server.queue.models.use(""):  # nothing is generated meanwhile
        body = as_json(png())
        for sent in (body, body[:100]):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(head("/v1/meshes", len(body)) + sent)
                if sent is body:
                    _until(lambda: server.queue._jobs)
        _until(lambda: not server.queue._jobs)
    assert server.post().status_code == 200 and server.files == []


def test_a_body_that_stops_arriving_is_not_waited_for(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that waits for its mesh may be as silent as it likes."""
    monkeypatch.setattr(guard, "BODY_S", 0.3)
    for path in ("/v1/meshes", "/generate"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            client.sendall(head(path, 99) + b"{")
            answer = b"".join(iter(lambda client=client: client.recv(4096), b""))  # until the server hangs up
        assert answer.startswith(b"HTTP/1.1 408") and b"stopped for 0.3 s" in answer
    with ThreadPoolExecutor(1) as pool:
        with server.queue.models.use(""):  # nothing is generated meanwhile
            waiting = pool.submit(server.post)
            time.sleep(1)
        assert waiting.result(60).status_code == 200


def test_bodies_that_arrive_at_once_have_a_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of jobs that wait: they are dropped."""
    monkeypatch.setattr(guard, "HELD_BODIES", 1)
    with running(max_megabytes=0.1) as server:
        large, body = png() + bytes(50_000), as_json(png() + bytes(50_000))
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head("/v1/meshes", len(body)) + body[:-1])  # of which the rest is to come
            _until(lambda: server.post(large).status_code == 503)
            refused = server.post(large)
            assert refused.json() == {"error": "more than 0.1 MB arrive at once, expected to ask again"}
            assert refused.headers["retry-after"] == "5" and server.post().status_code == 200
            with server.queue.models.use(""):  # nothing is generated meanwhile
                client.sendall(body[-1:])
                _until(lambda: server.queue._jobs)
                assert server.post(large, wait="false").status_code == 202
        assert server.post(large).status_code == 200


@pytest.mark.parametrize("kind", ["form", "json", "generate"])
def test_an_upload_is_dropped_once_its_image_is_read(server: Running, kind: str) -> None:
    """While its job waits, neither its bytes are held nor what the file says beside the pixels."""
    data = png(comment="x" * 4_000_000)
    if kind == "form":
        form = httpx.Request("POST", "http://a", files={"image": data})
        sent = head("/v1/meshes", len(form.read()), form.headers["content-type"]) + form.content
    else:
        body = as_json(data)
        sent = head("/generate" if kind == "generate" else "/v1/meshes", len(body)) + body
    with server.queue.models.use(""):  # nothing is generated meanwhile
        tracemalloc.start()
        try:
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(sent)
                _until(lambda: server.queue._jobs)
                _until(lambda: tracemalloc.get_traced_memory()[0] < 1_000_000, 5)
        finally:
            tracemalloc.stop()
        _until(lambda: not server.queue._jobs)


def _until(true, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_full_disk_is_the_servers_fault_and_says_so(server: Running) -> None:
    """No file may become larger than 16 kB while the mesh is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, limits[1]))
    try:
        answer = server.post(format="stl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert answer.status_code == 500
    assert answer.json() == {"error": "the server can't keep the mesh: File too large"}
    assert server.files == [] and server.post().status_code == 200


def test_no_upload_and_no_mesh_outlives_its_job() -> None:
    with running(max_megabytes=5) as server:
        where = server.post(wait="false").headers["location"]
        job = server.queue.find(where.rpartition("/")[2])
        assert job is not None and job.finished.wait(60)
        assert job.image is None and len(server.files) == 1
        assert server.client.delete(where).status_code == 204 and server.files == []
        folder = server.queue._folder
        server.post(wait="false")
    assert not folder.exists(), "stopped"


@pytest.mark.parametrize("stopped", [True, False])
def test_who_does_not_take_an_answer_is_given_up_when_the_server_stops(stopped: bool) -> None:
    """At the ASGI interface: uvicorn cancels what has not ended in the time to stop, and shows what comes of it."""
    queue = MeshQueue(tiny_pipeline())
    if stopped:
        queue.close()

    async def app(scope: dict, receive: object, send: object) -> None:
        await asyncio.Event().wait()

    async def cancelled() -> bool:
        guarded = guard.Guard(app, ServeConfig(), Metrics(), queue)
        task = asyncio.create_task(guarded({"type": "http", "path": "/docs", "headers": []}, None, None))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(cancelled()) is not stopped
    queue.close()


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_answers_all_within_the_time_to_stop(tmp_path: Path, how: signal.Signals, code: int) -> None:
    """The command: what waits or arrives is refused at once, what runs after `stop_s`; nothing else is said, nor of
    mistakes in requests, which are answered."""
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = [f"model={tmp_path / 'tiny'}", f"port={port}", "device=cpu", "stop_s=1"]
    command = [sys.executable, str(ROOT / "scripts/serve.py"), *options]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background starts without it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _until(lambda: process.poll() is None and _answers(client), 120)

            for mistake in (
                b"garbage\r\n\r\n",
                b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
                head("/v1/meshes", 5, "multipart/form-data; boundary=x") + b"hello",
            ):
                with socket.create_connection(("127.0.0.1", port), timeout=60) as mistaken:
                    mistaken.sendall(mistake)
                    assert mistaken.recv(4096).startswith(b"HTTP/1.1 ")

            def ask(steps: int) -> httpx.Response:
                form = {"steps": str(steps), "resolution": "16"}
                return client.post("/v1/meshes", files={"image": png()}, data=form)

            with ThreadPoolExecutor(2) as pool:
                asked = [pool.submit(ask, steps) for steps in (1000, 999)]
                arriving, gone = (socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(2))
                for upload in (arriving, gone):
                    upload.sendall(head("/v1/meshes", 99) + b"{")
                gone.close()
                busy = {"status": "ok", "waiting": 1, "running": 1}
                _until(lambda: client.get("/healthz").json() == busy)
                process.send_signal(how)
                with arriving:
                    refused = b"".join(iter(partial(arriving.recv, 4096), b""))
                assert refused.startswith(b"HTTP/1.1 503") and refused.endswith(
                    b'{"error":"the server stops"}'
                )
                for answer in asked:
                    assert answer.result().status_code == 503, answer.result().text
                    assert answer.result().json()["error"] == "the job was cancelled: the server stops"
        _, said = process.communicate(timeout=50)
        ended = {143: "terminated", 130: "interrupted"}[code]
        assert process.returncode == code
        assert said.splitlines() == [f"tiny on http://127.0.0.1:{port}", ended]
    finally:
        process.kill()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False
