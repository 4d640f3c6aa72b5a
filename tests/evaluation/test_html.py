"""The HTML report: self-contained, safe against odd names, and looked at in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from elastic3d.errors import UserError
from elastic3d.evaluation import html
from elastic3d.evaluation.folders import evaluate_folders
from elastic3d.evaluation.html import load_frontier, rank, write_html
from elastic3d.evaluation.options import EvaluateConfig, ProtocolConfig

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ODD = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """A report of four items, one of them missing and one with a hostile name."""
    folder = tmp_path_factory.mktemp("report")
    for side in ("pred", "gt", "floor"):
        (folder / side).mkdir()
        for index, name in enumerate(("ball", "box", "lost", "x <b>bold & co")):
            mesh = trimesh.creation.box((1, 1 + index, 1)) if index % 2 else trimesh.creation.icosphere(2)
            mesh.vertices *= {"pred": 1.05 + 0.02 * index, "gt": 1.0, "floor": 1.1}[side]
            if (side, name) != ("pred", "lost"):
                mesh.export(folder / side / f"{name}.ply")
    rows = [{"method": m, "dit_speedup": s, "f_score@0.05": 1 - s / 9} for m in "ab" for s in (1.0, 2.0, 3.0)]
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
    config = EvaluateConfig(
        pred=folder / "pred",
        gt=folder / "gt",
        output=folder / "report.json",
        html=folder / "report.html",
        html_items=1,
        floor=[folder / "floor"],
        protocol=ProtocolConfig(points=500, volume_points=200, near_points=200, views=0),
        workers=1,
        bootstrap=100,
    )
    report = evaluate_folders(config, command=f"python evaluate.py {ODD}")
    write_html(report, config, load_frontier(folder / "results.json"))
    return config


@pytest.fixture(scope="module")
def page(config: EvaluateConfig) -> str:
    assert config.html is not None
    return config.html.read_text()


def data_of(page: str) -> dict:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def test_the_page_needs_nothing_from_elsewhere(page: str) -> None:
    assert "default-src 'none'" in page
    assert not re.search(
        r"""(src|href)\s*=\s*["'](?!data:)""", re.sub(r"<script.*?</script>", "", page, flags=re.S)
    )
    assert set(re.findall(r"https?://[^\s\"'`)]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert "@@" not in re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.S)


def test_names_and_commands_cannot_leave_their_string(page: str) -> None:
    assert ODD not in page
    data = data_of(page)
    assert ODD in data["report"]["command"]
    assert {row["name"] for row in data["report"]["items"]} >= {"x <b>bold & co"}


def test_worst_and_best_have_renders_and_meshes(page: str) -> None:
    data = data_of(page)
    assert len(data["worst"]) == len(data["best"]) == 1
    assert data["worst"] != data["best"]
    for name in data["worst"] + data["best"]:
        assert list(data["renders"][name]) == [
            "ground truth",
            "ground truth: error",
            "prediction",
            "prediction: error",
        ]
        assert data["renders"][name]["prediction"].startswith("data:image/png;base64,")
        mesh = data["meshes"][name]["pred"]
        vertices = len(base64.b64decode(mesh["positions"])) // 8
        faces = np.frombuffer(base64.b64decode(mesh["faces"]), "<u4" if mesh["wide"] else "<u2")
        assert len(base64.b64decode(mesh["heat"])) == vertices
        assert faces.max() == vertices - 1


def test_rank_takes_scored_items_once() -> None:
    rows = [{"name": str(i), "status": "ok", "chamfer_l1": float(i)} for i in range(5)]
    rows.append({"name": "broken", "status": "failed", "chamfer_l1": 9.0})
    assert rank(rows, 2) == (["4", "3"], ["0", "1"])
    assert rank(rows, 10) == (["4", "3", "2"], ["0", "1"])
    assert rank(rows[:1], 3) == (["0"], [])
    assert rank(rows, 0) == ([], [])


def test_packed_positions_and_heat_are_those_of_the_mesh() -> None:
    box = trimesh.creation.box((2, 1, 1))
    lifted = box.copy().apply_translation([0, 0.05, 0])
    packed = html.pack_mesh(lifted, box)
    positions = np.frombuffer(base64.b64decode(packed["positions"]), "<u2").reshape(-1, 4)[:, :3]
    restored = np.array(packed["low"]) + positions / 65535 * np.array(packed["size"])
    assert restored.min(axis=0) == pytest.approx(lifted.bounds[0], abs=1e-4)
    assert restored.max(axis=0) == pytest.approx(lifted.bounds[1], abs=1e-4)
    heat = np.frombuffer(base64.b64decode(packed["heat"]), np.uint8)
    top = np.isclose(restored[:, 1], 0.55, atol=1e-3)
    assert top.sum() > 20
    assert heat[top] == pytest.approx(127.5, abs=1.5)  # 0.05 away, half of the ramp


@pytest.mark.parametrize("mesh", [trimesh.creation.icosphere(6), trimesh.creation.box((2, 2, 2))])
def test_display_meshes_have_a_bounded_number_of_faces(mesh: trimesh.Trimesh) -> None:
    shown = html.display_mesh(mesh)
    assert 1000 < len(shown.faces) <= html.DISPLAY_FACES
    assert shown.area == pytest.approx(mesh.area, rel=0.01)


def test_long_thin_faces_are_not_cut_into_millions(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have next to no area, which says nothing of their edges."""
    counts, cut = [], trimesh.remesh.subdivide_to_size

    def counted(*given: object, **options: object) -> tuple[np.ndarray, np.ndarray]:
        vertices, faces = cut(*given, **options)
        counts.append(len(faces))
        return vertices, faces

    monkeypatch.setattr(trimesh.remesh, "subdivide_to_size", counted)
    bar = trimesh.creation.box((200, 0.001, 0.001))
    assert html.display_mesh(bar) is bar
    assert max(counts) < 1_000_000


def test_heat_colours_follow_the_ramp() -> None:
    colours = html.heat_colours(np.array([0.0, html.HEAT_MAX / 2, 9.0]))
    assert (colours == html.RAMP[[0, 2, 4]]).all()


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"rows": [1]}'])
def test_bad_benchmark_results(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json"):
        load_frontier(tmp_path / "results.json")


CHECK = """
<script>
const said = [];
const check = (name, good) => { if (!good) said.push(name); };
addEventListener("error", event => said.push(event.message));
check("items", document.querySelectorAll("#items tbody tr").length === 4);
find("#status").value = "failed"; find("#status").oninput();
check("status filter", document.querySelectorAll("#items tbody tr").length === 1);
find("#status").value = "all";
find("#filter").value = "chamfer_l1<0.2 bold"; find("#filter").oninput();
check("value filter", document.querySelectorAll("#items tbody tr").length === 1);
find("#filter").value = ""; find("#filter").oninput();
const names = () => [...document.querySelectorAll("#items tbody td:first-child")].map(cell => cell.textContent);
find("#items th button").click();
const down = names(); find("#items th button").click();
check("sort", down.join() === names().reverse().join() && down[0] > down[3]);
check("frontier", document.querySelectorAll("#frontier circle").length === 8);
check("verdicts", document.querySelectorAll("#comparisons tbody tr").length > 3);
check("no markup from names", !document.querySelector("#items b"));
check("fits", document.documentElement.scrollWidth <= innerWidth);
const centre = canvas => { const p = new Uint8Array(4), gl = canvas.getContext("webgl2");
  gl.readPixels(canvas.width / 2, canvas.height / 2, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, p); return p.join(); };
const canvases = [...document.querySelectorAll("canvas")];
if (canvases.length && canvases[0].getContext("webgl2")) {
  const plain = canvases.map(centre);
  check("drawn", plain.every(p => p !== "255,255,255,255"));
  find("#viewer-heat").click();
  check("heat", canvases.map(centre).join() !== plain.join());
} else said.push("no WebGL");
document.title = "checked: " + said.join("; ");
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 480])
def test_in_a_browser(config: EvaluateConfig, page: str, tmp_path: Path, width: int) -> None:
    """Sort, filter, plots, both 3D canvases and the layout, without a console error, wide and narrow."""
    assert CHROMIUM is not None
    (tmp_path / "report.html").write_text(page.replace("</body>", CHECK + "</body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    command += [
        "--enable-logging=stderr",
        f"--window-size={width},900",
        f"--screenshot={tmp_path / 'shot.png'}",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", (tmp_path / "report.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title
    assert title[1] == "checked: "
    assert "CONSOLE" not in done.stderr
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.width == width
        assert len(shot.convert("RGB").getcolors(1 << 24)) > 50
