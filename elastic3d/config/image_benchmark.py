"""Options of `scripts/benchmark.py` for a text-to-image model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from elastic3d.config.base import check_range, option
from elastic3d.config.benchmark import BenchmarkOptions
from elastic3d.config.generate import check_sampling
from elastic3d.config.text_to_image import BackboneName

DEFAULT_PROMPTS = "data/prompts/image-small.txt"


class CacheName(Enum):
    """Training-free caches of others that run on the dense transformer, and are rows of the table."""

    first_block_cache = "first_block_cache"
    taylor_seer = "taylor_seer"
    taylor_seer_lite = "taylor_seer_lite"
    mag_cache = "mag_cache"
    db_cache = "db_cache"


@dataclass(kw_only=True)
class ImageBenchmarkConfig(BenchmarkOptions):
    """An elastic text-to-image model against its dense self, fewer steps, controls, and caches of others."""

    backbone: BackboneName = option(BackboneName.small, "family of the pipeline")
    weights: str = option("", "folder of the pipeline as published; empty: the bundled one")
    routers: str = option("", "folder of routers; empty: `routers` in the folder of the weights, if there")
    prompts: Path | None = option(None, f"text file, one prompt a line; null: {DEFAULT_PROMPTS}")
    steps: list[int] = option([4, 6, 8, 10, 12, 16, 20, 25], "step counts of fewer_steps")
    batch_size: int = option(16, "quality: pictures generated at a time")
    timing_prompts: int = option(4, "timing: prompts, spread evenly")
    sheet_prompts: int = option(8, "prompts in the contact sheet")
    caches: list[CacheName] = option(list(CacheName), "caches of others to put beside")
    cache_steps: list[int] = option([], "step counts of caches of others; empty: baseline_steps")
    first_block_thresholds: list[float] = option([0.05, 0.1, 0.2, 0.4], "first_block_cache: one row each")
    taylor_intervals: list[int] = option([2, 3, 5], "taylor_seer, taylor_seer_lite: one row each")
    taylor_warmup: int = option(3, "taylor_seer, taylor_seer_lite: steps that are computed first")
    mag_thresholds: list[float] = option([0.06, 0.12, 0.24, 0.5], "mag_cache: one row each")
    db_thresholds: list[float] = option([0.05, 0.1, 0.2, 0.4], "db_cache: one row for each and db_blocks")
    db_blocks: list[int] = option([1], "db_cache: first blocks that are always computed")
    batched_decisions: bool = option(
        False, "run caches that decide for a whole batch in batches: faster, but samples depend on others"
    )
    prepared: Path = option(
        Path("data/prepared"), "prepared shapes, whose held-out views are the real pictures"
    )
    splits: Path = option(Path("data/splits"), "folder of train.txt, val.txt and test.txt")
    references: Path | None = option(
        None, "folder of real pictures with captions (a.png with a.txt) instead; then without a classifier"
    )
    reference_views: int = option(2, "views of each held-out shape that are real pictures")
    probe_shapes: int = option(1500, "training shapes whose views the classifier learns from")
    feature_size: int = option(128, "pixels a side at which EfficientNet sees a picture")

    def __post_init__(self) -> None:
        super().__post_init__()
        for count in self.cache_steps:
            check_sampling(count, None, None)
        if not self.weights and self.backbone is not BackboneName.small:
            raise ValueError(f"weights= is missing: the folder of the {self.backbone.name} pipeline")
        for name in ("timing_prompts", "reference_views"):
            check_range(name, getattr(self, name), 1, 1 << 20)
        for name in ("sheet_prompts", "probe_shapes", "taylor_warmup"):
            check_range(name, getattr(self, name), 0, 1 << 20)
        for name in ("first_block_thresholds", "mag_thresholds", "db_thresholds"):
            for threshold in getattr(self, name):
                check_range(name, threshold, 0, 100)
        for interval in self.taylor_intervals:
            check_range("taylor_intervals", interval, 2, 1000)
        for blocks in self.db_blocks:
            check_range("db_blocks", blocks, 1, 1000)
        if not 32 <= self.feature_size <= 1024 or self.feature_size % 32:
            raise ValueError(f"feature_size is {self.feature_size}, expected a multiple of 32 up to 1024")
        for name in self.variants:
            if name in CacheName.__members__:
                raise ValueError(f"variants has {name!r}, which is the name of a cache")
