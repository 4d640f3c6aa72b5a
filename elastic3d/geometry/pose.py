"""From where an image shows a mesh: the camera whose silhouette and shading fit it best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy.ndimage import zoom
from scipy.optimize import minimize
from scipy.spatial import ConvexHull, QhullError

from elastic3d.geometry.render import Camera, Scene, Views, frame, orbit_camera

Floats = NDArray[np.floating]

_COARSE, _FINE = 48, 96  # pixels a side at which poses are compared
_STARTS = 4  # poses of the coarse grid that are refined
_SHADING = 0.05  # how much shading counts against the overlap of the silhouettes; painted parts mislead it


@dataclass(frozen=True)
class PoseRange:
    """Where the camera may be, in degrees: azimuth 0 is the front (+Z), 90 is +X."""

    azimuth: tuple[float, float]
    elevation: tuple[float, float]
    fov: tuple[float, float] = (15.0, 65.0)


CANONICAL = PoseRange((-90.0, 90.0), (-10.0, 60.0))
"""Meshes that face +Z from wherever the image shows them: of the bundled model, and of published ones, whose training
pairs images from all around with the shape as it stands."""


@dataclass(frozen=True)
class Pose:
    """A camera and how well it fits: the intersection over union of the silhouettes, and the score with the shading."""

    camera: Camera
    overlap: float
    fit: float
    azimuth_deg: float
    elevation_deg: float


def find_pose(mesh: trimesh.Trimesh, image: NDArray[np.uint8], allowed: PoseRange = CANONICAL) -> Pose:
    """The camera from which a mesh looks like a square RGBA image (S, S, 4).

    The object's box has to be centred in the image, as `elastic3d.models.images.centred` leaves it: that fixes the
    camera's distance and target, and leaves azimuth, elevation and angle of view. A grid of them is compared with the
    image, and the best ones are refined (Nelder-Mead). The score is the overlap of the silhouettes, and how much of the
    brightness inside is explained by an affine function of the normals, which any distant light on one colour is.

    Raises ValueError if the image shows no object or is not square, or the mesh has no face.
    """
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 4:
        raise ValueError(f"the image has shape {image.shape}, expected (S, S, 4)")
    search = _Search(mesh, image)
    grid = [
        np.array([azimuth, elevation, np.clip(35.0, *allowed.fov)])
        for azimuth in _steps(allowed.azimuth, 10)
        for elevation in _steps(allowed.elevation, 10)
    ]
    scores = [search.score(point, _COARSE) for point in grid]
    low, high = np.array([allowed.azimuth, allowed.elevation, allowed.fov]).T
    best, best_score = grid[0], -np.inf
    for index in np.argsort(scores)[::-1][:_STARTS]:
        simplex = grid[index] + np.array([[0, 0, 0], [6, 0, 0], [0, 6, 0], [0, 0, 12]])
        found = minimize(
            lambda point: -search.score(np.clip(point, low, high), _FINE),
            grid[index],
            method="Nelder-Mead",
            options={"initial_simplex": simplex, "maxfev": 40, "xatol": 0.3, "fatol": 1e-3},
        )
        if -found.fun > best_score:
            best, best_score = np.clip(found.x, low, high), -found.fun
    camera = search.camera(best)
    return Pose(camera, search.overlap(camera, _FINE), float(best_score), float(best[0]), float(best[1]))


def _steps(interval: tuple[float, float], step: float) -> Floats:
    low, high = interval
    return np.linspace(low, high, max(1, round((high - low) / step)) + 1)


class _Search:
    """An image and a mesh, compared from any direction."""

    def __init__(self, mesh: trimesh.Trimesh, image: NDArray[np.uint8]) -> None:
        alpha = image[..., 3] >= 128
        if not alpha.any():
            raise ValueError("the image is transparent, expected an object")
        self._scene = Scene(mesh)
        self._outline = _hull(np.asarray(mesh.vertices))
        rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
        self._fill = float(max(np.ptp(rows), np.ptp(columns)) + 1) / len(image)
        self._masks: dict[int, NDArray[np.bool_]] = {}
        self._greys: dict[int, Floats] = {}
        for size in (_COARSE, _FINE):
            share = size / len(image)
            weight = zoom(alpha.astype(np.float64), share, order=1, grid_mode=True, mode="nearest")
            grey = zoom(image[..., :3].mean(axis=2) * alpha, share, order=1, grid_mode=True, mode="nearest")
            self._masks[size] = weight >= 0.5
            self._greys[size] = grey / np.maximum(weight, 0.25)

    def camera(self, point: Floats) -> Camera:
        """Of an azimuth, an elevation and an angle of view."""
        azimuth, elevation, fov = map(float, point)
        return frame(orbit_camera(azimuth, elevation, 4.0, fov), self._outline, self._fill)

    def overlap(self, camera: Camera, size: int) -> float:
        """Intersection over union of the silhouettes."""
        return _overlap(self._scene.render(camera, size, shaded=False).silhouette, self._masks[size])

    def score(self, point: Floats, size: int) -> float:
        """Larger is better."""
        views = self._scene.render(self.camera(point), size, shaded=False)
        mask = self._masks[size]
        return _overlap(views.silhouette, mask) + _SHADING * _explained(views, mask, self._greys[size])


def _overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def _explained(views: Views, mask: NDArray[np.bool_], grey: Floats) -> float:
    """Share of the variance of the brightness inside both silhouettes that the normals explain, in [0, 1]."""
    both = views.silhouette & mask
    if both.sum() < 16:
        return 0.0
    values = grey[both] - grey[both].mean()
    total = float(values @ values)
    if total < 1e-6:
        return 0.0
    normals = np.concatenate([views.normal[both], np.ones((int(both.sum()), 1))], axis=1).astype(np.float64)
    matrix = normals.T @ normals + 1e-6 * np.eye(4)
    fitted = normals @ np.linalg.solve(matrix, normals.T @ values)
    return float(np.clip(1 - ((values - fitted) ** 2).sum() / total, 0, 1))


def _hull(points: Floats) -> Floats:
    """The points that can be at the edge of a view; all of them where they have no volume."""
    try:
        return points[ConvexHull(points).vertices]
    except (QhullError, ValueError):
        return points
