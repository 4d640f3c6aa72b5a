"""Options of `scripts/benchmark.py`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from elastic3d.config.routing import MIN_BUDGET, BlockCacheConfig
from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.options import Options, option


class Method(Enum):
    """What can be a row of the table; `elastic3d.benchmark.methods` says how each is run."""

    dense = "dense"
    fewer_steps = "fewer_steps"
    euler_steps = "euler_steps"
    elastic = "elastic"
    elastic_no_cache = "elastic_no_cache"
    elastic_no_width = "elastic_no_width"
    elastic_paper_cache = "elastic_paper_cache"
    elastic_drift_cache = "elastic_drift_cache"
    elastic_shared = "elastic_shared"
    elastic_no_updates = "elastic_no_updates"
    updated_steps = "updated_steps"
    dense_cache = "dense_cache"
    random = "random"
    static = "static"
    timestep = "timestep"
    shuffled = "shuffled"


class Phase(Enum):
    """`quality` makes and scores meshes, `timing` takes times. Both keep what they did."""

    quality = "quality"
    timing = "timing"


@dataclass(kw_only=True)
class BenchmarkOptions(Options):
    """What the benchmarks of all models share."""

    output: Path = option(..., "folder for results.json, the plots, and all that makes a run resumable")
    variants: dict[str, str] = option(
        {}, "further rows, {name: folder}: of routers for the model, of a DiT, or of a whole model (shapes)"
    )
    methods: list[Method] = option([], "rows of the table; empty: all that the model and the items allow")
    budgets: list[float] = option(
        [1.0, 0.8, 0.65, 0.5, 0.4, 0.3],
        "budgets of elastic rows",
        ge=MIN_BUDGET,
        le=1,
        lengths=(1, 1000),
        unique=True,
    )
    control_budgets: list[float] = option(
        [], "budgets of controls and variants; empty: those of elastic rows", ge=MIN_BUDGET, le=1, unique=True
    )
    steps: list[int] = option(
        [8, 12, 16, 25, 50, 100], "step counts of fewer_steps", ge=1, le=1000, lengths=(1, 1000), unique=True
    )
    elastic_steps: list[int] = option([], "step counts of elastic rows; empty: baseline_steps", ge=1, le=1000)
    baseline_steps: int | None = option(
        None, "steps of dense, controls and variants; null: the model's default", ge=1, le=1000
    )
    reference_steps: int = option(
        100, "steps of the dense results that all others are paired with", ge=1, le=1000
    )
    seeds: list[int] = option(
        [0, 1, 2],
        "seeds of the noise; the first two or more give the seed floor",
        ge=0,
        le=2**63 - 1,
        lengths=(1, 1000),
        unique=True,
    )
    cache: BlockCacheConfig | None = option(None, "cache of elastic rows; null: the model's default")
    drifts: list[float] = option(
        [0.1], "drift limits of dense_cache, one row each", ge=0, le=100, lengths=(1, 1000), unique=True
    )
    intervals: list[int] = option(
        [2, 3],
        "dense_cache: every block computed every N-th step and forecast between, one row each",
        ge=2,
        le=1000,
    )
    limit: int = option(0, "items, spread evenly over all; 0 takes all", ge=0, le=1 << 20)
    phases: list[Phase] = option(
        [Phase.quality, Phase.timing],
        "what to do; the report is written in any case",
        lengths=(1, 1000),
        unique=True,
    )
    guidance: float | None = option(None, "guidance scale; null: the model's default", ge=0, le=100)
    resolution: int | None = option(
        None, "shapes: grid cells a side; pictures: pixels a side; null: the model's default", ge=8, le=512
    )
    batch_size: int = option(8, "quality: items generated at a time", ge=1, le=1 << 20)
    batches: list[int] = option([1, 4], "timing: batch sizes", ge=1, le=4096, lengths=(1, 1000), unique=True)
    repeats: int = option(5, "timing: rounds of the DiT alone, after a warm one", ge=1, le=1 << 20)
    end_to_end_repeats: int = option(2, "timing: rounds of everything, after a warm one", ge=0, le=1 << 20)
    calibration: Path | None = option(
        None,
        "items that static and timestep routes are found on, given as the others; null: the first of those",
    )
    calibration_samples: int = option(
        8, "items that static and timestep routes are found on", ge=1, le=1 << 20
    )
    calibration_calls: int = option(
        4, "static: random times an item at which the velocity is compared", ge=1, le=1 << 20
    )
    bootstrap: int = option(2000, "resamples behind the confidence intervals", ge=1, le=1_000_000)
    device: DeviceChoice = option(DeviceChoice.auto, "where the model runs")
    dtype: DTypeChoice = option(DTypeChoice.auto, "number format of the model")
    threads: int = option(0, "CPU threads of PyTorch; 0: its default", ge=0, le=1 << 20)

    def check(self) -> None:
        """Rows have names of their own."""
        for name in self.variants:
            if name in Method.__members__ or name == "model" or not name.isidentifier():
                raise ValueError(f"variants has {name!r}, expected another name, of letters, digits and _")


@dataclass(kw_only=True)
class BenchmarkConfig(BenchmarkOptions):
    """An elastic model against its dense self, fewer steps and controls: speed and fidelity in one table."""

    images: Path = option(..., "folder of pictures, each of one object")
    gt: Path | None = option(None, "folder of ground truth meshes named as the pictures; null: no F-scores")
    model: str = option("default", "folder of the elastic model; default is the bundled one")
    dense: str = option("", "folder of the dense model; empty: `model` without its routers")
    timing_images: int = option(4, "timing: pictures, spread evenly", ge=1, le=1 << 20)
    protocol: ProtocolConfig = option(ProtocolConfig, "how a mesh is scored: a file of configs/protocol")
    workers: int = option(0, "processes that score; 0 takes one a core", ge=0, le=1 << 20)
    sheet_images: int = option(8, "pictures in the contact sheet", ge=0, le=1 << 20)
