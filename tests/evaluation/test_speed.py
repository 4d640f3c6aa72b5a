"""The point metrics are at least as fast as Open3D's own on the same pair, in CPU time (a wall clock lies on a busy
machine)."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import trimesh

from elastic3d.evaluation import metrics
from elastic3d.geometry.sampling import sample_surface

POINTS = 100_000
THRESHOLDS = (0.01, 0.02, 0.05)


def cpu_seconds(work: Callable[[], object], repeats: int = 3) -> float:
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def ours(pred: trimesh.Trimesh, gt: trimesh.Trimesh) -> dict[str, float]:
    pred_points, pred_normals = sample_surface(pred, POINTS, 0)
    gt_points, gt_normals = sample_surface(gt, POINTS, 0)
    pairs = metrics.correspond(pred_points, gt_points)
    return metrics.point_scores(pairs, pred_normals, gt_normals, THRESHOLDS)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.002, 0.02])
def test_as_fast_as_open3d(noise: float) -> None:
    try:
        import open3d as o3d
    except (ImportError, OSError) as error:
        pytest.skip(f"open3d can't be imported: {error}")
    gt = trimesh.creation.torus(0.7, 0.3, 200, 50)  # 20,000 faces
    pred = gt.copy()
    pred.vertices += noise * np.random.default_rng(0).standard_normal(pred.vertices.shape)

    def mesh_of(mesh: trimesh.Trimesh) -> o3d.t.geometry.TriangleMesh:
        vertices, faces = mesh.vertices.astype(np.float32), mesh.faces.astype(np.int64)
        return o3d.t.geometry.TriangleMesh(o3d.core.Tensor(vertices), o3d.core.Tensor(faces))

    theirs = [mesh_of(pred), mesh_of(gt)]
    kinds = o3d.t.geometry.Metric
    wanted = [kinds.ChamferDistance, kinds.FScore]
    settings = o3d.t.geometry.MetricParameters(list(THRESHOLDS), POINTS)
    own = cpu_seconds(lambda: ours(pred, gt))
    other = cpu_seconds(lambda: theirs[0].compute_metrics(theirs[1], wanted, settings))
    print(f"CPU seconds: {own:.2f} (ours, with normals), {other:.2f} (Open3D, without)")
    assert own < 2
    assert own <= other
