"""View metrics against closed forms and scikit-image."""

from __future__ import annotations

import time

import numpy as np
import pytest
import trimesh

from elastic3d.evaluation.views import (
    DISTANCE,
    FOV_DEG,
    PSNR_CAP,
    RINGS,
    compare_views,
    fixed_cameras,
    psnr,
    sharp_edges,
    silhouette_iou,
    ssim,
)
from elastic3d.geometry.render import Camera, Scene, Views
from tests.benchmark.test_image_scores import slow_ssim

FRONT = Camera(eye=(0.0, 0.0, DISTANCE), fov_deg=FOV_DEG)


def ring_views(mesh: trimesh.Trimesh, count: int, size: int, shaded: bool) -> list[Views]:
    scene = Scene(mesh, smooth=False)
    return [scene.render(camera, size, shaded=shaded) for camera in fixed_cameras(count)]


def sphere(radius: float = 1.0, subdivisions: int = 4) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions, radius)


@pytest.mark.parametrize("count", RINGS)
def test_rings_have_their_number_of_distinct_cameras(count: int) -> None:
    eyes = {tuple(np.round(camera.eye, 6)) for camera in fixed_cameras(count)}
    assert len(eyes) == count
    assert np.linalg.norm(list(eyes), axis=1) == pytest.approx(DISTANCE)


@pytest.mark.parametrize("shaded", [True, False])
def test_ring_views_are_whole_and_deterministic(shaded: bool) -> None:
    first, second = (ring_views(trimesh.creation.box((2, 1, 1)), 4, 48, shaded) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert (one.silhouette == np.isfinite(one.depth)).all()
        assert np.linalg.norm(one.normal[one.silhouette], axis=-1) == pytest.approx(1, abs=1e-5)
        assert (one.colour[..., 3] > 0).any() == shaded
        assert all(
            (getattr(one, k) == getattr(two, k)).all() for k in ("silhouette", "depth", "normal", "colour")
        )
    assert first[0].silhouette.sum() > first[1].silhouette.sum()  # the long side is seen from the front


def test_other_numbers_of_views_raise() -> None:
    with pytest.raises(ValueError, match="views is 5, expected one of 4, 8, 22"):
        fixed_cameras(5)


def test_the_sphere_around_the_cube_fits_into_the_image() -> None:
    silhouette = Scene(sphere(np.sqrt(3))).render(FRONT, 128).silhouette
    assert silhouette[:, [0, -1]].sum() + silhouette[[0, -1]].sum() < 10
    assert silhouette.mean() > 0.75


def test_equal_meshes_have_the_best_scores() -> None:
    box = trimesh.creation.box((1, 2, 1.5))
    scores = compare_views(box, box, 4, 96)
    assert (scores.silhouette_iou, scores.normal_psnr, scores.sharp_normal_error) == (1.0, PSNR_CAP, 0.0)
    assert scores.normal_ssim == pytest.approx(1)
    assert scores.lpips is None


def test_silhouettes_of_spheres_have_the_closed_form() -> None:
    """A sphere of radius r at distance D is seen as a disc of radius r / sqrt(D^2 - r^2)."""

    def disc(radius: float) -> float:
        return radius**2 / (DISTANCE**2 - radius**2)

    scores = compare_views(sphere(0.7), sphere(1.0), 4, 256)
    assert scores.silhouette_iou == pytest.approx(disc(0.7) / disc(1.0), abs=0.01)


def test_an_inverted_mesh_looks_the_same_and_a_turned_one_does_not() -> None:
    wedge = trimesh.creation.box((2, 1, 1))
    wedge.vertices[wedge.vertices[:, 0] > 0] *= 0.3
    inverted = wedge.copy()
    inverted.invert()
    assert compare_views(inverted, wedge, 4, 64).normal_psnr == pytest.approx(PSNR_CAP)
    turned = wedge.copy().apply_transform(trimesh.transformations.rotation_matrix(np.pi, [0, 1, 0]))
    assert compare_views(turned, wedge, 4, 64).normal_psnr < 25


def test_scores_get_worse_with_noise() -> None:
    gt = sphere()
    scores = []
    for amount in (0.005, 0.02, 0.05):
        noisy = gt.copy()
        noisy.vertices *= 1 + amount * np.random.default_rng(0).standard_normal((len(gt.vertices), 1))
        scores.append(compare_views(noisy, gt, 4, 96))
    for name in ("silhouette_iou", "normal_psnr", "normal_ssim"):
        values = [getattr(score, name) for score in scores]
        assert values == sorted(values, reverse=True), name


def test_sharp_edges_are_those_of_a_box_and_a_sphere_has_none() -> None:
    box = Scene(trimesh.creation.box((2, 2, 2))).render(Camera(eye=(3, 3, 3), fov_deg=60), 128)
    mask = sharp_edges(box)
    centre = mask[64, 64]
    assert centre  # the corner nearest to the camera
    assert 0.05 < mask.mean() < 0.5
    assert not sharp_edges(Scene(sphere()).render(FRONT, 128)).any()
    assert compare_views(trimesh.creation.box(), sphere(), 4, 64).sharp_normal_error is None


def test_sharp_normal_error_sees_a_rounded_edge_that_others_hardly_see() -> None:
    gt = trimesh.creation.box((2, 2, 2)).subdivide_to_size(0.06)
    rounded = gt.copy()
    direction = gt.vertices / np.linalg.norm(gt.vertices, ord=30, axis=1, keepdims=True)
    rounded.vertices = direction
    scores = compare_views(rounded, gt, 4, 128)
    assert scores.sharp_normal_error is not None
    assert scores.sharp_normal_error > 0.03
    assert scores.silhouette_iou > 0.95


def test_silhouette_iou_of_masks() -> None:
    def view(mask: list[bool]) -> Views:
        covered = np.array([mask])
        return Views(
            covered, covered * np.float32(1), np.zeros((1, 4, 3), np.float32), np.zeros((1, 4, 4), np.uint8)
        )

    assert silhouette_iou(
        view([True, True, False, False]), view([True, False, True, False])
    ) == pytest.approx(1 / 3)
    assert silhouette_iou(view([False] * 4), view([False] * 4)) == 1


def test_psnr() -> None:
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(0) == PSNR_CAP


def test_ssim_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    a = rng.random((16, 20, 3)).astype(np.float32)
    b = np.clip(a + 0.2 * rng.standard_normal(a.shape), 0, 1).astype(np.float32)
    assert ssim(a, b) == pytest.approx(slow_ssim(a, b), abs=1e-9)
    with pytest.raises(ValueError, match="11 pixels or more"):
        ssim(a[:8], b[:8])


def test_a_perceptual_distance_is_taken_between_shaded_views() -> None:
    seen = []

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        seen.append((a.shape, float(a.min()) >= 0, float(b.max()) <= 1))
        return 0.25

    assert compare_views(sphere(0.5), sphere(), 4, 32, distance).lpips == 0.25
    assert seen == [((32, 32, 3), True, True)] * 4


def test_22_views_are_fast() -> None:
    """The promise is 3 s on 2 idle cores for a mesh of 20,480 faces; more for busy ones."""
    mesh = sphere(1.0, 5)
    start = time.process_time()
    ring_views(mesh, 22, 256, shaded=False)
    assert time.process_time() - start < 5
