"""Augmented views: the same for the same generator, and each effect does what it says."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from elastic3d.models.images import prepare_image
from elastic3d.models.options import ForegroundConfig
from elastic3d.training import views as augment


@pytest.fixture
def view() -> Image.Image:
    image = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    draw = ImageDraw.Draw(image)
    draw.rectangle((50, 30, 110, 120), fill=(200, 60, 40, 255))
    draw.ellipse((60, 40, 100, 80), fill=(30, 90, 200, 255))
    return image


def _array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_generator_decides(view: Image.Image) -> None:
    first, again = (augment.augment_view(view, np.random.default_rng(3)) for _ in range(2))
    assert (_array(first) == _array(again)).all()
    drawn = [_array(augment.augment_view(view, np.random.default_rng(seed))) for seed in range(40)]
    changed = [not np.array_equal(one, _array(view)) for one in drawn]
    assert 0.5 < np.mean(changed) < 1
    assert all(one.shape == (160, 160, 4) for one in drawn)


def test_a_shadow_lies_at_the_foot_and_leaves_the_object_in_its_box(view: Image.Image) -> None:
    shaded = augment.floor_shadow(view, 0.4, 0.5, 0.03)
    alpha, before = _array(shaded)[..., 3], _array(view)[..., 3]
    added = alpha - before
    assert added[before == 0].max() > 25 and alpha[before == 0].max() <= 0.4 * 255 + 1
    rows, _ = np.nonzero(added > 10)
    assert rows.min() > 85 and rows.max() > 120
    assert (_array(shaded)[before == 255] == _array(view)[before == 255]).all()
    found, clean = (
        _array(prepare_image(image, ForegroundConfig(), 128)).min(axis=2) < 100 for image in (shaded, view)
    )
    assert (found & clean).sum() / (found | clean).sum() > 0.97


def test_small_compressed_pale_and_exposed_views_keep_the_mask(view: Image.Image) -> None:
    inside = _array(view)[..., 3] > 0
    for image in (augment.compress(view, 20), augment.pale(view, 0.6), augment.expose(view, 1.4, 1.1)):
        assert (_array(image)[..., 3] == _array(view)[..., 3]).all()
        assert not np.array_equal(_array(image)[inside], _array(view)[inside])
    assert _array(augment.pale(view, 0.6))[inside][:, :3].mean() > _array(view)[inside][:, :3].mean() + 60
    small = augment.reduce_resolution(view, 40)
    assert small.size == view.size and len(np.unique(_array(small)[..., 3])) > 10


def test_an_empty_view_has_no_shadow() -> None:
    empty = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert not _array(augment.floor_shadow(empty, 0.4, 0, 0.03)).any()
