import numpy as np
import pytest
import trimesh

from elastic3d.errors import UserError
from elastic3d.geometry.normalize import scale_to, with_up


def figure() -> trimesh.Trimesh:
    """Two boxes: tall along Y, with a nose towards +Z."""
    body = trimesh.creation.box(bounds=[[-1, 0, -1], [1, 4, 1]])
    return trimesh.util.concatenate([body, trimesh.creation.box(bounds=[[-0.1, 3, 1], [0.1, 3.2, 2]])])


def test_up() -> None:
    mesh = figure()
    turned = with_up(mesh, "z")
    np.testing.assert_allclose(turned.bounds, [[-1, -2, 0], [1, 1, 4]])
    assert turned.volume == pytest.approx(mesh.volume)
    np.testing.assert_allclose(turned.vertex_normals, mesh.vertex_normals[:, [0, 2, 1]] * [1, -1, 1])
    assert with_up(mesh, "y") is mesh
    with pytest.raises(UserError, match="up=x, expected y or z"):
        with_up(mesh, "x")


def test_size_in_the_unit_of_the_file() -> None:
    mesh = figure()
    mesh.visual = trimesh.visual.TextureVisuals(uv=np.random.default_rng(0).random((len(mesh.vertices), 2)))
    for suffix, longest in (
        (".stl", 120.0),
        (".STL", 120.0),
        (".obj", 120.0),
        (".ply", 120.0),
        (".glb", 0.12),
    ):
        scaled = scale_to(mesh, 120, suffix)
        assert scaled.extents.max() == pytest.approx(longest)
        np.testing.assert_allclose(scaled.extents / scaled.extents.max(), mesh.extents / mesh.extents.max())
        np.testing.assert_array_equal(scaled.visual.uv, mesh.visual.uv)
    for size in (0, -3, float("nan"), 1e9):
        with pytest.raises(UserError, match="size_mm="):
            scale_to(mesh, size, ".stl")
    with pytest.raises(ValueError, match="no extent"):
        scale_to(trimesh.Trimesh(), 10, ".stl")
