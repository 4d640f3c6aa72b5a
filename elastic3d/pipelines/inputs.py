"""What may be given as an image: a file, a PIL image, an array; or several of one object, by direction. And how it
becomes what the encoder reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from elastic3d.checkpoints.hunyuan3d import VIEW_NAMES
from elastic3d.errors import UserError
from elastic3d.models.image_encoder import ImageEncoder
from elastic3d.models.images import prepare_image
from elastic3d.models.options import ForegroundConfig

SingleImage = str | Path | Image.Image | np.ndarray
ImageInput = SingleImage | Mapping[str, SingleImage]
"""An image, or images of one object by direction: front, left, back, right. Arrays are (H,W), or (H,W,C) with 1, 3 or 4
channels: uint8, or floats from 0 to 1."""
Prepared = dict[int, Image.Image]
"""Images as the encoder wants them, by the number of their direction; 0 is the front."""


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


def prepare(image: ImageInput, foreground: ForegroundConfig, encoder: ImageEncoder) -> Prepared:
    """The object of each image cut out, centred, on white.

    Raises:
        UserError: no usable image, an unknown direction, or several directions for an encoder of one.
    """
    views = image if isinstance(image, Mapping) else {VIEW_NAMES[0]: image}
    foreground = foreground.for_encoder(encoder.config)
    known = VIEW_NAMES[: encoder.config.views]
    for name in views:
        if name not in known:
            raise UserError(f"an image from the {name}, but this model takes {', '.join(known)} only")
    if not views:
        raise UserError("there are no images, expected at least the front")
    found = {}
    for number, name in enumerate(known):
        if name in views:
            view = views[name]
            source = view if isinstance(view, (str, Path, Image.Image)) else array_image(view)
            found[number] = prepare_image(source, foreground, encoder.image_size)
    return found
