"""Point metrics against brute force, closed forms, invariances, Open3D and PyTorch3D."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from elastic3d.evaluation import metrics

THRESHOLDS = (0.02, 0.05, 0.5)


def brute_force(pred: np.ndarray, gt: np.ndarray, pred_normals: np.ndarray, gt_normals: np.ndarray) -> dict:
    """All pairwise distances, every formula written out."""
    distance = np.linalg.norm(pred[:, None] - gt[None], axis=-1)
    forth, back = distance.min(axis=1), distance.min(axis=0)
    scores = {"chamfer_l1": forth.mean() + back.mean(), "chamfer_l2": (forth**2).mean() + (back**2).mean()}
    for threshold in THRESHOLDS:
        p, r = (forth < threshold).mean(), (back < threshold).mean()
        scores[f"f_score@{threshold:g}"] = 2 * p * r / (p + r) if p + r else 0.0
    cos = np.abs(pred_normals @ gt_normals.T)
    forth_cos = cos[np.arange(len(pred)), distance.argmin(axis=1)].mean()
    back_cos = cos[distance.argmin(axis=0), np.arange(len(gt))].mean()
    return scores | {
        "normal_consistency": (forth_cos + back_cos) / 2,
        "hausdorff": max(forth.max(), back.max()),
    }


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("counts", "scale"), [((200, 300), 1.0), ((1, 1), 1.0), ((500, 3), 0.05), ((64, 64), 10.0)]
)
def test_scores_equal_brute_force(counts: tuple[int, int], scale: float) -> None:
    rng = np.random.default_rng(sum(counts))
    pred, gt = (scale * rng.random((count, 3)) for count in counts)
    pred_normals, gt_normals = (unit(rng, count) for count in counts)
    pairs = metrics.correspond(pred, gt)
    scores = metrics.point_scores(pairs, pred_normals, gt_normals, THRESHOLDS)
    assert scores == pytest.approx(brute_force(pred, gt, pred_normals, gt_normals), abs=1e-12)


def test_concentric_spheres_have_the_closed_form() -> None:
    """Radius 1 and 0.9, sampled in the same directions: every point is 0.1 from the other sphere."""
    directions = unit(np.random.default_rng(0), 4000)
    pairs = metrics.correspond(0.9 * directions, directions)
    assert metrics.chamfer_l1(pairs) == pytest.approx(0.2)
    assert metrics.chamfer_l2(pairs) == pytest.approx(0.02)
    assert metrics.hausdorff(pairs) == pytest.approx(0.1)
    assert metrics.f_score(pairs, 0.0999) == 0
    assert metrics.f_score(pairs, 0.1001) == 1
    assert metrics.normal_consistency(pairs, -directions, directions) == pytest.approx(1)


def test_shifted_grid_has_the_closed_form() -> None:
    """A unit grid moved by 0.25 along x: each point is 0.25 away; perpendicular normals give 0."""
    grid = np.stack(np.meshgrid(*[np.arange(6.0)] * 3), axis=-1).reshape(-1, 3)
    pairs = metrics.correspond(grid + [0.25, 0, 0], grid)
    assert metrics.chamfer_l1(pairs) == pytest.approx(0.5)
    assert metrics.chamfer_l2(pairs) == pytest.approx(2 * 0.25**2)
    x, y = np.tile([1.0, 0, 0], (len(grid), 1)), np.tile([0, 1.0, 0], (len(grid), 1))
    assert metrics.normal_consistency(pairs, x, y) == 0


def test_precision_and_recall_tell_missing_from_extra_parts() -> None:
    whole = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]])
    pairs = metrics.correspond(whole[:1], whole)
    assert (metrics.precision(pairs, 0.1), metrics.recall(pairs, 0.1)) == (1.0, 0.25)
    assert metrics.f_score(pairs, 0.1) == pytest.approx(0.4)


points = arrays(np.float64, st.tuples(st.integers(1, 30), st.just(3)), elements=st.floats(-1, 1, width=32))


@settings(max_examples=60, deadline=None)
@given(points, points, st.integers(0, 2**31))
def test_properties(pred: np.ndarray, gt: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    forward, backward = metrics.correspond(pred, gt, 1), metrics.correspond(gt, pred, 1)
    assert metrics.chamfer_l1(forward) == pytest.approx(metrics.chamfer_l1(backward))
    assert metrics.chamfer_l2(metrics.correspond(gt, gt, 1)) == 0
    shuffled = metrics.correspond(rng.permutation(pred), rng.permutation(gt), 1)
    assert metrics.chamfer_l1(shuffled) == pytest.approx(metrics.chamfer_l1(forward))
    moved = metrics.correspond(3 * pred + 5, 3 * gt + 5, 1)
    assert metrics.chamfer_l1(moved) == pytest.approx(3 * metrics.chamfer_l1(forward), abs=1e-6)
    scores = [metrics.f_score(forward, threshold) for threshold in (0.01, 0.1, 0.5, 4)]
    assert scores == sorted(scores)
    assert scores[-1] == 1
    assert metrics.chamfer_l1(forward) <= 2 * metrics.hausdorff(forward) + 1e-12


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((0, 3)), "at least one"),
        (np.zeros((4, 2)), r"\(4, 2\)"),
        (np.full((2, 3), np.nan), "not finite"),
    ],
)
def test_bad_points_raise(bad: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.correspond(bad, np.zeros((5, 3)))
    with pytest.raises(ValueError, match=message):
        metrics.correspond(np.zeros((5, 3)), bad)


def test_bad_normals_raise() -> None:
    pairs = metrics.correspond(np.zeros((2, 3)), np.zeros((3, 3)))
    with pytest.raises(ValueError, match="gt_normals"):
        metrics.normal_consistency(pairs, np.zeros((2, 3)), np.zeros((2, 3)))


def test_intersection_over_union() -> None:
    a, b = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert metrics.intersection_over_union(a, b) == pytest.approx(1 / 3)
    assert metrics.intersection_over_union(a, a) == 1
    assert metrics.intersection_over_union(a & False, b & False) is None
    with pytest.raises(ValueError, match="shape"):
        metrics.intersection_over_union(a, b[:2])


@pytest.fixture
def clouds() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    return unit(rng, 3000).astype(np.float32), (0.95 * unit(rng, 2500)).astype(np.float32)


def test_agrees_with_open3d(clouds: tuple[np.ndarray, np.ndarray]) -> None:
    try:
        import open3d as o3d
    except (ImportError, OSError) as error:
        pytest.skip(f"open3d can't be imported: {error}")
    pred, gt = (o3d.t.geometry.PointCloud(o3d.core.Tensor(cloud)) for cloud in clouds)
    kinds = o3d.t.geometry.Metric
    wanted = [kinds.ChamferDistance, kinds.HausdorffDistance, kinds.FScore]
    parameters = o3d.t.geometry.MetricParameters(fscore_radius=[0.06])
    chamfer, hausdorff, f_score = pred.compute_metrics(gt, wanted, parameters).numpy()
    pairs = metrics.correspond(*clouds)
    assert metrics.chamfer_l1(pairs) == pytest.approx(chamfer, rel=1e-5)
    assert metrics.hausdorff(pairs) == pytest.approx(hausdorff, rel=1e-5)
    assert 100 * metrics.f_score(pairs, 0.06) == pytest.approx(f_score, abs=0.1)


def test_agrees_with_pytorch3d(clouds: tuple[np.ndarray, np.ndarray]) -> None:
    loss = pytest.importorskip("pytorch3d.loss")
    import torch

    batch = [torch.from_numpy(cloud)[None] for cloud in clouds]
    pairs = metrics.correspond(*clouds)
    squared, cosine = loss.chamfer_distance(*batch, x_normals=batch[0], y_normals=batch[1] / 0.95)
    assert metrics.chamfer_l2(pairs) == pytest.approx(float(squared), rel=1e-4)
    consistency = metrics.normal_consistency(pairs, clouds[0], clouds[1] / 0.95)
    assert 2 - 2 * consistency == pytest.approx(float(cosine), abs=1e-4)  # theirs: sum of both, 1 - |cos|
