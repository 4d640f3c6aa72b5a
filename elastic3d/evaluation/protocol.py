"""The protocol: two meshes in, typed scores out.

Both meshes are moved by the ground truth's placement (bounding-box centre to the origin, longest side to [-1,
1]), `points` area-weighted surface points are drawn from each with one fixed seed, and the distances of
`elastic3d.evaluation.metrics` are taken between them. This is the protocol of the 3DShape2VecSet lineage
(Zhang et al. 2023; TripoSG, Dora): Chamfer distances are the sum of both directions.

The two IoUs are measured where both meshes are watertight, by generalised winding numbers (Barill et al. 2018) after
faces that run the wrong way around are turned: volume IoU on uniform points in the common bounding box, near-surface
IoU on the ground truth's surface samples moved by Gaussian noise. Rendered views (`elastic3d.evaluation.views`) and
defects of the predicted surface (`elastic3d.evaluation.health`) follow where the protocol asks for them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray

from elastic3d.errors import UserError
from elastic3d.evaluation import metrics
from elastic3d.evaluation.align import align, turn_up
from elastic3d.evaluation.health import SurfaceHealth, surface_health
from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.evaluation.views import ViewScores, compare_views, load_lpips
from elastic3d.geometry.cleanup import MeshHealth, mesh_health, solid_of
from elastic3d.geometry.mesh_io import merge_equal_vertices
from elastic3d.geometry.normalize import normalize_to
from elastic3d.geometry.sampling import sample_surface

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class PairScores:
    """What one prediction scored against its ground truth, in the ground truth's frame (longest side 2).

    `points` holds the point-based scores by their report names. The IoUs are None where a mesh is not
    watertight, or has no inside as a Klein bottle, or the protocol asks for no query points.
    """

    points: dict[str, float]
    volume_iou: float | None
    near_iou: float | None
    views: ViewScores | None
    health: MeshHealth
    surface: SurfaceHealth | None

    def flat(self) -> dict[str, Any]:
        """The row of a report: every score and every health entry under its own name."""
        return {
            **self.points,
            "volume_iou": self.volume_iou,
            "near_iou": self.near_iou,
            **(dataclasses.asdict(self.views) if self.views else {}),
            **dataclasses.asdict(self.health),
            **(dataclasses.asdict(self.surface) if self.surface else {}),
        }


def check_mesh(name: str, mesh: trimesh.Trimesh, max_faces: int) -> None:
    """Raise UserError unless `mesh` has faces, few enough of them, finite vertices and a surface area above 0."""
    if len(mesh.faces) == 0:
        raise UserError(f"{name} has no faces, expected a triangle mesh")
    if len(mesh.faces) > max_faces:
        raise UserError(f"{name} has {len(mesh.faces):,} faces, expected at most max_faces={max_faces:,}")
    if not np.isfinite(mesh.vertices).all():
        raise UserError(f"{name} has vertices that are not finite (NaN or infinity)")
    extent = float(np.ptp(mesh.vertices[mesh.faces].reshape(-1, 3), axis=0).max())
    if not mesh.area > 1e-12 * extent**2:
        raise UserError(f"{name} has no surface area, expected a mesh with some")


def evaluate_pair(
    pred: trimesh.Trimesh, gt: trimesh.Trimesh, protocol: ProtocolConfig | None = None, workers: int = -1
) -> PairScores:
    """Score the mesh `pred` against `gt`; neither is changed.

    Args:
        protocol: how to score; the default protocol if None.
        workers: threads for the nearest-neighbour searches, -1 for all cores.

    Raises:
        UserError: a mesh is empty, not finite, without area, or has more faces than the protocol allows.
    """
    protocol = protocol or ProtocolConfig()
    pred, gt = prepare(pred, gt, protocol)
    pred_points, pred_normals = sample_surface(pred, protocol.points, protocol.seed)
    gt_points, gt_normals = sample_surface(gt, protocol.points, protocol.seed)
    pairs = metrics.correspond(pred_points, gt_points, workers)
    solids = solid_of(pred), solid_of(gt)
    return PairScores(
        points=metrics.point_scores(pairs, pred_normals, gt_normals, protocol.thresholds),
        volume_iou=iou(*solids, volume_queries(pred, gt, protocol)),
        near_iou=iou(*solids, near_queries(gt, protocol)),
        views=view_scores(pred, gt, protocol),
        health=mesh_health(pred),
        surface=surface_health(pred, protocol.seed) if protocol.surface_health else None,
    )


def prepare(
    pred: trimesh.Trimesh, gt: trimesh.Trimesh, protocol: ProtocolConfig
) -> tuple[trimesh.Trimesh, trimesh.Trimesh]:
    """Check both meshes, align the prediction as the protocol says, and move both by the ground truth's placement.

    Raises UserError as `evaluate_pair`.
    """
    check_mesh("the prediction", pred, protocol.max_faces)
    check_mesh("the ground truth", gt, protocol.max_faces)
    pred, gt = merge_equal_vertices(turn_up(pred, protocol.pred_up)), merge_equal_vertices(gt)
    gt, pred = normalize_to(gt, align(pred, gt, protocol.align, protocol.seed))
    return pred, gt


def view_scores(
    pred: trimesh.Trimesh | None, gt: trimesh.Trimesh, protocol: ProtocolConfig
) -> ViewScores | None:
    """Scores of rendered views; None where the protocol asks for none."""
    if protocol.views == 0:
        return None
    perceptual = load_lpips() if protocol.lpips else None
    return compare_views(pred, gt, protocol.views, protocol.view_size, perceptual)


def failed_scores(gt: trimesh.Trimesh, protocol: ProtocolConfig) -> dict[str, Any]:
    """What a failed generation scores: an empty prediction, taken as one point at the centre of the ground truth.

    So a failure counts against the method, by the worst value where a score has one (0 for F-score, consistency and
    IoU), and by a point's distances where it has none (Chamfer, Hausdorff).
    """
    check_mesh("the ground truth", gt, protocol.max_faces)
    (gt,) = normalize_to(merge_equal_vertices(gt))
    points, _ = sample_surface(gt, protocol.points, protocol.seed)
    distance = np.linalg.norm(points.astype(np.float64), axis=1)
    views, closed = view_scores(None, gt, protocol), solid_of(gt) is not None
    return {
        "chamfer_l1": float(distance.min() + distance.mean()),
        "chamfer_l2": float(distance.min() ** 2 + np.square(distance).mean()),
        **{f"f_score@{threshold:g}": 0.0 for threshold in protocol.thresholds},
        "normal_consistency": 0.0,
        "hausdorff": float(distance.max()),
        "watertight": False,
        **({"volume_iou": 0.0} if closed and protocol.volume_points else {}),
        **({"near_iou": 0.0} if closed and protocol.near_points else {}),
        **(dataclasses.asdict(views) if views else {}),
    }


def volume_queries(pred: trimesh.Trimesh, gt: trimesh.Trimesh, protocol: ProtocolConfig) -> Floats:
    """Uniform points (P, 3) in the box around both meshes: what lies outside the ground truth's box counts too."""
    low = np.minimum(pred.bounds[0], gt.bounds[0])
    high = np.maximum(pred.bounds[1], gt.bounds[1])
    return low + (high - low) * np.random.default_rng(protocol.seed).random((protocol.volume_points, 3))


def near_queries(gt: trimesh.Trimesh, protocol: ProtocolConfig) -> Floats:
    """Points (P, 3) around the ground truth's surface: its samples moved by isotropic Gaussian noise."""
    if protocol.near_points == 0:
        return np.empty((0, 3))
    points, _ = sample_surface(gt, protocol.near_points, protocol.seed)
    noise = np.random.default_rng(protocol.seed).standard_normal(points.shape)
    return points + protocol.near_sigma * noise


def iou(pred: trimesh.Trimesh | None, gt: trimesh.Trimesh | None, queries: Floats) -> float | None:
    """Intersection over union of the two solids on `queries` (P, 3); None without both, without queries, or where
    boxes overlap and none is inside."""
    if pred is None or gt is None or len(queries) == 0:
        return None
    if (pred.bounds[1] < gt.bounds[0]).any() or (gt.bounds[1] < pred.bounds[0]).any():
        return 0.0  # however far apart: in a box around both, no query may lie in either
    return metrics.intersection_over_union(*(metrics.inside(mesh, queries) for mesh in (pred, gt)))
