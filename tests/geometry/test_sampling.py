"""Surface and sharp-edge samples."""

import numpy as np
import pytest
import trimesh

from elastic3d.geometry.sampling import sample_sharp_edges, sample_surface


def test_points_lie_on_a_box_with_its_normals() -> None:
    points, normals = sample_surface(trimesh.creation.box((2, 2, 2)), 5000, seed=3)
    assert points.dtype == normals.dtype == np.float32
    np.testing.assert_allclose(np.abs(points).max(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.einsum("ij,ij->i", points, normals), 1, atol=1e-6)


def test_uniform_by_area() -> None:
    points, _ = sample_surface(trimesh.creation.box((8, 2, 2)), 20_000, seed=0)
    ends = np.abs(points[:, 0]) > 4 - 1e-5
    assert ends.mean() == pytest.approx(2 * 4 / (2 * 4 + 4 * 16), abs=0.002)


def test_seed_decides() -> None:
    mesh = trimesh.creation.icosphere()
    first, again, other = (sample_surface(mesh, 100, seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_any_prefix_covers_the_surface() -> None:
    points, _ = sample_surface(trimesh.creation.icosphere(subdivisions=4), 4000, seed=0)
    assert np.abs(points[:400].mean(axis=0)).max() < 0.1


def test_degenerate_faces_get_no_point() -> None:
    box = trimesh.creation.box((1, 1, 1))
    mesh = trimesh.Trimesh(box.vertices, np.vstack([[[0, 0, 0]], box.faces, [[1, 1, 2]]]), process=False)
    _, normals = sample_surface(mesh, 1000, seed=0)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="no face with an area"):
        sample_surface(trimesh.Trimesh(box.vertices, [[0, 0, 0]], process=False), 10, seed=0)


def test_sharp_edges_of_a_box() -> None:
    points, normals = sample_sharp_edges(trimesh.creation.box((2, 2, 2)), 2000, seed=0)
    on_faces = np.abs(np.abs(points) - 1) < 1e-6
    assert (on_faces.sum(axis=1) >= 2).all(), "diagonals of flat sides are no edges"
    expected = np.where(on_faces, np.sign(points), 0) / np.sqrt(2)
    np.testing.assert_allclose(normals, expected, atol=1e-6)
    assert len({tuple(row) for row in np.sign(expected)}) == 12, "every edge has points"


def test_no_sharp_edge_gives_none() -> None:
    points, normals = sample_sharp_edges(trimesh.creation.icosphere(subdivisions=3), 50, seed=0)
    assert points.shape == normals.shape == (0, 3)
