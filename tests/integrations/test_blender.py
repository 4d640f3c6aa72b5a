"""The Blender add-on: its client against a live server, and the whole of it where `bpy` can be imported."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
from tiny_dial import load, save_dialled  # noqa: E402
from tiny_pipeline import save_image  # noqa: E402

from elastic3d.geometry.mesh_io import read_extras  # noqa: E402
from elastic3d.serve.api import create_app  # noqa: E402
from elastic3d.serve.config import ServeConfig  # noqa: E402
from elastic3d.serve.metrics import Metrics  # noqa: E402
from elastic3d.serve.queue import MeshQueue  # noqa: E402

ADDON = Path(__file__).parents[2] / "integrations" / "blender" / "elastic3d"


@pytest.fixture(scope="module")
def client():
    spec = importlib.util.spec_from_file_location("blender_client", ADDON / "client.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(load(save_dialled(tmp_path_factory.mktemp("model") / "dialled"))) as where:
        yield where


@contextmanager
def served(pipeline) -> Iterator[str]:
    with MeshQueue(pipeline) as queue:
        app = create_app(queue, ServeConfig(), Metrics())
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_the_client_gets_a_mesh_in_the_background(client, address: str, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.png")
    job = client.Generation(address, "", image, {"resolution": 16, "seed": 2})
    job.start()
    job.join(60)
    assert job.error == "" and job.mesh[:4] == b"glTF" and job.progress == 1.0


def test_the_client_asks_for_a_quality(client, address: str, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.png")
    job = client.Generation(address, "", image, {"resolution": 16, "quality": "fast"})
    job.start()
    job.join(60)
    assert job.error == ""
    (tmp_path / "a.glb").write_bytes(job.mesh)
    assert read_extras(tmp_path / "a.glb")["dial"]["requested"] == "fast"


def test_the_client_says_what_is_wrong(client, address: str, tmp_path: Path) -> None:
    image = save_image(tmp_path / "a.png")
    (tmp_path / "no.png").write_text("text")
    for server, path, options, words in (
        (address, tmp_path / "none.png", {}, "can't read"),
        (address, tmp_path / "no.png", {}, "no image"),
        (address, image, {"budget": 7}, "budget"),
        ("http://127.0.0.1:9", image, {}, "no answer"),
        ("somewhere", image, {}, "expected an address"),
        ("http://127.0.0.1:port", image, {}, "no answer"),
        (address, Path(), {}, "choose one"),
    ):
        job = client.Generation(server, "", path, options)
        job.start()
        job.join(60)
        assert job.mesh is None and words in job.error, job.error


@pytest.mark.parametrize(("broken", "made"), [("DELETE", True), ("GET", False)])
def test_a_connection_that_breaks_costs_no_mesh_and_no_job(
    client, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, made: bool
) -> None:
    """What was fetched is kept though the server can't be told; a job that can't be followed is given up."""
    asked, ask = [], client.ask

    def breaking(server: str, path: str, body=None, token: str = "", method: str = "") -> bytes:
        asked.append(method or ("GET" if body is None else "POST"))
        if asked[-1] == broken:
            raise client.ServerError("the connection broke")
        return ask(server, path, body, token, method)

    monkeypatch.setattr(client, "ask", breaking)
    job = client.Generation(address, "", save_image(tmp_path / "a.png"), {"resolution": 16})
    job.start()
    job.join(60)
    assert (job.mesh is not None) == made and job.error == ("" if made else "the connection broke")
    assert asked[-1] == "DELETE"


@pytest.mark.parametrize(
    "content", [b"HTTP/1.0 200 OK\r\n\r\n<html>", b"HTTP/1.0 200 OK\r\n\r\n[1]", b"SSH-2.0\r\n"]
)
def test_the_client_says_that_somebody_else_answers(client, tmp_path: Path, content: bytes) -> None:
    image = save_image(tmp_path / "a.png")
    with socket.create_server(("127.0.0.1", 0)) as other:
        job = client.Generation(f"http://127.0.0.1:{other.getsockname()[1]}", "", image, {})
        job.start()
        connection, _ = other.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            job.join(60)
    assert job.mesh is None and ("no elastic3d server" in job.error or "no answer" in job.error), job.error


def _python_with_bpy() -> str | None:
    """$ELASTIC3D_BPY_PYTHON, or this Python if it has Blender's module."""
    named = os.environ.get("ELASTIC3D_BPY_PYTHON")
    if named and shutil.which(named):
        return named
    return sys.executable if importlib.util.find_spec("bpy") else None


@pytest.mark.skipif(_python_with_bpy() is None, reason="needs bpy (or $ELASTIC3D_BPY_PYTHON)")
def test_in_blender_itself(address: str, tmp_path: Path) -> None:
    image = save_image(tmp_path / "vase.png")
    python, script = _python_with_bpy(), Path(__file__).with_name("blender_session.py")
    done = subprocess.run(
        [str(python), str(script), address, str(image)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(lines[0].removeprefix("RESULT "))
    assert found["outcome"] == ["FINISHED"] and found["faces"] > 10 and found["name"] == "vase"
    assert found["longest"] == pytest.approx(2.5, rel=1e-3)
    assert found["location"] == pytest.approx([1, 2, 3], abs=1e-5)
    assert found["material"].startswith("neutral") and "can't read" in found["error"]
    assert found["fast"] == ["FINISHED"] and found["colours"] > 0
