"""Polygons to triangles: convex ones as fans, concave ones by ear clipping in their own plane."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_STRAIGHT = 1e-9
"""A corner turns inwards if it turns by more than this share of the polygon's area."""


def triangulate(vertices: Floats, sizes: Ints, corners: Ints) -> Ints:
    """Triangles (F, 3) of polygons, in their order and with their winding.

    Every polygon of n corners gives n - 2 triangles, which use all of its corners, so that polygons that share
    an edge still do afterwards. Polygons of one or two corners give none. One without a plane (all corners on a
    line, or a boundary that crosses itself) becomes a fan.

    Args:
        vertices: (V, 3) positions.
        sizes: (P,) number of corners of each polygon.
        corners: (sum of sizes,) vertices of the polygons, one after the other, each in [0, V).
    """
    if (sizes < 3).any():
        corners = corners[np.repeat(sizes >= 3, sizes)]
        sizes = sizes[sizes >= 3]
    if len(sizes) == 0:
        return np.zeros((0, 3), np.int64)
    if sizes.max() == 3:
        return corners.reshape(-1, 3)
    starts = np.cumsum(sizes) - sizes
    faces = _fans(sizes, starts, corners)
    first_face = np.cumsum(sizes - 2) - (sizes - 2)
    concave, normals = _concave(vertices, sizes, starts, corners)
    for polygon in np.flatnonzero(concave):
        ring = corners[starts[polygon] : starts[polygon] + sizes[polygon]]
        clipped = _ear_clip(vertices[ring], normals[polygon])
        if clipped is not None:
            faces[first_face[polygon] : first_face[polygon] + len(clipped)] = ring[clipped]
    return faces


def strip(corners: Ints) -> Ints:
    """Triangles (F, 3) of a triangle strip, every second one turned round; those without area are left out."""
    turn = np.arange(max(len(corners) - 2, 0)) % 2
    index = np.arange(len(turn))
    return _proper(np.stack([corners[index], corners[index + 1 + turn], corners[index + 2 - turn]], axis=1))


def fan(corners: Ints) -> Ints:
    """Triangles (F, 3) of a triangle fan; those without area are left out."""
    index = np.arange(max(len(corners) - 2, 0))
    return _proper(np.stack([corners[index + 1], corners[index + 2], corners[index * 0]], axis=1))


def _proper(faces: Ints) -> Ints:
    """The faces with three different corners; strips repeat corners to jump from one part to the next."""
    a, b, c = faces.T
    return faces[(a != b) & (b != c) & (c != a)]


def _fans(sizes: Ints, starts: Ints, corners: Ints) -> Ints:
    triangles = sizes - 2
    owner = np.repeat(np.arange(len(sizes)), triangles)
    step = np.arange(len(owner)) - np.repeat(np.cumsum(triangles) - triangles, triangles)
    first = starts[owner]
    return np.stack([corners[first], corners[first + step + 1], corners[first + step + 2]], axis=1)


def _concave(vertices: Floats, sizes: Ints, starts: Ints, corners: Ints) -> tuple[NDArray[np.bool_], Floats]:
    """Which polygons (P,) have a corner that turns inwards, and their normals (P, 3), twice the area long."""
    position = np.arange(len(corners))
    start, size = np.repeat(starts, sizes), np.repeat(sizes, sizes)
    after = start + (position - start + 1) % size
    points = vertices[corners] - vertices[corners[start]]  # relative: exact far from the origin
    normals = np.add.reduceat(np.cross(points, points[after]), starts, axis=0)  # Newell
    along = points[after] - points
    before = start + (position - start - 1) % size
    turn = np.einsum("ck,ck->c", np.cross(along[before], along), np.repeat(normals, sizes, axis=0))
    square = np.repeat(np.einsum("pk,pk->p", normals, normals), sizes)
    return np.logical_or.reduceat(turn < -_STRAIGHT * square, starts) & (sizes > 3), normals


def _ear_clip(points: Floats, normal: Floats) -> Ints | None:
    """Triangles (n - 2, 3) of one polygon with corners (n, 3), as numbers of corners; None if it has no plane."""
    import mapbox_earcut

    axis = int(np.argmax(np.abs(normal)))
    plane = [(axis + 1) % 3, (axis + 2) % 3]
    flat = (points - points[0])[:, plane if normal[axis] > 0 else plane[::-1]]
    longest = np.abs(flat).max()
    if not longest > 0:
        return None
    flat = np.ascontiguousarray(flat / longest)
    count = len(flat)
    found = (
        mapbox_earcut.triangulate_float64(flat, np.array([count], np.uint32)).reshape(-1, 3).astype(np.int64)
    )
    u, v = flat[found[:, 1]] - flat[found[:, 0]], flat[found[:, 2]] - flat[found[:, 0]]
    clockwise = u[:, 0] * v[:, 1] < u[:, 1] * v[:, 0]
    found[clockwise] = found[clockwise, ::-1]
    return _with_all_corners(found.tolist(), count)


def _with_all_corners(triangles: list[list[int]], count: int) -> Ints | None:
    """The triangles with the corners that ear clipping leaves out, those on a straight line, put back in.

    Without them an edge would run past a vertex of the neighbouring polygon, which opens the surface.
    """
    used = sorted({corner for triangle in triangles for corner in triangle})
    for here, following in zip(used, used[1:] + used[:1], strict=True):
        skipped = (following - here) % count - 1
        if skipped <= 0:
            continue
        owner = [t for t in triangles if (here, following) in ((t[0], t[1]), (t[1], t[2]), (t[2], t[0]))]
        if len(owner) != 1:
            return None
        triangles.remove(owner[0])
        opposite = next(corner for corner in owner[0] if corner not in (here, following))
        chain = [(here + i) % count for i in range(skipped + 2)]
        triangles += [[a, b, opposite] for a, b in zip(chain[:-1], chain[1:], strict=True)]
    return np.array(triangles, np.int64) if len(triangles) == count - 2 else None
