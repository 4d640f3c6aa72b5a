"""Images and prompts as a backbone's latents and embeddings, computed once and kept in shards.

`<cache>/<train|val>/shard-00012.safetensors`: `latents` (n,N,C), uint8 where a backbone's latents are pixels, else
f16; `caption` (n,c) rows of `text/<name>` (k, ...), the arguments of the pipeline. `<cache>/cache.json` holds what it
was made with, `<cache>/negative.safetensors` the text of the unconditional branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from elastic3d.errors import UserError
from elastic3d.pipelines.backbones import Backbone, Text
from elastic3d.training.datasets import Batch, read_split
from elastic3d.training.image_data import Captioned, ImageDataConfig, ImageSource, open_images
from elastic3d.training.options import DataConfig
from elastic3d.utils.structured import Number, load_json, save_json
from elastic3d.utils.tensors import open_tensors, read_weights, save_weights

INFO_NAME, NEGATIVE_NAME = "cache.json", "negative.safetensors"
_INFO = {"settings": dict, "counts": {str: Number(0, whole=True)}}


def build_image_cache(image: ImageDataConfig, data: DataConfig, backbone: Backbone, seed: int) -> None:
    """Encode training and validation images; what an earlier call finished stays as it is.

    An image that can't be read is reported and left out. UserError where the folder holds a cache of other images,
    or made otherwise.
    """
    size = image.size or backbone.default_size
    settings = cache_settings(image, backbone, size)
    output = image.cache
    path = output / INFO_NAME
    if path.is_file():
        found = load_json(path, _INFO)
        differing = [name for name, value in settings.items() if found["settings"].get(name) != value]
        if differing:
            raise UserError(
                f"{output} was made with another {differing[0]}: delete it, or choose another image.cache="
            )
        if found["counts"]:
            return
    save_json({"settings": settings, "counts": {}}, path)
    negative = backbone.encode_prompts([backbone.negative], length=text_length(image, backbone))
    save_weights({name: _halved(value) for name, value in negative.items()}, output / NEGATIVE_NAME)
    counts = {}
    for split, paths in (("train", data.train), ("val", data.val)):
        ids = [] if image.images is not None else read_split(paths)
        limit = data.limit if split == "train" else 0
        source = open_images(image, data.prepared, ids, limit, seed, split == "val")
        counts[split] = _write_split(source, output / split, image, backbone, size)
    save_json({"settings": settings, "counts": counts}, path)


def cache_settings(image: ImageDataConfig, backbone: Backbone, size: int) -> dict[str, Any]:
    """All that decides what is in a cache."""
    names = ("views", "recolour", "background") if image.images is None else ("val_every",)
    return {
        "backbone": backbone.name.name,
        "images": str(image.images) if image.images else None,
        "size": size,
        "patch": backbone.multiple,
        "text_length": text_length(image, backbone),
        **{name: getattr(image, name) for name in names},
    }


def text_length(image: ImageDataConfig, backbone: Backbone) -> int:
    """Tokens of a cached prompt."""
    return min(image.text_length, backbone.longest)


def _write_split(
    source: ImageSource, folder: Path, image: ImageDataConfig, backbone: Backbone, size: int
) -> int:
    """Shards of one split -> how many images they hold."""
    total = 0
    known: dict[str, Text] = {}
    with tqdm(total=len(source), desc=f"cache {folder.name}", dynamic_ncols=True) as bar:
        stream = _stream(source, size, bar)
        for number in range(1 << 30):
            images = list(islice(stream, image.shard))
            if not images:
                break
            target = folder / f"shard-{number:05d}.safetensors"
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
        latents.append(_stored(backbone.encode_images(tensor), backbone.stores_bytes))
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


def _stored(latents: Tensor, as_bytes: bool) -> Tensor:
    return ((latents.float() + 1) * 127.5).round().byte().cpu() if as_bytes else latents.half().cpu()


@dataclass
class ImageCache:
    """One split of a finished cache, mapped, not read.

    Attributes:
        count: images; at most `limit`, spread over all, where it is set.
    """

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
        self._places = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
        if 0 < self.limit < len(self._places):
            whole = len(self._places)
            self._places = [self._places[i * whole // self.limit] for i in range(self.limit)]

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
