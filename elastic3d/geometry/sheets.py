"""Sheets of a closed surface that touch along an edge or at a vertex, each with vertices of its own."""

from __future__ import annotations

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Ints = NDArray[np.int64]


def separate_sheets(mesh: trimesh.Trimesh) -> trimesh.Trimesh | None:
    """A closed two-manifold with the same surface where sheets of it touch each other; None if it is open.

    Where an edge has four faces or more, those belong together that go on as straight as possible: the two sides
    of a plate that was squeezed to nothing stay two sides, and two bodies that touch stay two bodies. Vertices are
    doubled for that, at equal positions. Pairs of faces that cancel (the same corners, opposite winding) go. Where
    two edges are left between the same two vertices, one gets a vertex halfway, and two faces more.
    """
    faces = _without_cancelling(np.asarray(mesh.faces, np.int64))
    partner = _partners(faces, np.asarray(mesh.vertices, np.float64))
    if partner is None or len(faces) == 0:
        return None
    corner = np.arange(faces.size)
    # A half-edge's first corner and the second one of the half-edge on its other side are one vertex of a sheet.
    links = coo_array((np.ones(faces.size, np.int8), (corner, _following(partner))), (faces.size, faces.size))
    count, label = connected_components(links, directed=False)
    vertices = np.empty((count, 3))
    vertices[label] = np.asarray(mesh.vertices)[faces.ravel()]
    return trimesh.Trimesh(*_without_double_edges(vertices, label.reshape(-1, 3), partner), process=False)


def _without_double_edges(
    vertices: NDArray[np.float64], faces: Ints, partner: Ints
) -> tuple[NDArray[np.float64], Ints]:
    """The surface with one edge at most between two vertices: of several, all but one get a vertex halfway."""
    tail, head = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    key = np.minimum(tail, head) * len(vertices) + np.maximum(tail, head)
    edges = np.flatnonzero(np.arange(len(key)) < partner)  # one half-edge of each
    again = np.ones(len(edges), bool)
    again[np.unique(key[edges], return_index=True)[1]] = False
    if not again.any():
        return vertices, faces
    split = edges[again]
    halfway = np.full(len(key), -1)
    halfway[split] = halfway[partner[split]] = len(vertices) + np.arange(len(split))
    vertices = np.concatenate([vertices, (vertices[tail[split]] + vertices[head[split]]) / 2])
    touched = (halfway.reshape(-1, 3) >= 0).any(axis=1)
    pieces = [faces[~touched]]
    for face, middles in zip(faces[touched], halfway.reshape(-1, 3)[touched], strict=True):
        ring = [vertex for pair in zip(face, middles, strict=True) for vertex in pair if vertex >= 0]
        first = next(i for i, vertex in enumerate(ring) if vertex in middles)
        ring = ring[first:] + ring[:first]  # a fan around a vertex halfway along a side has no flat triangle
        pieces.append(np.array([(ring[0], a, b) for a, b in zip(ring[1:-1], ring[2:], strict=True)]))
    return vertices, np.concatenate(pieces)


def _following(half_edge: Ints) -> Ints:
    """The next half-edge around the same face; half-edge 3 f + i runs from corner i of face f to the next."""
    return np.where(half_edge % 3 == 2, half_edge - 2, half_edge + 1)


def _without_cancelling(faces: Ints) -> Ints:
    """The faces (F, 3) without pairs of the same corners and opposite winding."""
    corners = np.sort(faces, axis=1)
    order = np.lexsort(corners.T)
    same = (corners[order[1:]] == corners[order[:-1]]).all(axis=1)
    if not same.any():
        return faces
    odd = (faces[:, 1] - faces[:, 0]) * (faces[:, 2] - faces[:, 1]) * (faces[:, 0] - faces[:, 2]) > 0
    gone = np.zeros(len(faces), bool)
    for at in np.flatnonzero(same):
        a, b = order[at], order[at + 1]
        if odd[a] != odd[b] and not gone[a]:
            gone[[a, b]] = True
    return faces[~gone]


def _partners(faces: Ints, vertices: NDArray[np.float64]) -> Ints | None:
    """For each half-edge (3F,) the one on its other side, which runs the opposite way; None where one has none."""
    tail, head = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    key = np.minimum(tail, head) * len(vertices) + np.maximum(tail, head)
    order = np.argsort(key, kind="stable")
    start = np.flatnonzero(np.diff(key[order], prepend=-1))
    size = np.diff(start, append=len(key))
    if (size % 2).any():
        return None
    partner = np.empty(len(key), np.int64)
    first, second = order[start[size == 2]], order[start[size == 2] + 1]
    if (tail[first] != head[second]).any() or (tail == head).any():
        return None
    partner[first], partner[second] = second, first
    opposite = np.roll(faces, -2, axis=1).ravel()
    for at, many in zip(start[size > 2], size[size > 2], strict=True):
        around = order[at : at + many]
        low, high = sorted((tail[around[0]], head[around[0]]))
        forward = tail[around] == low
        if 2 * forward.sum() != many:
            return None
        angle = _angles(vertices[opposite[around]] - vertices[low], vertices[high] - vertices[low])
        for a, b in _straightest(forward, angle):
            partner[around[a]], partner[around[b]] = around[b], around[a]
    return partner


def _angles(points: NDArray[np.float64], axis: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angles (P,) of points (P, 3) about an axis through the origin."""
    across = np.cross(axis, np.eye(3)[np.argmin(np.abs(axis))])
    along = np.cross(axis, across) / max(float(np.linalg.norm(axis)), 1e-300)
    return np.arctan2(points @ along, points @ across)


def _straightest(forward: NDArray[np.bool_], angle: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Pairs of the faces around an edge, one of either direction, without crossing and with the widest wedges.

    Going round, the solid lies between a face that runs backward and the next that runs forward, the outside between
    a forward one and the next backward one. Either all wedges of the solid are kept, or, where those of the outside
    are wider, all of these.
    """
    once = np.argsort(angle, kind="stable").tolist()
    found = []
    for opens in (False, True):
        pairs, waiting, done = list[tuple[int, int]](), list[int](), set[int]()
        for face in (*once, *once):  # twice round, as a wedge may hold the beginning
            if face in done or face in waiting:
                continue
            if forward[face] == opens:
                waiting.append(face)
            elif waiting:
                pairs.append((waiting.pop(), face))
                done.update(pairs[-1])
        found.append((sum((angle[b] - angle[a]) % (2 * np.pi) for a, b in pairs), pairs))
    (solid, bodies), (outside, sides) = found
    return sides if outside > solid + 1e-6 else bodies
