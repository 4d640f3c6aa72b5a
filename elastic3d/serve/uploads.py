"""Bytes that somebody sent, as an image: any ordinary format, within a limit of pixels, or one sentence."""

from __future__ import annotations

import io
import threading
import warnings

from PIL import Image

from elastic3d.errors import UserError
from elastic3d.models.images import load_image, open_image, reduced, why_unreadable

_UNPACKING = threading.Semaphore(2)  # at a time: 50 kB may take 700 MB meanwhile


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """The image in a file's bytes, RGBA, of no more pixels than a mesh takes from it: many may wait. Callers
    beyond two take turns.

    UserError if it is none, broken, or has more than `max_pixels`.
    """
    if not data:
        raise UserError("the image is empty, expected an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = open_image(io.BytesIO(data), "the upload")
        if image.width * image.height > max_pixels:
            raise UserError(
                f"the image has {image.width} x {image.height} pixels, expected at most {max_pixels:,}"
            )
        with _UNPACKING:
            kept = reduced(load_image(image))
        kept.info.clear()  # comments and profiles may be as large as the file
        return kept
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"the image has far too many pixels, expected at most {max_pixels:,}") from error
    except Exception as error:  # decoders of broken files raise anything
        raise UserError(f"the upload {why_unreadable(error)}") from error
