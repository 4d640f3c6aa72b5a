"""Furniture of painted parts, seen as in the training data, and meshes of it as a model would make them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import trimesh
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh

from elastic3d.geometry.normalize import normalize_mesh
from elastic3d.geometry.render import Camera, Light, Scene, frame, orbit_camera
from elastic3d.geometry.solid import solidify
from elastic3d.preparation.shape import random_lights

SIZE = 224


@dataclass(frozen=True)
class Painted:
    """A mesh with a colour for each face, and what a model might make of it: near, of other faces, without colour."""

    mesh: trimesh.Trimesh
    colours: np.ndarray  # (F, 3) uint8
    made: trimesh.Trimesh

    def view(self, camera: Camera, seed: int | None = None) -> np.ndarray:
        """RGBA (SIZE, SIZE, 4) in random light; without a seed in that of the sky alone."""
        sky = Light(ambient=1.0, diffuse=0, specular=0, shadows=False)
        lights = [sky] if seed is None else random_lights(camera, np.random.default_rng(seed))
        return Scene(self.mesh, self.colours, smooth=False).render(camera, SIZE, lights).colour

    def camera(self, azimuth: float, elevation: float, fov: float) -> Camera:
        return frame(orbit_camera(azimuth, elevation, 4.0, fov), np.asarray(self.mesh.vertices), 0.85)


def _box(low: tuple, high: tuple) -> trimesh.Trimesh:
    return trimesh.creation.box(bounds=[low, high])


def _upright(mesh: trimesh.Trimesh, at: tuple) -> trimesh.Trimesh:
    mesh.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, [1, 0, 0]))
    mesh.apply_translation(at)
    return mesh


def _chair() -> list[trimesh.Trimesh]:
    legs = [_box((x, 0, z), (x + 0.12, 0.9, z + 0.12)) for x in (-0.6, 0.48) for z in (-0.6, 0.48)]
    return [
        trimesh.util.concatenate(legs),
        _box((-0.6, 0.9, -0.6), (0.6, 1.02, 0.6)),
        _box((-0.6, 1.02, -0.6), (0.6, 2, -0.48)),
    ]


def _table() -> list[trimesh.Trimesh]:
    legs = [_box((x, 0, z), (x + 0.14, 0.8, z + 0.14)) for x in (-1, 0.86) for z in (-0.6, 0.46)]
    return [trimesh.util.concatenate(legs), _box((-1, 0.8, -0.6), (1, 0.95, 0.6))]


def _sofa() -> list[trimesh.Trimesh]:
    arms = [_box((x, 0, -0.5), (x + 0.25, 0.65, 0.5)) for x in (-1, 0.75)]
    return [
        trimesh.util.concatenate(arms),
        _box((-0.75, 0, -0.5), (0.75, 0.4, 0.5)),
        _box((-0.75, 0.4, -0.5), (0.75, 0.9, -0.25)),
    ]


def _lamp() -> list[trimesh.Trimesh]:
    foot = _upright(trimesh.creation.cylinder(0.4, 0.1, sections=48), (0, 0.05, 0))
    pole = _upright(trimesh.creation.cylinder(0.07, 1.4, sections=24), (0, 0.75, 0))
    shade = _upright(trimesh.creation.cone(0.5, 0.7, sections=48), (0, 1.3, 0))
    return [foot, pole, shade]


def _cabinet() -> list[trimesh.Trimesh]:
    doors = [_box((x, 0.15, 0.4), (x + 0.55, 1.35, 0.46)) for x in (-0.58, 0.03)]
    return [
        _box((-0.6, 0.1, -0.4), (0.6, 1.4, 0.4)),
        trimesh.util.concatenate(doors),
        _box((-0.7, 1.4, -0.5), (0.7, 1.5, 0.5)),
    ]


PALETTES = {
    "chair": (_chair, [(120, 72, 30), (190, 40, 40), (40, 70, 160)]),
    "table": (_table, [(60, 60, 66), (200, 160, 100)]),
    "sofa": (_sofa, [(150, 40, 60), (210, 200, 180), (170, 60, 80)]),
    "lamp": (_lamp, [(40, 40, 44), (190, 150, 60), (230, 220, 190)]),
    "cabinet": (_cabinet, [(110, 70, 40), (220, 215, 205), (60, 90, 70)]),
}


def painted(name: str) -> Painted:
    """One of PALETTES in the common frame."""
    build, palette = PALETTES[name]
    parts = [part.subdivide_to_size(0.08) for part in build()]
    colours = np.concatenate(
        [np.tile(np.uint8(c), (len(p.faces), 1)) for c, p in zip(palette, parts, strict=True)]
    )
    mesh, _ = normalize_mesh(trimesh.util.concatenate(parts))
    return Painted(mesh, colours, solidify(mesh, 96))


def look(mesh: trimesh.Trimesh, camera: Camera, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """What a viewer without lights shows of vertex colours: sRGB (S, S, 3) float, and where there is a surface."""
    rays = rtcore_scene.EmbreeScene()
    TriangleMesh(rays, np.ascontiguousarray(mesh.triangles, np.float32))
    rows, columns = np.divmod(np.arange(size * size), size)
    directions = camera.rays(np.stack([rows, columns], axis=1) + 0.5, size).astype(np.float32)
    origins = np.ascontiguousarray(np.broadcast_to(np.float32(camera.eye), directions.shape))
    found = rays.run(origins, np.ascontiguousarray(directions), output=True)
    face = np.asarray(found["primID"])
    u, v = np.asarray(found["u"]), np.asarray(found["v"])
    corners = np.asarray(mesh.visual.vertex_colors)[np.asarray(mesh.faces)[face.clip(0)], :3].astype(float)
    colour = np.einsum("pk,pkc->pc", np.stack([1 - u - v, u, v], axis=1), corners)
    return colour.reshape(size, size, 3), (face >= 0).reshape(size, size)


def psnr(error: np.ndarray) -> float:
    """Of differences of colours on a scale of 255, in dB."""
    return float(10 * np.log10(255**2 / max(float(np.mean(error**2)), 1e-9)))
