"""Points with normals on a surface and along its sharp edges; the same seed gives the same points."""

from __future__ import annotations

import numpy as np
import trimesh
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def sample_faces(
    triangles: NDArray[np.floating], count: int, seed: int
) -> tuple[Floats, NDArray[np.int64], Floats]:
    """Area-weighted, stratified points on triangles (F, 3, 3).

    Returns points (P, 3), the face each one is on (P,), and the unit normals of those faces (P, 3).
    ValueError if all faces are degenerate, larger than float32 holds, or for a count below 0.
    """
    triangles = np.asarray(triangles, np.float32)
    first, second = triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]
    cross = np.cross(first, second)
    double_area = np.linalg.norm(cross, axis=1)
    total = np.cumsum(double_area, dtype=np.float64)
    if not np.isfinite(total[-1:]).all():
        raise ValueError("the mesh is too large to sample: its area is not finite in single precision")
    if len(total) == 0 or not total[-1] > 0:
        raise ValueError("the mesh has no face with an area, expected a surface")
    generator = np.random.default_rng(seed)
    ticks = (np.arange(count) + generator.random(count)) / max(count, 1) * total[-1]
    last = int(np.flatnonzero(double_area > 0)[-1])
    face = np.minimum(np.searchsorted(total, ticks, side="right"), last)
    u, v = generator.random((2, count, 1), dtype=np.float32)
    outside = u + v > 1
    u, v = np.where(outside, 1 - u, u), np.where(outside, 1 - v, v)
    points = triangles[face, 0] + u * first[face] + v * second[face]
    return points, face, cross[face] / np.maximum(double_area[face, None], 1e-30)


def sample_surface(mesh: trimesh.Trimesh, count: int, seed: int) -> tuple[Floats, Floats]:
    """Uniform points on a mesh in random order: points (P, 3) and outward face normals (P, 3).

    ValueError if no face has an area.
    """
    points, _, normals = sample_faces(mesh.triangles, count, seed)
    order = np.random.default_rng((seed, 1)).permutation(count)
    return points[order], normals[order]


def sample_sharp_edges(
    mesh: trimesh.Trimesh, count: int, seed: int, angle: float = 30.0
) -> tuple[Floats, Floats]:
    """Uniform points along edges whose two faces meet at more than `angle` degrees from flat.

    Returns points (P, 3) and the mean of both faces' unit normals, normalised (P, 3). P is `count`, or 0 if
    there is no sharp edge. Faces so thin that their normal means nothing are left out, as are edges without
    two faces.
    """
    empty = np.zeros((0, 3), np.float32)
    if count < 1 or len(mesh.faces) == 0:
        return empty, empty
    pairs, edges = _face_pairs(np.asarray(mesh.faces))
    triangles = np.asarray(mesh.triangles)
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    double_area = np.linalg.norm(cross, axis=1)
    normals = cross / np.maximum(double_area[:, None], 1e-30)
    solid = double_area > 1e-3 * np.median(double_area)
    cosine = np.einsum("ij,ij->i", normals[pairs[:, 0]], normals[pairs[:, 1]])
    sharp = np.flatnonzero((cosine < np.cos(np.radians(angle))) & solid[pairs].all(axis=1))
    if len(sharp) == 0:
        return empty, empty
    ends = np.asarray(mesh.vertices)[edges[sharp]]
    total = np.cumsum(np.linalg.norm(ends[:, 1] - ends[:, 0], axis=1))
    if not total[-1] > 0:
        return empty, empty
    generator = np.random.default_rng(seed)
    chosen = np.minimum(np.searchsorted(total, generator.random(count) * total[-1]), len(sharp) - 1)
    along = generator.random((count, 1))
    points = ends[chosen, 0] * (1 - along) + ends[chosen, 1] * along
    mean = normals[pairs[sharp[chosen], 0]] + normals[pairs[sharp[chosen], 1]]
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    mean = np.where(length > 1e-6, mean, normals[pairs[sharp[chosen], 0]])  # a knife's edge: either side
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    return points.astype(np.float32), mean.astype(np.float32)


def _face_pairs(faces: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The faces (E, 2) on both sides of every edge (E, 2) that has exactly two."""
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).astype(np.int64), axis=1)
    key = edges[:, 0] * (int(faces.max()) + 1) + edges[:, 1]
    order = np.argsort(key, kind="stable")
    new = np.flatnonzero(np.diff(key[order], prepend=-1))
    twice = new[np.diff(new, append=len(key)) == 2]
    return np.stack([order[twice] // 3, order[twice + 1] // 3], axis=1), edges[order[twice]]
