"""The report as one HTML file that opens anywhere: no request leaves it, and its viewer is part of it.

Worst and best pairs are shown as renders, error heat maps, and packed meshes for the viewer.
"""

from __future__ import annotations

import base64
import io
import json
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from elastic3d.errors import UserError
from elastic3d.evaluation.items import find_items
from elastic3d.evaluation.metrics import Floats, surface_distance
from elastic3d.evaluation.options import EvaluateConfig, ProtocolConfig
from elastic3d.evaluation.protocol import prepare
from elastic3d.evaluation.statistics import Row
from elastic3d.geometry.cleanup import simplify
from elastic3d.geometry.mesh_io import load_mesh
from elastic3d.geometry.render import Camera, Scene, Views, orbit_camera
from elastic3d.utils.files import atomic_path, load_json, printable

RANKED_BY = "chamfer_l1"
HEAT_MAX = 0.1  # distance at the end of the colour ramp; the ground truth's longest side is 2
RAMP = np.array([[217, 221, 226], [247, 209, 61], [242, 112, 58], [184, 36, 94], [59, 15, 82]], float)
RENDER_SIZE = 288
DISPLAY_FACES = 12_000
_EDGE_LENGTHS = (0.06, 0.12, 0.25, 0.5)  # tried in turn, so that coarse meshes have vertices to colour


def write_html(report: dict[str, Any], config: EvaluateConfig, frontier: list[dict[str, Any]]) -> None:
    """Write the page of a report to `config.html`; the worst and best items are loaded and rendered again.

    `frontier` holds the rows of benchmark runs (`load_frontier`), or nothing. UserError if the page can't be written.
    """
    assert config.html is not None
    worst, best = rank(report["items"], config.html_items)
    files = {item.name: item for item in find_items(config.pred, config.gt)}
    names, protocol = dict.fromkeys(worst + best), config.effective_protocol()
    pairs = {name: (load_mesh(files[name].pred[0]), load_mesh(files[name].gt[0])) for name in names}
    shown = {name: make_exhibit(*pair, protocol) for name, pair in pairs.items()}
    data = {
        "report": report,
        "worst": worst,
        "best": best,
        "renders": {name: renders for name, (renders, _) in shown.items()},
        "meshes": {name: meshes for name, (_, meshes) in shown.items()},
        "frontier": frontier,
        "heat_max": HEAT_MAX,
    }
    assets = resources.files("elastic3d.evaluation") / "assets"
    page = (assets / "report.html").read_text(encoding="utf-8")
    for name in ("style.css", "viewer.js", "report.js"):
        page = page.replace(f"@@{name}@@", (assets / name).read_text(encoding="utf-8"))
    # "</script>" inside a string would end the element; names come from files of any origin
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    with atomic_path(config.html) as temporary:
        temporary.write_text(page.replace("@@data@@", text), encoding="utf-8")


def rank(rows: list[Row], count: int) -> tuple[list[str], list[str]]:
    """Names of up to `count` worst and `count` best scored items by Chamfer-L1; no name is in both lists."""
    scored = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: -row[RANKED_BY])
    names = [row["name"] for row in scored]
    worst = names[: min(count, (len(names) + 1) // 2)]
    return worst, [name for name in reversed(names) if name not in worst][:count]


def load_frontier(path: Path) -> list[dict[str, Any]]:
    """The `rows` of a benchmark's results.json. UserError if the file has none."""
    try:
        rows: list[dict[str, Any]] = load_json(path, {"rows": [dict]})["rows"]
    except UserError as error:
        raise UserError(f"{printable(path)} is no results.json of scripts/benchmark.py ({error})") from error
    return rows


# ------------------------------------------------------------------------------------------------- one pair


def make_exhibit(
    pred: trimesh.Trimesh, gt: trimesh.Trimesh, protocol: ProtocolConfig
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """A pair in the protocol's frame: renders and error heat maps, PNG data URIs by their captions, and the packed
    meshes `pred` and `gt`. Raises UserError as `evaluate_pair`."""
    pred, gt = prepare(pred, gt, protocol)
    camera = orbit_camera(35, 20, 5.1, 36)
    renders = {}
    for name, mesh, other in (("ground truth", gt, pred), ("prediction", pred, gt)):
        view = Scene(mesh).render(camera, RENDER_SIZE)
        renders[name] = png(view.colour)
        renders[f"{name}: error"] = png(heat_view(view, camera, other))
    return renders, {"pred": pack_mesh(pred, gt), "gt": pack_mesh(gt, pred)}


def heat_view(view: Views, camera: Camera, other: trimesh.Trimesh) -> NDArray[np.uint8]:
    """The view (H, W, 4) coloured by each pixel's distance to the other surface, its shading kept."""
    size = len(view.silhouette)
    pixels = np.argwhere(view.silhouette)
    directions = camera.rays(pixels + 0.5, size)
    depth = view.depth[view.silhouette] / (directions @ camera.axes()[2])
    colours = heat_colours(surface_distance(np.array(camera.eye) + depth[:, None] * directions, other))
    light = view.colour[view.silhouette][:, :3].mean(axis=1, keepdims=True) / 190
    image = np.zeros((size, size, 4), np.uint8)
    image[view.silhouette, :3] = np.clip(colours * np.clip(light, 0.35, 1.1), 0, 255)
    image[view.silhouette, 3] = 255
    return image


def heat_colours(distance: Floats) -> Floats:
    """Colours (P, 3) in [0, 255] of distances (P,): grey at 0, yellow, red, dark purple from `HEAT_MAX` on."""
    place = np.clip(distance / HEAT_MAX, 0, 1) * (len(RAMP) - 1)
    return np.stack([np.interp(place, np.arange(len(RAMP)), RAMP[:, i]) for i in range(3)], axis=1)


def pack_mesh(mesh: trimesh.Trimesh, other: trimesh.Trimesh) -> dict[str, Any]:
    """A mesh of about `DISPLAY_FACES` faces at most as `pack_surface` does, with uint8 `heat` a vertex: how far from
    the other it is."""
    mesh = display_mesh(mesh)
    distance = surface_distance(np.asarray(mesh.vertices), other)
    heat = np.round(np.clip(distance / HEAT_MAX, 0, 1) * 255).astype(np.uint8)
    return pack_surface(mesh) | {"heat": encoded(heat)}


def pack_surface(mesh: trimesh.Trimesh) -> dict[str, Any]:
    """A mesh as the viewer takes it, base64: uint16 positions in their box (four a vertex, the last unused), faces as
    uint32 where `wide` and as uint16 elsewhere."""
    vertices = np.asarray(mesh.vertices)
    low, size = vertices.min(axis=0), np.maximum(np.ptp(vertices, axis=0), 1e-9)
    wide = len(vertices) > 65535
    positions = np.zeros((len(vertices), 4), "<u2")
    positions[:, :3] = np.round((vertices - low) / size * 65535)
    return {
        "low": low.tolist(),
        "size": size.tolist(),
        "positions": encoded(positions),
        "wide": wide,
        "faces": encoded(np.asarray(mesh.faces, "<u4" if wide else "<u2")),
    }


def display_mesh(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The mesh with fewer faces where it has too many, and with long edges cut where it has few."""
    if len(mesh.faces) > DISPLAY_FACES:
        with suppress(UserError):  # of very many pieces none can lose more
            return simplify(mesh, DISPLAY_FACES)
        return mesh
    longest = mesh.edges_unique_length[mesh.faces_unique_edges].max(axis=1)
    for length in _EDGE_LENGTHS:
        # Faces at the least, before cutting for nothing: by the area, and along the edges of faces of next to none.
        least = max(mesh.area / (length**2 / 4), np.ceil(longest / length).sum())
        if least < DISPLAY_FACES:
            vertices, faces = trimesh.remesh.subdivide_to_size(mesh.vertices, mesh.faces, length, max_iter=20)
            if len(faces) <= DISPLAY_FACES:
                return trimesh.Trimesh(vertices, faces, process=False)
    return mesh


def png(image: NDArray[np.uint8]) -> str:
    """An image (H, W, 4) as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def encoded(array: NDArray) -> str:
    """The bytes of an array as base64."""
    return base64.b64encode(array.tobytes()).decode()
