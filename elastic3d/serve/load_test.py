"""How much a server answers: requests one at a time, then many clients at once, with its memory over them."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from elastic3d.diffusion.options import Quality
from elastic3d.errors import UserError
from elastic3d.utils.options import Options, option

START_S, STOP_S = 300.0, 60.0  # that the server is given


@dataclass(kw_only=True)
class LoadTestConfig(Options):
    """Options of `scripts/load_test.py`; the server is started for it, on this machine alone."""

    model: str = option("", "Folder of the model; empty: the bundled model.")
    requests: int = option(500, "Requests of all clients together.", ge=10, le=100_000)
    alone: int = option(50, "Requests one at a time, before.", ge=5, le=100_000)
    clients: int = option(8, "Clients that ask at once.", ge=1, le=256)
    batch_size: int = option(8, "Of the server.", ge=1, le=1024)
    quality: Quality | None = option(Quality.fast, "Of each mesh; null: the model's default.")
    steps: int | None = option(None, "Instead of quality=: sampling steps of each mesh.", ge=1, le=1000)
    resolution: int = option(64, "Grid cells a side of each mesh.", ge=8, le=512)
    max_s: float = option(300.0, "Seconds after which clients together send no more.", ge=1, le=86_400)
    output: Path | None = option(None, "Also write the figures to this JSON file.")

    def setting(self) -> dict[str, str]:
        """The fields of a request that say how its mesh is made; `steps` takes the place of `quality`."""
        if self.steps is not None:
            return {"steps": str(self.steps)}
        return {"quality": self.quality.name} if self.quality is not None else {}


def load_test(config: LoadTestConfig, script: Path) -> dict[str, Any]:
    """Figures of a server that `script` starts: requests a second alone and together, p50 and p95, errors, memory.

    Raises:
        UserError: httpx is missing, the server did not start, or it refuses such requests.
    """
    try:
        import httpx
    except ImportError as error:
        raise UserError("httpx is missing: pip install httpx") from error
    import psutil

    image, setting = _image(), config.setting()
    limits = httpx.Limits(max_connections=config.clients)
    with (
        _server(config, script) as (base, process),
        httpx.Client(base_url=base, timeout=600, limits=limits) as client,
    ):

        def send(seed: int) -> httpx.Response:
            form = {"seed": str(seed), "resolution": str(config.resolution), **setting}
            return client.post("/v1/meshes", files={"image": image}, data=form)

        def ask(seed: int) -> tuple[float, int]:
            start = time.perf_counter()
            try:
                status = send(seed).status_code
            except httpx.HTTPError:
                status = 0  # no answer
            return time.perf_counter() - start, status

        _ready(client, process)
        for seed in range(3):  # what is loaded at first use
            with suppress(httpx.HTTPError):
                if (answer := send(seed)).is_client_error:
                    raise UserError(f"the server refuses such requests: {answer.text:.300}")
        server = psutil.Process(process.pid)
        start, cpu = time.perf_counter(), _cpu_s(server)
        alone = _figures([ask(seed) for seed in range(config.alone)], start, server, cpu)
        memory = []
        start, cpu = time.perf_counter(), _cpu_s(server)
        together: list[tuple[float, int]] = []

        def ask_in_time(seed: int) -> tuple[float, int] | None:
            return ask(seed) if time.perf_counter() - start < config.max_s else None

        pool = ThreadPoolExecutor(config.clients)
        try:
            for made in pool.map(ask_in_time, range(config.requests)):
                if made is None:
                    break
                together.append(made)
                if len(together) % max(config.requests // 10, 1) == 0:
                    memory.append(round(server.memory_info().rss / 2**20))
        finally:
            pool.shutdown(cancel_futures=True)  # whoever stops the command waits for none that are to come
        at_once = _figures(together, start, server, cpu) | {"clients": config.clients}
    return {"alone": alone, "together": at_once, "memory_mib": memory}


def _cpu_s(server: Any) -> float:
    """Processor time of the server so far, which other programs on the machine hardly change."""
    times = server.cpu_times()
    return float(times.user + times.system)


def _figures(answers: list[tuple[float, int]], start: float, server: Any, cpu_s: float) -> dict[str, Any]:
    """Of answers since `start`, when the server had taken `cpu_s` of processor time."""
    seconds, spent = time.perf_counter() - start, _cpu_s(server) - cpu_s
    times = np.array([time for time, _ in answers])
    return {
        "requests": len(answers),
        "errors": sum(status != 200 for _, status in answers),
        "requests_per_s": round(len(answers) / seconds, 2),
        "p50_s": round(float(np.quantile(times, 0.5)), 3),
        "p95_s": round(float(np.quantile(times, 0.95)), 3),
        "cpu_s_per_request": round(spent / len(answers), 3),
    }


@contextmanager
def _server(config: LoadTestConfig, script: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        f"port={port}",
        f"model={config.model}",
        f"batch_size={config.batch_size}",
        "queue=1000",
        "stop_s=0",
    ]
    open_to_us = os.environ | {"ELASTIC3D_TOKEN": ""}
    process = subprocess.Popen([sys.executable, str(script), *options], env=open_to_us)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _ready(client: Any, process: subprocess.Popen[bytes]) -> None:
    import httpx

    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            client.get("/healthz").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.2)
    if process.returncode is not None:
        raise UserError(f"the server ended with exit code {process.returncode} before it answered")
    raise UserError(f"the server did not answer within {START_S:g} s")


def _image() -> bytes:
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).ellipse((60, 40, 200, 220), fill="brown")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
