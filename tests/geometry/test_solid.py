"""The solid of open, closed and thin meshes."""

import numpy as np
import pytest
import trimesh

from elastic3d.geometry.options import BOX
from elastic3d.geometry.solid import THICKNESS, signed_distance, solidify

RESOLUTION = 64
VOXEL = 2 * BOX / RESOLUTION
WALL = THICKNESS * VOXEL


def uniform(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (count, 3))


def test_sphere_has_the_right_signed_distance() -> None:
    solid = solidify(trimesh.creation.icosphere(subdivisions=4, radius=0.6), RESOLUTION)
    points = uniform(2000)
    expected = 0.6 + WALL - np.linalg.norm(points, axis=1)
    np.testing.assert_allclose(signed_distance(solid, points), expected, atol=0.1 * VOXEL)
    assert solid.is_watertight
    assert solid.volume == pytest.approx(4 / 3 * np.pi * (0.6 + WALL) ** 3, rel=0.01)


def test_distance_is_that_of_the_nearest_triangle() -> None:
    solid = solidify(trimesh.creation.torus(0.5, 0.2), RESOLUTION)
    points = uniform(60)
    closest, _, _ = trimesh.proximity.closest_point_naive(solid, points)
    slow = np.linalg.norm(points - closest, axis=1)
    np.testing.assert_allclose(np.abs(signed_distance(solid, points)), slow, atol=1e-6)
    inside = solid.contains(points)
    np.testing.assert_array_equal(signed_distance(solid, points) > 0, inside)


def test_sheet_becomes_a_plate_without_holes() -> None:
    sheet = trimesh.Trimesh(
        [[-0.8, 0.01, -0.8], [0.8, 0.3, -0.8], [0.8, 0.3, 0.8], [-0.8, 0.01, 0.8]], [[0, 1, 2], [0, 2, 3]]
    )
    solid = solidify(sheet, RESOLUTION)
    assert solid.is_watertight
    assert solid.body_count == 1
    assert solid.euler_number == 2, "no hole"
    inner, _ = trimesh.sample.sample_surface(sheet, 500, seed=0)
    np.testing.assert_allclose(
        signed_distance(solid, 0.9 * inner + 0.1 * sheet.centroid), WALL, atol=0.15 * VOXEL
    )


def test_wire_is_not_broken() -> None:
    wire = trimesh.creation.cylinder(0.002, segment=[[-0.7, -0.51, 0.3], [0.8, 0.62, -0.4]], sections=8)
    assert solidify(wire, RESOLUTION).body_count == 1


def test_open_box_is_hollow_and_closed_box_is_not() -> None:
    box = trimesh.creation.box((1.2, 1.2, 1.2)).subdivide()
    closed, centre = solidify(box, RESOLUTION), np.zeros((1, 3))
    assert signed_distance(closed, centre)[0] > 0.5
    top = box.face_normals[:, 1] > 0.9
    opened = solidify(trimesh.Trimesh(box.vertices, box.faces[~top]), RESOLUTION)
    assert signed_distance(opened, centre)[0] < 0
    assert opened.is_watertight


def test_hidden_interior_vanishes_and_winding_does_not_matter() -> None:
    outer, inner = trimesh.creation.icosphere(3, 0.7), trimesh.creation.box((0.3, 0.3, 0.3))
    inner.invert()
    both = solidify(trimesh.util.concatenate([outer, inner]), RESOLUTION)
    alone = solidify(outer, RESOLUTION)
    assert both.volume == pytest.approx(alone.volume, rel=1e-3)
    outer.invert()
    assert solidify(outer, RESOLUTION).volume == pytest.approx(alone.volume, rel=1e-6)


def test_mesh_must_fit_the_box() -> None:
    with pytest.raises(ValueError, match=r"reaches 2\.000"):
        solidify(trimesh.creation.box((4, 1, 1)), RESOLUTION)
