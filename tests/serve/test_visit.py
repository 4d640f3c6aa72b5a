"""What the web app's buttons do, without a browser: meshes, viewer, gallery, routes, downloads."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trimesh
from PIL import Image

gradio = pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
from app import Drawer  # noqa: E402 (the script)
from tiny_dial import ROUTERS as LORA  # noqa: E402
from tiny_dial import load, save_dialled  # noqa: E402
from tiny_pipeline import image, tiny_pipeline  # noqa: E402

from elastic3d.elastic import attach  # noqa: E402
from elastic3d.elastic.config import ElasticConfig, RouterConfig, RouterCurves  # noqa: E402
from elastic3d.geometry import pose  # noqa: E402
from elastic3d.geometry.mesh_io import read_extras  # noqa: E402
from elastic3d.serve import visit  # noqa: E402
from elastic3d.serve.app import _settings, build_app, launch  # noqa: E402
from elastic3d.serve.config import AppConfig  # noqa: E402
from elastic3d.serve.models import ModelInfo, Models  # noqa: E402
from elastic3d.serve.queue import Job, MeshQueue, Observer  # noqa: E402
from elastic3d.serve.visit import Choices, Shown, Visits, download, route_image, table, tiles  # noqa: E402

CHOICES = Choices(image(), "", "budget", 0.6, True, True, 3, 1, 1, 2, 16, 500, 20, 0.15)


def test_both_meshes_with_colours_and_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(pose, "_STARTS", 1)  # any camera will do
    monkeypatch.setattr(pose, "_FINE", 24)
    pipeline = tiny_pipeline()
    attach(pipeline.dit, RouterConfig())
    pipeline.config.elastic = ElasticConfig(budget=0.5)
    with MeshQueue(pipeline) as queue:
        visits = Visits(queue)
        made = visits.generate(CHOICES, "somebody", lambda *_, **__: None)
        assert [m.name for m in (*made.elastic, *made.dense)] == ["elastic, seed 3", "dense, seed 3"]
        assert made.elastic[0].metadata["budget"] == 0.6 and made.dense[0].share == "100%"
        assert made.elastic[0].mesh.visual.kind == "vertex"
        page = made.view(0)
        assert page.count("<iframe") == 1 and "dense, seed 3" in page and "colours" in page
        assert page.index("dense, seed 3") < page.index("elastic, seed 3")
        assert [name for _, name in tiles(made)] == ["seed 3"] and Path(str(route_image(made, 0))).is_file()
        assert "<td>elastic, seed 3</td>" in table([m.row() for m in made.elastic])
        for kind, longest in (("glb", 0.05), ("stl", 50), ("obj", 50), ("ply", 50)):
            button = download(made, 0, kind, "z", 50)
            path = Path(button.value["path"] if isinstance(button.value, dict) else button.value)
            assert trimesh.load_mesh(path).extents.max() == pytest.approx(longest, rel=1e-4)
        glb = next(path for path in made.elastic[0].path.parent.glob("*.glb"))
        assert read_extras(glb)["seed"] == 3
        folder = made.folder
        other = visits.generate(
            replace(CHOICES, compare=False, colours=False), "somebody", lambda *_, **__: None
        )
        assert not other.dense and folder is not None and not folder.exists(), "the newest alone is kept"
        visits.leave("somebody")
        assert not list(tmp_path.glob("elastic3d-*"))


PLAIN = replace(CHOICES, compare=False, colours=False, budget=0.8)


def test_the_first_mesh_is_kept_until_the_last_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with MeshQueue(tiny_pipeline(), batch_size=1, keep_s=0.0) as queue:
        others = lambda *_, **__: queue.find("of somebody else")  # noqa: E731 (which drops what is old)
        made = Visits(queue).generate(replace(PLAIN, samples=3), "somebody", others)
        assert len(made.elastic) == 3 and not list(queue._folder.iterdir())


def test_empty_numbers_are_defaults_and_others_are_checked() -> None:
    with MeshQueue(tiny_pipeline()) as queue:
        (request,), _ = replace(PLAIN, seed=None, faces=None).requests(queue.models.info())
        assert (request.seed, request.max_faces) == (0, None)
        with pytest.raises(gradio.Error, match="seed is 1000000.*should be less than"):
            Visits(queue).generate(replace(PLAIN, seed=1e30), "somebody", lambda *_, **__: None)
        with pytest.raises(gradio.Error, match="max_faces is 1: "):
            Visits(queue).generate(replace(PLAIN, faces=1), "somebody", lambda *_, **__: None)
        assert queue.waiting == queue.running == 0


def test_a_budget_counts_by_a_dial_without_routers(tmp_path: Path) -> None:
    info = replace(ModelInfo.of(load(save_dialled(tmp_path / "model"))), elastic=False)
    (request,), _ = PLAIN.requests(info)
    assert (request.budget, request.steps) == (0.8, None)
    assert info.dial is not None
    cheapest = replace(info.dial.rows[0], cost=0.143)
    cheap = replace(info, dial=replace(info.dial, rows=(cheapest, *info.dial.rows[1:])))
    assert _settings(cheap)["budget"]["minimum"] == 0.15, "what the slider shows can be kept"


def test_a_quality_brings_its_resolution(tmp_path: Path) -> None:
    """The page sends what its slider shows."""
    pipeline = load(save_dialled(tmp_path / "model"))
    pipeline.config = replace(pipeline.config, fast_resolution=8, best_resolution=24)
    with MeshQueue(pipeline) as queue:
        choose = {item.name: item.fn for item in build_app(queue).fns.values()}["choose"]
        shown = {name: choose("", name) for name in ("fast", "default", "best", "budget")}
        assert _settings(queue.models.info())["resolution"] == {"value": 16, "minimum": 8}
    assert [resolution for _, resolution in shown.values()] == [8, 16, 24, 16]
    assert [budget["visible"] for budget, _ in shown.values()] == [False, False, False, True]


def test_the_budget_by_default_is_the_one_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-block routers know none below a smallest one, which depends on the steps: 0.525 in two, 0.35 in three."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    curves = RouterCurves(requested_budgets=[0.7, 1.0], calibrated_budgets=[0.7, 1.0])
    routers = replace(LORA, trained_steps=[2, 3], few_step_max_steps=3, few_step_nfe=3.0, curves=curves)
    pipeline = tiny_pipeline()
    attach(pipeline.dit, replace(routers, guided_times=[0.4, 0.6]))
    pipeline.config.elastic = ElasticConfig(budget=0.3)
    with MeshQueue(pipeline) as queue:
        info, found = queue.models.info(), {}
        shown = _settings(info)["budget"]["value"]
        assert info.defaults["budget"] == shown
        for steps in (3, 2):
            choices = replace(PLAIN, steps=steps, budget=shown)
            (made,) = Visits(queue).generate(choices, "somebody", lambda *_, **__: None).elastic
            found[steps] = made.metadata["budget"]
        assert found[3] == shown < found[2]


def test_a_budget_without_routers_and_dial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As published models have neither: the page shows the budget, of all FLOPs at first, and a plan keeps it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with MeshQueue(tiny_pipeline()) as queue:
        settings = _settings(queue.models.info())
        assert settings["budget"] == {"minimum": 0.3, "value": 1, "visible": True}
        assert not settings["quality"]["visible"] and settings["steps"]["visible"]
        for budget in (1.0, 0.8):
            choices = replace(PLAIN, budget=budget)
            (made,) = Visits(queue).generate(choices, "somebody", lambda *_, **__: None).elastic
            assert made.metadata["budget"] == budget and ("routes" in made.metadata) == (budget < 1)


def test_the_border_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published models were trained with others; the page sends what its slider shows."""
    pipeline = tiny_pipeline()
    monkeypatch.setattr(pipeline.encoder.config, "border", 0.05)
    with MeshQueue(pipeline) as queue:
        assert _settings(queue.models.info())["border"] == {"value": 0.05, "maximum": 0.5}
        functions = {item.name: item.fn for item in build_app(queue).fns.values()}
        assert 0.05 in [update.get("value") for update in functions["switch"](queue.models.names[0])]


def test_images_of_the_page_lose_nothing() -> None:
    """What is drawn of a prompt is sent back for its mesh, and the mask is what the model sees."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    with MeshQueue(tiny_pipeline()) as queue:
        blocks = build_app(queue).blocks.values()
        shown = {block.elem_id: block for block in blocks if isinstance(block, gradio.Image)}
    for name in ("image", "mask"):
        written = Image.open(shown[name].postprocess(Image.fromarray(noise)).path)
        np.testing.assert_array_equal(np.asarray(written), noise)


@pytest.mark.parametrize("act", [Visits.stop, Visits.leave])
def test_stop_and_leaving_count_while_the_model_is_loaded(act: Callable[[Visits, str], None]) -> None:
    """Before there is a job to cancel."""
    loading, go = threading.Event(), threading.Event()

    def slow():
        loading.set()
        go.wait(30)
        return tiny_pipeline()

    ended: list[Job] = []
    with (
        MeshQueue(
            Models({"tiny": tiny_pipeline, "slow": slow}), observer=Observer(ended=ended.append)
        ) as queue,
        ThreadPoolExecutor(1) as pool,
    ):
        visits = Visits(queue)
        making = pool.submit(visits.generate, replace(PLAIN, model="slow"), "somebody", lambda *_, **__: None)
        assert loading.wait(30)
        act(visits, "somebody")
        go.set()
        with pytest.raises(gradio.Error, match="Stopped"):
            making.result(60)
        assert not ended and not visits._stops


def test_who_leaves_while_meshes_are_copied_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with MeshQueue(tiny_pipeline()) as queue:
        visits, copy = Visits(queue), visit._copy

        def slowly(*made) -> None:
            copy(*made)
            visits.leave("somebody")

        monkeypatch.setattr(visit, "_copy", slowly)
        with pytest.raises(gradio.Error, match="Stopped"):
            visits.generate(PLAIN, "somebody", lambda *_, **__: None)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gone"))
    with (
        MeshQueue(tiny_pipeline()) as queue,
        pytest.raises(gradio.Error, match="keep the mesh: No such file"),
    ):
        Visits(queue).generate(PLAIN, "somebody", lambda *_, **__: None)


def test_another_sample_of_meshes_that_are_gone() -> None:
    with MeshQueue(tiny_pipeline()) as queue:
        functions = {item.name: item.fn for item in build_app(queue).fns.values()}
        with pytest.raises(gradio.Error, match="kept for 15 minutes"):
            functions["pick"](Shown(), SimpleNamespace(index=1))


def test_two_visitors_load_one_model_for_prompts() -> None:
    drawer, loaded = Drawer(AppConfig(), []), []

    def slowly(name: str) -> object:
        loaded.append(name)
        time.sleep(0.2)
        return lambda prompts, seeds: [SimpleNamespace(image=image())]

    drawer._load = slowly
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(drawer, ["a chair", "a table"], [0, 1]))
    assert len(loaded) == 1


def test_an_address_in_the_place_of_an_upload_is_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    asked, resolve = [], socket.getaddrinfo

    def noted(host, *more, **options):
        asked.append(host)
        return resolve("127.0.0.1", *more, **options)

    with MeshQueue(tiny_pipeline()) as queue:
        app = build_app(queue)
        _, url, _ = launch(app, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        try:
            monkeypatch.setattr(socket, "getaddrinfo", noted)
            file = {"path": "http://elsewhere.example/a.png", "meta": {"_type": "gradio.FileData"}}
            where = f"{url}gradio_api/call/masked"
            event = httpx.post(where, json={"data": [file, 20, 0.15]}).json()["event_id"]
            told = httpx.get(f"{where}/{event}", timeout=60).text
        finally:
            app.close()
    assert "expected an upload" in told
    assert "elsewhere.example" not in asked
