"""Views of a mesh by ray casting on the CPU: silhouette, depth, normals and a shaded colour image.

Conventions (Y up, the shape looks along +Z): a camera at azimuth 0 stands on +Z and sees the front; azimuth
grows towards +X. Image row 0 is the top, column 0 the left; at azimuth 0, +X is on the right of the image.
Rays: Embree through `embreex`. Everything is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import trimesh
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from numpy.typing import NDArray

Floats = NDArray[np.float32]

GAMMA = 2.2
SUBPIXELS = 3  # a side, where the image is antialiased
_LINEAR = ((np.arange(256) / 255) ** GAMMA).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera with square pixels; `fov_deg` is the full vertical and horizontal angle of view."""

    eye: tuple[float, float, float]
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)
    up: tuple[float, float, float] = (0.0, 1.0, 0.0)
    fov_deg: float = 40.0

    def axes(self) -> NDArray[np.float64]:
        """Rows (3, 3): right, up and forward of the image, unit length. ValueError if they are undefined."""
        forward = [to - at for to, at in zip(self.target, self.eye, strict=True)]
        right = _cross(forward, self.up)
        length, width = math.hypot(*forward), math.hypot(*right)
        if length < 1e-9 or width < 1e-9 * length:
            raise ValueError(
                f"camera eye {self.eye}, target {self.target}, up {self.up} fix no direction of view"
            )
        forward, right = [x / length for x in forward], [x / width for x in right]
        return np.array([right, _cross(right, forward), forward])

    def project(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Points (P, 3) to image coordinates (P, 2): x to the right, y up, the image spans [-1, 1]."""
        local = (points - np.array(self.eye)) @ self.axes().T
        return local[:, :2] / (local[:, 2:] * np.tan(np.radians(self.fov_deg) / 2))

    def rays(self, pixels: NDArray[np.floating], size: int) -> NDArray[np.float64]:
        """Unit directions (P, 3) through pixel positions (P, 2) given as (row, column), centres at +0.5."""
        plane = np.stack([2 * pixels[:, 1] / size - 1, 1 - 2 * pixels[:, 0] / size], axis=1)
        plane = plane * np.tan(np.radians(self.fov_deg) / 2)
        axes = self.axes()
        directions = plane @ axes[:2] + axes[2]
        return directions / np.sqrt(np.einsum("ij,ij->i", directions, directions))[:, None]


def _cross(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Of single vectors, where NumPy's takes most of the time of a small view."""
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]


def orbit_camera(azimuth_deg: float, elevation_deg: float, distance: float, fov_deg: float) -> Camera:
    """A camera that looks at the origin from a direction: azimuth 0 is the front (+Z), 90 is +X."""
    azimuth, elevation = np.radians(azimuth_deg), np.radians(elevation_deg)
    eye = distance * np.array(
        [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
    )
    return Camera(eye=(float(eye[0]), float(eye[1]), float(eye[2])), fov_deg=fov_deg)


def ring_cameras(count: int, elevation_deg: float, distance: float, fov_deg: float) -> list[Camera]:
    """`count` cameras at equal steps of azimuth, the first one in front, at a distance from the origin."""
    if count < 1:
        raise ValueError(f"count is {count}, expected at least one camera")
    return [orbit_camera(360 * index / count, elevation_deg, distance, fov_deg) for index in range(count)]


def frame(camera: Camera, points: NDArray[np.floating], fill: float) -> Camera:
    """The camera moved, not turned, so that the points (P, 3) are centred and span `fill` of the image."""
    axes = camera.axes()
    slope = np.tan(np.radians(camera.fov_deg) / 2)
    target, distance = np.zeros(3), float(np.linalg.norm(np.subtract(camera.eye, camera.target)))
    closest = float(np.linalg.norm(points, axis=1).max()) * 1.05
    for _ in range(6):
        moved = Camera(
            eye=_triple(target - distance * axes[2]), target=_triple(target), fov_deg=camera.fov_deg
        )
        seen = moved.project(points)
        low, high = seen.min(axis=0), seen.max(axis=0)
        target = target + ((low + high) / 2 * slope * distance) @ axes[:2]
        distance = max(distance * float((high - low).max()) / 2 / fill, closest)
    return Camera(eye=_triple(target - distance * axes[2]), target=_triple(target), fov_deg=camera.fov_deg)


def _triple(vector: NDArray[np.floating]) -> tuple[float, float, float]:
    return float(vector[0]), float(vector[1]), float(vector[2])


@dataclass(frozen=True, kw_only=True)
class Light:
    """One distant light, a sky that is brighter above than below, and a dull highlight."""

    direction: tuple[float, float, float] = (0.4, 0.8, 0.6)  # towards the light, in the frame of the object
    ambient: float = 0.45
    diffuse: float = 0.6
    specular: float = 0.08
    shadows: bool = True


@dataclass(frozen=True)
class Views:
    """What one camera sees, H = W = size. The background is False, infinity, zero and transparent."""

    silhouette: NDArray[np.bool_]  # (H, W)
    depth: Floats  # (H, W), along the axis of view
    normal: Floats  # (H, W, 3), unit, in the frame of the object, turned towards the camera
    colour: NDArray[np.uint8]  # (H, W, 4), straight alpha


@dataclass
class _Hits:
    """Where rays met the surface; `face` is -1 for a miss."""

    face: NDArray[np.int64]
    distance: Floats
    normal: Floats


class Scene:
    """A mesh ready for rays; build it once for many views.

    `face_colours` (F, 3) uint8 are sRGB base colours (default: a light grey). `smooth` interpolates vertex
    normals, except across creases sharper than `crease_deg`. ValueError for a mesh without faces.
    """

    def __init__(
        self,
        mesh: trimesh.Trimesh,
        face_colours: NDArray[np.uint8] | None = None,
        smooth: bool = True,
        crease_deg: float = 35.0,
    ) -> None:
        if len(mesh.faces) == 0:
            raise ValueError("the mesh has no faces, expected a surface to render")
        self._faces = np.asarray(mesh.faces)
        self._triangles = np.asarray(mesh.vertices, np.float32)[self._faces]
        self._vertex_normals = np.asarray(mesh.vertex_normals, np.float32) if smooth else None
        self._crease = np.cos(np.radians(crease_deg))
        self._colours: NDArray[np.uint8] | None = None
        self.face_colours = face_colours
        self._embree = rtcore_scene.EmbreeScene()
        TriangleMesh(self._embree, self._triangles)

    @property
    def face_colours(self) -> NDArray[np.uint8] | None:
        """Base colours (F, 3); assign others to repaint the mesh."""
        return self._colours

    @face_colours.setter
    def face_colours(self, colours: NDArray[np.uint8] | None) -> None:
        if colours is not None and colours.shape != (len(self._faces), 3):
            raise ValueError(f"face_colours has shape {colours.shape}, expected {(len(self._faces), 3)}")
        self._colours = colours

    def render(
        self,
        camera: Camera,
        size: int,
        light: Light | Sequence[Light] | None = None,
        shaded: bool = True,
    ) -> Views:
        """Cast one ray a pixel, and 9 more where colour changes abruptly (when `shaded`).

        What several lights add is summed.
        """
        if size < 1:
            raise ValueError(f"size is {size}, expected at least one pixel")
        lights = [light or Light()] if isinstance(light, Light | None) else list(light)
        rows, columns = np.divmod(np.arange(size * size), size)
        centres = np.stack([rows, columns], axis=1) + 0.5
        directions = camera.rays(centres, size)
        hits = self._cast(camera, directions)
        silhouette = hits.face >= 0
        depth = np.where(silhouette, hits.distance * (directions @ camera.axes()[2]), np.inf)
        colour = np.zeros((size * size, 4), np.float32)
        if shaded:
            colour = self._shade(hits, directions, camera, lights)
            self._antialias(colour, centres, camera, lights, size)
        return Views(
            silhouette=silhouette.reshape(size, size),
            depth=depth.astype(np.float32).reshape(size, size),
            normal=hits.normal.astype(np.float32).reshape(size, size, 3),
            colour=np.round(255 * np.clip(colour, 0, 1)).astype(np.uint8).reshape(size, size, 4),
        )

    def _cast(self, camera: Camera, directions: NDArray[np.float64]) -> _Hits:
        origins = np.broadcast_to(np.array(camera.eye, np.float32), directions.shape)
        found = self._embree.run(
            np.ascontiguousarray(origins), np.ascontiguousarray(directions, dtype=np.float32), output=True
        )
        face = np.asarray(found["primID"]).astype(np.int64)
        hit = np.flatnonzero(face >= 0)
        normal = np.zeros((len(face), 3), np.float32)
        normal[hit] = self._normals(face[hit], np.asarray(found["u"])[hit], np.asarray(found["v"])[hit])
        normal[np.einsum("ij,ij->i", normal, directions) > 0] *= -1
        return _Hits(face, np.asarray(found["tfar"], np.float32), normal)

    def _normals(self, face: NDArray[np.int64], u: Floats, v: Floats) -> Floats:
        corners = self._triangles[face]
        flat = _unit(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
        if self._vertex_normals is None:
            return flat
        corner = self._vertex_normals[self._faces[face]]
        gentle = np.einsum("ijk,ik->ij", corner, flat) > self._crease
        corner = np.where(gentle[:, :, None], corner, flat[:, None])
        return _unit(np.einsum("ij,ijk->ik", np.stack([1 - u - v, u, v], axis=1), corner))

    def _shade(
        self, hits: _Hits, directions: NDArray[np.float64], camera: Camera, lights: Sequence[Light]
    ) -> Floats:
        """Lambert, sky and Blinn-Phong highlight in linear light; sRGB and alpha in [0, 1], 0 for a miss."""
        colour = np.zeros((len(directions), 4), np.float32)
        hit = np.flatnonzero(hits.face >= 0)
        normal = hits.normal[hit]
        base = np.full((len(hit), 3), 192) if self._colours is None else self._colours[hits.face[hit]]
        linear = np.zeros((len(hit), 3), np.float32)
        for light in lights:
            towards = _unit(np.array([light.direction], np.float32))
            facing = np.clip(normal @ towards[0], 0, None)
            if light.shadows:
                points = np.array(camera.eye, np.float32) + hits.distance[hit, None] * directions[hit]
                facing = facing * ~self._shadowed(points + 2e-3 * normal, towards[0], facing > 0)
            sky = light.ambient * (0.75 + 0.25 * normal[:, 1])
            aligned = np.clip(np.einsum("ij,ij->i", normal, _unit(towards - directions[hit])), 0, 1)
            highlight = light.specular * aligned**24 * (facing > 0)
            linear = linear + _LINEAR[base] * (sky + light.diffuse * facing)[:, None] + highlight[:, None]
        colour[hit, :3] = np.clip(linear, 0, 1) ** (1 / GAMMA)
        colour[hit, 3] = 1
        return colour

    def _shadowed(
        self, points: NDArray[np.floating], towards: Floats, lit: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        shadow = np.zeros(len(points), bool)
        origins = np.ascontiguousarray(points[lit], dtype=np.float32)
        directions = np.ascontiguousarray(np.broadcast_to(towards.astype(np.float32), origins.shape))
        if len(origins):
            shadow[lit] = self._embree.run(origins, directions, query="OCCLUDED") >= 0
        return shadow

    def _antialias(
        self,
        colour: Floats,
        centres: NDArray[np.float64],
        camera: Camera,
        lights: Sequence[Light],
        size: int,
    ) -> None:
        """Replace pixels whose neighbours differ by the mean of a grid of rays (premultiplied alpha)."""
        image = colour.reshape(size, size, 4)
        rough = np.zeros((size, size), bool)
        for axis in (0, 1):
            jump = np.abs(np.diff(image, axis=axis)).max(axis=-1) > 0.12
            rough |= np.pad(jump, [(0, 1), (0, 0)] if axis == 0 else [(0, 0), (0, 1)])
            rough |= np.pad(jump, [(1, 0), (0, 0)] if axis == 0 else [(0, 0), (1, 0)])
        pixel = np.flatnonzero(rough)
        steps = (np.arange(SUBPIXELS) + 0.5) / SUBPIXELS - 0.5
        offsets = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
        directions = camera.rays((centres[pixel, None] + offsets).reshape(-1, 2), size)
        fine = self._shade(self._cast(camera, directions), directions, camera, lights).reshape(
            -1, SUBPIXELS**2, 4
        )
        alpha = fine[:, :, 3].mean(axis=1)
        total = (fine[:, :, :3] * fine[:, :, 3:]).mean(axis=1)
        colour[pixel, :3] = total / np.maximum(alpha, 1e-6)[:, None]
        colour[pixel, 3] = alpha


def _unit(vectors: NDArray[np.floating]) -> Floats:
    lengths = np.sqrt(np.einsum("...i,...i->...", vectors, vectors))[..., None]
    return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
