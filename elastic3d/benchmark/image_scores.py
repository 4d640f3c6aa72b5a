"""Scores of images against the dense ones of the same prompt and seed, and features of all; computed once a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from elastic3d.benchmark.methods import Run
from elastic3d.benchmark.task import Scores
from elastic3d.evaluation.items import Row
from elastic3d.evaluation.perceptual import feature_distance
from elastic3d.evaluation.views import psnr, ssim
from elastic3d.models.image_encoder import EfficientNetLite
from elastic3d.models.options import ImageEncoderConfig
from elastic3d.utils.files import atomic_path

SAME_STEPS, REFERENCE = "dense", "reference"  # the dense images in the default and in many steps
METRICS = ("psnr", "ssim", "feature")
SSIM_SIDE = 11  # pixels of its window
BATCH = 32
Pixels = NDArray[np.uint8]
Maps = list[Tensor]
Arrays = dict[str, NDArray[Any]]


class ImageFeatures:
    """What EfficientNet-Lite0 sees, frozen, at one size; smaller images are enlarged, all in the same way."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.network = EfficientNetLite(ImageEncoderConfig(image_size=size)).to(device)

    @torch.no_grad()
    def maps(self, images: Pixels) -> tuple[Maps, NDArray[np.float32]]:
        """Images (P,H,W,3) uint8 -> a map (P,C,h,w) f16 for each resolution, and pooled features (P,1280)."""
        parts: list[Maps] = []
        pooled = []
        for batch in self._batches(images):
            maps, flat = self.network.pyramid(batch)
            parts.append([each.half().cpu() for each in maps])
            pooled.append(flat.cpu().numpy())
        return [torch.cat(scale) for scale in zip(*parts, strict=True)], np.concatenate(pooled)

    @torch.no_grad()
    def pooled(self, images: Pixels) -> NDArray[np.float32]:
        """Images (P,H,W,3) uint8 -> (P,1280)."""
        return np.concatenate([self.network.pooled(batch).cpu().numpy() for batch in self._batches(images)])

    def _batches(self, images: Pixels) -> list[Tensor]:
        found, size = [], (self.size, self.size)
        for start in range(0, len(images), BATCH):
            part = np.ascontiguousarray(images[start : start + BATCH])
            x = torch.from_numpy(part).permute(0, 3, 1, 2).float().to(self.network.mean.device) / 255
            if x.shape[-2:] != size:
                x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)
            found.append(x)
        return found


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


def kept(path: Path, key: str, make: Callable[[], Arrays]) -> Arrays:
    """What a file holds; made and written first where there is none, or one of another `key`."""
    if path.is_file():
        with np.load(path) as file:
            if str(file["key"]) == key:
                return {name: file[name] for name in file.files if name != "key"}
    found = make()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, key=np.array(key), **found)  # type: ignore[arg-type]
    return found


class Judge:
    """Scores runs beside their `anchors`; `images(run, seed, prompts)` are those that were made. What was scored before
    is read from `folder`."""

    def __init__(
        self,
        folder: Path,
        features: ImageFeatures,
        prompts: Sequence[str],
        anchors: dict[str, Run],
        images: Callable[[Run, int, Sequence[str]], Pixels],
    ) -> None:
        self.folder, self.features, self.prompts = folder, features, prompts
        self.anchors, self.images = anchors, images
        self._seen: dict[str, tuple[Pixels, Maps]] = {}  # of one seed
        facts = json.dumps([{a: run.name for a, run in anchors.items()}, list(prompts), features.size])
        self._key = hashlib.sha256(facts.encode()).hexdigest()

    def score(
        self, runs: Sequence[Run], seeds: Sequence[int], after: Callable[[int], int]
    ) -> tuple[Scores, dict[str, NDArray[np.float32]]]:
        """Rows and floors (`after`: the seed that another is compared with), and pooled features by run."""
        scores, pooled = Scores(), {run.name: list[NDArray[np.float32]]() for run in runs}
        with tqdm(total=len(seeds) * len(runs), desc="scores", unit="run", dynamic_ncols=True) as bar:
            for seed in seeds:
                self._seen.clear()
                for run in runs:
                    found = self._of(run, seed, list(self.anchors), f"seed-{seed}", seed)
                    pooled[run.name].append(found.pop("pooled").astype(np.float32))
                    for anchor in self.anchors:
                        scores.rows.setdefault((run.name, anchor), []).extend(_rows(found, anchor, seed))
                    bar.update()
                for anchor, run in self.anchors.items() if len(seeds) > 1 else ():
                    other = after(seed)
                    found = self._of(run, other, [anchor], f"floor-{anchor}-{seed}-{other}", seed)
                    scores.floors.setdefault(anchor, []).extend(_rows(found, anchor, seed))
        return scores, {name: np.concatenate(parts) for name, parts in pooled.items()}

    def _of(self, run: Run, made: int, anchors: Sequence[str], name: str, seed: int) -> Arrays:
        """`<anchor>/<metric>` (P,) and `pooled` (P,1280) of a run's images of the seed `made` beside those of the
        anchors of `seed`."""

        def scored() -> Arrays:
            images = self.images(run, made, self.prompts)
            maps, pooled = self.features.maps(images)
            found: Arrays = {"pooled": pooled.astype(np.float16)}
            for anchor in anchors:
                true, seen = self._anchor(anchor, seed)
                scores = compare_images(images, true, (maps, seen))
                found |= {f"{anchor}/{metric}": values for metric, values in scores.items()}
            return found

        return kept(self.folder / run.name / f"{name}.npz", self._key, scored)

    def _anchor(self, name: str, seed: int) -> tuple[Pixels, Maps]:
        if name not in self._seen:
            images = self.images(self.anchors[name], seed, self.prompts)
            self._seen[name] = images, self.features.maps(images)[0]
        return self._seen[name]


def _rows(found: Arrays, anchor: str, seed: int) -> list[Row]:
    columns = [found[f"{anchor}/{metric}"].tolist() for metric in METRICS]
    return [
        {"name": f"seed-{seed}/{number:05d}"}
        | {name: None if np.isnan(v) else v for name, v in zip(METRICS, values, strict=True)}
        for number, values in enumerate(zip(*columns, strict=True))
    ]
