"""Real images: held-out renders that generated ones are compared with, and a classifier that learned from others."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from elastic3d.benchmark.config import ImageBenchmarkConfig
from elastic3d.benchmark.image_scores import Arrays, ImageFeatures, kept
from elastic3d.errors import UserError
from elastic3d.evaluation.probe import Probe, fit_probe
from elastic3d.training.datasets import read_split
from elastic3d.training.image import ImageStageConfig
from elastic3d.training.image_data import ImageFolder, ImageSource, ShapeViews, noun_in

LEAST = 20  # training images of a category that the classifier knows
FILE = "references.npz"


@dataclass(frozen=True)
class References:
    """Pooled features (R,D) of held-out renders; a classifier, and its accuracy on them."""

    features: NDArray[np.float32]
    probe: Probe | None = None
    trained_on: int = 0
    accuracy: float | None = None

    def about(self) -> dict[str, Any]:
        """For the report."""
        probe = {"classes": len(self.probe.classes) if self.probe else 0, "images": self.trained_on}
        return {"real_images": len(self.features), "classifier": probe | {"held_out_accuracy": self.accuracy}}


def load_references(config: ImageBenchmarkConfig, features: ImageFeatures, size: int) -> References | None:
    """Features of the real images, computed once and kept in the output; None where there are no real images.

    Args:
        size: pixels a side of the generated images, to which the real ones are brought first.

    Raises:
        UserError: `references` is no folder of images with captions.
    """
    if config.references is None and not config.prepared.is_dir():
        return None
    names = ("references", "prepared", "splits", "reference_views", "probe_shapes", "feature_size")
    facts = json.dumps([size, *(str(getattr(config, name)) for name in names)])

    def encoded() -> Arrays:
        found: Arrays = {}
        for part, source in _sources(config).items():
            found[part], nouns = _encoded(source, features, size, part)
            found[f"{part}_nouns"] = np.array(nouns)
        return found

    found = kept(config.output / FILE, hashlib.sha256(facts.encode()).hexdigest(), encoded)
    if "train" not in found:
        return References(found["real"])
    counts = Counter(found["train_nouns"].tolist())
    known = np.array([counts[noun] >= LEAST for noun in found["train_nouns"].tolist()])
    if len({noun for noun, count in counts.items() if count >= LEAST}) < 2:
        return References(found["real"])
    probe = fit_probe(found["train"][known], found["train_nouns"][known].tolist())
    accuracy = probe.accuracy(found["real"], found["real_nouns"].tolist())
    return References(found["real"], probe, int(known.sum()), accuracy)


def _sources(config: ImageBenchmarkConfig) -> dict[str, ImageSource]:
    options = ImageStageConfig(views=config.reference_views)
    if config.references is not None:
        options.val_every = 1  # all of them
        return {"real": ImageFolder(config.references, options, validation=True)}
    splits = {name: config.splits / f"{name}.txt" for name in ("train", "val", "test")}
    held_out = read_split([splits["val"], splits["test"]])
    sources: dict[str, ImageSource] = {"real": ShapeViews(config.prepared, held_out, options, 0, 1)}
    if config.probe_shapes:
        train = read_split([splits["train"]])
        sources["train"] = ShapeViews(config.prepared, train, options, config.probe_shapes, 0)
    return sources


def _encoded(
    source: ImageSource, features: ImageFeatures, size: int, name: str
) -> tuple[NDArray[np.float32], list[str]]:
    """Features (R,D) and the nouns of all images of a source; those that can't be read are left out."""
    parts, nouns = list[NDArray[np.float32]](), list[str]()
    images = list[NDArray[np.uint8]]()
    for index in tqdm(range(len(source)), desc=f"real images, {name}", dynamic_ncols=True):
        try:
            loaded = source.load(index, size)
        except UserError:
            continue
        images += [np.asarray(each.image) for each in loaded]
        nouns += [noun_in(each.captions[-1]) for each in loaded]
        if len(images) >= 256 or index == len(source) - 1:
            parts.append(features.pooled(np.stack(images)))
            images = []
    if images:
        parts.append(features.pooled(np.stack(images)))
    if sum(map(len, parts)) < 2:
        raise UserError(f"{len(nouns)} real images could be read, expected at least 2")
    return np.concatenate(parts), nouns


def category_accuracy(
    probe: Probe | None, features: NDArray[np.float32], prompts: Sequence[str]
) -> float | None:
    """Share of images in which the classifier finds what the prompt names; None where it knows none of that."""
    return None if probe is None else probe.accuracy(features, [noun_in(prompt) for prompt in prompts])
