"""From anything given as an image to what the encoder was trained on: the object alone, centred on a white square.

Every ordinary format is read; whatever is no image is told in one sentence.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError, features
from scipy import ndimage
from torch import Tensor

from elastic3d.errors import UserError
from elastic3d.models.options import ForegroundConfig, ForegroundMethod, ImageEncoderConfig
from elastic3d.utils.files import atomic_path, check_file, parse_json, printable, visible_files

if TYPE_CHECKING:
    from elastic3d.models.image_encoder import ImageEncoder

SingleImage = str | Path | Image.Image | np.ndarray
ImageInput = SingleImage | Mapping[str, SingleImage]
"""An image, or images of one object by direction: front, left, back, right. Arrays are (H,W), or (H,W,C) with 1, 3 or 4
channels: uint8, or floats from 0 to 1."""
Prepared = dict[int, Image.Image]
"""Images as the encoder wants them, by the number of their direction; 0 is the front."""
VIEW_NAMES = ("front", "left", "back", "right")

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpf", ".jpx", ".avif", ".heic", ".heif"),
)
# Formats whose decoders need no other program, unlike EPS, and no fonts or macros.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

_METADATA = "elastic3d"
# Metadata of what a command draws of its results, which shows no object to generate.
DRAWING = {"drawing": True}

_WORKING_SIDE = 1024  # longer sides are reduced first: the encoder sees a few hundred pixels
_SMALLEST_OBJECT = 8  # pixels; less carries no shape
_PLAIN_SHARE = 0.75  # of the border's pixels; the object may touch the rest
_SPECK = 0.002  # parts smaller than this share of the largest one are noise
_SPECK_PIXELS, _TINY = 9, 0.02  # and so are parts of fewer pixels that are smaller than this share
_SHADOW_DEPTH = 0.3  # of the background's brightness is left in the darkest shadow
_SHADOW_TINT = 0.06  # largest difference between the channels of that share
_SHADOW_SLOPES = (
    14.0,
    7.0,
)  # levels a pixel, of a side of 256: less steep than most outlines, than nearly all
_SHADOW_WARNED = 0.15  # of the mask looks like a shadow with an outline
_SHADOW_HEIGHT = 0.45  # of the object's height, from above, has no part of its shadow on the floor,
_SHADOW_STRAY = 0.03  # up to this share
_SHADOWED_REST = 0.2  # of the mask at least is the object
_SHADOW_BLACK = 40  # largest channel value of a shadow that is drawn as transparent black


def load_image(source: SingleImage) -> Image.Image:
    """A file, a PIL image or an array -> RGBA, 8 bits a channel, upright, the first frame of an animation.

    HEIC needs the package pillow-heif.

    Raises:
        UserError: the file is missing, empty, truncated, no image, or would unpack to more pixels than
            PIL's limit against decompression bombs; an array that is no image, or anything else.
    """
    if not isinstance(source, (str, Path)):
        return _as_rgba(source if isinstance(source, Image.Image) else _of_array(source), "the image")
    path = check_file(source, "an image file")
    name = printable(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with path.open("rb") as file, open_image(file, name) as image:
                return _as_rgba(image, name)
    except UserError:
        raise
    except Exception as error:  # decoders of broken files raise anything
        raise UserError(f"{name} {why_unreadable(error)}") from error


def why_unreadable(error: Exception) -> str:
    """What is wrong with a file from which Pillow makes no image, after its name."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"would unpack to more than {Image.MAX_IMAGE_PIXELS} pixels, expected a smaller image"
    if isinstance(error, UnidentifiedImageError):
        return "is no image, expected PNG, JPEG, JPEG 2000, WebP, BMP, GIF, TIFF, PPM, AVIF or HEIC"
    return f"is broken: {' '.join(str(error).split())[:200]}"


def save_image(image: Image.Image, path: str | Path, metadata: dict[str, Any]) -> None:
    """Write a PNG with `metadata` as the JSON text of its `elastic3d` entry, whole or not at all.

    Raises:
        UserError: the file can't be written.
    """
    entries = PngImagePlugin.PngInfo()
    entries.add_itxt(_METADATA, json.dumps(metadata, allow_nan=False, ensure_ascii=False))
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG", pnginfo=entries)


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, sorted, without drawings. UserError if it can't be read."""
    return [path for path in visible_files(folder, False, IMAGE_SUFFIXES) if not is_drawing(path)]


def without_drawings(found: Sequence[Path], what: str) -> list[Path]:
    """Images without drawings. UserError, which begins with `what`, where no other is among them."""
    images = [path for path in found if not is_drawing(path)]
    if not images:
        rest = (
            " but previews and drawings of routes, which are left out: expected images of objects"
            if found
            else f" ({', '.join(IMAGE_SUFFIXES)})"
        )
        raise UserError(f"{what} holds no image{rest}")
    return images


def is_drawing(path: Path) -> bool:
    """Whether `save_image` wrote a file with the metadata `DRAWING`."""
    try:
        with path.open("rb") as file:
            return json.dumps(DRAWING).encode() in file.read(256)  # entries stand before the pixels
    except OSError:  # told by who reads the image
        return False


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_image` noted; empty for any other image. UserError if the file is no image."""
    path = Path(path)
    load_image(path)
    with path.open("rb") as file, open_image(file, printable(path)) as image:
        image.load()  # the entries may stand behind the pixels
        return dict(
            parse_json(str(image.info.get(_METADATA, "{}")), dict, f"{printable(path)}: its entry elastic3d")
        )


def open_image(file: BinaryIO, name: str) -> Image.Image:
    """`Image.open` with the formats that are taken from anybody, by the head of the file alone.

    Raises:
        UserError: the format needs a package that is missing. Else what Pillow raises: see `why_unreadable`.
    """
    head = file.read(12)
    if head[4:8] == b"ftyp":
        _prepare_for(head[8:12], name)
    file.seek(0)
    Image.init()
    return Image.open(file, formats=[known for known in _FORMATS if known in Image.ID])


def _prepare_for(brand: bytes, name: str) -> None:
    """Let Pillow read HEIC, by the brand in the head of a file. UserError as `open_image`."""
    if brand in _HEIF_BRANDS:
        try:
            import pillow_heif
        except ImportError as error:
            raise UserError(
                f"{name} is a HEIC image, which needs another package to be read: pip install pillow-heif"
            ) from error
        pillow_heif.register_heif_opener()
    if brand in (b"avif", b"avis") and not features.check("avif"):
        raise UserError(f"{name} is an AVIF image, which this build of Pillow can't read: save it as PNG")


def _as_rgba(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise UserError(f"{name} has no pixels")
    transparent, tile = image.info.get("transparency"), getattr(image, "tile", None)  # none once it is loaded
    image = ImageOps.exif_transpose(image)
    if tile and tile[0][3] == "RGB;16B" and isinstance(transparent, tuple):
        # Pillow keeps the higher bytes of the pixels alone
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode.startswith(("I", "F")):
        return _of_deep_grey(image, transparent)
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    return image.convert("RGBA")


def _of_array(value: Any) -> Image.Image:
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


def _of_deep_grey(image: Image.Image, transparent: Any) -> Image.Image:
    """RGBA of 16 or 32 bits a pixel, grey, which PIL's own conversion would clip; `transparent`: the one value that
    stands for nothing, if it is a number."""
    grey = np.asarray(image, dtype=np.float64)
    rgba = Image.fromarray(_eight_bits(grey)).convert("RGBA")
    if isinstance(transparent, int):
        rgba.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    return rgba


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Grey values (H, W) of an unknown range -> uint8: floats to 1, else 8, 16 or 32 bits, whichever fits."""
    grey = np.nan_to_num(grey, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0.0)
    top = float(grey.max())
    limit = next((limit for limit in (1.0, 255.0, 65535.0) if top <= limit), top)
    return (grey / limit * 255.0).round().astype(np.uint8)


def prepare(image: ImageInput, foreground: ForegroundConfig, encoder: ImageEncoder) -> Prepared:
    """The object of each image cut out, centred, on white.

    Raises:
        UserError: no usable image, an unknown direction, or several directions for an encoder of one.
    """
    views = _numbered(image, encoder.config) if isinstance(image, Mapping) else {0: image}
    foreground = foreground.for_encoder(encoder.config)
    return {number: prepare_image(view, foreground, encoder.image_size) for number, view in views.items()}


def _numbered(views: Mapping[str, SingleImage], config: ImageEncoderConfig) -> dict[int, SingleImage]:
    """Images by the numbers of their directions, ascending. UserError as `prepare`."""
    known = VIEW_NAMES[: config.views]
    for name in views:
        if name not in known:
            raise UserError(f"an image from the {name}, but this model takes {', '.join(known)} only")
    if not views:
        raise UserError("there are no images, expected at least the front")
    return {number: views[name] for number, name in enumerate(known) if name in views}


def prepare_image(source: SingleImage, config: ForegroundConfig, size: int) -> Image.Image:
    """A file, PIL image or array -> RGB image of `size` x `size`: the object cut out, centred, on white.

    Raises:
        UserError: no usable image, or no object found in it; names the file.
    """
    try:
        border = ImageEncoderConfig.border if config.border is None else config.border
        return centred(cut_out(load_image(source), config), size, border, "white").convert("RGB")
    except UserError as error:
        if not isinstance(source, (str, Path)) or str(source) in str(error):
            raise
        raise UserError(f"{source}: {error}") from error


def to_tensor(images: list[Image.Image]) -> Tensor:
    """RGB images of one size S x S -> (B,3,S,S) in [0,1]."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def cut_out(image: Image.Image, config: ForegroundConfig) -> Image.Image:
    """An RGBA image whose alpha is the object's mask, by the configured method.

    Raises:
        UserError: the method finds no object, or (auto) no method fits.
    """
    image = reduced(image)
    clear = (np.asarray(image.getchannel("A")) < 128).mean() > 0.001  # stray pixels do not count
    if config.method is ForegroundMethod.alpha and not clear:
        raise UserError("the image has no transparent pixels, expected an alpha channel around the object")
    if clear and config.method in (ForegroundMethod.auto, ForegroundMethod.alpha):
        return _without_black_haze(image)
    return _cut_out_of_background(image, config)


def reduced(image: Image.Image) -> Image.Image:
    """An RGBA image of no more than the pixels that `cut_out` looks at."""
    image = image.copy()
    image.thumbnail((_WORKING_SIDE, _WORKING_SIDE), Image.Resampling.LANCZOS)  # leaves a smaller one as it is
    return image


def _cut_out_of_background(image: Image.Image, config: ForegroundConfig) -> Image.Image:
    """As `cut_out`, by what is seen around the object."""
    method, colour = config.method, _plain_background(image, config.tolerance)
    if method is ForegroundMethod.plain and colour is None:
        raise UserError("the image's background is not plain, expected one colour along its border")
    if colour is not None and method in (ForegroundMethod.auto, ForegroundMethod.plain):
        return _with_alpha(image, _mask_against(image, colour, config.tolerance))
    if method is ForegroundMethod.auto and find_spec("rembg") is None:
        raise UserError(
            "the image has neither transparency nor a plain background: give one with an alpha channel or a plain"
            " background, or install rembg (pip install 'elastic3d[rembg]')"
        )
    return _cut_out_by_rembg(image)


def centred(image: Image.Image, size: int, border: float, ground: Any = (0, 0, 0, 0)) -> Image.Image:
    """RGBA with alpha as mask -> RGBA of `size` x `size` on a ground, the object `(1 - border) * size` long.

    Specks beside the object are not part of it: they neither move nor shrink it.

    Raises:
        UserError: the image is fully transparent, or the object is only a few pixels large.
    """
    alpha = np.asarray(image.getchannel("A"))
    if not alpha.any():
        raise UserError("the image is fully transparent, expected an object")
    rows, columns = np.nonzero(_without_specks(alpha >= max(1, int(alpha.max()) // 2)))
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    longest = max(width, height)
    if longest < _SMALLEST_OBJECT:
        raise UserError(f"the object is {width} x {height} pixels, expected at least {_SMALLEST_OBJECT}")
    scale = size * (1 - border) / longest
    new_size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = image.crop(box).resize(new_size, Image.Resampling.LANCZOS)  # premultiplies by alpha itself
    canvas = Image.new("RGBA", (size, size), ground)
    canvas.alpha_composite(resized, ((size - new_size[0]) // 2, (size - new_size[1]) // 2))
    return canvas


def _plain_background(image: Image.Image, tolerance: int) -> np.ndarray | None:
    """The background's colour (3,) if most of the border has about one colour, else None."""
    rgb = np.asarray(image.convert("RGB")).astype(np.int16)
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    colour = np.median(border, axis=0)
    close = np.abs(border - colour).max(axis=1) <= tolerance
    return colour if close.mean() >= _PLAIN_SHARE else None


def _mask_against(image: Image.Image, colour: np.ndarray, tolerance: int) -> np.ndarray:
    """Object mask (H, W): what the background's colour, flooding in from the border, does not reach."""
    # channels first: NumPy reduces a last axis of three slowly
    rgb = np.asarray(image.convert("RGB")).transpose(2, 0, 1).astype(np.int16, order="C")
    colour = colour[:, None, None]
    background = _reached_from_border(np.abs(rgb - colour).max(axis=0) <= tolerance)
    darker, slope = _darkened(rgb, colour)
    shadows = (_floor_shadow(darker & (slope < steepest), background) for steepest in _SHADOW_SLOPES)
    shadow = next(filter(np.any, shadows), np.zeros_like(background))
    if not shadow.any():
        hard = _floor_shadow(darker, background)
        if hard.sum() > _SHADOW_WARNED * (~background).sum():
            warnings.warn(
                "what may be the object's shadow on the floor is taken for a part of it: cut it out if it is one",
                stacklevel=4,
            )
    mask = ~(background | shadow)
    if not mask.any():
        raise UserError("nothing in the image stands out from its background, expected an object")
    return _without_specks(mask, 1)


def _reached_from_border(region: np.ndarray) -> np.ndarray:
    """The parts (H, W) of a region that touch the image's border."""
    labels, _ = ndimage.label(region)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.isin(labels, np.unique(edge[edge > 0]))


def _darkened(rgb: np.ndarray, colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where an image (3, H, W) has the background's colour at a share of its brightness, and how steep it is, in
    levels a pixel, of a side of 256 pixels. Nowhere in an image that no object fits into."""
    if min(rgb.shape[1:]) < _SMALLEST_OBJECT:
        return np.zeros(rgb.shape[1:], bool), np.zeros(rgb.shape[1:])
    share = rgb / np.maximum(colour, 1.0)
    brightness = share.mean(axis=0)
    darker = (np.ptp(share, axis=0) <= _SHADOW_TINT) & (brightness > _SHADOW_DEPTH) & (brightness < 1)
    grey = ndimage.gaussian_filter(rgb.mean(axis=0), 1.0)
    return darker, np.hypot(*np.gradient(grey)) * max(grey.shape) / 256


def _floor_shadow(darker: np.ndarray, background: np.ndarray) -> np.ndarray:
    """What a soft shadow darkens (H, W) of a plain background; nothing where that is not below an object.

    A shadow is the background's colour at a share of its brightness and fades out: no outline parts it from the
    background. Object surfaces of that colour lie behind an outline, which is steeper. A gap of a few pixels in an
    outline lets nothing through. A hard shadow can't be told from an object.
    """
    like = background | darker
    gap = max(1, round(max(like.shape) / 128))
    reached = _reached_from_border(ndimage.binary_erosion(like, iterations=gap, border_value=1))
    shadow = ndimage.binary_dilation(reached, iterations=gap + 1, mask=like) & ~background
    return shadow if _lies_low(shadow, ~background) else np.zeros_like(shadow)


def _lies_low(part: np.ndarray, mask: np.ndarray) -> bool:
    """Whether a part (H, W) of the mask is as a floor's shadow: low beside an object that is higher and no sliver."""
    rest = _without_specks(mask & ~part)
    if not part.any() or rest.sum() < _SHADOWED_REST * mask.sum():
        return False
    rows = np.flatnonzero(rest.any(axis=1))
    middle = rows[0] + _SHADOW_HEIGHT * (rows[-1] - rows[0])
    return bool(part[: int(middle)].sum() < _SHADOW_STRAY * part.sum())


def _without_black_haze(image: Image.Image) -> Image.Image:
    """Without a shadow drawn as transparent black, away from the object's own soft outline."""
    pixels = np.asarray(image)
    alpha = pixels[..., 3]
    haze = (alpha > 0) & (alpha < 230) & (pixels[..., :3].max(axis=2) <= _SHADOW_BLACK)
    haze &= ~ndimage.binary_dilation(alpha >= 230, iterations=2)
    if not haze.any() or not (alpha >= 230).any():
        return image
    result = image.copy()
    result.putalpha(Image.fromarray(np.where(haze, 0, alpha).astype(np.uint8)))
    return result


def _without_specks(mask: np.ndarray, least: int = _SPECK_PIXELS) -> np.ndarray:
    """A mask (H, W) without the parts that are too small, compared with its largest one, to belong to an object."""
    parts, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    smallest = max(_SPECK * sizes.max(), min(least, _TINY * sizes.max()), 1)
    return np.isin(parts, np.flatnonzero(sizes >= smallest))


def _with_alpha(image: Image.Image, mask: np.ndarray) -> Image.Image:
    result = image.convert("RGB").convert("RGBA")
    result.putalpha(Image.fromarray(mask.astype(np.uint8) * 255))
    return result


def _cut_out_by_rembg(image: Image.Image) -> Image.Image:
    if find_spec("rembg") is None:
        raise UserError("background removal by rembg needs it installed: pip install 'elastic3d[rembg]'")
    import rembg

    return rembg.remove(image.convert("RGB")).convert("RGBA")
