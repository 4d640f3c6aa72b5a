"""Options of `scripts/compare_decoding.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastic3d.config.base import check_range, option
from elastic3d.config.generate import DEFAULT_MODEL


@dataclass(kw_only=True)
class DecodingConfig:
    """What resolution and tolerance of the decoding cost, and what they leave of the mesh."""

    model: str = option(DEFAULT_MODEL, "folder of the model")
    images: Path = option(Path("data/samples"), "folder of images to sample latents from")
    seeds: list[int] = option([0, 1, 2], "seeds of the latents of each image")
    output: Path = option(
        Path("outputs/decoding"), "folder for latents.safetensors, shapes.json and table.md"
    )
    reference: int = option(256, "cells a side of the reference, evaluated everywhere at the surface")
    resolutions: list[int] = option(
        [64, 96, 128, 192, 256], "cells a side to compare with it, by default ways"
    )
    points: int = option(20000, "points on each mesh that distances are measured from")
    limit: int = option(0, "shapes, from the first; 0: all")

    def __post_init__(self) -> None:
        check_range("reference", self.reference, 8, 512)
        for resolution in self.resolutions:
            check_range("resolutions", resolution, 8, 512)
        check_range("points", self.points, 100, 1 << 24)
        check_range("limit", self.limit, 0, 1 << 20)
