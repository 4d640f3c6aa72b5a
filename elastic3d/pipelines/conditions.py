"""From pictures to condition tokens: one picture of an object, or several from known directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from elastic3d.config.hunyuan3d import VIEW_NAMES
from elastic3d.errors import UserError
from elastic3d.models.foreground import prepare_picture, to_tensor
from elastic3d.models.image_encoder import DinoV2, ImageEncoder
from elastic3d.models.options import ForegroundConfig

OnePicture = str | Path | Image.Image
Picture = OnePicture | Mapping[str, OnePicture]
"""A picture, or pictures of one object by direction: front, left, back, right."""
Prepared = dict[int, Image.Image]
"""Pictures as the encoder wants them, by the number of their direction; 0 is the front."""


def is_picture(value: Any) -> bool:
    """Whether `value` is one picture (or one object's views), rather than a list of them."""
    return isinstance(value, (str, Path, Image.Image, Mapping))


def prepare(picture: Picture, foreground: ForegroundConfig, encoder: ImageEncoder) -> Prepared:
    """The object of each picture cut out, centred, on white.

    Raises:
        UserError: no usable picture, an unknown direction, or several directions for an encoder of one.
    """
    views = picture if isinstance(picture, Mapping) else {VIEW_NAMES[0]: picture}
    known = VIEW_NAMES[: encoder.config.views]
    for name in views:
        if name not in known:
            raise UserError(f"a picture from the {name}, but this model takes {', '.join(known)} only")
    if not views:
        raise UserError("there are no pictures, expected at least the front")
    return {
        VIEW_NAMES.index(name): prepare_picture(view, foreground, encoder.image_size)
        for name, view in sorted(views.items(), key=lambda item: VIEW_NAMES.index(item[0]))
    }


def encode(prepared: Sequence[Prepared], encoder: ImageEncoder, device: torch.device) -> Tensor:
    """Condition tokens (B,M,Cc) of prepared pictures; UserError where objects show different directions."""
    directions = list(prepared[0])
    if any(list(each) != directions for each in prepared):
        raise UserError("the objects of one batch are seen from different directions: give one at a time")
    images = torch.stack([to_tensor(list(each.values())) for each in prepared]).to(device)
    if isinstance(encoder, DinoV2) and encoder.config.views > 1:
        return encoder.encode_views(images, directions)
    return encoder(images[:, 0])
