"""What may be given as an image: a file, a PIL image, an array; or several of one object, by direction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from elastic3d.errors import UserError

SingleImage = str | Path | Image.Image | np.ndarray
ImageInput = SingleImage | Mapping[str, SingleImage]
"""An image, or images of one object by direction: front, left, back, right. Arrays are (H,W), or (H,W,C) with 1, 3 or 4
channels: uint8, or floats from 0 to 1."""


def array_image(value: Any) -> Image.Image:
    """An array as a PIL image. UserError for one that is none, and for anything else."""
    if not isinstance(value, np.ndarray):
        raise UserError(
            f"an image is a {type(value).__name__}, expected a file, a PIL image or a numpy array"
        )
    array = value[..., 0] if value.ndim == 3 and value.shape[-1] == 1 else value
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise UserError(
            f"an image is an array of {value.shape}, expected (H,W) or (H,W,C) with 1, 3 or 4 channels"
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min(initial=0) < 0 or array.max(initial=0) > 1:
            raise UserError(
                "an image is an array of floats, expected values from 0 to 1 (or integers to 255)"
            )
        array = (255 * array).round()
    elif array.dtype.kind not in "bui" or array.min(initial=0) < 0 or array.max(initial=0) > 255:
        raise UserError(f"an image is an array of {array.dtype}, expected uint8, or floats from 0 to 1")
    elif array.dtype.kind == "b":
        array = 255 * array.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))
