"""Placement of meshes in the common frame."""

import numpy as np
import pytest
import trimesh

from elastic3d.geometry.normalize import normalize_mesh, normalize_to


def test_longest_side_and_centre() -> None:
    box = trimesh.creation.box((1, 4, 2))
    box.apply_translation((5, -3, 8))
    mesh, placement = normalize_mesh(box)
    np.testing.assert_allclose(mesh.bounds, [[-0.2375, -0.95, -0.475], [0.2375, 0.95, 0.475]], atol=1e-12)
    np.testing.assert_allclose(placement.invert().apply(mesh).vertices, box.vertices, atol=1e-12)


def test_unused_vertices_do_not_count() -> None:
    box = trimesh.creation.box((2, 2, 2))
    loose = trimesh.Trimesh(np.vstack([box.vertices, [[99, 99, 99]]]), box.faces, process=False)
    np.testing.assert_allclose(np.abs(normalize_mesh(loose)[0].vertices[:8]), 0.95)


def test_normalize_to_moves_all_alike() -> None:
    reference, other = trimesh.creation.box((2, 2, 4)), trimesh.creation.box((1, 1, 1))
    first, second = normalize_to(reference, other)
    assert first.extents.max() == pytest.approx(2)
    np.testing.assert_allclose(second.extents, 0.5)


@pytest.mark.parametrize(
    ("vertices", "faces", "message"),
    [
        (np.zeros((3, 3)), np.zeros((0, 3), int), "no faces"),
        (np.ones((3, 3)), [[0, 1, 2]], "single point"),
        (np.full((3, 3), np.nan), [[0, 1, 2]], "not finite"),
    ],
)
def test_unusable_mesh(vertices: np.ndarray, faces: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalize_mesh(trimesh.Trimesh(vertices, faces, process=False))
