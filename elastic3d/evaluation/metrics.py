"""Distances between two sampled surfaces, on plain point arrays.

Axis letters: P points of the prediction, Q points of the ground truth. Every function works in the units of
the points it is given; the protocol (`elastic3d.evaluation.protocol`) fixes those units.

Sources: Chamfer distance as in Fan et al. 2017, "A Point Set Generation Network for 3D Object
Reconstruction"; F-score as in Knapitsch et al. 2017, "Tanks and Temples"; normal consistency as in Mescheder
et al. 2019, "Occupancy Networks".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import trimesh
from numpy.typing import NDArray
from scipy.spatial import cKDTree

Floats = NDArray[np.floating]

# Sliding-midpoint cells without shrunken bounds: 15x faster than SciPy's defaults where one surface is far
# from the other, and as fast where they are close. The numbers are the same.
TREE = {"leafsize": 32, "balanced_tree": False, "compact_nodes": False}


@dataclass(frozen=True)
class Correspondence:
    """Nearest neighbours between two point sets, in both directions.

    `to_gt` (P,) is the distance of each predicted point to the ground truth and `gt_index` (P,) the nearest
    point there; `to_pred` (Q,) and `pred_index` (Q,) are the other direction.
    """

    to_gt: Floats
    gt_index: NDArray[np.intp]
    to_pred: Floats
    pred_index: NDArray[np.intp]


def check_points(name: str, points: Floats) -> None:
    """Raise ValueError unless `points` is a non-empty, finite (P, 3) array."""
    if points.ndim != 2 or points.shape[1] != 3 or len(points) == 0:
        raise ValueError(f"{name} has shape {points.shape}, expected (P, 3) with at least one point")
    if not np.isfinite(points).all():
        raise ValueError(f"{name} has values that are not finite, expected finite coordinates")


def nearest(queries: Floats, tree: cKDTree, order: NDArray[np.intp], workers: int) -> tuple[Floats, NDArray]:
    """Distance (P,) and index (P,) of the nearest point in `tree`; a spatial `order` keeps the cache warm."""
    distance, index = np.empty(len(queries)), np.empty(len(queries), np.intp)
    distance[order], index[order] = tree.query(queries[order], workers=workers)
    return distance, index


def correspond(pred: Floats, gt: Floats, workers: int = -1) -> Correspondence:
    """Exact nearest neighbours between `pred` (P, 3) and `gt` (Q, 3) in both directions.

    `workers` is the number of threads, -1 for all cores. Raises ValueError on empty, badly shaped or non-finite input.
    """
    check_points("pred", pred)
    check_points("gt", gt)
    pred_tree, gt_tree = cKDTree(pred, **TREE), cKDTree(gt, **TREE)
    to_gt, gt_index = nearest(pred, gt_tree, pred_tree.indices, workers)
    to_pred, pred_index = nearest(gt, pred_tree, gt_tree.indices, workers)
    return Correspondence(to_gt, gt_index, to_pred, pred_index)


def chamfer_l1(pairs: Correspondence) -> float:
    """mean_p min_q |p - q| + mean_q min_p |q - p|: the SUM of both directions, Euclidean distances."""
    return float(pairs.to_gt.mean() + pairs.to_pred.mean())


def chamfer_l2(pairs: Correspondence) -> float:
    """mean_p min_q |p - q|^2 + mean_q min_p |q - p|^2: the SUM of both directions, squared distances."""
    return float(np.square(pairs.to_gt).mean() + np.square(pairs.to_pred).mean())


def precision(pairs: Correspondence, threshold: float) -> float:
    """Share of predicted points strictly nearer than `threshold` to the ground truth."""
    return float((pairs.to_gt < threshold).mean())


def recall(pairs: Correspondence, threshold: float) -> float:
    """Share of ground truth points strictly nearer than `threshold` to the prediction."""
    return float((pairs.to_pred < threshold).mean())


def f_score(pairs: Correspondence, threshold: float) -> float:
    """Harmonic mean of precision and recall at `threshold`; 0 where both are 0. In [0, 1]."""
    p, r = precision(pairs, threshold), recall(pairs, threshold)
    return 2 * p * r / (p + r) if p + r > 0 else 0.0


def normal_consistency(pairs: Correspondence, pred_normals: Floats, gt_normals: Floats) -> float:
    """Mean |cos| between the unit normals of nearest neighbours, both directions averaged. In [0, 1].

    `pred_normals` is (P, 3) and `gt_normals` (Q, 3). The sign is ignored, so inverted winding is not punished here.
    """
    for name, normals, count in (
        ("pred_normals", pred_normals, len(pairs.to_gt)),
        ("gt_normals", gt_normals, len(pairs.to_pred)),
    ):
        if normals.shape != (count, 3):
            raise ValueError(f"{name} has shape {normals.shape}, expected ({count}, 3)")
    forth = np.abs(np.einsum("pk,pk->p", pred_normals, gt_normals[pairs.gt_index]))
    back = np.abs(np.einsum("qk,qk->q", gt_normals, pred_normals[pairs.pred_index]))
    return float(min((forth.mean(dtype=np.float64) + back.mean(dtype=np.float64)) / 2, 1.0))


def hausdorff(pairs: Correspondence) -> float:
    """Largest nearest-neighbour distance of both directions (Hausdorff distance of the samples)."""
    return float(max(pairs.to_gt.max(), pairs.to_pred.max()))


def surface_distance(points: Floats, mesh: trimesh.Trimesh) -> Floats:
    """Exact distance (P,) of points (P, 3) to the surface."""
    import igl

    if len(points) == 0:
        return np.zeros(0)
    return np.sqrt(
        igl.point_mesh_squared_distance(np.ascontiguousarray(points, np.float64), *arrays(mesh))[0]
    )


def inside(mesh: trimesh.Trimesh, points: Floats) -> NDArray[np.bool_]:
    """Which of `points` (P, 3) the closed surface winds around (P,), by the sign-free winding number |w| > 1/2. Its
    faces have to run around in one sense (`solid_of`)."""
    import igl

    return np.abs(igl.fast_winding_number(*arrays(mesh), np.ascontiguousarray(points, np.float64))) > 0.5


def arrays(mesh: trimesh.Trimesh) -> tuple[Floats, NDArray[np.int64]]:
    """Vertices (V, 3) and faces (F, 3) as libigl takes them."""
    return np.ascontiguousarray(mesh.vertices, np.float64), np.ascontiguousarray(mesh.faces, np.int64)


def intersection_over_union(pred_inside: NDArray[np.bool_], gt_inside: NDArray[np.bool_]) -> float | None:
    """|A and B| / |A or B| over the query points; None where neither has a point inside (nothing was measured)."""
    if pred_inside.shape != gt_inside.shape:
        raise ValueError(
            f"pred_inside has shape {pred_inside.shape}, expected {gt_inside.shape} like gt_inside"
        )
    union = np.count_nonzero(pred_inside | gt_inside)
    return np.count_nonzero(pred_inside & gt_inside) / union if union else None


def point_scores(
    pairs: Correspondence, pred_normals: Floats, gt_normals: Floats, thresholds: Sequence[float]
) -> dict[str, float]:
    """All point-based scores under the names used in reports, e.g. `f_score@0.02`."""
    scores = {"chamfer_l1": chamfer_l1(pairs), "chamfer_l2": chamfer_l2(pairs)}
    scores |= {f"f_score@{threshold:g}": f_score(pairs, threshold) for threshold in thresholds}
    scores["normal_consistency"] = normal_consistency(pairs, pred_normals, gt_normals)
    scores["hausdorff"] = hausdorff(pairs)
    return scores
