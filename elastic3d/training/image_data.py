"""Images with captions, and the cache of what a backbone makes of them.

They are a folder of images, or the stored views of prepared shapes with captions made from what is known of them.
Latents and embeddings are computed once: `<cache>/<train|val>/shard-00012.safetensors` has `latents` (n,N,C), uint8
where a backbone's latents are pixels, else f16; `caption` (n,c) rows of `text/<name>` (k, ...), the arguments of the
pipeline. `<cache>/cache.json` holds what it was made with, `<cache>/negative.safetensors` the text of the unconditional
branch.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from elastic3d.errors import UserError
from elastic3d.evaluation.items import spread
from elastic3d.models.images import images_in, load_image
from elastic3d.models.weights import open_tensors, read_weights, save_weights
from elastic3d.pipelines.backbones import Backbone, Text
from elastic3d.preparation.sources import with_article
from elastic3d.training.datasets import Batch, PreparedShapes, read_split
from elastic3d.training.options import LimitedSplitsConfig
from elastic3d.training.views import recoloured, stored_views, view_words
from elastic3d.utils.claims import sole_use
from elastic3d.utils.files import (
    Number,
    file_sha256,
    load_json,
    load_json_lines,
    read_text,
    save_json,
)
from elastic3d.utils.options import Options, option

INFO_NAME, NEGATIVE_NAME = "cache.json", "negative.safetensors"
_INFO = {"settings": dict, "counts": {str: Number(0, whole=True)}}
# Of the settings, those that older caches did not note.
_LATER = ("encoder_sha256", "data.limit", "data.train_sha256", "data.val_sha256")

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
    shard: int = option(512, "images in a file of the cache", ge=1, le=1 << 20, internal=True)
    encode_batch: int = option(8, "images or prompts encoded at once", ge=1, le=1 << 16, advanced=True)


@dataclass(kw_only=True)
class PipelineImagesConfig(ImageDataConfig):
    """How a published pipeline sees them. The small model has a size and a number of tokens of its own."""

    size: int | None = option(None, "pixels a side; null: the model's", ge=16, le=4096)
    text_length: int | None = option(
        None, "tokens of a cached prompt; null: what the pipeline fills prompts up to, 256 where it does not",
        ge=3, le=1024, advanced=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Captioned:
    """A square RGB image and captions, any of which describes it."""

    image: Image.Image
    captions: list[str]


class ImageFolder:
    """`a.png` with `a.txt` beside it, or `captions.jsonl` with lines {"file": "a.png", "caption": "..."}.

    An image is cut to its central square. Every `val_every`-th is for validation alone, with all of its captions.
    """

    def __init__(self, folder: Path, config: ImageDataConfig, validation: bool) -> None:
        if not folder.is_dir():
            raise UserError(f"images is {folder}, which is no folder")
        pairs = _from_lines(folder) if (folder / "captions.jsonl").is_file() else _from_texts(folder)
        numbers = {path: number for number, path in enumerate(dict.fromkeys(path for path, _ in pairs))}
        self.pairs = [p for p in pairs if (numbers[p[0]] % config.val_every == 0) == validation]
        if not self.pairs:
            raise UserError(
                f"{folder} has {len(numbers)} images with captions, expected a.png with a.txt or captions.jsonl"
                f" for at least 2 (every {config.val_every}th is for validation)"
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int, size: int) -> list[Captioned]:
        """One image on white, `size` pixels a side; UserError if it can't be used."""
        path, caption = self.pairs[index]
        image = load_image(path)
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        return [
            Captioned(ImageOps.fit(ground.convert("RGB"), (size, size), Image.Resampling.LANCZOS), [caption])
        ]

    def made_of(self) -> list[Any]:
        """Each image's name, size and time of its last change, and its caption."""
        states = [
            (path.stat() if path.is_file() else None, path.name, caption) for path, caption in self.pairs
        ]
        return [[name, s and s.st_size, s and s.st_mtime_ns, caption] for s, name, caption in states]


class ShapeViews:
    """Views of prepared shapes on a plain ground; captions say what it is, its colour, and from where it is seen."""

    def __init__(
        self, prepared: Path, split: Sequence[str], config: ImageDataConfig, limit: int, seed: int
    ) -> None:
        self.shapes = PreparedShapes(prepared, split, (), limit)
        self.config, self.seed = config, seed
        self._nouns = {
            f"{sidecar.parent.name}/{item['id']}": noun_of(item["caption"])
            for source in sorted({id.partition("/")[0] for id in self.shapes.ids})
            for sidecar in sorted((prepared / source).glob("shard-*.json"))
            for item in load_json(sidecar, {"items": [{"id": str, "caption": str}]})["items"]
        }

    def __len__(self) -> int:
        return len(self.shapes)

    def load(self, index: int, size: int) -> list[Captioned]:
        """The first `config.views` views, `size` pixels a side; UserError if the shape has none."""
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

    def made_of(self) -> list[Any]:
        """The shapes, and the seed of their colours and captions."""
        return [self.seed, *self.shapes.ids]

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


ImageSource = ImageFolder | ShapeViews  # groups of images by number


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


def _shade(hsv: tuple[float, float, float], rng: np.random.Generator) -> tuple[int, int, int]:
    """A colour near (hue in degrees, saturation, value)."""
    hue = (hsv[0] + rng.uniform(-7, 7)) / 360 % 1
    rest = [min(1.0, max(0.0, part * rng.uniform(0.85, 1.15))) for part in hsv[1:]]
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, *rest))
    return red, green, blue


def _from_texts(folder: Path) -> list[tuple[Path, str]]:
    texts = [(path, path.with_suffix(".txt")) for path in images_in(folder)]
    full = [(path, file) for path, file in texts if file.is_file() and file.stat().st_size]
    return [(path, text) for path, file in full if (text := read_text(file, "a caption").strip())]


def _from_lines(folder: Path) -> list[tuple[Path, str]]:
    lines = load_json_lines(folder / "captions.jsonl", {"file": str, "caption": str})
    return [(folder / entry["file"], entry["caption"].strip()) for entry in lines]


# ------------------------------------------------------------------------------------------------- the cache


def build_image_cache(
    image: ImageDataConfig,
    data: LimitedSplitsConfig,
    backbone: Backbone,
    seed: int,
    encoders: Sequence[Path] = (),
) -> None:
    """Encode training and validation images. A cache that an earlier call finished stays as it is, with a warning where
    there are other images now; one that it did not finish goes on, with the same images.

    An image that can't be read is reported and left out.

    Args:
        encoders: files of the backbone's VAE and text encoders; empty where these can't change.

    Raises:
        UserError: the folder holds a cache of other images, shapes or encoders, or made otherwise.
    """
    own = image.size if isinstance(image, PipelineImagesConfig) else None
    size = own or backbone.default_size
    settings = cache_settings(image, data, backbone, size, encoders)
    output = image.cache
    path = output / INFO_NAME
    unmade = {"settings": settings, "counts": {}}
    found: dict[str, Any] = load_json(path, _INFO) if path.is_file() else unmade
    made = {name: settings.get(name) for name in _LATER} | found["settings"]
    differing = [name for name, value in settings.items() if made.get(name) != value]
    if not differing and found["counts"]:
        with suppress(UserError):  # the cache is all that it takes: its images may be gone
            now = _digest(_sources(image, data, found.get("seed", seed)))
            if found.get("made_of", now) != now:
                warnings.warn(
                    f"{output} is complete, and was made of other images or captions than there are now: delete it,"
                    " or choose another image.cache=, to train on these",
                    stacklevel=2,
                )
        return
    sources = _sources(image, data, seed)
    digest = _digest(sources)
    if found.get("made_of", digest) != digest:  # the rest would be numbered otherwise than what is there
        differing.append("list of images or captions")
    if differing:
        name = differing[0].removesuffix("_sha256")
        raise UserError(f"{output} was made with another {name}: delete it, or choose another image.cache=")
    info = {"settings": settings, "made_of": digest, "seed": seed}
    with sole_use(output):
        save_json(info | {"counts": {}}, path)
        negative = backbone.encode_prompts([backbone.negative], length=text_length(image, backbone))
        save_weights({name: _halved(value) for name, value in negative.items()}, output / NEGATIVE_NAME)
        counts = {
            split: _write_split(source, output / split, image, backbone, size)
            for split, source in sources.items()
        }
        save_json(info | {"counts": counts}, path)


def _digest(sources: Mapping[str, ImageSource]) -> str:
    """SHA-256 of what the images of each split are made of."""
    made_of = json.dumps({split: source.made_of() for split, source in sources.items()})
    return hashlib.sha256(made_of.encode()).hexdigest()


def _sources(image: ImageDataConfig, data: LimitedSplitsConfig, seed: int) -> dict[str, ImageSource]:
    """The training and the validation images."""
    if image.images is not None:
        return {split: ImageFolder(image.images, image, split == "val") for split in ("train", "val")}
    return {
        "train": ShapeViews(data.prepared, read_split(data.train), image, data.limit, seed),
        "val": ShapeViews(data.prepared, read_split(data.val), image, 0, seed),
    }


def cache_settings(
    image: ImageDataConfig,
    data: LimitedSplitsConfig,
    backbone: Backbone,
    size: int,
    encoders: Sequence[Path],
) -> dict[str, Any]:
    """What a finished cache has to agree in. The files of a folder of images may have become more since, and trainings
    of several seeds share one."""
    names = ("views", "recolour", "background") if image.images is None else ("val_every",)
    settings = {
        "backbone": backbone.name.name,
        "images": str(image.images) if image.images else None,
        "size": size,
        "patch": backbone.multiple,
        "text_length": text_length(image, backbone),
        **{name: getattr(image, name) for name in names},
    }
    if image.images is None:
        settings["data.limit"] = data.limit
        for name, lists in (("train", data.train), ("val", data.val)):
            ids = "\n".join(read_split(lists))
            settings[f"data.{name}_sha256"] = hashlib.sha256(ids.encode()).hexdigest()
    return settings | ({"encoder_sha256": file_sha256(*encoders)} if encoders else {})


def text_length(image: ImageDataConfig, backbone: Backbone) -> int:
    """Tokens of a cached prompt."""
    requested = image.text_length if isinstance(image, PipelineImagesConfig) else None
    return min(requested or backbone.cached_tokens, backbone.longest)


def _write_split(
    source: ImageSource, folder: Path, image: ImageDataConfig, backbone: Backbone, size: int
) -> int:
    """Shards of one split -> how many images they hold."""
    total = 0
    known: dict[str, Text] = {}
    with tqdm(total=len(source), desc=f"cache {folder.name}", dynamic_ncols=True) as bar:
        stream = _stream(source, size, bar)
        numbers = count()
        while images := list(islice(stream, image.shard)):
            target = folder / f"shard-{next(numbers):05d}.safetensors"
            if not target.is_file():
                save_weights(_encode(images, image, backbone, known), target)
            total += len(images)
    if not total:
        raise UserError(f"no image for {folder.name} could be used")
    return total


def _stream(source: ImageSource, size: int, bar: tqdm[Any]) -> Iterator[Captioned]:
    for index in range(len(source)):
        bar.update()
        try:
            yield from source.load(index, size)
        except UserError as error:
            bar.write(f"skipped: {error}")


def _encode(
    images: list[Captioned], image: ImageDataConfig, backbone: Backbone, known: dict[str, Text]
) -> dict[str, Tensor]:
    """One shard; `known` remembers encoded prompts while they are small."""
    latents = []
    for batch in _batches(images, image.encode_batch):
        pixels = np.stack([np.asarray(each.image) for each in batch])
        tensor = torch.from_numpy(pixels).to(backbone.device).permute(0, 3, 1, 2).float() / 255
        found = backbone.encode_images(tensor)
        as_bytes = backbone.stores_bytes
        latents.append((((found.float() + 1) * 127.5).round().byte() if as_bytes else found.half()).cpu())
    prompts = list(dict.fromkeys(c for each in images for c in each.captions))
    for batch in _batches([p for p in prompts if p not in known], image.encode_batch):
        text = backbone.encode_prompts(batch, length=text_length(image, backbone))
        for row, prompt in enumerate(batch):
            known[prompt] = {name: _halved(value[row]) for name, value in text.items()}
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    most = max(len(each.captions) for each in images)
    captions = [[rows[c] for c in each.captions] for each in images]
    shard = {
        "latents": torch.cat(latents),
        "caption": torch.tensor([(row * most)[:most] for row in captions], dtype=torch.int32),
    }
    for name in known[prompts[0]]:
        shard[f"text/{name}"] = torch.stack([known[prompt][name] for prompt in prompts])
    if sum(value.nbytes for value in known[prompts[0]].values()) > 1 << 16:
        known.clear()
    return shard


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for first in range(0, len(items), size):
        yield list(items[first : first + size])


def _halved(value: Tensor) -> Tensor:
    """f16 for what is a float, and as it is otherwise."""
    return (value.half() if value.is_floating_point() else value).cpu()


@dataclass
class ImageCache:
    """One split of a finished cache, mapped, not read: at most `limit` images, spread over all, where it is set."""

    folder: Path
    split: str
    limit: int = 0

    def __post_init__(self) -> None:
        path = self.folder / INFO_NAME
        info = load_json(path, _INFO) if path.is_file() else {"counts": {}}
        if not info["counts"]:
            raise UserError(f"{self.folder} has no finished cache of images, which {INFO_NAME} would count")
        self.settings: dict[str, Any] = info["settings"]
        self._paths = sorted((self.folder / self.split).glob("shard-*.safetensors"))
        self._open: dict[int, Any] = {}
        sizes = [self._file(i).get_slice("caption").get_shape()[0] for i in range(len(self._paths))]
        places = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
        self._places: list[tuple[int, int]] = spread(places, self.limit)

    def __len__(self) -> int:
        return len(self._places)

    def negative(self) -> Text:
        """The text of the unconditional branch, (1, ...)."""
        return read_weights(self.folder / NEGATIVE_NAME)

    def read(self, index: int, caption: int) -> Batch:
        """`latents` (N,C) fp32 and `text/<name>` of one of its captions."""
        shard, row = self._places[index]
        file = self._file(shard)
        rows = file.get_slice("caption")[row]
        line = int(rows[caption % len(rows)])
        latents: Tensor = file.get_slice("latents")[row]
        number = latents.float() / 127.5 - 1 if latents.dtype == torch.uint8 else latents.float()
        names = [name for name in file.keys() if name.startswith("text/")]  # noqa: SIM118 (it is no mapping)
        return {"latents": number, **{name: file.get_slice(name)[line] for name in names}}

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = open_tensors(self._paths[shard], ("latents", "caption"))
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # another process maps the files itself


def text_of(batch: Batch) -> Text:
    """The arguments of the pipeline that are in a batch."""
    return {name.removeprefix("text/"): value for name, value in batch.items() if name.startswith("text/")}
