"""The images that shapes are seen by: rendered views as they are stored, a user's own, and views closer to what people
give.

A clean render of the object alone is the exception in practice. Users bring images with a soft shadow on the floor,
small or compressed ones, pale objects on white, other exposures. Each of these is drawn for a share of the views.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from elastic3d.errors import UserError
from elastic3d.models.images import IMAGE_SUFFIXES, without_drawings
from elastic3d.training.datasets import PreparedShapes
from elastic3d.utils.files import visible_files

MIN_OPAQUE_PIXELS = 16  # of a view; with fewer there is no object to recognise
SHADOW, SMALL, COMPRESSED, PALE, EXPOSED, GREY = 0.25, 0.25, 0.3, 0.08, 0.4, 0.05  # shares of the views


def stored_views(shapes: PreparedShapes, id: str) -> list[Image.Image]:
    """The condition views that were rendered of a shape, RGBA; UserError if there are none.

    A sheet seen from its edge can leave a view empty: such a view is no condition and is left out.
    """
    data, offsets = shapes.read(id, "views").numpy().tobytes(), shapes.read(id, "view_offsets").tolist()
    parts = [data[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    views = [Image.open(io.BytesIO(part), formats=("PNG",)).convert("RGBA") for part in parts]
    seen = [view for view in views if (np.asarray(view)[..., 3] > 127).sum() >= MIN_OPAQUE_PIXELS]
    if not seen:
        raise UserError(f"{id} has no condition view that shows it")
    return seen


def named_images(folder: Path) -> dict[str, list[Path]]:
    """Every image below a folder, by the id that a mesh of that name has (see `FolderSource`)."""
    if not folder.is_dir():
        raise UserError(f"latents.images={folder} is no folder, expected one with images")
    found: dict[str, list[Path]] = {}
    images = visible_files(folder, suffixes=IMAGE_SUFFIXES)
    for path in without_drawings(images, f"latents.images={folder}"):
        found.setdefault("--".join(path.relative_to(folder).with_suffix("").parts), []).append(path)
    return found


def augment_view(view: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An RGBA view of an object alone -> RGBA of the same size: exposure, shadow, low resolution, compression."""
    if rng.random() < PALE:
        view = pale(view, float(rng.uniform(0.4, 0.75)))
    if rng.random() < GREY:
        view = _with_colour(view, np.asarray(view.convert("L").convert("RGB")))
    if rng.random() < EXPOSED:
        view = expose(view, float(rng.uniform(0.65, 1.5)), float(rng.uniform(0.85, 1.15)))
    if rng.random() < SHADOW:
        view = floor_shadow(
            view, float(rng.uniform(0.1, 0.45)), float(rng.uniform(-1, 1)), rng.uniform(0.02, 0.06)
        )
    if rng.random() < SMALL:
        view = reduce_resolution(view, int(rng.integers(40, 112)))
    if rng.random() < COMPRESSED:
        view = compress(view, int(rng.integers(20, 80)))
    return view


def pale(view: Image.Image, share: float) -> Image.Image:
    """Colours (H,W) moved towards white by `share`, so that a light object on white has little contrast."""
    colour = np.asarray(view.convert("RGB")).astype(np.float32)
    return _with_colour(view, colour + share * (245 - colour))


def expose(view: Image.Image, gamma: float, gain: float) -> Image.Image:
    """Another exposure: value -> gain * value^gamma, values in [0, 1]."""
    colour = np.asarray(view.convert("RGB")).astype(np.float32) / 255
    return _with_colour(view, 255 * gain * colour**gamma)


def floor_shadow(view: Image.Image, strength: float, slant: float, softness: float) -> Image.Image:
    """A soft dark patch on a floor under the object, part of the image as with a poor cut-out.

    The silhouette, flattened to a fifth of its height at its foot and slanted to one side, is blurred by `softness`
    of the image's side. Its opacity is at most `strength`, so that the box around the object does not grow by it.
    """
    alpha = np.asarray(view.getchannel("A")).astype(np.float32) / 255
    rows = np.nonzero(alpha.max(axis=1) > 0.5)[0]
    if not len(rows):
        return view
    foot, height = int(rows[-1]), int(rows[-1] - rows[0] + 1)
    row, column = np.mgrid[: alpha.shape[0], : alpha.shape[1]].astype(np.float32)
    above = (foot + 0.05 * height - row) * 5  # a row of the floor shows what stands so far above the foot
    shadow = ndimage.map_coordinates(alpha, [foot - above, column - slant * above * 0.5], order=1, cval=0.0)
    shadow = strength * ndimage.gaussian_filter(shadow, softness * len(alpha))
    colour = np.asarray(view.convert("RGB")).astype(np.float32)
    total = alpha + shadow * (1 - alpha)
    mixed = colour * (alpha / np.maximum(total, 1e-6))[..., None]  # the shadow itself is black
    return _rgba(mixed, 255 * total)


def reduce_resolution(view: Image.Image, side: int) -> Image.Image:
    """The view as it comes out of an image of `side` pixels."""
    small = view.resize((side, side), Image.Resampling.BOX)
    return small.resize(view.size, Image.Resampling.BICUBIC)


def compress(view: Image.Image, quality: int) -> Image.Image:
    """The artefacts of JPEG on white; the mask stays."""
    flat = Image.new("RGBA", view.size, "white")
    flat.alpha_composite(view)
    buffer = io.BytesIO()
    flat.convert("RGB").save(buffer, "JPEG", quality=quality)
    return _with_colour(view, np.asarray(Image.open(buffer).convert("RGB")))


def _with_colour(view: Image.Image, colour: NDArray[np.generic]) -> Image.Image:
    return _rgba(np.asarray(colour, np.float32), np.asarray(view.getchannel("A")).astype(np.float32))


def _rgba(colour: NDArray[np.float32], alpha: NDArray[np.float32]) -> Image.Image:
    both = np.concatenate([colour, alpha[..., None]], axis=-1)
    return Image.fromarray(both.round().clip(0, 255).astype(np.uint8), "RGBA")


def view_words(camera: NDArray[np.floating]) -> str:
    """From where a camera (eye 3, target 3, fov, elevation) sees an object that faces +Z."""
    x, _, z = camera[:3] - camera[3:6]
    azimuth = abs(float(np.degrees(np.arctan2(x, z))))
    words = ["from the front", "at an angle", "from the side", "from behind"]
    place = words[int(np.searchsorted([20, 65, 115], azimuth))]
    return f" seen {place}" + (" and above" if camera[7] > 32 else "")


def recoloured(pixels: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The object (H,W,4) in one colour, its light and shadow kept."""
    rgb, alpha = pixels[..., :3].astype(np.float64), pixels[..., 3]
    light = rgb.max(axis=-1)
    seen = light[alpha > 127]
    if len(seen) == 0:
        return pixels
    shade = np.clip(light / max(float(np.percentile(seen, 85)), 1.0), 0.15, 1.2)
    painted = np.clip(shade[..., None] * np.array(colour), 0, 255).astype(np.uint8)
    return np.concatenate([painted, alpha[..., None]], axis=-1)
