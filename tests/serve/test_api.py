"""The HTTP API on a tiny pipeline: every endpoint, every refusal, batches and limits."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image, ImageDraw

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402
from tiny_dial import save_dialled  # noqa: E402
from tiny_pipeline import tiny_pipeline  # noqa: E402

from elastic3d.errors import UserError  # noqa: E402
from elastic3d.geometry.mesh_io import read_extras  # noqa: E402
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline  # noqa: E402
from elastic3d.serve.api import create_app  # noqa: E402
from elastic3d.serve.application import build_app  # noqa: E402
from elastic3d.serve.config import AppConfig, Runner, ServeConfig, ServerConfig  # noqa: E402
from elastic3d.serve.guard import Guard  # noqa: E402
from elastic3d.serve.metrics import Metrics  # noqa: E402
from elastic3d.serve.queue import JobState, MeshQueue, MeshRequest, QueueFull  # noqa: E402
from elastic3d.utils.devices import DeviceChoice  # noqa: E402

SMALL = {"steps": "2", "resolution": "16"}


def image_bytes(side: int = 64, kind: str = "PNG") -> bytes:
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).ellipse((side // 5, side // 6, side * 4 // 5, side * 5 // 6), fill="brown")
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


class Server:
    def __init__(self, pipeline, **options) -> None:
        queue_options = {name: options.pop(name) for name in ("capacity", "batch_size") if name in options}
        self.config, self.metrics = ServeConfig(**options), Metrics()
        self.queue = MeshQueue(pipeline, observer=self.metrics.observer(), **queue_options)
        self.client = TestClient(
            create_app(self.queue, self.config, self.metrics), raise_server_exceptions=False
        )


@pytest.fixture
def serve(pipeline) -> Iterator:
    servers: list[Server] = []

    def start(**options) -> Server:
        servers.append(Server(pipeline, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.queue.close()


@pytest.fixture(scope="module")
def client(pipeline) -> Iterator[TestClient]:
    """Of a server with every default, for tests that only need its answers: making an app takes a while."""
    server = Server(pipeline)
    yield server.client
    server.queue.close()


def post(client: TestClient, data: bytes | None = None, **fields: str):
    return client.post(
        "/v1/meshes", files={"image": ("a.png", data or image_bytes())}, data={**SMALL, **fields}
    )


def test_a_mesh_of_an_uploaded_image(serve, tmp_path: Path) -> None:
    server = serve()
    answer = post(server.client, seed="3")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "model/gltf-binary"
    path = tmp_path / "a.glb"
    path.write_bytes(answer.content)
    assert len(trimesh.load_mesh(path).faces)
    assert read_extras(path)["seed"] == 3
    assert not list(server.queue._folder.iterdir())  # nothing is kept once it is answered


def test_json_gives_the_same_mesh_as_a_form(client: TestClient) -> None:
    body = {"image": base64.b64encode(image_bytes()).decode(), "steps": 2, "resolution": 16, "format": "ply"}
    assert client.post("/v1/meshes", json=body).content == post(client, format="ply").content
    body["image"] = "data:image/png;base64," + str(body["image"])
    assert client.post("/v1/meshes", json=body).status_code == 200


def test_a_job_from_start_to_deletion(client: TestClient) -> None:
    answer = post(client, wait="false", format="stl")
    assert answer.status_code == 202
    where = answer.headers["location"]
    deadline = time.monotonic() + 60
    while (state := client.get(where).json())["state"] != "done":
        assert state["state"] in ("queued", "running") and time.monotonic() < deadline
        time.sleep(0.02)
    assert state["progress"] == 1 and state["metadata"]["steps"] == 2
    mesh = client.get(f"{where}/mesh")
    assert mesh.status_code == 200 and mesh.headers["content-type"] == "model/stl"
    assert client.delete(where).status_code == 204
    assert client.get(where).status_code == 404 and client.get(f"{where}/mesh").status_code == 404


@pytest.mark.parametrize(("wait", "status"), [("no", 202), ("OFF", 202), ("yes", 200), ("banana", 400)])
def test_waiting_is_a_truth_value_in_a_form_too(client: TestClient, wait: str, status: int) -> None:
    answer = post(client, wait=wait)
    assert answer.status_code == status
    assert status != 400 or answer.json()["error"].startswith("wait is 'banana'")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"budget": "2"}, "budget is '2'"),
        ({"steps": "0"}, "steps is '0'"),
        ({"resolution": "4096"}, "resolution"),
        ({"format": "exe"}, "format"),
        ({"stpes": "3"}, "there is no option stpes: GET /docs lists them"),
        ({"seed": "-1"}, "seed"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_a_wrong_value_is_named(client: TestClient, fields: dict[str, str], words: str) -> None:
    answer = post(client, **fields)
    assert answer.status_code == 400 and words in answer.json()["error"], answer.text


def test_uploads_that_are_no_images(serve) -> None:
    client = serve(max_pixels=10_000).client
    for data, words in (
        (b"no image at all", "no image"),
        (image_bytes()[:60], "broken"),
        (image_bytes(200), "200 x 200 pixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image"),
    ):
        answer = post(client, data)
        assert answer.status_code == 400 and words in answer.json()["error"], answer.text
    blank = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(blank, "PNG")
    assert post(client, blank.getvalue()).status_code == 400


@pytest.mark.parametrize("path", ["/v1/meshes", "/generate"])
def test_json_that_is_no_object_is_said_to_be_none(client: TestClient, path: str) -> None:
    answer = client.post(path, json=[1])
    assert (answer.status_code, answer.json()) == (
        400,
        {"error": "the request is no JSON object, expected one"},
    )


def test_bodies_that_are_no_requests(serve) -> None:
    client = serve(max_megabytes=0.01).client
    for path in ("/v1/meshes", "/generate", "/send"):
        answer = client.post(path, content=b"x", headers={"content-type": "text/plain"})
        assert answer.status_code == 415 and "application/json" in answer.json()["error"]
    json_kind = {"content-type": "application/json"}
    for content in (b"{", b"[]", b"{}", b'{"image": "%%%"}', b"[" * 3000):
        answer = client.post("/v1/meshes", content=content, headers=json_kind)
        assert answer.status_code == 400 and answer.json()["error"], content[:20]
    assert client.post("/v1/meshes", data=SMALL).status_code in (400, 415)
    assert client.post("/v1/meshes", content=b"x" * 20_000, headers=json_kind).status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 1000

    for path in ("/v1/meshes", "/generate"):
        answer = client.post(path, content=endless(), headers=json_kind)
        assert (answer.status_code, answer.json()) == (413, {"error": "the request is larger than 0.01 MB"})
    answer = client.post("/generate", content=b"{", headers=json_kind)
    assert answer.json()["error"].startswith("the request is no valid JSON: EOF while parsing")


def test_without_the_token_nothing_is_done(serve) -> None:
    client = serve(token="secret").client
    assert post(client).status_code == 401
    for given in ("secret", "Basic secret", "Bearer wrong", "Bearer secretx"):
        assert client.get("/v1/models", headers={"Authorization": given}).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("token", "sent"),
    [
        ("secret à", ["secret à".encode(), "secret à".encode("latin-1")]),
        ("ключ", ["ключ".encode()]),
        (os.fsdecode(b"secr\xe9t"), [b"secr\xe9t"]),  # from the environment
    ],
)
def test_a_token_need_not_be_ascii(token: str, sent: list[bytes]) -> None:
    """At the ASGI interface, as Starlette's client sends UTF-8 whatever it is given."""
    found: list[int] = []

    async def send(message: dict) -> None:
        found.extend([message["status"]] if "status" in message else [])

    async def app(scope: dict, receive: object, send: Callable) -> None:
        await send({"type": "http.response.start", "status": 200})

    guard = Guard(app, ServeConfig(token=token), Metrics(), queue=None)
    for given in (*sent, b"secret ?", b"????", b"", "secret á".encode()):
        headers = [(b"authorization", b"Bearer " + given)]
        asyncio.run(guard({"type": "http", "path": "/v1/models", "headers": headers}, None, send))
    assert found == [200] * len(sent) + [401] * 4


@pytest.mark.parametrize(
    ("host", "needed"), [("127.0.0.1", False), ("::1", False), ("0.0.0.0", True), ("a.b", True)]
)
def test_an_open_address_needs_a_token(host: str, needed: bool) -> None:
    if needed:
        with pytest.raises(UserError, match="no token"):
            ServeConfig(host=host).require_token()
    ServeConfig(host=host, token="t").require_token()


def test_with_several_replicas_there_are_no_jobs(serve) -> None:
    client = serve(runner=Runner.ray, replicas=2).client
    for path in ("/v1/jobs/any", "/v1/jobs/any/mesh", "/status/any"):
        answer = client.get(path)
        assert answer.status_code == 501 and "2 replicas" in answer.text, path
    assert client.delete("/v1/jobs/any").status_code == 501


def test_with_low_memory_one_mesh_is_made_at_a_time(pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    app = build_app(ServeConfig(model=str(tmp_path / "model"), low_memory=True, device=DeviceChoice.cpu))
    assert app.state.queue.batch_size == 1
    app.state.queue.close()


@pytest.mark.parametrize("config", [ServeConfig, AppConfig])
def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(config: type[ServerConfig]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"can't listen on host=127.0.0.1 port={port}: .*in use"):
            config(port=port).require_port()
    free = config(port=0)
    free.require_port()
    assert free.port > 0, "which is said when the server listens"
    assert free.address == f"http://127.0.0.1:{free.port}"
    assert config(host="::1", port=80).address == "http://[::1]:80"


class Slow:
    """A pipeline that waits for permission before each batch, and notes its batches."""

    def __init__(self, inner) -> None:
        self.inner, self.config, self.session = inner, inner.config, inner.session
        self.dial, self.weights_sha256, self.encoder = inner.dial, inner.weights_sha256, inner.encoder
        self.configured = inner.configured
        self.go, self.batches = threading.Event(), []

    def __call__(self, images, **options):
        self.go.wait(30)
        self.batches.append(len(images))
        return self.inner(images, **options)


def test_requests_that_come_together_are_one_batch_and_equal_those_alone(
    pipeline, client: TestClient
) -> None:
    alone = {seed: post(client, seed=str(seed)).content for seed in range(3)}
    slow = Slow(pipeline)
    server = Server(slow)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, server.client, seed="9")
        while server.queue.running == 0:
            time.sleep(0.01)
        others = {seed: pool.submit(post, server.client, seed=str(seed)) for seed in range(3)}
        while server.queue.waiting < 3:
            time.sleep(0.01)
        slow.go.set()
        assert first.result().status_code == 200
        for seed, answer in others.items():
            np.testing.assert_allclose(_vertices(answer.result().content), _vertices(alone[seed]), atol=1e-4)
    assert slow.batches == [1, 3]
    server.queue.close()


def _vertices(content: bytes) -> np.ndarray:
    return np.asarray(trimesh.load_mesh(io.BytesIO(content), file_type="glb").vertices)


def test_a_full_queue_is_429_and_a_late_mesh_504(pipeline) -> None:
    slow = Slow(pipeline)
    server = Server(slow, capacity=1, timeout_s=0.3)
    image = Image.open(io.BytesIO(image_bytes()))
    running = server.queue.submit(image, MeshRequest(steps=2, resolution=16))
    while server.queue.running == 0:
        time.sleep(0.01)
    waiting = server.queue.submit(image, MeshRequest(steps=2, resolution=16))
    for data in (None, b"no image"):  # which is not looked at
        answer = post(server.client, data)
        assert answer.status_code == 429 and "Retry-After" in answer.headers
    server.queue.cancel(waiting)
    assert waiting.state is JobState.cancelled and waiting.image is None
    assert post(server.client).status_code == 504
    slow.go.set()
    assert running.finished.wait(60) and running.state is JobState.done
    server.queue.close()
    with pytest.raises(QueueFull):
        server.queue.submit(image, MeshRequest())
    assert not server.queue._folder.exists()


def test_one_failing_image_does_not_fail_its_batch(pipeline) -> None:
    slow = Slow(pipeline)
    server = Server(slow)
    good, bad = Image.open(io.BytesIO(image_bytes())), Image.new("RGB", (64, 64), "white")
    first = server.queue.submit(good, MeshRequest(steps=1, resolution=8))
    jobs = [server.queue.submit(image, MeshRequest(steps=2, resolution=16)) for image in (good, bad, good)]
    slow.go.set()
    for job in (first, *jobs):
        assert job.finished.wait(60)
    assert [job.state.value for job in jobs] == ["done", "failed", "done"]
    assert "image" in jobs[1].error
    server.queue.close()


def test_as_a_client_of_hunyuan3d_2_asks(client: TestClient) -> None:
    body = {
        "image": base64.b64encode(image_bytes()).decode(),
        "seed": 1,
        "octree_resolution": 16,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "mc_algo": "mc",
        "texture": False,
    }
    answer = client.post("/generate", json=body)
    assert answer.status_code == 200 and answer.content[:4] == b"glTF"
    uid = client.post("/send", json=body).json()["uid"]
    deadline = time.monotonic() + 60
    while (state := client.get(f"/status/{uid}").json())["status"] == "processing":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert base64.b64decode(state["model_base64"])[:4] == b"glTF"
    assert client.get("/status/unknown").json()["status"] == "error"
    assert "texture" in client.post("/generate", json={**body, "texture": True}).json()["error"]


def test_a_quality_is_a_point_of_the_dial(client: TestClient, tmp_path: Path) -> None:
    dialled = ImageTo3DPipeline.from_pretrained(save_dialled(tmp_path / "model"), "cpu", "float32")
    server = Server(dialled)
    try:
        form = {"files": {"image": ("a.png", image_bytes())}}
        answer = server.client.post("/v1/meshes", data={"quality": "fast", "resolution": "8"}, **form)
        assert answer.status_code == 200, answer.text
        (tmp_path / "a.glb").write_bytes(answer.content)
        assert read_extras(tmp_path / "a.glb")["dial"]["requested"] == "fast"
        answer = server.client.post("/v1/meshes", data={"quality": "fast", "budget": "0.5"}, **form)
        assert answer.status_code == 400 and "expected one of them" in answer.json()["error"]
        answer = server.client.post("/v1/meshes", data={"quality": "good"}, **form)
        assert answer.status_code == 400 and answer.json()["error"].startswith("quality is 'good'")
        assert server.client.get("/v1/models").json()["models"][0]["dial"]["names"]["best"] == 1
    finally:
        server.queue.close()
    answer = client.post("/v1/meshes", data={"quality": "fast"}, **form)
    assert answer.status_code == 400 and "this model has no dial.json" in answer.json()["error"]


@pytest.mark.parametrize("kind", ["dial", "routers", "dense"])
def test_a_request_with_the_defaults_is_one_without_options(kind: str, tmp_path: Path) -> None:
    folder = save_dialled(tmp_path / "model")
    made = ImageTo3DPipeline.from_pretrained(
        folder, "cpu", "float32", dial=kind == "dial", routers=kind != "dense"
    )
    server, settings = Server(made), []
    try:
        defaults = server.client.get("/v1/models").json()["models"][0]["defaults"]
        assert (defaults["quality"] is None) == (defaults["steps"] is not None) == (kind != "dial")
        given = {name: str(value) for name, value in defaults.items() if value is not None}
        for data in ({}, given):
            form = {"files": {"image": ("a.png", image_bytes())}, "data": data}
            answer = server.client.post("/v1/meshes", **form)
            assert answer.status_code == 200, answer.text
            (tmp_path / "a.glb").write_bytes(answer.content)
            found = read_extras(tmp_path / "a.glb")
            settings.append({name: found[name] for name in found if name not in ("ms", "print")})
        assert settings[0] == settings[1]
    finally:
        server.queue.close()


def test_what_the_server_says_of_itself(serve) -> None:
    client = serve().client
    post(client)
    model = client.get("/v1/models").json()["models"][0]
    assert model["defaults"]["steps"] > 0
    text = client.get("/metrics").text
    assert 'elastic3d_jobs_total{state="done"} 1.0' in text or 'state="cancelled"' in text
    assert 'elastic3d_requests_total{path="/v1/meshes",status="200"} 1.0' in text
    assert "/v1/meshes" in client.get("/openapi.json").json()["paths"]
    page = client.get("/docs").text
    assert "https://" not in page  # nothing is loaded from elsewhere
    assert client.get("/docs/assets/swagger-ui.css").status_code == 200
    assert client.get("/nothing").json() == {"error": "Not Found"}
