"""The web app in headless Chromium: upload, mask, generate, compare, download, what goes wrong; no request leaves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import trimesh
from PIL import Image, ImageDraw

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
from tiny_dial import load, save_dialled  # noqa: E402
from tiny_pipeline import image, save_image, tiny_pipeline  # noqa: E402

from elastic3d.elastic import attach  # noqa: E402
from elastic3d.elastic.config import ElasticConfig, RouterConfig  # noqa: E402
from elastic3d.errors import UserError  # noqa: E402
from elastic3d.geometry import pose  # noqa: E402
from elastic3d.geometry.mesh_io import read_extras  # noqa: E402
from elastic3d.serve import app as app_module  # noqa: E402
from elastic3d.serve.app import build_app, launch  # noqa: E402
from elastic3d.serve.config import AppConfig  # noqa: E402
from elastic3d.serve.models import Models  # noqa: E402
from elastic3d.serve.queue import MeshQueue  # noqa: E402
from elastic3d.serve.visit import Choices, Visits, masked  # noqa: E402

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
    pytest.mark.timeout(280),
]
ARGUMENTS = [
    "--no-sandbox", "--enable-unsafe-swiftshader", "--disable-background-networking", "--disable-component-update",
    # no other machine has an address; to look at every request here would take longer than to answer them
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]  # fmt: skip
WAIT_MS = 90_000
HOSTILE = "<img src=x onerror=window.hit=1>"
CHOICES = Choices(image(), "", "default", 1.0, False, False, 0, 1, 1, 2, 16, 500, 20, 0.15)


def routed():
    """A tiny model with routers and no dial."""
    pipeline = tiny_pipeline()
    attach(pipeline.dit, RouterConfig())
    pipeline.config.elastic = ElasticConfig(budget=0.5)
    return pipeline


class Page:
    """An app that runs: its address, its queue, its folder of files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "gradio"
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder)
        dialled = save_dialled(folder / "dialled")
        self.queue = MeshQueue(Models({"routed": routed, "dialled": lambda: load(dialled), "gone": _gone}))
        page = build_app(
            self.queue, lambda prompt, seed: (image("navy"), f"{prompt} is not known"), ["egg"],
            AppConfig(max_pixels=10**6),
        )  # fmt: skip
        self.app = page
        _, self.url, _ = launch(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)

    def close(self) -> None:
        self.app.close()
        self.queue.close()


def _gone():
    raise UserError("no weights here")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("app")
    (folder / "gradio").mkdir()
    page = Page(folder)
    yield page
    page.close()


class Visit:
    """A browser page that may reach this machine alone."""

    def __init__(self, browser, address: str, **options) -> None:
        self.elsewhere: list[str] = []
        options.setdefault("viewport", {"width": 1280, "height": 1400})
        self.page = browser.new_context(**options).new_page()
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("request", self._note)
        self.page.goto(address)
        self.page.get_by_role("button", name="Make mesh").wait_for()

    def _note(self, request) -> None:
        if urlparse(request.url).hostname not in ("127.0.0.1", "localhost", None):
            self.elsewhere.append(request.url)

    def upload(self, path: Path) -> None:
        self.page.locator("#image input[type=file]").set_input_files(path)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def quick(self) -> None:
        """The smallest mesh."""
        self.page.get_by_text("More", exact=True).click()
        self.page.get_by_label("number input for Resolution (grid cells a side)").fill("16")

    def downloaded(self, label: str, path: Path) -> Path:
        """What the button gives once it is called so."""
        button = self.page.get_by_role("button", name=label)
        button.wait_for()
        with self.page.expect_download() as download:
            button.click()
        download.value.save_as(path)
        return path

    def canvases(self) -> list[dict[str, int]]:
        """Of the viewer's canvases the contrast of the pixels, and a sum that tells them from others."""
        frame = next(f for f in self.page.frames if f != self.page.main_frame and "views" in f.content())
        frame.wait_for_function("typeof views === 'object' && views.canvases[0].canvas.width > 300")
        script = """() => views.canvases.map(({gl, canvas}) => {
            const p = new Uint8Array(4 * canvas.width * canvas.height);
            gl.readPixels(0, 0, canvas.width, canvas.height, gl.RGBA, gl.UNSIGNED_BYTE, p);
            return {contrast: p.reduce((a, b) => Math.max(a, b)) - p.reduce((a, b) => Math.min(a, b)),
                    sum: p.reduce((sum, value) => (31 * sum + value) % 1e9, 7)}; })"""
        return frame.evaluate(script)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def visited(browser) -> Iterator[Callable[..., Visit]]:
    """Opens a page, which goes with the test: it would take time from those that come."""
    opened: list[Visit] = []

    def visit(address: str, **options) -> Visit:
        opened.append(Visit(browser, address, **options))
        return opened[-1]

    yield visit
    for each in opened:
        each.page.context.close()


def test_from_an_image_to_downloads(
    site: Page, visited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pose, "_STARTS", 1)  # four cameras are sought, and any will do
    monkeypatch.setattr(pose, "_FINE", 24)
    visit = visited(site.url)
    page = visit.page
    visit.upload(save_image(tmp_path / "a.png"))
    page.locator("#mask img").wait_for()
    page.get_by_label("Dense beside it").check()
    page.get_by_label("Image's colours").check()
    page.get_by_label("number input for Samples").fill("2")
    visit.quick()
    page.get_by_label("number input for Steps").fill("3")
    visit.press("Make mesh")
    for kind, unit in (("glb", 0.1), ("stl", 100), ("obj", 100), ("ply", 100)):
        page.get_by_label(kind, exact=True).check()
        path = visit.downloaded(f"Download .{kind}, 100 mm", tmp_path / f"mesh.{kind}")
        assert trimesh.load_mesh(path).extents.max() == pytest.approx(unit, rel=1e-4)
    assert read_extras(tmp_path / "mesh.glb")["texture"]["overlap"] > 0
    assert trimesh.load_mesh(tmp_path / "mesh.ply").visual.kind == "vertex"
    upright = trimesh.load_mesh(tmp_path / "mesh.ply").extents
    page.get_by_label("Z", exact=True).check()
    page.get_by_label("Longest side, mm").fill("50")
    turned = trimesh.load_mesh(visit.downloaded("Download .ply, 50 mm", tmp_path / "turned.ply")).extents
    np.testing.assert_allclose(turned, upright[[0, 2, 1]] / 2, rtol=1e-4)
    rows = page.locator("#table").inner_text()
    assert [
        name for name in ("elastic, seed 0", "elastic, seed 1", "dense, seed 0") if name not in rows
    ] == []
    assert "100%" in rows and "watertight" in rows and page.locator("#routes img").count() == 1
    frame = page.frame_locator("#viewer iframe")
    assert frame.locator("figure").all_inner_texts()[0].startswith("dense, seed 0\n100% of the FLOPs")
    before = visit.canvases()
    assert len(before) == 2 and all(canvas["contrast"] > 100 for canvas in before), "both meshes are seen"
    box = frame.locator("canvas").first.bounding_box()
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 60)
    page.mouse.up()
    assert all(a != b for a, b in zip(visit.canvases(), before, strict=True)), "one camera turns both"
    page.locator("#gallery button").nth(1).click()
    frame.get_by_text("elastic, seed 1").wait_for()
    assert visit.elsewhere == []


def test_what_goes_wrong_is_said_on_the_page(site: Page, visited, tmp_path: Path) -> None:
    visit = visited(site.url)
    page = visit.page
    visit.press("Make mesh")
    page.get_by_text("There is no image yet").wait_for()
    (tmp_path / "text.png").write_text("no image at all")
    Image.new("L", (10_000, 10_000)).save(tmp_path / "large.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "blank.png")
    (tmp_path / "cut.png").write_bytes(save_image(tmp_path / "a.png").read_bytes()[:200])
    for name, words in (
        ("text", "the upload is no image"),
        ("large", "10000 x 10000 pixels, expected at most 1,000,000"),
        ("cut", "the upload is broken"),
        ("blank", "stands out from its background"),
    ):
        visit.upload(tmp_path / f"{name}.png")
        page.get_by_text(words).first.wait_for()
    field = page.get_by_label("or a prompt")
    field.fill(HOSTILE)
    field.press("Enter")
    page.get_by_text(f"{HOSTILE} is not known").wait_for()
    page.locator("#mask img").wait_for()
    assert page.evaluate("window.hit") is None, "what a visitor types is text"


def test_the_mask_can_be_corrected(site: Page, visited, tmp_path: Path) -> None:
    """A pale object on white is lost at the usual tolerance."""
    image = Image.new("RGB", (120, 120), "white")
    ImageDraw.Draw(image).rectangle((30, 30, 60, 90), fill=(246, 246, 246))
    ImageDraw.Draw(image).rectangle((60, 30, 90, 90), fill=(120, 40, 40))
    image.save(tmp_path / "pale.png")
    visit = visited(site.url)
    visit.upload(tmp_path / "pale.png")
    mask = visit.page.locator("#mask img")
    mask.wait_for()
    before = mask.get_attribute("src")
    visit.page.get_by_text("Correct the mask").click()
    field = visit.page.get_by_label("number input for Background tolerance")
    field.fill("4")
    field.press("Tab")
    visit.page.wait_for_function("src => document.querySelector('#mask img').src !== src", arg=before)
    wide, narrow = (np.asarray(masked(image, value, 0.15).convert("L")) < 250 for value in (4, 20))
    assert np.ptp(np.flatnonzero(wide.any(0))) > np.ptp(np.flatnonzero(narrow.any(0)))


def test_another_model_and_its_dial(site: Page, visited, tmp_path: Path) -> None:
    visit = visited(site.url)
    page = visit.page
    visit.quick()
    steps, quality = page.get_by_label("number input for Steps"), page.get_by_role("radio", name="fast")
    assert steps.is_visible() and not quality.is_visible()

    def choose(name: str) -> None:
        page.get_by_label("Model").click()
        page.get_by_role("option", name=name).click()

    choose("gone")
    page.get_by_text("no weights here").wait_for()
    choose("dialled")
    quality.wait_for()
    assert not steps.is_visible() and page.get_by_text("fast: 5.5x, IoU 0.60").is_visible()
    page.get_by_role("radio", name="by budget").check()
    page.get_by_label("number input for Budget").fill("0.7")
    visit.upload(save_image(tmp_path / "a.png"))
    page.locator("#mask img").wait_for()
    page.get_by_label("number input for Resolution (grid cells a side)").fill("24")
    visit.press("Make mesh")
    metadata = read_extras(visit.downloaded("Download .glb, 100 mm", tmp_path / "a.glb"))
    assert metadata["resolution"] == 24
    assert metadata["dial"] == {"requested": 0.7, "cost": pytest.approx(2 / 3)}


def test_stop_and_leaving_cancel_what_runs(site: Page, visited, tmp_path: Path) -> None:
    visit = visited(site.url)
    page = visit.page
    visit.upload(save_image(tmp_path / "a.png"))
    page.locator("#mask img").wait_for()
    with site.queue.models.use(""):  # nothing can run meanwhile
        visit.press("Make mesh")
        # Playwright answers the page's requests only while it waits itself.
        _until(lambda: site.queue.running or site.queue.waiting, page.wait_for_timeout)
        visit.press("Stop")
        page.get_by_text("Stopped.").wait_for()
    others = set(site.folder.glob("elastic3d-*"))
    visit.quick()
    visit.press("Make mesh")
    page.get_by_role("button", name="Download .glb, 100 mm").wait_for()
    (folder,) = set(site.folder.glob("elastic3d-*")) - others
    assert list(folder.iterdir())
    page.close()
    _until(lambda: not folder.exists())


def _until(true, wait=lambda ms: time.sleep(ms / 1000)) -> None:
    deadline = time.monotonic() + WAIT_MS / 1000
    while not true():
        assert time.monotonic() < deadline
        wait(50)


def test_a_prompt_becomes_the_image_and_a_phone_shows_the_page(site: Page, visited) -> None:
    phone = {"viewport": {"width": 390, "height": 800}, "is_mobile": True, "has_touch": True}
    visit = visited(site.url, **phone)
    page = visit.page
    field = page.get_by_label("or a prompt")
    field.fill("a blue egg")
    field.press("Enter")
    page.locator("#mask img").wait_for()
    page.get_by_label("Dense beside it").check()
    visit.quick()
    visit.press("Make mesh")
    page.get_by_role("button", name="Download .glb, 100 mm").wait_for()
    assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]


def test_requests_of_a_visit() -> None:
    """A budget counts where it is chosen; the steps where the model has no dial."""
    with MeshQueue(routed()) as queue:
        chosen = replace(CHOICES, budget=0.6, compare=True, samples=2, ensemble=3)
        elastic, dense = chosen.requests(queue.models.info())
        assert [(r.seed, r.budget, r.steps, r.ensemble) for r in elastic] == [(0, 0.6, 2, 3), (1, 0.6, 2, 3)]
        assert [(r.seed, r.elastic, r.ensemble) for r in dense] == [(0, False, 1), (1, False, 1)]
    with MeshQueue(tiny_pipeline()) as queue:
        elastic, dense = CHOICES.requests(queue.models.info())
        assert elastic[0].budget is None and elastic[0].quality is None and not dense


def test_what_goes_wrong_is_one_sentence_for_the_page() -> None:
    """`gr.Error` is what Gradio shows to a visitor."""
    with MeshQueue(tiny_pipeline(), capacity=1) as queue:
        visits = Visits(queue)
        with pytest.raises(gradio.Error, match="There is no image yet"):
            visits.generate(replace(CHOICES, image=None), "s", lambda *_, **__: None)
        with pytest.raises(gradio.Error, match="try again in a moment"):
            visits.generate(replace(CHOICES, samples=8), "s", lambda *_, **__: None)
        with pytest.raises(gradio.Error, match="expected one of tiny"):
            visits.generate(replace(CHOICES, model="<b>"), "s", lambda *_, **__: None)
        assert queue.waiting == 0
    with pytest.raises(gradio.Error, match="stands out from its background"):
        masked(Image.new("RGB", (64, 64), "white"), 20, 0.15)


def test_uploads_go_after_a_while(visited, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(app_module, "KEEP_S", 2)
    (tmp_path / "gradio").mkdir()
    page = Page(tmp_path)
    try:
        visit = visited(page.url)
        visit.upload(save_image(tmp_path / "mine.png"))
        visit.page.locator("#mask img").wait_for()
        assert list(page.folder.rglob("mine.png"))
        _until(lambda: not list(page.folder.rglob("*.png")) and not list(page.folder.rglob("*.webp")))
    finally:
        page.close()


WATCH = """
import socket
def refuse(self, address, real=socket.socket.connect):
    host = address[0] if isinstance(address, tuple) else "local"
    if host not in ("127.0.0.1", "::1", "localhost", "local", "0.0.0.0"):
        print("ELSEWHERE", address, flush=True)
        raise OSError("no network in this test")
    return real(self, address)
socket.socket.connect = refuse
"""


def test_the_script_keeps_to_itself_and_leaves_nothing(browser, tmp_path: Path) -> None:
    """Started as a user does, behind a token: no connection of it leaves the machine, and SIGTERM removes its files."""
    tiny_pipeline().save_pretrained(tmp_path / "tiny")
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch/sitecustomize.py").write_text(WATCH)
    (tmp_path / "tmp").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(tmp_path / "watch"), str(ROOT)])
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": path}
    environment.pop("GRADIO_TEMP_DIR", None)
    options = [f"model={tmp_path / 'tiny'}", f"port={port}", "token=secret", "device=cpu"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts/app.py"), *options], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    context = browser.new_context()
    try:
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        _until(lambda: process.poll() is not None or _listens(port))
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_label("username").fill("elastic3d")
        page.get_by_label("password").fill("wrong")
        page.get_by_role("button", name=re.compile("login", re.IGNORECASE)).click()
        page.get_by_text("incorrect", exact=False).first.wait_for()
        page.get_by_label("username").fill("elastic3d")
        page.get_by_label("password").fill("secret")
        page.get_by_role("button", name=re.compile("login", re.IGNORECASE)).click()
        page.get_by_role("button", name="Make mesh").wait_for()
        page.locator("#image input[type=file]").set_input_files(save_image(tmp_path / "a.png"))
        page.locator("#mask img").wait_for()
        assert list((tmp_path / "tmp").rglob("a.png"))
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        context.close()
    assert process.returncode == 143, output
    assert "ELSEWHERE" not in output
    assert not list((tmp_path / "tmp").iterdir())


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("script", ["app.py", "serve.py"])
def test_a_script_on_the_network_without_a_token_refuses(script: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ELASTIC3D_TOKEN"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), "host=0.0.0.0"], env=environment, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "there is no token" in done.stderr
