"""Images with captions: a folder of them, or the stored views of prepared shapes with captions made from what is
known of them."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from elastic3d.errors import UserError
from elastic3d.models.images import IMAGE_SUFFIXES, load_image
from elastic3d.training.datasets import PreparedShapes
from elastic3d.training.latents import stored_views
from elastic3d.utils.files import visible_files
from elastic3d.utils.options import Options, option
from elastic3d.utils.structured import load_json, load_json_lines

# Names of colours with (hue in degrees, saturation, value); a name may stand for a material that looks like it.
COLOURS = {
    "white": (0, 0.0, 0.95), "light grey": (0, 0.0, 0.75), "grey": (0, 0.0, 0.5), "black": (0, 0.0, 0.15),
    "red": (0, 0.8, 0.75), "orange": (28, 0.85, 0.95), "yellow": (50, 0.8, 0.95), "green": (120, 0.6, 0.6),
    "turquoise": (178, 0.6, 0.7), "blue": (220, 0.75, 0.75), "purple": (275, 0.55, 0.6), "pink": (335, 0.4, 0.95),
    "brown": (24, 0.6, 0.45), "wooden": (28, 0.5, 0.68), "beige": (38, 0.25, 0.85),
}  # fmt: skip
GROUNDS = {"grey": (0, 0, 0.75), "blue": (215, 0.35, 0.9), "green": (120, 0.3, 0.8), "pink": (340, 0.25, 0.95),
           "yellow": (50, 0.4, 0.97), "black": (0, 0, 0.1)}  # fmt: skip


@dataclass(kw_only=True)
class ImageDataConfig(Options):
    """Images with captions, and the cache of what a backbone makes of them."""

    images: Path | None = option(
        None,
        "folder of images with captions (a.png with a.txt, or captions.jsonl); null: the prepared shapes' views",
    )
    cache: Path = option(Path("data/prepared/images"), "folder of the cached images and texts")
    size: int | None = option(None, "pixels a side; null: the model's", ge=16, le=4096)
    text_length: int = option(
        256, "tokens of a cached prompt; the small model has its own", ge=3, le=1024, advanced=True
    )
    views: int = option(12, "prepared shapes: views of each", ge=1, le=1 << 16)
    recolour: float = option(
        0.5, "prepared shapes: share of views that get one colour, which the caption names", ge=0, le=1
    )
    background: float = option(
        0.15, "prepared shapes: share on a coloured ground, which the caption names", ge=0, le=1
    )
    val_every: int = option(
        50, "folder of images: every N-th is for validation", ge=1, le=1 << 20, advanced=True
    )
    shard: int = option(512, "images in a file of the cache", ge=1, le=1 << 20, advanced=True)
    encode_batch: int = option(8, "images or prompts encoded at once", ge=1, le=1 << 16, advanced=True)


@dataclass(frozen=True)
class Captioned:
    """A square RGB image and captions, any of which describes it."""

    image: Image.Image
    captions: list[str]


class ImageSource(Protocol):
    """Groups of images by number."""

    missing: int

    def __len__(self) -> int: ...

    def load(self, index: int, size: int) -> list[Captioned]:
        """The images of a group, `size` pixels a side; UserError if they can't be used."""
        ...


class ImageFolder:
    """`a.png` with `a.txt` beside it, or `captions.jsonl` with lines {"file": "a.png", "caption": "..."}.

    An image is cut to its central square. Every `val_every`-th is for validation alone.
    """

    missing = 0

    def __init__(self, folder: Path, config: ImageDataConfig, validation: bool) -> None:
        if not folder.is_dir():
            raise UserError(f"images is {folder}, which is no folder")
        pairs = _from_lines(folder) if (folder / "captions.jsonl").is_file() else _from_texts(folder)
        self.pairs = [p for i, p in enumerate(pairs) if (i % config.val_every == 0) == validation]
        if not self.pairs:
            raise UserError(
                f"{folder} has {len(pairs)} images with captions, expected a.png with a.txt or captions.jsonl"
                f" for at least 2 (every {config.val_every}th is for validation)"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int, size: int) -> list[Captioned]:
        """One image on white."""
        path, caption = self.pairs[index]
        image = load_image(path)
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        return [
            Captioned(ImageOps.fit(ground.convert("RGB"), (size, size), Image.Resampling.LANCZOS), [caption])
        ]


class ShapeViews:
    """Views of prepared shapes on a plain ground; captions say what it is, its colour, and from where it is seen."""

    def __init__(
        self, prepared: Path, split: Sequence[str], config: ImageDataConfig, limit: int, seed: int
    ) -> None:
        self.shapes = PreparedShapes(prepared, split, (), limit)
        self.missing, self.config, self.seed = self.shapes.missing, config, seed
        self._nouns = {
            f"{sidecar.parent.name}/{item['id']}": noun_of(item["caption"])
            for source in sorted({id.partition("/")[0] for id in self.shapes.ids})
            for sidecar in sorted((prepared / source).glob("shard-*.json"))
            for item in load_json(sidecar, {"items": [{"id": str, "caption": str}]})["items"]
        }

    def __len__(self) -> int:
        return len(self.shapes)

    def load(self, index: int, size: int) -> list[Captioned]:
        """The first `config.views` views."""
        id = self.shapes.ids[index]
        if id not in self._nouns:
            raise UserError(f"{id} has no caption in its shard's JSON file")
        cameras = self.shapes.read(id, "cameras").numpy()
        rng = np.random.default_rng([self.seed, index, 5])
        views = stored_views(self.shapes, id)
        # A view that shows nothing was left out, and with it the numbering: then where it is seen from isn't said.
        places = [view_words(row) for row in cameras] if len(cameras) == len(views) else [""] * len(views)
        return [
            self._captioned(view, self._nouns[id], place, size, rng)
            for view, place in list(zip(views, places, strict=True))[: self.config.views]
        ]

    def _captioned(
        self, view: Image.Image, noun: str, place: str, size: int, rng: np.random.Generator
    ) -> Captioned:
        config = self.config
        pixels = np.asarray(view.resize((size, size), Image.Resampling.LANCZOS)).copy()
        colour = colour_name(pixels)
        if rng.random() < config.recolour:
            colour = str(rng.choice(list(COLOURS)))
            pixels = recoloured(pixels, _shade(COLOURS[colour], rng))
        behind, ground = "", (255, 255, 255)
        if rng.random() < config.background:
            name = str(rng.choice(list(GROUNDS)))
            behind, ground = f", on a {name} background", _shade(GROUNDS[name], rng)
        image = Image.new("RGBA", (size, size), (*ground, 255))
        image.alpha_composite(Image.fromarray(pixels))
        coloured = with_article(f"{colour} {noun}" if colour else noun)
        captions = [f"{coloured}{place}{behind}", f"{coloured}{behind}", f"{with_article(noun)}{behind}"]
        return Captioned(image.convert("RGB"), captions)


def open_images(
    config: ImageDataConfig, prepared: Path, split: Sequence[str], limit: int, seed: int, validation: bool
) -> ImageSource:
    """The folder of images that `config` names, else views of the shapes of `split`."""
    if config.images is not None:
        return ImageFolder(config.images, config, validation)
    return ShapeViews(prepared, split, config, limit, seed)


def noun_of(caption: str) -> str:
    """`a dining table` -> `dining table`."""
    first, _, rest = caption.partition(" ")
    return rest if first in ("a", "an") and rest else caption


def noun_in(caption: str) -> str:
    """What a caption of `ShapeViews` names: `a red bar stool seen from behind, on a blue background` -> `bar stool`.

    The first word or two are taken for a colour where they are one of `COLOURS`.
    """
    noun = noun_of(caption.partition(" seen from ")[0].partition(" seen at ")[0].partition(", on a ")[0])
    for colour in sorted(COLOURS, key=len, reverse=True):
        if noun.startswith(f"{colour} "):
            return noun.removeprefix(f"{colour} ")
    return noun


def with_article(noun: str) -> str:
    """`armchair` -> `an armchair`."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def view_words(camera: NDArray[np.floating]) -> str:
    """From where a camera (eye 3, target 3, fov, elevation) sees an object that faces +Z."""
    x, _, z = camera[:3] - camera[3:6]
    azimuth = abs(float(np.degrees(np.arctan2(x, z))))
    words = ["from the front", "at an angle", "from the side", "from behind"]
    place = words[int(np.searchsorted([20, 65, 115], azimuth))]
    return f" seen {place}" + (" and above" if camera[7] > 32 else "")


def colour_name(pixels: NDArray[np.uint8]) -> str | None:
    """The name of the colour that most of an object's pixels (H,W,4) have; None where there is none."""
    rgb = pixels[pixels[..., 3] > 200][:, :3].astype(np.float64) / 255
    if len(rgb) < 16:
        return None
    names = [name for name in COLOURS if name not in ("wooden", "beige", "light grey")]
    palette = np.array([colorsys.hsv_to_rgb(COLOURS[n][0] / 360, *COLOURS[n][1:]) for n in names])
    nearest = np.square(rgb[:, None] - palette).sum(-1).argmin(axis=1)
    counts = np.bincount(nearest, minlength=len(names))
    return names[int(counts.argmax())] if counts.max() > 0.6 * len(rgb) else None


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


def _shade(hsv: tuple[float, float, float], rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour near (hue in degrees, saturation, value)."""
    hue = (hsv[0] + rng.uniform(-7, 7)) / 360 % 1
    rest = [min(1.0, max(0.0, part * rng.uniform(0.85, 1.15))) for part in hsv[1:]]
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, *rest))
    return red, green, blue


def _from_texts(folder: Path) -> list[tuple[Path, str]]:
    files = visible_files(folder, recursive=False)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    texts = [(path, path.with_suffix(".txt")) for path in images]
    return [(path, text) for path, file in texts if file.is_file() and (text := file.read_text().strip())]


def _from_lines(folder: Path) -> list[tuple[Path, str]]:
    lines = load_json_lines(folder / "captions.jsonl", {"file": str, "caption": str})
    return [(folder / entry["file"], entry["caption"].strip()) for entry in lines]
