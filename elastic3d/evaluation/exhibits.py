"""One pair of meshes as images: renders, error heat maps, and packed meshes for the viewer of the HTML
report.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.evaluation.protocol import prepare
from elastic3d.geometry.cleanup import simplify
from elastic3d.geometry.render import Camera, Scene, Views, orbit_camera

Floats = NDArray[np.floating]

HEAT_MAX = 0.1  # distance at the end of the colour ramp; the ground truth's longest side is 2
RAMP = np.array([[217, 221, 226], [247, 209, 61], [242, 112, 58], [184, 36, 94], [59, 15, 82]], float)
RENDER_SIZE = 288
DISPLAY_FACES = 12_000
_EDGE_LENGTHS = (0.06, 0.12, 0.25, 0.5)  # tried in turn, so that coarse meshes have vertices to colour


@dataclass(frozen=True)
class Exhibit:
    """`renders` maps captions to PNG data URIs, `meshes` maps `pred` and `gt` to packed meshes."""

    renders: dict[str, str]
    meshes: dict[str, dict[str, Any]]


def make_exhibit(pred: trimesh.Trimesh, gt: trimesh.Trimesh, protocol: ProtocolConfig) -> Exhibit:
    """Images of a pair in the protocol's frame. Raises UserError as `evaluate_pair`."""
    pred, gt = prepare(pred, gt, protocol)
    camera = orbit_camera(35, 20, 5.1, 36)
    renders = {}
    for name, mesh, other in (("ground truth", gt, pred), ("prediction", pred, gt)):
        view = Scene(mesh).render(camera, RENDER_SIZE)
        renders[name] = png(view.colour)
        renders[f"{name}: error"] = png(heat_view(view, camera, other))
    return Exhibit(renders, {"pred": pack_mesh(pred, gt), "gt": pack_mesh(gt, pred)})


def surface_distance(points: Floats, mesh: trimesh.Trimesh) -> Floats:
    """Exact distance (P,) of points (P, 3) to the surface."""
    import igl

    if len(points) == 0:
        return np.zeros(0)
    vertices = np.ascontiguousarray(mesh.vertices, np.float64)
    faces = np.ascontiguousarray(mesh.faces, np.int64)
    squared = igl.point_mesh_squared_distance(np.ascontiguousarray(points, np.float64), vertices, faces)[0]
    return np.sqrt(squared)


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
        return simplify(mesh, DISPLAY_FACES)
    for length in _EDGE_LENGTHS:
        area_faces = mesh.area / (length**2 / 4)  # a first guess, before cutting for nothing
        if area_faces < DISPLAY_FACES:
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
