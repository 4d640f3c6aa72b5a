"""The web app in headless Chromium: upload, mask, generate, compare, download, a bad file; no request leaves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest
import trimesh
from PIL import Image

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
from tiny_dial import load, save_dialled  # noqa: E402
from tiny_pipeline import image, save_image, tiny_pipeline  # noqa: E402

from elastic3d.elastic import attach  # noqa: E402
from elastic3d.elastic.config import ElasticConfig, RouterConfig  # noqa: E402
from elastic3d.serve.app import _mask, _Visit, build_app, launch  # noqa: E402
from elastic3d.serve.queue import MeshQueue  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
    pytest.mark.timeout(280),
]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
WAIT_MS = 90_000


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    pipeline = tiny_pipeline()
    attach(pipeline.dit, RouterConfig())
    pipeline.config.elastic = ElasticConfig(budget=0.5)
    with MeshQueue(pipeline) as queue:
        page = build_app(queue, lambda prompt, seed: image("navy"))
        _, url, _ = launch(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
        yield url
        page.close()


class Visit:
    """A browser page that may reach this machine alone."""

    def __init__(self, browser, width: int = 1280) -> None:
        self.elsewhere: list[str] = []
        self.page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.page.route("**/*", self._allow)

    def _allow(self, route) -> None:
        host = urlparse(route.request.url).hostname
        if host in ("127.0.0.1", "localhost", None):
            route.continue_()
        else:
            self.elsewhere.append(route.request.url)
            route.abort()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


def test_a_dial_is_three_buttons_in_the_place_of_budget_and_steps(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    with MeshQueue(load(save_dialled(tmp_path / "model"))) as queue:
        config = build_app(queue).get_config_file()
        shown = {c["props"].get("label"): c["props"] for c in config["components"]}
        assert [value for _, value in shown["Quality"]["choices"]] == ["fast", "default", "best"]
        assert shown["Quality"]["choices"][0][0] == "fast (5.5x, 0.60)" and shown["Quality"]["visible"]
        assert not shown["Budget"]["visible"] and not shown["Steps"]["visible"]
        visit = _Visit(queue).generate(image(), "fast", 1.0, True, 0, 1, 25, 32, 1000, 20, 0.15)
        _, rows, _, _, _, _ = next(visit)
        assert [row[3] for row in rows] == ["17%", "100%"], "of the dense default"


def test_from_an_image_to_a_download(address: str, browser, tmp_path: Path) -> None:
    visit = Visit(browser)
    page = visit.page
    page.goto(address)
    page.get_by_role("button", name="Make mesh").wait_for()
    page.locator("input[type=file]").first.set_input_files(save_image(tmp_path / "a.png"))
    page.locator("#mask img").wait_for()
    page.get_by_label("Dense beside it").check()
    page.get_by_text("More", exact=True).click()
    page.get_by_label("number input for Resolution (grid cells a side)").fill("32")
    page.get_by_label("number input for Steps").fill("3")
    page.get_by_role("button", name="Make mesh").click()
    button = page.get_by_role("button", name="Download .glb, 100 mm")
    button.wait_for()
    for row in ("dense, seed 0", "elastic, seed 0"):
        assert page.get_by_text(row).count()
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    assert Image.open(tmp_path / "page.png").convert("L").getextrema()[0] < 100
    with page.expect_download() as download:
        button.click()
    download.value.save_as(tmp_path / "mesh.glb")
    assert trimesh.load_mesh(tmp_path / "mesh.glb").extents.max() == pytest.approx(0.1, rel=1e-4)
    page.get_by_label("stl", exact=True).check()
    button = page.get_by_role("button", name="Download .stl, 100 mm")
    button.wait_for()
    with page.expect_download() as download:
        button.click()
    download.value.save_as(tmp_path / "mesh.stl")
    assert trimesh.load_mesh(tmp_path / "mesh.stl").extents.max() == pytest.approx(100, rel=1e-4)
    assert visit.elsewhere == []


def test_what_goes_wrong_is_one_sentence_for_the_page() -> None:
    """`gr.Error` is what Gradio shows to a visitor."""
    with MeshQueue(tiny_pipeline()) as queue:
        generate = _Visit(queue).generate
        options = (0.5, False, 0, 1, 2, 16, 500, 20, 0.15)
        with pytest.raises(gradio.Error, match="There is no image yet"):
            next(generate(None, "default", *options))
    with pytest.raises(gradio.Error, match="stands out from its background"):
        _mask(Image.new("RGB", (64, 64), "white"), 20, 0.15)


def test_a_prompt_becomes_the_image_and_a_phone_shows_the_page(address: str, browser) -> None:
    visit = Visit(browser, width=390)
    page = visit.page
    page.goto(address)
    field = page.get_by_label("or a prompt")
    field.fill("a blue egg")
    field.press("Enter")
    page.locator("#mask img").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
