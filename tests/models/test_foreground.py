"""The object is found on transparency and on plain backgrounds, and centred on white."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from elastic3d.errors import UserError
from elastic3d.models.images import centred, cut_out, prepare_image, to_tensor
from elastic3d.models.options import ForegroundConfig, ForegroundMethod

CONFIG = ForegroundConfig()


def _box_image(background: object = (0, 0, 0, 0), size: tuple[int, int] = (200, 120)) -> Image.Image:
    image = Image.new("RGBA", size, background)  # type: ignore[arg-type]
    ImageDraw.Draw(image).rectangle((20, 10, 79, 39), fill=(200, 30, 30, 255))
    return image


def _noisy() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def _object_box(image: Image.Image) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero((np.asarray(image) < 250).any(axis=-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("background", [(0, 0, 0, 0), "white", (10, 90, 40, 255)])
def test_the_object_is_centred_with_the_border_ratio(background: object) -> None:
    result = prepare_image(_box_image(background), CONFIG, 200)
    left, top, right, bottom = _object_box(result)
    assert result.mode == "RGB" and result.size == (200, 200)
    assert right - left == pytest.approx(170, abs=2) and bottom - top == pytest.approx(85, abs=2)
    assert (left + right) / 2 == pytest.approx(100, abs=1) and (top + bottom) / 2 == pytest.approx(100, abs=1)
    assert result.getpixel((0, 0)) == (255, 255, 255) and result.getpixel((100, 100)) == (200, 30, 30)


def test_jpeg_noise_and_specks_do_not_move_the_object(tmp_path: Path) -> None:
    image = _box_image("white").convert("RGB").resize((800, 480))
    image.putpixel((790, 470), (0, 0, 0))
    image.save(tmp_path / "a.jpg", quality=60)
    left, _, right, _ = _object_box(prepare_image(tmp_path / "a.jpg", CONFIG, 200))
    assert right - left == pytest.approx(170, abs=4)


def test_a_hole_that_the_background_does_not_reach_stays_object() -> None:
    image = _box_image("white")
    ImageDraw.Draw(image).rectangle((40, 20, 50, 30), fill="white")
    alpha = np.asarray(cut_out(image, CONFIG).getchannel("A"))
    assert alpha[25, 45] == 255 and alpha[0, 0] == 0


def test_an_object_at_the_border_is_found() -> None:
    image = Image.new("RGB", (100, 100), "white")
    ImageDraw.Draw(image).rectangle((30, 40, 70, 99), fill="navy")
    alpha = np.asarray(cut_out(image.convert("RGBA"), CONFIG).getchannel("A"))
    assert alpha[99, 50] == 255 and alpha[99, 5] == 0


def test_huge_images_are_reduced_first() -> None:
    assert max(cut_out(_box_image("white").resize((4000, 2400)), CONFIG).size) == 1024


def test_colours_under_transparency_do_not_bleed() -> None:
    image = _box_image((0, 0, 0, 0))
    pixels = np.asarray(prepare_image(image, CONFIG, 100)).reshape(-1, 3)
    assert (pixels[:, 0] > 150).all(), "neither white nor red pixels are dark in red"


def test_an_image_without_an_object() -> None:
    cases = {
        "fully transparent": Image.new("RGBA", (30, 30), (255, 0, 0, 0)),
        "stands out": Image.new("RGB", (30, 30), "white"),
        "neither transparency nor a plain background": _noisy(),
    }
    cases["object is 2 x 2 pixels"] = Image.new("RGBA", (30, 30), (0, 0, 0, 0))
    cases["object is 2 x 2 pixels"].paste((1, 2, 3, 255), (4, 4, 6, 6))
    for message, image in cases.items():
        with pytest.raises(UserError, match=message):
            prepare_image(image, CONFIG, 64)
    with pytest.raises(UserError, match="stands out"):
        prepare_image(Image.new("RGB", (1, 1), "red"), CONFIG, 64)


def test_errors_name_the_file(tmp_path: Path) -> None:
    Image.new("RGBA", (30, 30), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    with pytest.raises(UserError, match="clear.png: the image is fully transparent"):
        prepare_image(tmp_path / "clear.png", CONFIG, 64)
    with pytest.raises(UserError, match="^there is no file .*gone.png$"):
        prepare_image(tmp_path / "gone.png", CONFIG, 64)


def test_an_explicit_method_does_not_fall_back() -> None:
    for method, message in (
        (ForegroundMethod.alpha, "no transparent pixels"),
        (ForegroundMethod.plain, "background is not plain"),
    ):
        with pytest.raises(UserError, match=message):
            cut_out(_noisy().convert("RGBA"), ForegroundConfig(method=method))


def test_rembg_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ForegroundConfig(method=ForegroundMethod.rembg)
    monkeypatch.setattr("elastic3d.models.images.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs it installed"):
        cut_out(_noisy().convert("RGBA"), config)
    fake = types.ModuleType("rembg")
    fake.remove = lambda image: _box_image()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rembg", fake)
    monkeypatch.setattr("elastic3d.models.images.find_spec", lambda name: object())
    for chosen in (config, CONFIG):
        assert cut_out(_noisy().convert("RGBA"), chosen).getpixel((0, 0)) == (0, 0, 0, 0)


def test_extreme_shapes_keep_at_least_a_pixel() -> None:
    image = Image.new("RGBA", (10, 1000), (0, 0, 0, 0))
    image.paste((1, 2, 3, 255), (5, 0, 6, 1000))
    assert centred(image, 64, 0.15).size == (64, 64)


def test_to_tensor() -> None:
    images = [Image.new("RGB", (4, 4), colour) for colour in ("white", "red")]
    tensor = to_tensor(images)
    assert tensor.shape == (2, 3, 4, 4)
    assert tensor[1, :, 0, 0].tolist() == [1.0, 0.0, 0.0] and tensor[0].min() == 1.0


@pytest.mark.parametrize("background", [(0, 0, 0, 0), "white"])
@pytest.mark.parametrize("side", [1, 2])
def test_specks_beside_the_object_change_nothing(background: object, side: int) -> None:
    image, stray = _box_image(background, (400, 300)), _box_image(background, (400, 300))
    ImageDraw.Draw(stray).rectangle((390, 290, 389 + side, 289 + side), fill=(0, 0, 0, 255))
    clean, found = (np.asarray(prepare_image(image, CONFIG, 200)) for image in (image, stray))
    np.testing.assert_array_equal(found, clean)


def test_a_small_part_of_an_object_is_no_speck() -> None:
    image = _box_image()
    ImageDraw.Draw(image).rectangle((150, 20, 156, 26), fill=(200, 30, 30, 255))
    left, _, right, _ = _object_box(prepare_image(image, CONFIG, 200))
    rows = np.asarray(prepare_image(image, CONFIG, 200)).min(axis=2) < 250
    assert right - left == pytest.approx(170, abs=2) and rows.sum() < 0.4 * 170 * 170


SAMPLES = sorted((Path(__file__).resolve().parents[2] / "data" / "samples").glob("*.png"))


def _on_floor(
    sample: Path, background: int, strength: float, softness: float = 0.03
) -> tuple[Image.Image, np.ndarray]:
    """A bundled view on a plain background with an elliptic shadow under it -> that image, the object's true mask."""
    pixels = np.asarray(Image.open(sample).convert("RGBA")).astype(float)
    side = pixels.shape[1]
    pixels = np.pad(pixels, ((side // 5,) * 2, (side // 5,) * 2, (0, 0)))
    alpha = pixels[..., 3] / 255
    rows, columns = np.nonzero(alpha > 0.5)
    y, x = np.mgrid[: len(alpha), : len(alpha)]
    half = (columns.max() - columns.min()) / 2
    across, down = (x - columns.min() - half) / (1.05 * half), (y - rows.max()) / (0.28 * half)
    ellipse = (across**2 + down**2 < 1).astype(float)
    shade = 1 - strength * ndimage.gaussian_filter(ellipse, softness * len(alpha))
    result = background * shade[..., None] * (1 - alpha[..., None]) + pixels[..., :3] * alpha[..., None]
    return Image.fromarray(result.round().clip(0, 255).astype(np.uint8)), alpha > 0.5


def _overlap(image: Image.Image, true: np.ndarray) -> float:
    found = np.asarray(cut_out(image.convert("RGBA"), CONFIG).getchannel("A")) > 127
    return float((found & true).sum() / (found | true).sum())


def test_a_soft_shadow_on_the_floor_is_background() -> None:
    for background in (255, 235):
        plain = [_overlap(*_on_floor(sample, background, 0.0)) for sample in SAMPLES]
        for strength in (0.3, 0.5):
            found = [_overlap(*_on_floor(sample, background, strength)) for sample in SAMPLES]
            assert np.mean(found) > np.mean(plain) - 0.04, "as good as without the shadow"


def test_a_shadow_with_an_outline_is_told_where_it_looks_like_one() -> None:
    image, _ = _on_floor(SAMPLES[-1], 120, 0.5, softness=0.002)
    with pytest.warns(UserWarning, match="shadow on the floor is taken for a part"):
        cut_out(image.convert("RGBA"), CONFIG)


def test_objects_without_a_shadow_keep_their_mask() -> None:
    """A grey vase on grey, and a white one: nothing of their smooth sides is taken for a shadow."""
    y, x = np.mgrid[:256, :256]
    inside = ((x - 128) / 50) ** 2 + ((y - 128) / 90) ** 2 < 1
    for background, low, high in ((255, 120, 210), (128, 40, 100), (235, 90, 200)):
        shading = low + (high - low) * (x - 78) / 100
        image = np.where(inside, shading, background).clip(0, 255).astype(np.uint8)
        assert _overlap(Image.fromarray(image), inside) > 0.98


def test_a_shadow_of_transparent_black_is_left_out() -> None:
    image = _box_image()
    ImageDraw.Draw(image).ellipse((10, 42, 120, 60), fill=(0, 0, 0, 140))
    with_shadow, without = (prepare_image(image, CONFIG, 200) for image in (image, _box_image()))
    np.testing.assert_array_equal(np.asarray(with_shadow), np.asarray(without))


@pytest.mark.parametrize("size", [(1, 40), (40, 1), (5, 5)])
def test_no_shadow_is_sought_where_no_object_fits(size: tuple[int, int]) -> None:
    image = Image.new("RGBA", size, "white")
    image.putpixel((size[0] // 2, size[1] // 2), (9, 9, 9, 255))
    assert np.asarray(cut_out(image, CONFIG).getchannel("A")).sum() == 255
