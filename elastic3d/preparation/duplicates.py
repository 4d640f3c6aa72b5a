"""Groups of nearly equal shapes, which have to stay on one side of a split."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from elastic3d.geometry.normalize import normalize_mesh
from elastic3d.geometry.sampling import sample_surface
from elastic3d.preparation.views import RawShape

POINTS = 2048


def shape_points(shape: RawShape) -> NDArray[np.float32]:
    """Points (P, 3) on the normalised shape (longest side 2) that `near_duplicate_groups` compares."""
    mesh, _ = normalize_mesh(shape.mesh, half_extent=1.0)
    return sample_surface(mesh, POINTS, seed=0)[0]


def near_duplicate_groups(clouds: list[NDArray[np.float32]], threshold: float = 0.05) -> NDArray[np.int32]:
    """Group number of every point cloud (P, 3); two are in one group if a chain of close pairs joins them.

    Close: the mean distance to the nearest point, averaged over both directions, is below `threshold`.
    Sampling alone accounts for about 0.02 of it at 2048 points.
    """
    trees = [cKDTree(cloud) for cloud in clouds]
    extents = np.stack([np.ptp(cloud, axis=0) for cloud in clouds])
    # A box that differs by 4 thresholds can't hold nearly the same surface, save for a few stray points.
    alike = np.abs(extents[:, None] - extents[None]).max(axis=-1) < 4 * threshold
    pairs = np.argwhere(np.triu(alike, k=1))
    close = [
        (first, second)
        for first, second in pairs
        if _distance(clouds[first], trees[second], clouds[second], trees[first], threshold) < threshold
    ]
    rows, columns = np.array(close, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(clouds), len(clouds)))
    return connected_components(graph, directed=False)[1]


def _distance(
    first: NDArray[np.float32],
    second_tree: cKDTree,
    second: NDArray[np.float32],
    first_tree: cKDTree,
    threshold: float,
) -> float:
    rough = second_tree.query(first[::16])[0].mean()
    if rough > 3 * threshold:
        return float("inf")
    there, back = second_tree.query(first)[0], first_tree.query(second)[0]
    return float(there.mean() + back.mean()) / 2
