"""Options of `scripts/benchmark.py` for a text-to-image model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from elastic3d.benchmark.options import BenchmarkOptions
from elastic3d.pipelines.options import BackboneName
from elastic3d.utils.options import option

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
    steps: list[int] = option(
        [4, 6, 8, 10, 12, 16, 20, 25],
        "step counts of fewer_steps",
        ge=1,
        le=1000,
        lengths=(1, 1000),
        unique=True,
    )
    batch_size: int = option(16, "quality: pictures generated at a time", ge=1, le=1 << 20)
    timing_prompts: int = option(4, "timing: prompts, spread evenly", ge=1, le=1 << 20)
    sheet_prompts: int = option(8, "prompts in the contact sheet", ge=0, le=1 << 20)
    caches: list[CacheName] = option(list(CacheName), "caches of others to put beside")
    cache_steps: list[int] = option(
        [], "step counts of caches of others; empty: baseline_steps", ge=1, le=1000
    )
    first_block_thresholds: list[float] = option(
        [0.05, 0.1, 0.2, 0.4], "first_block_cache: one row each", ge=0, le=100
    )
    taylor_intervals: list[int] = option(
        [2, 3, 5], "taylor_seer, taylor_seer_lite: one row each", ge=2, le=1000
    )
    taylor_warmup: int = option(
        3, "taylor_seer, taylor_seer_lite: steps that are computed first", ge=0, le=1 << 20
    )
    mag_thresholds: list[float] = option([0.06, 0.12, 0.24, 0.5], "mag_cache: one row each", ge=0, le=100)
    db_thresholds: list[float] = option(
        [0.05, 0.1, 0.2, 0.4], "db_cache: one row for each and db_blocks", ge=0, le=100
    )
    db_blocks: list[int] = option([1], "db_cache: first blocks that are always computed", ge=1, le=1000)
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
    reference_views: int = option(2, "views of each held-out shape that are real pictures", ge=1, le=1 << 20)
    probe_shapes: int = option(
        1500, "training shapes whose views the classifier learns from", ge=0, le=1 << 20
    )
    feature_size: int = option(
        128, "pixels a side at which EfficientNet sees a picture", ge=32, le=1024, multiple_of=32
    )

    def check(self) -> None:
        """A published pipeline has a folder; rows have names of their own."""
        super().check()
        if not self.weights and self.backbone is not BackboneName.small:
            raise ValueError(f"weights= is missing: the folder of the {self.backbone.name} pipeline")
        for name in self.variants:
            if name in CacheName.__members__:
                raise ValueError(f"variants has {name!r}, which is the name of a cache")
