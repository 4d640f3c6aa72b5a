"""Rays through rendered views, on a box that is rendered as preparation does it."""

import numpy as np
import pytest
import torch
import trimesh
from safetensors.torch import save_file

from elastic3d.errors import UserError
from elastic3d.geometry.options import BOX
from elastic3d.preparation.views import RawShape, render_views
from elastic3d.training.datasets import PreparedShapes
from elastic3d.training.view_rays import through_box, view_rays

EXTENTS = np.array([1.8, 0.6, 1.0])


def shapes_with(tmp_path, views: int) -> PreparedShapes:
    box = trimesh.creation.box(EXTENTS)
    raw = RawShape(box, np.zeros(len(box.faces), np.int64))
    images, cameras = render_views(raw, views, 96, np.random.default_rng(0))
    tensors = {
        "box/views": torch.from_numpy(np.frombuffer(b"".join(images), np.uint8).copy()),
        "box/view_offsets": torch.from_numpy(np.cumsum([0, *map(len, images)]).astype(np.int64)),
        "box/cameras": torch.from_numpy(cameras),
    }
    (tmp_path / "made").mkdir()
    save_file(tensors, tmp_path / "made" / "shard-00000.safetensors")
    return PreparedShapes(tmp_path, ["made/box"])


def test_rays_are_covered_where_they_meet_the_shape(tmp_path):
    shapes, rng = shapes_with(tmp_path, 4), np.random.default_rng(1)
    right = total = 0
    for _ in range(8):
        rays = view_rays(shapes, "made/box", 200, rng)
        starts, ends = rays["ray_starts"].numpy(), rays["ray_ends"].numpy()
        assert starts.shape == ends.shape == (200, 3) and np.abs(np.stack([starts, ends])).max() < BOX + 1e-4
        places = np.linspace(0, 1, 500)[:, None, None]
        points = starts + places * (ends - starts)
        inside = (np.abs(points) < EXTENTS / 2).all(-1).any(0)
        covered = rays["covered"].numpy()
        assert 0.1 < covered.mean() < 0.9
        right, total = right + (inside == covered).sum(), total + len(covered)
    assert right / total > 0.97  # all but pixels on the outline


def test_rays_are_drawn_from_the_generator_alone(tmp_path):
    shapes = shapes_with(tmp_path, 3)
    first, again = (view_rays(shapes, "made/box", 20, np.random.default_rng(5)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_ray_beside_the_box_leaves_before_it_enters():
    eye, directions = (
        np.array([0.0, 0.0, 3.0]),
        np.array([[0.0, 0.0, -1.0], [0.0, 1.0, 0.0], [0.6, 0.0, -0.8]]),
    )
    near, far = through_box(eye, directions)
    assert near[0] == pytest.approx(3 - BOX) and far[0] == pytest.approx(3 + BOX)
    assert far[1] <= near[1] and far[2] <= near[2]


def test_shapes_without_views_are_named(tmp_path):
    with pytest.raises(
        UserError, match="made/box has no views, expected some .shape.views=. for routing.mesh"
    ):
        view_rays(shapes_with(tmp_path, 0), "made/box", 4, np.random.default_rng(0))
