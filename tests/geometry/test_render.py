"""Camera conventions, silhouettes, depth, normals and colours of rendered views."""

import numpy as np
import pytest
import trimesh

from elastic3d.geometry.render import Camera, Light, Scene, orbit_camera, ring_cameras

FLAT = Light(ambient=1.0, diffuse=0.0, specular=0.0, shadows=False)


def blob(at: tuple[float, float, float]) -> trimesh.Trimesh:
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=0.1)
    mesh.apply_translation(at)
    return mesh


def centre(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(rows.mean()), float(columns.mean())


def test_sphere_silhouette_and_depth() -> None:
    distance, radius, fov, size = 3.0, 0.8, 50.0, 200
    sphere = trimesh.creation.icosphere(subdivisions=5, radius=radius)
    views = Scene(sphere).render(orbit_camera(30, 20, distance, fov), size)
    seen = np.tan(np.arcsin(radius / distance)) / np.tan(np.radians(fov / 2)) * size / 2  # radius in pixels
    assert views.silhouette.sum() == pytest.approx(np.pi * seen**2, rel=0.01)
    assert centre(views.silhouette) == pytest.approx((size / 2 - 0.5, size / 2 - 0.5), abs=0.1)
    assert views.depth[size // 2, size // 2] == pytest.approx(distance - radius, abs=2e-3)
    assert np.isinf(views.depth[0, 0])
    covered = views.colour[:, :, 3].astype(float).sum() / 255
    assert covered == pytest.approx(np.pi * seen**2, rel=0.003), "antialiased alpha is the covered area"


def test_depth_is_along_the_axis_of_view() -> None:
    wall = trimesh.creation.box((4, 4, 0.2))
    depth = Scene(wall).render(orbit_camera(0, 0, 3, 60), 64).depth
    np.testing.assert_allclose(depth, 2.9, atol=1e-4)


def test_front_camera_sees_x_on_the_right_and_y_on_top() -> None:
    camera = ring_cameras(4, 0, 3, 40)[0]
    np.testing.assert_allclose(camera.eye, (0, 0, 3), atol=1e-9)
    row, column = centre(Scene(blob((0.5, 0, 0))).render(camera, 100).silhouette)
    assert column > 60 and row == pytest.approx(49.5, abs=0.5)
    row, column = centre(Scene(blob((0, 0.5, 0))).render(camera, 100).silhouette)
    assert row < 40 and column == pytest.approx(49.5, abs=0.5)


def test_an_arrow_to_the_front_turns_with_azimuth() -> None:
    """What points at +Z is nearest at azimuth 0, on the left seen from +X (azimuth 90), hidden behind at 180."""
    arrow = trimesh.creation.cone(0.2, 0.8)  # along +Z
    front, side, back = (
        Scene(arrow).render(orbit_camera(azimuth, 0, 4, 40), 101) for azimuth in (0, 90, 180)
    )
    assert front.depth.min() == pytest.approx(3.2, abs=0.02)
    assert back.depth.min() == pytest.approx(4.0, abs=0.02)
    assert centre(side.silhouette)[1] < 45


def test_project_agrees_with_the_image() -> None:
    point = np.array([[0.4, -0.3, 0.2]])
    camera = Camera(eye=(1.5, 2.0, 2.5), target=(0.1, 0.0, 0.0), fov_deg=45)
    row, column = centre(Scene(blob((0.4, -0.3, 0.2))).render(camera, 300).silhouette)
    x, y = camera.project(point)[0]
    assert ((x + 1) * 150 - 0.5, (1 - y) * 150 - 0.5) == pytest.approx((column, row), abs=1)


def test_normals_face_the_camera_in_the_frame_of_the_object() -> None:
    box = trimesh.creation.box((1, 1, 1))
    box.invert()
    normal = Scene(box).render(orbit_camera(90, 0, 3, 40), 33).normal
    np.testing.assert_allclose(normal[16, 16], (1, 0, 0), atol=1e-5)
    np.testing.assert_array_equal(normal[0, 0], 0)


def test_smooth_shading_keeps_creases() -> None:
    box, ball = trimesh.creation.box((1, 1, 1)), trimesh.creation.icosphere(subdivisions=2)
    corner = Scene(box, smooth=True).render(orbit_camera(40, 30, 3, 40), 64)
    shown = np.abs(corner.normal[corner.silhouette])
    np.testing.assert_allclose(shown.max(axis=1), 1, atol=1e-5)
    smooth = Scene(ball, smooth=True).render(orbit_camera(0, 0, 4, 40), 64)
    flat = Scene(ball, smooth=False).render(orbit_camera(0, 0, 4, 40), 64)
    assert len(np.unique(smooth.normal.reshape(-1, 3), axis=0)) > 4 * len(
        np.unique(flat.normal.reshape(-1, 3), axis=0)
    )


def test_colours_and_transparent_background() -> None:
    box = trimesh.creation.box((1, 1, 1))
    colours = np.tile(np.array([[200, 100, 50]], np.uint8), (len(box.faces), 1))
    views = Scene(box, colours).render(
        orbit_camera(0, 0, 4, 40), 65, light=Light(ambient=1 / 0.75, diffuse=0, specular=0)
    )
    np.testing.assert_array_equal(views.colour[32, 32], (200, 100, 50, 255))
    np.testing.assert_array_equal(views.colour[0, 0], (0, 0, 0, 0))


def test_shadow_darkens_what_lies_below() -> None:
    floor, roof = trimesh.creation.box((2, 0.05, 2)), trimesh.creation.box((2, 0.05, 2))
    roof.apply_translation((0, 1, 0))
    both, camera = trimesh.util.concatenate([floor, roof]), orbit_camera(0, 10, 6, 40)
    light = {"direction": (0.0, 1.0, 0.1), "ambient": 0.2, "diffuse": 0.8}
    lit, dark = (
        Scene(both).render(camera, 80, light=Light(**light, shadows=on)).colour for on in (False, True)
    )
    assert lit[lit[:, :, 3] == 255].mean() > dark[dark[:, :, 3] == 255].mean() + 10


def test_same_call_same_pixels() -> None:
    mesh, camera = trimesh.creation.torus(0.6, 0.2), orbit_camera(25, 25, 3, 40)
    np.testing.assert_array_equal(
        Scene(mesh).render(camera, 50).colour, Scene(mesh).render(camera, 50).colour
    )


def test_wrong_arguments() -> None:
    box = trimesh.creation.box((1, 1, 1))
    with pytest.raises(ValueError, match="no direction of view"):
        Scene(box).render(Camera(eye=(0, 3, 0)), 10)
    with pytest.raises(ValueError, match="no faces"):
        Scene(trimesh.Trimesh())
    with pytest.raises(ValueError, match=r"expected \(12, 3\)"):
        Scene(box, np.zeros((3, 3), np.uint8))
    with pytest.raises(ValueError, match="size is 0"):
        Scene(box).render(orbit_camera(0, 0, 3, 40), 0)
    with pytest.raises(ValueError, match="count is 0"):
        ring_cameras(0, 0, 3, 40)
