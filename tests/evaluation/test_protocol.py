"""Scores of pairs of meshes against closed forms, and their invariances."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import trimesh

from elastic3d.errors import UserError
from elastic3d.evaluation import evaluate_pair
from elastic3d.evaluation.metrics import inside
from elastic3d.evaluation.options import Align, ProtocolConfig
from elastic3d.evaluation.protocol import failed_scores

QUICK = ProtocolConfig(points=10_000, volume_points=10_000, near_points=2000, views=0, surface_health=False)


def sphere(radius: float = 1.0, subdivisions: int = 4) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions, radius)


def test_equal_meshes_have_the_best_scores() -> None:
    scores = evaluate_pair(sphere(), sphere(), QUICK)
    assert scores.points["chamfer_l1"] == scores.points["chamfer_l2"] == 0
    assert scores.points["f_score@0.005"] == 1
    assert scores.points["normal_consistency"] == pytest.approx(1, abs=1e-6)
    assert (scores.volume_iou, scores.near_iou) == (1, 1)
    assert scores.health.watertight


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_concentric_spheres_have_the_closed_form(scale: float) -> None:
    """Radius 0.8 in radius 1: 0.2 apart everywhere, 0.8^3 of the volume, in any unit."""
    scores = evaluate_pair(sphere(0.8 * scale, 5), sphere(scale, 5), QUICK)
    assert scores.points["chamfer_l1"] == pytest.approx(0.4, abs=0.004)
    assert scores.points["chamfer_l2"] == pytest.approx(0.08, abs=0.002)
    assert scores.points["f_score@0.05"] == 0
    assert scores.points["normal_consistency"] == pytest.approx(1, abs=0.01)
    assert scores.volume_iou == pytest.approx(0.8**3, abs=0.015)


def test_cubes_have_the_closed_form() -> None:
    """A cube moved by half its side shares half of it: IoU 1/3, though it leaves the box."""
    gt = trimesh.creation.box((1, 1, 1))
    moved = gt.copy().apply_translation([0.5, 0, 0])
    scores = evaluate_pair(moved, gt, QUICK)
    assert scores.volume_iou == pytest.approx(1 / 3, abs=0.02)


def test_parallel_plates_have_the_closed_form() -> None:
    """A plate of side 2 lifted by 0.3: every point is 0.3 from the other plate, normals agree."""
    plate = trimesh.Trimesh([[-1, 0, -1], [1, 0, -1], [1, 0, 1], [-1, 0, 1]], [[0, 1, 2], [0, 2, 3]])
    scores = evaluate_pair(plate.copy().apply_translation([0, 0.3, 0]), plate, QUICK)
    assert scores.points["chamfer_l1"] == pytest.approx(0.6, abs=1e-3)
    assert scores.points["chamfer_l2"] == pytest.approx(0.18, abs=1e-3)
    assert (scores.points["normal_consistency"], scores.volume_iou) == (pytest.approx(1), None)


def test_torus_inside_test_has_the_right_volume() -> None:
    torus = trimesh.creation.torus(0.7, 0.25, 96, 48)
    points = np.random.default_rng(0).uniform(-1, 1, (50_000, 3))
    ring = np.hypot(np.hypot(points[:, 0], points[:, 1]) - 0.7, points[:, 2])
    clear = np.abs(ring - 0.25) > 0.005
    assert (inside(torus, points) == (ring < 0.25))[clear].all()


def test_inside_is_the_same_for_inverted_winding_and_empty_in_a_cavity() -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (2000, 3))
    radius = np.linalg.norm(points, axis=1)
    inverted = sphere(0.9)
    inverted.invert()
    assert (inside(inverted, points) == inside(sphere(0.9), points)).all()
    hole = sphere(0.5)
    hole.invert()
    shell = trimesh.util.concatenate([sphere(0.9), hole])
    assert not inside(shell, points)[radius < 0.49].any()
    assert inside(shell, points)[(radius > 0.51) & (radius < 0.88)].all()


@pytest.mark.parametrize("inner", [None, 0.5])
def test_faces_that_run_the_wrong_way_around_change_no_iou(inner: float | None) -> None:
    whole = sphere()
    if inner:
        cavity = sphere(inner)
        cavity.invert()
        whole = trimesh.util.concatenate([whole, cavity])
    flipped = whole.faces.copy()
    cap = whole.triangles_center[:, 1] > 0.3
    flipped[cap] = flipped[cap, ::-1]
    mixed = trimesh.Trimesh(whole.vertices, flipped, process=False)
    for pair in ((mixed, whole), (whole, mixed)):
        scores = evaluate_pair(*pair, QUICK)
        assert (scores.volume_iou, scores.near_iou) == (1, 1)
    assert failed_scores(mixed, QUICK)["volume_iou"] == 0


def test_a_closed_surface_with_one_side_has_no_iou() -> None:
    """A Klein bottle: a grid whose ends are joined the other way around."""
    count = 12
    u, v = np.meshgrid(np.arange(count), np.arange(count), indexing="ij")
    a, b = 2 * np.pi * u / count, 2 * np.pi * v / count
    ring = 2 + np.cos(a / 2) * np.sin(b) - np.sin(a / 2) * np.sin(2 * b)
    height = np.sin(a / 2) * np.sin(b) + np.cos(a / 2) * np.sin(2 * b)
    vertices = np.stack([ring * np.cos(a), ring * np.sin(a), height], axis=-1).reshape(-1, 3)

    def place(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return (i % count) * count + np.where(i < count, j, -j) % count

    corners = place(u, v), place(u + 1, v), place(u + 1, v + 1), place(u, v + 1)
    faces = np.concatenate(
        [
            np.stack([corners[k] for k in triangle], axis=-1).reshape(-1, 3)
            for triangle in ((0, 1, 2), (0, 2, 3))
        ]
    )
    bottle = trimesh.Trimesh(vertices, faces, process=False)
    scores = evaluate_pair(bottle, sphere(), QUICK)
    assert scores.health.watertight and scores.volume_iou is None and scores.near_iou is None
    assert "volume_iou" not in failed_scores(bottle, QUICK)


@pytest.mark.parametrize("far", [2.1, 150, 1e6])
def test_solids_that_are_apart_score_0_however_far(far: float) -> None:
    scores = evaluate_pair(sphere().apply_translation([far] * 3), sphere(), QUICK)
    assert (scores.volume_iou, scores.near_iou) == (0, 0)
    few = replace(QUICK, volume_points=1)
    corner = sphere().apply_translation([1.9] * 3)  # boxes overlap, and the one query is in neither
    assert evaluate_pair(corner, sphere(), few).volume_iou is None


def test_tessellation_and_vertex_order_do_not_matter() -> None:
    """The same surface cut into other triangles scores as two samples of one surface do."""
    box, other = trimesh.creation.box((1, 2, 1.5)), sphere(0.9)
    fine = box.subdivide().subdivide()
    order = np.random.default_rng(0).permutation(len(fine.vertices))
    shuffled = trimesh.Trimesh(fine.vertices[order], np.argsort(order)[fine.faces][::-1], process=False)
    for one, two in ((box, fine), (fine, shuffled)):
        a, b = evaluate_pair(one, other, QUICK).flat(), evaluate_pair(two, other, QUICK).flat()
        for key in ("chamfer_l1", "chamfer_l2", "f_score@0.05", "normal_consistency"):
            assert a[key] == pytest.approx(b[key], abs=0.004), key
        assert a["volume_iou"] == pytest.approx(b["volume_iou"], abs=1e-9)
    spacing = evaluate_pair(fine, box, QUICK).points["chamfer_l1"]
    assert spacing < 0.04  # 20,000 points on this surface lie about 0.015 apart


def test_scale_and_position_of_the_pair_do_not_matter() -> None:
    pred, gt = trimesh.creation.box((1, 0.8, 0.9)), sphere(0.6)
    first = evaluate_pair(pred, gt, QUICK).flat()
    for mesh in (pred, gt):
        mesh.apply_scale(37).apply_translation([100, -50, 3])
    second = evaluate_pair(pred, gt, QUICK).flat()
    for key, value in first.items():
        assert second[key] == pytest.approx(value, abs=1e-3), key


def test_open_meshes_have_no_iou_and_say_so() -> None:
    half = sphere()
    half.update_faces(half.triangles_center[:, 1] > 0)
    for pred, gt in ((half, sphere()), (sphere(), half)):
        scores = evaluate_pair(pred, gt, QUICK)
        assert scores.volume_iou is None
        assert scores.near_iou is None
    assert evaluate_pair(sphere(), sphere(), ProtocolConfig(points=100, volume_points=0)).volume_iou is None


def test_quads_that_collapse_at_the_poles_are_no_holes() -> None:
    """As many programs write a sphere: the rows at the poles have a vertex for each column, all at one place."""
    rows, columns = 16, 24
    polar, around = np.meshgrid(
        np.linspace(0, np.pi, rows), np.linspace(0, 2 * np.pi, columns + 1), indexing="ij"
    )
    grid = np.stack([np.sin(polar) * np.cos(around), np.cos(polar), np.sin(polar) * np.sin(around)], axis=-1)
    first = (np.arange(rows - 1)[:, None] * (columns + 1) + np.arange(columns)).ravel()
    corners = np.stack([first, first + 1, first + columns + 2, first + columns + 1], axis=1)
    poles = grid.round(12) + 0.0
    poles[:, -1] = poles[:, 0]
    mesh = trimesh.Trimesh(
        poles.reshape(-1, 3), np.concatenate([corners[:, :3], corners[:, [0, 2, 3]]]), process=False
    )
    scores = evaluate_pair(mesh, sphere(), replace(QUICK, surface_health=True))
    assert scores.volume_iou is not None and scores.volume_iou > 0.9
    assert (scores.health.watertight, scores.health.genus) == (True, 0)
    assert scores.surface is not None and scores.surface.manifold
    assert scores.health.degenerate_share == pytest.approx(2 * columns / len(mesh.faces))


def test_scores_are_deterministic_and_follow_the_seed() -> None:
    pred = sphere(0.9)
    assert evaluate_pair(pred, sphere(), QUICK) == evaluate_pair(pred, sphere(), QUICK)
    other = replace(QUICK, seed=1)
    assert evaluate_pair(pred, sphere(), other) != evaluate_pair(pred, sphere(), QUICK)


def test_views_and_surface_health_are_part_of_the_row() -> None:
    protocol = ProtocolConfig(points=100, volume_points=0, near_points=0, view_size=64)
    row = evaluate_pair(sphere(0.7), sphere(), protocol).flat()
    assert 0.4 < row["silhouette_iou"] < 0.55
    assert row["self_intersection_share"] == row["inverted_share"] == row["floaters"] == 0
    failed = failed_scores(sphere(), protocol)
    assert failed["silhouette_iou"] == 0
    assert failed["normal_psnr"] < row["normal_psnr"]
    assert failed["normal_ssim"] < row["normal_ssim"]


@pytest.mark.parametrize(("how", "chamfer"), [(Align.none, 2.0), (Align.bbox, 0.0), (Align.icp, 0.0)])
def test_alignment_is_part_of_the_protocol(how: Align, chamfer: float) -> None:
    gt = trimesh.creation.box((1, 2, 1.5))
    pred = gt.copy().apply_scale(0.1).apply_translation([1, 1, 1])
    protocol = ProtocolConfig(points=3000, volume_points=0, views=0, surface_health=False, align=how)
    assert evaluate_pair(pred, gt, protocol).points["chamfer_l1"] == pytest.approx(
        chamfer, abs=1.0 if chamfer else 0.06
    )


def test_the_meshes_are_not_changed() -> None:
    pred, gt = sphere(0.9), sphere(2)
    before = pred.vertices.copy(), gt.vertices.copy()
    evaluate_pair(pred, gt, QUICK)
    assert (pred.vertices == before[0]).all()
    assert (gt.vertices == before[1]).all()


def test_a_failure_scores_as_a_point_in_the_centre() -> None:
    scores = failed_scores(sphere(3.0, 5), QUICK)
    assert scores["chamfer_l1"] == pytest.approx(2, abs=0.01)
    assert scores["chamfer_l2"] == pytest.approx(2, abs=0.01)
    assert scores["f_score@0.02"] == scores["normal_consistency"] == scores["volume_iou"] == 0
    row = evaluate_pair(sphere(0.5), sphere(), QUICK).flat()
    assert scores.keys() <= row.keys()


def nan_sphere() -> trimesh.Trimesh:
    mesh = sphere()
    mesh.vertices[3] = np.nan
    return mesh


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (trimesh.Trimesh(), "no faces"),
        (nan_sphere(), "not finite"),
        (trimesh.Trimesh(np.zeros((3, 3)), [[0, 1, 2]], process=False), "no surface area"),
        (trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False), "no surface area"),
        (sphere(1, 6), "81,920 faces, expected at most max_faces=80,000"),
    ],
)
def test_meshes_that_cannot_be_scored_raise(bad: trimesh.Trimesh, message: str) -> None:
    protocol = ProtocolConfig(points=100, max_faces=80_000)
    with pytest.raises(UserError, match=f"the prediction.*{message}"):
        evaluate_pair(bad, sphere(), protocol)
    with pytest.raises(UserError, match=f"the ground truth.*{message}"):
        evaluate_pair(sphere(), bad, protocol)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 0}, "points is 0"),
        ({"near_sigma": float("nan")}, "near_sigma is nan"),
        ({"thresholds": []}, "thresholds has 0 values"),
        ({"thresholds": [0.0]}, "thresholds has 0.0"),
    ],
)
def test_bad_protocols_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProtocolConfig(**options)


def test_a_pair_is_fast() -> None:
    """The promise for 20,480 faces each, everything included, is 3 s of wall time on 2 idle cores."""
    gt = sphere(1, 5)
    pred = gt.copy()
    pred.vertices *= 1 + 0.01 * np.random.default_rng(0).standard_normal((len(gt.vertices), 1))
    start = time.process_time()
    evaluate_pair(pred, gt)
    assert time.process_time() - start < 6  # of CPU time, which other jobs on the machine hardly change
