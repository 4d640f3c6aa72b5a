"""What is kept of an upload: no more pixels than a mesh takes from it, and the same mesh."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from elastic3d.errors import UserError
from elastic3d.models.images import prepare_image
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines.assets import object_pixels
from elastic3d.serve import uploads
from elastic3d.serve.config import ServeConfig
from elastic3d.serve.uploads import decode_image
from elastic3d.utils.options import from_dict

SIZE = (1500, 1000)
AVIF = pytest.mark.skipif(not features.check("avif"), reason="this build of Pillow has no AVIF")


def _noise(mode: str) -> Image.Image:
    """A block of noise on white, or on nothing."""
    pixels = np.full((*SIZE[::-1], 4), 255, np.uint8)
    block = np.s_[200:750, 250:950]
    pixels[block][..., :3] = np.random.default_rng(0).integers(0, 200, (550, 700, 3))
    if mode == "RGBA":
        pixels[..., 3] = 0
        pixels[block][..., 3] = 255
    drawn = Image.fromarray(pixels)
    if mode == "I;16":
        return Image.fromarray(np.asarray(drawn.convert("L")).astype(np.uint16) * 257)
    return drawn.convert(mode)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    return exif


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"format": "PNG"}),
        ("RGBA", {"format": "PNG"}),
        ("P", {"format": "PNG"}),
        ("I;16", {"format": "PNG"}),
        ("RGB", {"format": "JPEG", "exif": _turned()}),
        pytest.param("RGB", {"format": "AVIF"}, marks=AVIF),
        pytest.param("RGBA", {"format": "AVIF"}, marks=AVIF),
    ],
)
def test_a_large_upload_is_kept_small_and_gives_the_same(mode: str, options: dict[str, Any]) -> None:
    file = io.BytesIO()
    _noise(mode).save(file, **options)
    whole, kept = Image.open(file), decode_image(file.getvalue(), 25_000_000)
    assert max(kept.size) == 1024 and kept.mode == "RGBA"
    config = ForegroundConfig()
    one, two = (prepare_image(source, config, 64) for source in (whole, kept))
    assert np.array_equal(np.asarray(one), np.asarray(two))
    # what texture=project and combine=fit look at
    assert np.array_equal(object_pixels(whole, config), object_pixels(kept, config))


@AVIF
def test_an_avif_image_is_measured_before_it_is_decoded() -> None:
    file = io.BytesIO()
    _noise("RGB").save(file, "AVIF")
    with pytest.raises(UserError, match="the image has 1500 x 1000 pixels, expected at most 1,000"):
        decode_image(file.getvalue(), 1000)
    for size in (20, 100, 1000, len(file.getvalue()) - 100):
        with pytest.raises(UserError, match="is broken|is no image, expected .* AVIF"):
            decode_image(file.getvalue()[:size], 25_000_000)


def test_the_limit_of_pixels_is_one_that_can_be_reached() -> None:
    """Pillow refuses more by itself, at whatever limit."""
    most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    assert from_dict(ServeConfig, {"max_pixels": most}).max_pixels == most
    with pytest.raises(UserError, match="max_pixels"):
        from_dict(ServeConfig, {"max_pixels": most + 1})


def test_many_uploads_at_once_take_the_memory_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 25 million pixels in 16 bits, each takes 700 MB until it is reduced, from a file of 48 kB."""
    at_once, most, lock, load = [0], [0], threading.Lock(), uploads.load_image

    def counted(image: Image.Image) -> Image.Image:
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.02)
        loaded = load(image)
        with lock:
            at_once[0] -= 1
        return loaded

    monkeypatch.setattr(uploads, "load_image", counted)
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "PNG")
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda _: decode_image(file.getvalue(), 25_000_000), range(8)))
    assert len(images) == 8 and most[0] == 2
