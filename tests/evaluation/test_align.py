"""Alignment undoes what was done to a copy."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from trimesh.transformations import random_rotation_matrix, rotation_matrix

from elastic3d.evaluation.align import align, cube_rotations, similarity, turn_up
from elastic3d.evaluation.options import Align, UpAxis
from elastic3d.geometry.normalize import placement_of


def chair() -> trimesh.Trimesh:
    parts = [trimesh.creation.box((1, 0.1, 1)), trimesh.creation.box((1, 1.2, 0.1))]
    parts[1].apply_translation([0, 0.6, -0.45])
    leg = trimesh.creation.box((0.1, 0.9, 0.1)).apply_translation([0.4, -0.45, 0.4])
    return trimesh.util.concatenate([*parts, leg])


def test_none_changes_nothing() -> None:
    mesh = chair()
    assert align(mesh, trimesh.creation.box(), Align.none) is mesh


def test_z_up_is_turned_to_y_up() -> None:
    gt = chair()
    z_up = trimesh.Trimesh(np.asarray(gt.vertices)[:, [0, 2, 1]] * [1, -1, 1], gt.faces)
    assert turn_up(z_up, UpAxis.z).vertices == pytest.approx(gt.vertices)
    assert turn_up(gt, UpAxis.y) is gt
    assert turn_up(trimesh.creation.box(), UpAxis.z).volume > 0  # no reflection


def test_bbox_matches_units_and_position() -> None:
    gt = chair()
    pred = gt.copy().apply_scale(1000).apply_translation([3, -4, 5])
    assert align(pred, gt, Align.bbox).vertices == pytest.approx(gt.vertices, abs=1e-9)


def test_bbox_keeps_the_proportions() -> None:
    aligned = align(trimesh.creation.box((4, 2, 1)), trimesh.creation.box((1, 1, 8)), Align.bbox)
    assert aligned.extents == pytest.approx([8, 4, 2])


def test_there_are_24_cube_rotations_and_the_identity_is_the_first() -> None:
    rotations = cube_rotations()
    assert len({m.tobytes() for m in rotations}) == 24
    assert (rotations[0] == np.eye(4)).all()
    assert all(m[1, 1] == 1 for m in rotations[:4])
    assert all(np.linalg.det(m) == pytest.approx(1) for m in rotations)


def test_similarity_is_exact_for_known_pairs() -> None:
    rng = np.random.default_rng(0)
    points = rng.standard_normal((50, 3))
    truth = random_rotation_matrix(rng.random(3))
    truth[:3, :3] *= 2.5
    truth[:3, 3] = [1, 2, 3]
    found = similarity(points, points @ truth[:3, :3].T + truth[:3, 3])
    assert found == pytest.approx(truth)
    assert np.linalg.det(similarity(points, points * [1, 1, -1])[:3, :3]) > 0  # no reflection
    with pytest.raises(ValueError, match="all points coincide"):
        similarity(np.ones((50, 3)), points)


@pytest.mark.parametrize(
    ("degrees", "axis"),
    [(0, (0, 1, 0)), (90, (1, 0, 0)), (180, (0, 1, 0)), (25, (1, 2, 3)), (130, (-3, 1, 2))],
)
def test_icp_undoes_rotation_scale_and_shift(degrees: float, axis: tuple[int, int, int]) -> None:
    gt = chair()
    pred = gt.copy().apply_transform(rotation_matrix(np.radians(degrees), axis))
    pred.apply_scale(0.01).apply_translation([1, 2, 3])
    assert align(pred, gt, Align.icp).vertices == pytest.approx(gt.vertices, abs=0.01)


def test_icp_is_as_exact_far_from_the_origin() -> None:
    """As in map coordinates, where single precision has steps of a metre."""
    gt = chair()
    far = [5e6, 2e2, -4e7]
    pred = gt.copy().apply_transform(rotation_matrix(np.radians(25), (1, 2, 3))).apply_translation(far)
    aligned = align(pred, gt, Align.icp)
    assert aligned.vertices == pytest.approx(gt.vertices, abs=0.01)
    there = align(gt, gt.copy().apply_translation(far), Align.icp)
    assert there.vertices - far == pytest.approx(gt.vertices, abs=0.01)


def test_icp_leaves_a_symmetric_shape_in_its_pose() -> None:
    box = trimesh.creation.box((2, 2, 2)).subdivide()
    first = align(box, box, Align.icp).vertices
    assert first == pytest.approx(box.vertices, abs=0.01)
    assert (align(box, box, Align.icp).vertices == first).all()  # deterministic


def test_icp_does_not_depend_on_the_units() -> None:
    gt, pred = chair(), trimesh.creation.box((1, 2, 1.2))
    once = align(pred, gt, Align.icp)
    big = align(pred, gt.copy().apply_scale(100), Align.icp)
    assert big.vertices == pytest.approx(100 * once.vertices, rel=1e-3, abs=0.5)
    assert placement_of(once, 1.0).scale == pytest.approx(100 * placement_of(big, 1.0).scale, rel=1e-3)
