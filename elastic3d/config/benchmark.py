"""Options of `scripts/benchmark.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from elastic3d.config.base import DeviceChoice, DTypeChoice, check_range, option
from elastic3d.config.evaluate import ProtocolConfig
from elastic3d.config.generate import check_sampling
from elastic3d.config.routing import BlockCacheConfig, check_budget


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
class BenchmarkOptions:
    """What the benchmarks of all models share."""

    output: Path = field(
        metadata={"help": "folder for results.json, the plots, and all that makes a run resumable"}
    )
    variants: dict[str, str] = option(
        {}, "further rows, {name: folder}: of routers for the model, of a DiT, or of a whole model (shapes)"
    )
    methods: list[Method] = option([], "rows of the table; empty: all that the model and the items allow")
    budgets: list[float] = option([1.0, 0.8, 0.65, 0.5, 0.4, 0.3], "budgets of elastic rows")
    control_budgets: list[float] = option(
        [], "budgets of controls and variants; empty: those of elastic rows"
    )
    steps: list[int] = option([8, 12, 16, 25, 50, 100], "step counts of fewer_steps")
    elastic_steps: list[int] = option([], "step counts of elastic rows; empty: baseline_steps")
    baseline_steps: int | None = option(
        None, "steps of dense, controls and variants; null: the model's default"
    )
    reference_steps: int = option(100, "steps of the dense results that all others are paired with")
    seeds: list[int] = option([0, 1, 2], "seeds of the noise; the first two or more give the seed floor")
    cache: BlockCacheConfig | None = option(None, "cache of elastic rows; null: the model's default")
    drifts: list[float] = option([0.1], "drift limits of dense_cache, one row each")
    intervals: list[int] = option(
        [2, 3], "dense_cache: every block computed every so-manieth step and forecast between, one row each"
    )
    limit: int = option(0, "items, spread evenly over all; 0 takes all")
    phases: list[Phase] = option(
        [Phase.quality, Phase.timing], "what to do; the report is written in any case"
    )
    guidance: float | None = option(None, "guidance scale; null: the model's default")
    resolution: int | None = option(
        None, "shapes: grid cells a side; pictures: pixels a side; null: the model's default"
    )
    batch_size: int = option(8, "quality: items generated at a time")
    batches: list[int] = option([1, 4], "timing: batch sizes")
    repeats: int = option(5, "timing: rounds of the DiT alone, after a warm one")
    end_to_end_repeats: int = option(2, "timing: rounds of everything, after a warm one")
    calibration: Path | None = option(
        None,
        "items that static and timestep routes are found on, given as the others; null: the first of those",
    )
    calibration_samples: int = option(8, "items that static and timestep routes are found on")
    calibration_calls: int = option(4, "static: random times an item at which the velocity is compared")
    bootstrap: int = option(2000, "resamples behind the confidence intervals")
    device: DeviceChoice = option(DeviceChoice.auto, "where the model runs")
    dtype: DTypeChoice = option(DTypeChoice.auto, "number format of the model")
    threads: int = option(0, "CPU threads of PyTorch; 0: its default")

    def __post_init__(self) -> None:
        for name in ("budgets", "steps", "seeds", "batches", "phases", "drifts"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name} is {values}, expected at least one value, and none twice")
        if len(set(self.control_budgets)) != len(self.control_budgets):
            raise ValueError(f"control_budgets is {self.control_budgets}, expected no value twice")
        for budget in (*self.budgets, *self.control_budgets):
            check_budget(budget)
        for count in (*self.steps, *self.elastic_steps, self.reference_steps, self.baseline_steps):
            check_sampling(count, self.guidance, self.resolution)
        for seed in self.seeds:
            check_range("seeds", seed, 0, 2**63 - 1)
        for drift in self.drifts:
            check_range("drifts", drift, 0, 100)
        for interval in self.intervals:
            check_range("intervals", interval, 2, 1000)
        for name in ("batch_size", "repeats", "calibration_samples", "calibration_calls"):
            check_range(name, getattr(self, name), 1, 1 << 20)
        for batch in self.batches:
            check_range("batches", batch, 1, 4096)
        for name in ("limit", "end_to_end_repeats", "threads"):
            check_range(name, getattr(self, name), 0, 1 << 20)
        check_range("bootstrap", self.bootstrap, 1, 1_000_000)
        for name in self.variants:
            if name in Method.__members__ or name == "model" or not name.isidentifier():
                raise ValueError(f"variants has {name!r}, expected another name, of letters, digits and _")


@dataclass(kw_only=True)
class BenchmarkConfig(BenchmarkOptions):
    """An elastic model against its dense self, fewer steps and controls: speed and fidelity in one table."""

    images: Path = field(metadata={"help": "folder of pictures, each of one object"})
    gt: Path | None = option(None, "folder of ground truth meshes named as the pictures; null: no F-scores")
    model: str = option("default", "folder of the elastic model; default is the bundled one")
    dense: str = option("", "folder of the dense model; empty: `model` without its routers")
    timing_images: int = option(4, "timing: pictures, spread evenly")
    protocol: ProtocolConfig = option(ProtocolConfig, "how a mesh is scored: a file of configs/protocol")
    workers: int = option(0, "processes that score; 0 takes one a core")
    sheet_images: int = option(8, "pictures in the contact sheet")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("timing_images", self.timing_images, 1, 1 << 20)
        for name in ("sheet_images", "workers"):
            check_range(name, getattr(self, name), 0, 1 << 20)
