"""Scores of images: against the dense ones of the same prompt and seed, and by their features beside real images, which
are held-out renders, and for a classifier that learned from others. What is computed is kept in files."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from elastic3d.benchmark.config import ImageBenchmarkConfig
from elastic3d.benchmark.task import Pixels
from elastic3d.errors import UserError
from elastic3d.evaluation.sets import Probe, fit_probe, frechet_distance, kernel_distance
from elastic3d.evaluation.views import feature_distance, psnr, ssim
from elastic3d.models.image_encoder import EfficientNetLite
from elastic3d.training.datasets import read_split
from elastic3d.training.image import ImageStageConfig
from elastic3d.training.image_data import ImageFolder, ImageSource, ShapeViews, noun_in
from elastic3d.utils.files import atomic_path

METRICS = ("psnr", "ssim", "feature")
SSIM_SIDE = 11  # pixels of its window
BATCH = 32
LEAST = 20  # training images of a category that the classifier knows
VIEWS = 2  # of a shape
PROBE_SHAPES = 1500  # whose views the classifier learns from
Maps = list[Tensor]
Arrays = dict[str, NDArray[Any]]
Features = NDArray[np.float32]


@torch.no_grad()
def feature_maps(network: EfficientNetLite, images: Pixels) -> tuple[Maps, Features]:
    """Images (P,H,W,3) uint8 -> a map (P,C,h,w) f16 for each resolution, and pooled features (P,1280).

    The network sees all at its own size; smaller images are enlarged, all in the same way.
    """
    size, parts, pooled = (network.config.image_size,) * 2, list[Maps](), list[Features]()
    for batch in torch.from_numpy(images).permute(0, 3, 1, 2).split(BATCH):
        x = batch.float().to(network.mean.device) / 255
        if x.shape[-2:] != size:
            x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)
        maps, flat = network.pyramid(x)
        parts.append([each.half().cpu() for each in maps])
        pooled.append(flat.cpu().numpy())
    return [torch.cat(scale) for scale in zip(*parts, strict=True)], np.concatenate(pooled)


def compare_images(first: Pixels, second: Pixels, maps: tuple[Maps, Maps]) -> dict[str, NDArray[np.float64]]:
    """PSNR in dB, SSIM and feature distance (P,) of images (P,H,W,3) uint8, with what the network saw in them.

    SSIM is nan for images smaller than its window.
    """
    a, b = first / 255.0, second / 255.0
    small = min(a.shape[1:3]) < SSIM_SIDE
    return {
        "psnr": np.array([psnr(float(e)) for e in np.square(a - b).mean(axis=(1, 2, 3))]),
        "ssim": np.array([np.nan if small else ssim(x, y) for x, y in zip(a, b, strict=True)]),
        "feature": feature_distance(*maps).double().numpy(),
    }


def kept(path: Path, facts: object, make: Callable[[], Arrays]) -> Arrays:
    """What a file holds; made and written first where there is none, or one that goes back to other `facts`."""
    key = hashlib.sha256(repr(facts).encode()).hexdigest()
    if path.is_file():
        with np.load(path) as file:
            if str(file["key"]) == key:
                return {name: file[name] for name in file.files if name != "key"}
    found = make()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, key=np.array(key), **found)  # type: ignore[arg-type]
    return found


# -------------------------------------------------------------------------------------------------- real images


@dataclass(frozen=True)
class References:
    """Pooled features (R,D) of held-out renders; a classifier, and its accuracy on them."""

    features: Features
    probe: Probe | None = None
    trained_on: int = 0
    accuracy: float | None = None

    def scores(self, features: Features, prompts: Sequence[str]) -> dict[str, float | None]:
        """Distances of generated images to these, and whether the classifier finds what the prompts name; None where it
        knows none of that."""
        nouns = [noun_in(prompt) for prompt in prompts]
        found = {"category_accuracy": self.probe.accuracy(features, nouns) if self.probe else None}
        if len(features) > 1:
            found["frechet"] = frechet_distance(features, self.features)
            found["kernel"] = kernel_distance(features, self.features)
        return found

    def about(self) -> dict[str, Any]:
        """For the report."""
        probe = {"classes": len(self.probe.classes) if self.probe else 0, "images": self.trained_on}
        return {"real_images": len(self.features), "classifier": probe | {"held_out_accuracy": self.accuracy}}


def load_references(config: ImageBenchmarkConfig, network: EfficientNetLite, size: int) -> References | None:
    """Features of the real images, computed once and kept in the output; None where there are no real images.

    Args:
        size: pixels a side of the generated images, to which the real ones are brought first.

    Raises:
        UserError: `references` is no folder of images with captions.
    """
    if config.references is None and not config.prepared.is_dir():
        return None
    facts = (size, config.references, config.prepared, config.splits, config.feature_size)
    found = kept(config.output / "references.npz", facts, partial(_encoded, config, network, size))
    counts = Counter(found["train_nouns"].tolist() if "train" in found else ())
    nouns = [noun for noun, count in counts.items() if count >= LEAST]
    if len(nouns) < 2:
        return References(found["real"])
    known = np.isin(found["train_nouns"], nouns)
    probe = fit_probe(found["train"][known], found["train_nouns"][known].tolist())
    accuracy = probe.accuracy(found["real"], found["real_nouns"].tolist())
    return References(found["real"], probe, int(known.sum()), accuracy)


def _sources(config: ImageBenchmarkConfig) -> dict[str, ImageSource]:
    options = ImageStageConfig(views=VIEWS)
    if config.references is not None:
        options.val_every = 1  # all of them
        return {"real": ImageFolder(config.references, options, validation=True)}
    train, val, test = ([config.splits / f"{name}.txt"] for name in ("train", "val", "test"))
    return {
        "real": ShapeViews(config.prepared, read_split(val + test), options, 0, 1),
        "train": ShapeViews(config.prepared, read_split(train), options, PROBE_SHAPES, 0),
    }


def _encoded(config: ImageBenchmarkConfig, network: EfficientNetLite, size: int) -> Arrays:
    """Features (R,D) and the nouns of all images of each source; those that can't be read are left out."""
    found: Arrays = {}
    for name, source in _sources(config).items():
        parts, nouns = list[Features](), list[str]()
        for index in tqdm(range(len(source)), desc=f"real images, {name}", dynamic_ncols=True):
            try:
                loaded = source.load(index, size)
            except UserError:
                continue
            if loaded:
                parts.append(feature_maps(network, np.stack([np.asarray(each.image) for each in loaded]))[1])
                nouns += [noun_in(each.captions[-1]) for each in loaded]
        if len(nouns) < 2:
            raise UserError(f"{len(nouns)} real images could be read, expected at least 2")
        found |= {name: np.concatenate(parts), f"{name}_nouns": np.array(nouns)}
    return found
