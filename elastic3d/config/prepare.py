"""Options of `scripts/prepare_data.py`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elastic3d.config.base import check_range, option


class SourceName(Enum):
    """Where shapes come from."""

    infinigen = "infinigen"
    sweethome3d = "sweethome3d"
    primitives = "primitives"
    folder = "folder"


@dataclass(kw_only=True)
class ShapeConfig:
    """What is stored of every shape."""

    resolution: int = option(128, "cells a side of the grid that decides what is solid")
    surface_points: int = option(16384, "points on the outer surface")
    sharp_points: int = option(4096, "points along its sharp edges")
    near_points: int = option(16384, "points with distances close to the surface")
    volume_points: int = option(16384, "points with distances in the whole box")
    views: int = option(12, "rendered views")
    view_size: int = option(160, "pixels a side of a view")

    def __post_init__(self) -> None:
        check_range("shape.resolution", self.resolution, 32, 512)
        for name in ("surface_points", "sharp_points", "near_points", "volume_points"):
            check_range(f"shape.{name}", getattr(self, name), 1, 10_000_000)
        check_range("shape.views", self.views, 0, 1000)
        check_range("shape.view_size", self.view_size, 8, 4096)


@dataclass(kw_only=True)
class PrepareConfig:
    """Turn meshes into shards of training data."""

    source: SourceName = option(SourceName.folder, "infinigen, sweethome3d, primitives or folder")
    output: str = option("data/prepared", "folder for the shards; each source gets a folder in it")
    path: str = option(
        "", "folder: the directory with meshes; sweethome3d: an unpacked package, if you have one"
    )
    name: str = option("", "folder of this source under output; its own name if empty")
    splits: str = option("data/splits", "folder with train.txt, val.txt and test.txt")
    workers: int = option(0, "processes that prepare shards; 0 takes one per core")
    limit: int = option(0, "prepare only the first so many shapes; 0 takes all")
    shard_size: int = option(32, "shapes in a shard, which is the unit of work and of resuming")
    seed: int = option(0, "seed of every sample and view")
    timeout: float = option(300.0, "seconds after which a single shape is given up")
    cache_dir: str = option(
        "", "folder for downloads, raw meshes and Infinigen; the user's cache folder if empty"
    )
    infinigen_env: str = option(
        "", "an Infinigen environment you already have; created in the cache if empty"
    )
    val_share: float = option(
        0.1,
        "folder: share of the meshes kept for validation; of fewer than 10 all train and are validated on",
    )
    categories: list[str] = option([], "categories of Infinigen or of primitives; all if empty")
    seeds: int = option(200, "Infinigen seeds for every category")
    shapes: int = option(4000, "shapes of primitives, over all categories")
    generators: int = option(1, "Blender processes that make Infinigen meshes")
    shape: ShapeConfig = option(ShapeConfig, "what is stored of every shape")

    def __post_init__(self) -> None:
        check_range("workers", self.workers, 0, 1024)
        check_range("limit", self.limit, 0, 10_000_000)
        check_range("shard_size", self.shard_size, 1, 10_000)
        check_range("seed", self.seed, 0, 2**31)
        check_range("timeout", self.timeout, 1, 1e6)
        check_range("seeds", self.seeds, 1, 1_000_000)
        check_range("val_share", self.val_share, 0, 0.9)
        check_range("shapes", self.shapes, 1, 10_000_000)
        check_range("generators", self.generators, 1, 256)


@dataclass(kw_only=True)
class SplitsConfig:
    """Make the split lists."""

    output: str = option("data/splits", "folder for train.txt, val.txt and test.txt")
    path: str = option("", "the unpacked sweethome3d package, if you have one")
    cache_dir: str = option("", "folder for downloads; the user's cache folder if empty")
    seeds: int = option(300, "Infinigen seeds that the lists name, for every category")
    primitives: int = option(8000, "composed shapes that the lists name, over all categories")
    test: int = option(100, "models of sweethome3d for testing")
    val: int = option(20, "models of sweethome3d for validation")
    threshold: float = option(0.05, "models closer than this, of a longest side of 2, are near duplicates")
    seed: int = option(0, "which groups are drawn")

    def __post_init__(self) -> None:
        check_range("seeds", self.seeds, 200, 1_000_000)
        check_range("primitives", self.primitives, 4000, 10_000_000)
        check_range("test", self.test, 0, 1000)
        check_range("val", self.val, 0, 1000)
        check_range("threshold", self.threshold, 1e-4, 1)
        check_range("seed", self.seed, 0, 2**31)
