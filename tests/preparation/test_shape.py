"""What is stored of a shape."""

import io

import numpy as np
import pytest
import trimesh
from PIL import Image

from elastic3d.geometry.render import Camera, orbit_camera
from elastic3d.preparation.options import ShapeConfig
from elastic3d.preparation.shape import RawShape, item_seed, prepare_shape, random_lights, view_cameras

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
    eye, target, _, elevation = np.split(arrays["cameras"], [3, 6, 7], axis=1)
    direction = (eye - target) / np.linalg.norm(eye - target, axis=1, keepdims=True)
    np.testing.assert_allclose(np.degrees(np.arcsin(direction[:, 1])), elevation[:, 0], atol=1e-3)
    assert direction[0, 2] > 0.5, "the first view sees the front"


def test_cameras_reach_their_limits_and_stay_within() -> None:
    generator, box = np.random.default_rng(0), trimesh.creation.box((1, 1, 1))
    drawn = [view_cameras(box, 12, generator) for _ in range(100)]

    def elevation(camera: Camera) -> float:
        x, y, z = np.subtract(camera.eye, camera.target)
        return float(np.degrees(np.arctan2(y, np.hypot(x, z))))

    def azimuth(camera: Camera) -> float:
        x, _, z = np.subtract(camera.eye, camera.target)
        return abs(float(np.degrees(np.arctan2(x, z))))

    others = [camera for cameras in drawn for camera in cameras[1:]]
    fov = np.array([camera.fov_deg for cameras in drawn for camera in cameras])
    assert_spans(fov, 15, 65)
    assert 0.8 < ((fov >= 25) & (fov <= 50)).mean() < 0.95
    assert_spans(np.array(list(map(elevation, others))), -10, 60)
    assert_spans(np.array([elevation(cameras[0]) for cameras in drawn]), 10, 30)
    assert_spans(np.array([azimuth(cameras[0]) for cameras in drawn]), 20, 50)
    for cameras in drawn:
        assert sum(azimuth(camera) < 90 for camera in cameras) == 8


def test_one_to_three_lights_that_share_their_strength() -> None:
    generator, camera = np.random.default_rng(0), orbit_camera(30.0, 20.0, 4.0, 40.0)
    drawn = [random_lights(camera, generator) for _ in range(2000)]
    counts = np.bincount([len(lights) for lights in drawn], minlength=4) / len(drawn)
    np.testing.assert_allclose(counts, [0, 0.5, 0.3, 0.2], atol=0.04)
    ambient = np.array([lights[0].ambient for lights in drawn])
    assert_spans(ambient, 0.3, 0.65)
    strength = np.array([sum(light.diffuse for light in lights) for lights in drawn])
    assert_spans(ambient + strength, 0.9, 1.25)
    for lights in drawn:
        diffuse = [light.diffuse for light in lights]
        assert diffuse == sorted(diffuse, reverse=True) and diffuse[-1] > 0
        assert all(light.ambient == 0 for light in lights[1:])
        for light, lowest in zip(lights, (0.35, -0.1, -0.1), strict=False):
            assert lowest <= light.direction[1] <= 0.95
            np.testing.assert_allclose(np.linalg.norm(light.direction), 1)
    specular = np.array([sum(light.specular for light in lights) for lights in drawn])
    assert specular.min() >= 0 and specular.max() <= 0.3**1.5
    assert 0.65 < np.mean([light.shadows for lights in drawn for light in lights]) < 0.75


def assert_spans(values: np.ndarray, low: float, high: float) -> None:
    """All within the limits, and both nearly reached."""
    near = 0.05 * (high - low)
    assert low - 1e-4 <= values.min() < low + near and high - near < values.max() <= high + 1e-4


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
