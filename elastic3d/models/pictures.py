"""Picture files to PIL images: every ordinary format in, one sentence for everything that is none."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from elastic3d.errors import UserError
from elastic3d.utils.files import atomic_path

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# Formats whose decoders need no other program, unlike EPS, and no fonts or macros.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

_RECEIPT = "elastic3d"


def load_picture(source: str | Path | Image.Image) -> Image.Image:
    """A file or a PIL image -> RGBA, 8 bits a channel, upright, the first frame of an animation.

    Raises:
        UserError: the file is missing, empty, truncated, no picture, or would unpack to more pixels than
            PIL's limit against decompression bombs.
    """
    if isinstance(source, Image.Image):
        return _as_rgba(source, "the image")
    path = Path(source)
    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                image.load()
                return _as_rgba(image, str(path))
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise UserError(
            f"{path} would unpack to more than {limit} pixels, expected a smaller image"
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no image, expected PNG, JPEG, WebP, BMP, GIF or TIFF") from error
    except Exception as error:  # decoders of broken files raise anything
        raise UserError(f"{path} is broken: {' '.join(str(error).split())}") from error


def save_picture(image: Image.Image, path: str | Path, receipt: dict[str, Any]) -> None:
    """Write a PNG with `receipt` as the JSON text of its `elastic3d` entry, whole or not at all.

    Raises:
        UserError: the file can't be written.
    """
    entries = PngImagePlugin.PngInfo()
    entries.add_itxt(_RECEIPT, json.dumps(receipt, allow_nan=False, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG", pnginfo=entries)


def read_receipt(path: str | Path) -> dict[str, Any]:
    """What `save_picture` noted; empty for any other picture. UserError if the file is no picture."""
    path = Path(path)
    load_picture(path)
    with Image.open(path) as image:
        image.load()  # the entries may stand behind the pixels
        return dict(json.loads(image.info.get(_RECEIPT, "{}")))


def _check_file(path: Path) -> None:
    try:
        if not path.exists():
            raise UserError(f"there is no file {path}")
        if path.is_dir():
            raise UserError(f"{path} is a folder, expected an image file")
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty, expected an image")
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error


def _as_rgba(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise UserError(f"{name} has no pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel, grey; PIL's own conversion would clip
        return Image.fromarray(_eight_bits(np.asarray(image, dtype=np.float64))).convert("RGBA")
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    return image.convert("RGBA")


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Grey values (H, W) of an unknown range -> uint8: floats to 1, else 8, 16 or 32 bits, whichever fits."""
    grey = np.nan_to_num(grey, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
    top = float(grey.max())
    limit = next((limit for limit in (1.0, 255.0, 65535.0) if top <= limit), top)
    return (grey / limit * 255.0).round().astype(np.uint8)
