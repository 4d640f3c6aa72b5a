"""Ray: two replicas answer as one process does, and a folder gives the meshes of one process."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

pytest.importorskip("fastapi")
ray = pytest.importorskip("ray")
httpx = pytest.importorskip("httpx")
from tiny_pipeline import save_image, tiny_pipeline  # noqa: E402

from elastic3d.errors import UserError  # noqa: E402
from elastic3d.evaluation.items import Item  # noqa: E402
from elastic3d.evaluation.options import ProtocolConfig, Runner  # noqa: E402
from elastic3d.evaluation.runner import score_all  # noqa: E402
from elastic3d.geometry.mesh_io import save_mesh  # noqa: E402
from elastic3d.pipelines import generation  # noqa: E402
from elastic3d.pipelines.options import GenerateConfig, MeshFormat  # noqa: E402
from elastic3d.pipelines.ray_generation import Worker, _spread, generate_over_ray  # noqa: E402
from elastic3d.serve.application import PROXY_START_S, serve_over_ray  # noqa: E402
from elastic3d.serve.config import ServeConfig  # noqa: E402
from elastic3d.utils.devices import DeviceChoice, DTypeChoice  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One for all tests: starting one takes seconds."""
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = PROXY_START_S  # before its processes start
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=4)
    yield
    ray.shutdown()


def _config(model: Path, images: Path, output: Path, **options) -> GenerateConfig:
    return GenerateConfig(
        image=str(images), output=f"{output}/", model=str(model), steps=1, batch_size=2, format=MeshFormat.stl,
        device=DeviceChoice.cpu, dtype=DTypeChoice.float32, **options,
    )  # fmt: skip


def over_ray(config: GenerateConfig) -> list[generation.Outcome]:
    outcomes: list[generation.Outcome] = []
    generate_over_ray(generation.plan(config).jobs, config, outcomes.append)
    return outcomes


def test_a_folder_gives_the_meshes_of_one_process_and_resumes(model: Path, tmp_path: Path) -> None:
    images = tmp_path / "in"
    for index, name in enumerate("abcde"):
        save_image(images / f"{name}.png", x=10 * index)
    (images / "broken.png").write_text("no image")
    alone = _config(model, images, tmp_path / "one")
    spread = _config(model, images, tmp_path / "ray", runner=Runner.ray)
    generation.generate(
        generation.load_pipeline(alone, 6), generation.plan(alone).jobs, alone, lambda _: None
    )
    outcomes = over_ray(spread)
    assert sorted(o.status for o in outcomes) == ["failed"] + ["ok"] * 5
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "ray").iterdir()) and len(files) == 5
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()
    (images / "broken.png").unlink()
    (tmp_path / "ray" / files[2]).unlink()
    spread.resume = True
    again = over_ray(spread)
    assert sorted(o.status for o in again) == ["ok"] + ["skipped"] * 4
    missing = _config(tmp_path / "nowhere", images, tmp_path / "none", runner=Runner.ray)
    with pytest.raises(UserError, match="nowhere"):
        over_ray(missing)


def test_relative_paths_are_those_of_the_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster was started elsewhere."""
    save_image(tmp_path / "in/a.png")
    monkeypatch.chdir(tmp_path)
    (outcome,) = over_ray(_config(model, Path("in"), Path("out"), runner=Runner.ray))
    assert outcome.status == "ok" and (tmp_path / "out/a.stl").is_file()
    item = Item("a", (Path("out/a.stl"),), (Path("out/a.stl"),))
    (row,) = score_all([item], ProtocolConfig(points=1000), runner=Runner.ray, workers=1)
    assert row["status"] == "ok"


@pytest.mark.timeout(300)
def test_a_worker_that_there_is_no_room_for_starts_when_another_is_done(model: Path, tmp_path: Path) -> None:
    """Each takes all cores of the cluster."""
    for name in "abcd":
        save_image(tmp_path / "in" / f"{name}.png")
    config = _config(model, tmp_path / "in", tmp_path / "out", runner=Runner.ray, workers=2)
    jobs, outcomes = generation.plan(config).jobs, list[generation.Outcome]()
    todo = generation.batches(jobs, config, outcomes.append)
    outcomes += _spread(ray, ray.remote(num_cpus=4)(Worker), todo, config)
    assert len(todo) == 2 and [o.status for o in outcomes] == ["ok"] * 4


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def port() -> int:
    """Of the cluster's proxy, which the first application starts and which stays."""
    return free_port()


def test_a_full_queue_refuses_and_other_applications_stay(model: Path, tmp_path: Path, port: int) -> None:
    image = save_image(tmp_path / "a.png").read_bytes()
    config = ServeConfig(
        model=str(model), port=port, runner=Runner.ray, queue=1, batch_size=1, stop_s=0, device=DeviceChoice.cpu,
        dtype=DTypeChoice.float32,
    )  # fmt: skip
    from ray import serve

    @serve.deployment
    def other() -> str:
        return "here"

    serve.start(http_options={"port": port})
    serve.run(other.bind(), name="other", route_prefix="/other")
    with serve_over_ray(config), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:

        def status(_: int) -> int:
            form = {"steps": "200", "resolution": "16"}
            return client.post("/v1/meshes", files={"image": image}, data=form).status_code

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(status, range(8)))
    assert set(found) == {200, 429}
    assert list(serve.status().applications) == ["other"], "stopping ends no other application"
    serve.delete("other")


def test_two_replicas_answer_as_one_process_does(model: Path, tmp_path: Path, port: int) -> None:
    image = save_image(tmp_path / "a.png").read_bytes()
    config = ServeConfig(
        model=str(model), port=port, runner=Runner.ray, replicas=2, device=DeviceChoice.cpu,
        dtype=DTypeChoice.float32, token="secret", batch_size=1,  # batches differ by rounding
    )  # fmt: skip
    with serve_over_ray(config):
        base = f"http://127.0.0.1:{port}"
        client = httpx.Client(base_url=base, headers={"Authorization": "Bearer secret"}, timeout=120)

        def mesh(seed: int) -> bytes:
            form = {"seed": str(seed), "steps": "1", "format": "stl"}
            answer = client.post("/v1/meshes", files={"image": image}, data=form)
            assert answer.status_code == 200, answer.text
            return answer.content

        with ThreadPoolExecutor(4) as pool:
            meshes = list(pool.map(mesh, [0, 1] * 4))
        assert meshes == meshes[:2] * 4 and meshes[0] != meshes[1]
        answered = {_meshes_of_a_replica(client.get("/metrics").text) for _ in range(40)}
        assert answered == {4} or (len(answered) == 2 and sum(answered) == 8), "each has answered some"
        expected = tmp_path / "one.stl"
        save_mesh(tiny_pipeline()(tmp_path / "a.png", seed=0, steps=1).mesh, expected)
        assert expected.read_bytes()[84:] == meshes[0][84:]
        answer = client.post("/v1/meshes", files={"image": image}, data={"wait": "false"})
        assert answer.status_code == 501 and "2 replicas" in answer.json()["error"]
        for path in ("/v1/jobs/any", "/v1/jobs/any/mesh", "/status/any"):
            assert client.get(path).status_code == 501, path
        assert httpx.get(f"{base}/v1/models").status_code == 401


def _meshes_of_a_replica(metrics: str) -> int:
    """How many meshes the replica has made whose counters these are."""
    found = re.search(
        r'^elastic3d_requests_total{path="/v1/meshes",status="200"} (\S+)', metrics, re.MULTILINE
    )
    return int(float(found[1])) if found else 0


def test_the_command_starts_two_replicas_and_stops_with_all_its_processes(model: Path) -> None:
    script, port = Path(__file__).parents[2] / "scripts/serve.py", free_port()
    options = [f"model={model}", f"port={port}", "runner=ray", "replicas=2", "device=cpu"]
    process = subprocess.Popen([sys.executable, str(script), *options])
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/healthz").json()["status"] == "ok"
                break
            except (httpx.HTTPError, ValueError, KeyError):
                time.sleep(0.5)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) > 3
        process.terminate()
        assert process.wait(90) == 143
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive
    finally:
        process.kill()
