"""What is stored of a shape."""

import io

import numpy as np
import pytest
import trimesh
from PIL import Image

from elastic3d.preparation.options import ShapeConfig
from elastic3d.preparation.shape import RawShape, item_seed, prepare_shape

SMALL = ShapeConfig(
    resolution=48,
    surface_points=500,
    sharp_points=200,
    near_points=400,
    volume_points=300,
    views=3,
    view_size=32,
)


def raw(mesh: trimesh.Trimesh) -> RawShape:
    return RawShape(mesh, np.arange(len(mesh.faces)) % 2)


def test_arrays_of_a_shape() -> None:
    arrays = prepare_shape(raw(trimesh.creation.box((3, 2, 1))), SMALL, seed=5, keep_solid=True)
    shapes = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
    assert shapes["surface"] == ((500, 6), "float16")
    assert shapes["sharp"] == ((200, 6), "float16")
    assert shapes["near"] == ((400, 4), "float16")
    assert shapes["volume"] == ((300, 4), "float16")
    assert shapes["view_offsets"] == ((4,), "int64")
    assert shapes["cameras"] == ((3, 8), "float32")
    wall = 0.75 * 2.02 / 48
    np.testing.assert_allclose(
        arrays["surface"][:, :3].max(axis=0), np.array([3, 2, 1]) * 0.95 / 3 + wall, atol=0.01
    )
    solid = trimesh.Trimesh(arrays["solid_vertices"], arrays["solid_faces"], process=False)
    assert solid.is_watertight and solid.volume > 0


def test_distances_belong_to_the_stored_points() -> None:
    sphere = trimesh.creation.icosphere(subdivisions=4, radius=7)
    arrays = prepare_shape(raw(sphere), SMALL, seed=0)
    radius = 0.95 + 0.75 * 2.02 / 48
    for name in ("near", "volume"):
        points, distance = arrays[name][:, :3].astype(np.float64), arrays[name][:, 3].astype(np.float64)
        np.testing.assert_allclose(distance, radius - np.linalg.norm(points, axis=1), atol=0.006)
        assert np.abs(points).max() <= 1.01
    assert np.abs(arrays["near"][:, 3]).mean() < 0.03
    assert arrays["sharp"].shape == (0, 6)


def test_views_are_images_of_the_object_alone() -> None:
    arrays = prepare_shape(raw(trimesh.creation.box((3, 2, 1))), SMALL, seed=1)
    data, offsets = arrays["views"].tobytes(), arrays["view_offsets"]
    for index in range(3):
        image = Image.open(io.BytesIO(data[offsets[index] : offsets[index + 1]]))
        assert (image.mode, image.size) == ("RGBA", (32, 32))
        alpha = np.asarray(image)[:, :, 3]
        rows, columns = np.nonzero(alpha > 127)
        assert 0.7 * 32 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 32
    eye, target, fov, elevation = np.split(arrays["cameras"], [3, 6, 7], axis=1)
    assert (fov >= 25).all() and (fov <= 50).all()
    assert (elevation >= -5.1).all() and (elevation <= 45.1).all()
    direction = (eye - target) / np.linalg.norm(eye - target, axis=1, keepdims=True)
    np.testing.assert_allclose(np.degrees(np.arcsin(direction[:, 1])), elevation[:, 0], atol=1e-3)
    assert direction[0, 2] > 0.5, "the first view sees the front"


def test_seed_decides_every_byte() -> None:
    first, again, other = (
        prepare_shape(raw(trimesh.creation.torus(2, 1)), SMALL, seed) for seed in (1, 1, 2)
    )
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    assert not np.array_equal(first["near"], other["near"])


def test_item_seed_is_fixed() -> None:
    assert item_seed("infinigen", "chair-00000", 0) == 3568242644
    assert item_seed("infinigen", "chair-00000", 1) != item_seed("infinigen", "chair-00000", 0)


def test_mesh_without_surface() -> None:
    with pytest.raises(ValueError, match="single point"):
        prepare_shape(raw(trimesh.Trimesh(np.zeros((3, 3)), [[0, 1, 2]], process=False)), SMALL, seed=0)
