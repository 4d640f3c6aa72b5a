"""Image files to PIL images: every ordinary format in, one sentence for everything that is none."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from elastic3d.errors import UserError
from elastic3d.utils.files import atomic_path, check_file, printable
from elastic3d.utils.structured import parse_json

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpf", ".jpx", ".avif", ".heic", ".heif"),
)
# Formats whose decoders need no other program, unlike EPS, and no fonts or macros.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

_METADATA = "elastic3d"


def load_image(source: str | Path | Image.Image) -> Image.Image:
    """A file or a PIL image -> RGBA, 8 bits a channel, upright, the first frame of an animation.

    HEIC needs the package pillow-heif.

    Raises:
        UserError: the file is missing, empty, truncated, no image, or would unpack to more pixels than
            PIL's limit against decompression bombs.
    """
    if isinstance(source, Image.Image):
        return _as_rgba(source, "the image")
    path = check_file(source, "an image file")
    name = printable(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _open(path) as image:
                image.load()
                return _as_rgba(image, name)
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise UserError(
            f"{name} would unpack to more than {limit} pixels, expected a smaller image"
        ) from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no image, expected PNG, JPEG, WebP, BMP, GIF, TIFF or AVIF") from error
    except Exception as error:  # decoders of broken files raise anything
        raise UserError(f"{name} is broken: {' '.join(str(error).split())}") from error


def save_image(image: Image.Image, path: str | Path, metadata: dict[str, Any]) -> None:
    """Write a PNG with `metadata` as the JSON text of its `elastic3d` entry, whole or not at all.

    Raises:
        UserError: the file can't be written.
    """
    entries = PngImagePlugin.PngInfo()
    entries.add_itxt(_METADATA, json.dumps(metadata, allow_nan=False, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG", pnginfo=entries)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_image` noted; empty for any other image. UserError if the file is no image."""
    path = Path(path)
    load_image(path)
    with _open(path) as image:
        image.load()  # the entries may stand behind the pixels
        return dict(
            parse_json(str(image.info.get(_METADATA, "{}")), dict, f"{printable(path)}: its entry elastic3d")
        )


def _open(path: Path) -> Image.Image:
    """`Image.open`; UserError naming the package that is needed for a format that can't be read without."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        try:
            import pillow_heif
        except ImportError as error:
            raise UserError(
                f"{printable(path)} is a HEIC image, which needs another package to be read: pip install pillow-heif"
            ) from error
        pillow_heif.register_heif_opener()
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis") and not features.check("avif"):
        raise UserError(
            f"{printable(path)} is an AVIF image, which this build of Pillow can't read: save it as PNG"
        )
    Image.init()
    image = Image.open(path, formats=[name for name in _FORMATS if name in Image.ID])
    key = image.info.get("transparency")
    if (
        image.tile and image.tile[0][3] == "RGB;16B" and isinstance(key, tuple)
    ):  # Pillow keeps the higher bytes alone
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image


def _as_rgba(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise UserError(f"{name} has no pixels")
    transparent = image.info.get("transparency")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel, grey; PIL's own conversion would clip
        grey = np.asarray(image, dtype=np.float64)
        rgba = Image.fromarray(_eight_bits(grey)).convert("RGBA")
        if isinstance(transparent, int):  # the one grey value that stands for nothing
            rgba.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
        return rgba
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    return image.convert("RGBA")


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Grey values (H, W) of an unknown range -> uint8: floats to 1, else 8, 16 or 32 bits, whichever fits."""
    grey = np.nan_to_num(grey, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
    top = float(grey.max())
    limit = next((limit for limit in (1.0, 255.0, 65535.0) if top <= limit), top)
    return (grey / limit * 255.0).round().astype(np.uint8)
