"""Options of `scripts/prepare_data.py`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elastic3d.utils.options import Options, option


class SourceName(Enum):
    """Where shapes come from."""

    infinigen = "infinigen"
    sweethome3d = "sweethome3d"
    primitives = "primitives"
    folder = "folder"


@dataclass(kw_only=True)
class ShapeConfig(Options):
    """What is stored of every shape."""

    resolution: int = option(128, "cells a side of the grid that decides what is solid", ge=32, le=512)
    surface_points: int = option(16384, "points on the outer surface", ge=1, le=10_000_000)
    sharp_points: int = option(4096, "points along its sharp edges", ge=1, le=10_000_000)
    near_points: int = option(16384, "points with distances close to the surface", ge=1, le=10_000_000)
    volume_points: int = option(16384, "points with distances in the whole box", ge=1, le=10_000_000)
    views: int = option(12, "rendered views", ge=0, le=1000)
    view_size: int = option(160, "pixels a side of a view", ge=8, le=4096)


@dataclass(kw_only=True)
class PrepareConfig(Options):
    """Turn meshes into shards of training data."""

    source: SourceName = option(SourceName.folder, "infinigen, sweethome3d, primitives or folder")
    output: str = option("data/prepared", "folder for the shards; each source gets a folder in it")
    path: str = option(
        "", "folder: the directory with meshes; sweethome3d: an unpacked package, if you have one"
    )
    name: str = option("", "folder: its folder under output, and the start of its ids; folder if empty")
    splits: str = option("data/splits", "folder with train.txt, val.txt and test.txt")
    workers: int = option(0, "processes that prepare shards; 0 takes one per core", ge=0, le=1024)
    limit: int = option(0, "prepare only the first N shapes; 0 takes all", ge=0, le=10_000_000)
    shard_size: int = option(
        32, "shapes in a shard, which is the unit of work and of resuming", ge=1, le=10_000
    )
    seed: int = option(0, "seed of every sample and view", ge=0, le=2**31)
    timeout: float = option(300.0, "seconds after which a single shape is given up", ge=1, le=1e6)
    retry: bool = option(
        False, "try skipped shapes again: after more memory, another timeout=, a package that was missing"
    )
    cache_dir: str = option(
        "", "folder for downloads, raw meshes and Infinigen; the user's cache folder if empty"
    )
    infinigen_env: str = option(
        "", "an Infinigen environment you already have; created in the cache if empty"
    )
    val_share: float = option(
        0.1,
        "folder: share of the meshes kept for validation; of fewer than 10 all train and are validated on",
        ge=0,
        le=0.9,
    )
    categories: list[str] = option([], "categories of Infinigen or of primitives; all if empty")
    seeds: int = option(300, "Infinigen seeds for every category", ge=1, le=1_000_000)
    shapes: int = option(4000, "shapes of primitives, over all categories", ge=1, le=10_000_000)
    generators: int = option(1, "Blender processes that make Infinigen meshes", ge=1, le=256)
    shape: ShapeConfig = option(ShapeConfig, "what is stored of every shape")

    def check(self) -> None:
        """The name is that of one folder, and of the ids in it."""
        super().check()
        if "/" in self.name or "\0" in self.name or self.name in (".", ".."):
            raise ValueError(f"name is {self.name!r}, expected a folder name")
        source = self.source.value
        if self.source is not SourceName.folder and self.name not in ("", source):
            raise ValueError(
                f"name is {self.name!r}, expected none with source={source}: training finds its shapes as {source}/...;"
                " choose another output= to keep them apart"
            )


@dataclass(kw_only=True)
class SplitsConfig(Options):
    """Make the split lists."""

    output: str = option("data/splits", "folder for train.txt, val.txt and test.txt")
    path: str = option("", "the unpacked sweethome3d package, if you have one")
    cache_dir: str = option("", "folder for downloads; the user's cache folder if empty")
    seeds: int = option(300, "Infinigen seeds that the lists name, for every category", ge=200, le=1_000_000)
    primitives: int = option(
        8000, "composed shapes that the lists name, over all categories", ge=4000, le=10_000_000
    )
    test: int = option(100, "models of sweethome3d for testing", ge=0, le=1000)
    val: int = option(20, "models of sweethome3d for validation", ge=0, le=1000)
    threshold: float = option(
        0.05, "models closer than this, of a longest side of 2, are near duplicates", ge=1e-4, le=1
    )
    seed: int = option(0, "which groups are drawn", ge=0, le=2**31)
