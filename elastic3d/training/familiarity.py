"""Statistics of a model's training images, and the distance from which an image is unfamiliar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from elastic3d.errors import UserError
from elastic3d.models.image_encoder import (
    FAMILIARITY_RECORD,
    Familiarity,
    ImageEncoder,
    image_feature,
    load_image_encoder,
)
from elastic3d.models.images import IMAGE_SUFFIXES, prepare, to_tensor, without_drawings
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines.runtime import find_model
from elastic3d.training.datasets import PreparedShapes, read_split
from elastic3d.training.options import FamiliarityConfig
from elastic3d.training.views import augment_view, stored_views
from elastic3d.utils.files import save_json, visible_files


def measure_familiarity(config: FamiliarityConfig) -> dict[str, Any]:
    """Write statistics and a record of how they were measured into the model's folder; return the record.

    Raises:
        UserError: no shape of a split is prepared with a view that shows it, or too few for the components; a probe
            has no image that shows an object.
    """
    folder = find_model(config.model)
    shapes = {split: _shapes(config, split) for split in ("val", "train")}
    images = {
        probe: without_drawings(visible_files(probe, False, IMAGE_SUFFIXES), f"probe={probe}")
        for probe in config.probe
    }
    encoder = load_image_encoder(folder / "image_encoder")
    # probes and validation before the training images, which take the longest: an error comes soon
    probes = {probe.name: _probe_features(probe, paths, encoder) for probe, paths in images.items()}
    features = {}
    for split in shapes:
        found = list(_features(shapes[split], encoder, config, split))
        if not found:
            raise UserError(f"no shape of {split} in {config.prepared} has a view that shows it")
        features[split] = torch.cat(found)
    try:
        known = Familiarity.fit(features["train"], config.components)
    except ValueError as error:
        raise UserError(str(error)) from error
    distances = known.distance(features["val"][:, None]).double().numpy()
    limit = float(np.quantile(distances, 1 - config.false_alarms, method="higher"))
    threshold = float(np.nextafter(np.float32(limit), np.float32(np.inf)))  # images at the limit are familiar
    known = Familiarity(known.mean, known.components, known.scale, torch.tensor([threshold]))
    record = {
        "sources": config.sources,
        "train_images": len(features["train"]),
        "val_images": len(distances),
        "val_distance": _spread(distances),
        "val_false_alarms": float((distances >= threshold).mean()),
        "threshold": threshold,
        "probes": {name: _unfamiliar(known, *found) for name, found in probes.items()},
    }
    known.save(folder)
    save_json(record, folder / FAMILIARITY_RECORD)
    return record


def _shapes(config: FamiliarityConfig, split: str) -> PreparedShapes:
    listed = read_split(getattr(config, split))
    return PreparedShapes(config.prepared, [id for id in listed if id.partition("/")[0] in config.sources])


@torch.no_grad()
def _features(
    shapes: PreparedShapes, encoder: ImageEncoder, config: FamiliarityConfig, split: str
) -> Iterator[Tensor]:
    """Features (V,Cc) of each shape's views, every second one as people give them."""
    bar = tqdm(shapes.ids, desc=split, unit="shape", disable=None)
    for place, id in enumerate(bar):
        rng = np.random.default_rng([place, split == "val"])
        try:
            views = stored_views(shapes, id)[: config.views]
        except UserError as error:
            bar.write(f"skipped: {error}")
            continue
        views = [augment_view(view, rng) if i % 2 else view for i, view in enumerate(views)]
        images = [prepare(view, ForegroundConfig(), encoder)[0] for view in views]
        yield image_feature(encoder(to_tensor(images)))


@torch.no_grad()
def _probe_features(folder: Path, paths: Sequence[Path], encoder: ImageEncoder) -> tuple[Tensor, int]:
    """Features (I,Cc) of the images of a folder, and how many are left out: they show no object."""
    found, unused = [], 0
    for path in paths:
        try:
            image = prepare(path, ForegroundConfig(), encoder)[0]
        except UserError:
            unused += 1
            continue
        found.append(image_feature(encoder(to_tensor([image]))))
    if not found:
        raise UserError(f"probe={folder} has no image that shows an object")
    return torch.cat(found), unused


def _unfamiliar(known: Familiarity, features: Tensor, unused: int) -> dict[str, Any]:
    """What is recorded of a probe's features (I,Cc)."""
    distances = known.distance(features[:, None]).double().numpy()
    return {
        "images": len(distances),
        "without_object": unused,
        "unfamiliar": float((distances >= float(known.threshold)).mean()),
        "distance": _spread(distances),
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "least": float(values.min()),
        "median": float(np.median(values)),
        "q98": float(np.quantile(values, 0.98)),
        "most": float(values.max()),
    }
