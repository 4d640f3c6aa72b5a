"""Scores of pictures against the dense ones of the same prompt and seed, and features of all; computed once a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from elastic3d.benchmark.images.features import PictureFeatures
from elastic3d.benchmark.images.place import ImagePlace
from elastic3d.benchmark.methods import Run
from elastic3d.evaluation.items import Row
from elastic3d.evaluation.perceptual import feature_distance
from elastic3d.evaluation.views import psnr, ssim
from elastic3d.utils.files import atomic_path

SAME_STEPS, REFERENCE = "dense", "reference"  # the dense pictures in the default and in many steps
ANCHORS = (SAME_STEPS, REFERENCE)
METRICS = ("psnr", "ssim", "feature")
SSIM_SIDE = 11  # pixels of its window
Maps = list[Tensor]


@dataclass
class Scores:
    """`rows` by (run, anchor), named `seed-<s>/<prompt number>`; `floors` by anchor; pooled features by run."""

    rows: dict[tuple[str, str], list[Row]] = field(default_factory=dict)
    floors: dict[str, list[Row]] = field(default_factory=dict)
    pooled: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def compare_pictures(
    first: NDArray[np.uint8], second: NDArray[np.uint8], maps: tuple[Maps, Maps]
) -> dict[str, NDArray[np.float64]]:
    """PSNR in dB, SSIM and feature distance (P,) of pictures (P,H,W,3) uint8, with what the network saw in them.

    SSIM is nan for pictures smaller than its window.
    """
    a, b = first / 255.0, second / 255.0
    small = min(a.shape[1:3]) < SSIM_SIDE
    return {
        "psnr": np.array([psnr(float(e)) for e in np.square(a - b).mean(axis=(1, 2, 3))]),
        "ssim": np.array([np.nan if small else ssim(x, y) for x, y in zip(a, b, strict=True)]),
        "feature": feature_distance(*maps).double().numpy(),
    }


def score_runs(place: ImagePlace, runs: Sequence[Run], features: PictureFeatures) -> Scores:
    """All runs whose pictures are all made, seed by seed; what was scored before is read.

    The floor of an anchor is the anchor itself against its pictures of the next seed, prompt by prompt.
    """
    seeds, planner, prompts = place.config.seeds, place.planner, place.prompts
    done = [run for run in runs if all(place.store.has(run, seed, prompts) for seed in seeds)]
    anchors = {SAME_STEPS: planner.dense(planner.baseline_steps), REFERENCE: planner.reference()}
    anchors = {name: run for name, run in anchors.items() if run in done}
    scores, pooled = Scores(), {run.name: list[NDArray[np.float32]]() for run in done}
    after = dict(zip(seeds, [*seeds[1:], seeds[0]], strict=True))
    with tqdm(total=len(seeds) * len(done), desc="scores", unit="run", dynamic_ncols=True) as bar:
        for seed in seeds:
            judge = _Judge(place, features, anchors, seed)
            for run in done:
                found = judge.scores(run)
                pooled[run.name].append(found.pop("pooled").astype(np.float32))
                for anchor in anchors:
                    scores.rows.setdefault((run.name, anchor), []).extend(_rows(found, anchor, seed))
                bar.update()
            for anchor in anchors if len(seeds) > 1 else ():
                found = judge.floor(anchor, after[seed])
                scores.floors.setdefault(anchor, []).extend(_rows(found, anchor, seed))
    scores.pooled = {name: np.concatenate(parts) for name, parts in pooled.items()}
    return scores


class _Judge:
    """The scores of one seed; the anchors' maps are kept while it lives."""

    def __init__(
        self, place: ImagePlace, features: PictureFeatures, anchors: dict[str, Run], seed: int
    ) -> None:
        self.place, self.features, self.anchors, self.seed = place, features, anchors, seed
        self._seen: dict[str, tuple[NDArray[np.uint8], Maps]] = {}

    def scores(self, run: Run) -> dict[str, NDArray[Any]]:
        """`<anchor>/<metric>` (P,) and `pooled` (P,1280) of a run's pictures."""
        path = self.place.config.output / "scores" / run.name / f"seed-{self.seed}.npz"
        found = _read(path, self._key())
        if found is None:
            pictures = self.place.store.pictures(run, self.seed, self.place.prompts)
            maps, pooled = self.features.maps(pictures)
            found = {"pooled": pooled.astype(np.float16)}
            for anchor in self.anchors:
                true, seen = self._anchor(anchor)
                found |= _named(anchor, compare_pictures(pictures, true, (maps, seen)))
            _write(path, self._key(), found)
        return found

    def floor(self, anchor: str, other: int) -> dict[str, NDArray[Any]]:
        """The same of an anchor's pictures of another seed, without features."""
        run = self.anchors[anchor]
        path = self.place.config.output / "scores" / run.name / f"floor-{anchor}-{self.seed}-{other}.npz"
        found = _read(path, self._key())
        if found is None:
            pictures = self.place.store.pictures(run, other, self.place.prompts)
            true, seen = self._anchor(anchor)
            maps = (self.features.maps(pictures)[0], seen)
            found = _named(anchor, compare_pictures(pictures, true, maps))
            _write(path, self._key(), found)
        return found

    def _anchor(self, name: str) -> tuple[NDArray[np.uint8], Maps]:
        if name not in self._seen:
            pictures = self.place.store.pictures(self.anchors[name], self.seed, self.place.prompts)
            self._seen[name] = pictures, self.features.maps(pictures)[0]
        return self._seen[name]

    def _key(self) -> str:
        names = {anchor: run.name for anchor, run in self.anchors.items()}
        facts = json.dumps([names, self.place.prompts, self.features.size])
        return hashlib.sha256(facts.encode()).hexdigest()


def _named(anchor: str, scores: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[Any]]:
    return {f"{anchor}/{name}": values for name, values in scores.items()}


def _rows(found: dict[str, NDArray[Any]], anchor: str, seed: int) -> list[Row]:
    columns = [found[f"{anchor}/{metric}"].tolist() for metric in METRICS]
    return [
        {"name": f"seed-{seed}/{number:05d}"}
        | {name: None if np.isnan(v) else v for name, v in zip(METRICS, values, strict=True)}
        for number, values in enumerate(zip(*columns, strict=True))
    ]


def _read(path: Path, key: str) -> dict[str, NDArray[Any]] | None:
    if not path.is_file():
        return None
    with np.load(path) as file:
        return {n: file[n] for n in file.files if n != "key"} if str(file["key"]) == key else None


def _write(path: Path, key: str, arrays: dict[str, NDArray[Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, key=np.array(key), **arrays)  # type: ignore[arg-type]  # as above
