"""Options of `scripts/benchmark.py`, those that both tasks share and of each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from elastic3d.elastic.config import MIN_BUDGET, BlockCacheConfig
from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.pipelines.options import BackboneName
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.options import Options, option

MANY = 1 << 20
COUNT: dict[str, Any] = {"ge": 1, "le": MANY}
STEPS: dict[str, Any] = {"ge": 1, "le": 1000}
THRESHOLD: dict[str, Any] = {"ge": 0, "le": 100}
BUDGET: dict[str, Any] = {"ge": MIN_BUDGET, "le": 1, "unique": True}
SOME: dict[str, Any] = {"lengths": (1, 1000), "unique": True}  # a list that has to have a value
CHANGES = [0.05, 0.1, 0.2, 0.4]  # relative, of a residual: below one of them a cache goes on


class TaskName(Enum):
    """What is made: meshes from images, or images from prompts."""

    meshes = "meshes"
    images = "images"


class Method(Enum):
    """What can be a row of the table; `elastic3d.benchmark.methods` says how each is run."""

    dense = "dense"
    fewer_steps = "fewer_steps"
    euler_steps = "euler_steps"
    elastic = "elastic"
    elastic_shared = "elastic_shared"
    elastic_no_lora = "elastic_no_lora"
    elastic_no_bias = "elastic_no_bias"
    elastic_no_damping = "elastic_no_damping"
    few_step_lora = "few_step_lora"
    dense_cache = "dense_cache"
    random = "random"
    random_blocks = "random_blocks"
    static = "static"
    timestep = "timestep"
    shuffled = "shuffled"
    training_free = "training_free"


class PolicyName(Enum):
    """What keeps a budget without routers: `early` steps and a damped line, with no calibration; by a calibration
    `fitted` forecasts at the same steps, `planned` steps too, or `online` ones, each sample's own."""

    early = "early"
    fitted = "fitted"
    planned = "planned"
    online = "online"


class CacheName(Enum):
    """Training-free rivals on the dense transformer: `forecast` and `hicache` run on every model, the others on those
    of diffusers."""

    forecast = "forecast"
    hicache = "hicache"
    first_block_cache = "first_block_cache"
    taylor_seer = "taylor_seer"
    taylor_seer_lite = "taylor_seer_lite"
    mag_cache = "mag_cache"
    db_cache = "db_cache"


# One decision, or one fit, for a whole batch: a sample's result depends on its batch mates.
BY_BATCH = (CacheName.first_block_cache, CacheName.db_cache, CacheName.hicache)
ON_ANY_MODEL = [CacheName.forecast, CacheName.hicache]


class ForecastName(Enum):
    """How `forecast` continues what the blocks added; `elastic3d.benchmark.forecasting` has the formulas."""

    linear = "linear"
    taylor = "taylor"
    hermite = "hermite"
    chebyshev = "chebyshev"
    dmd = "dmd"


class Calibrator(Enum):
    """How DBCache continues a residual: as it was, by a Taylor series, or by its dynamic modes."""

    none = "none"
    taylorseer = "taylorseer"
    dmd = "dmd"


class Phase(Enum):
    """`quality` makes and scores results, `timing` takes times. Both keep what they did. `quick`, alone,
    compares the last latents of one batch."""

    quality = "quality"
    timing = "timing"
    quick = "quick"


@dataclass(kw_only=True)
class BenchmarkOptions(Options):
    """What both tasks share."""

    task: TaskName = option(TaskName.meshes, "what is made; task=images --help lists the options for images")
    output: Path = option(..., "folder for results.json, the plots, and all that makes a run resumable")
    variants: dict[str, str] = option(
        {}, "further rows, {name: folder}: of routers for the model, of a DiT, or of a whole model (meshes)"
    )
    methods: list[Method] = option([], "rows; empty: all that are possible, but ablations and random_blocks")
    budgets: list[float] = option([1.0, 0.8, 0.65, 0.5, 0.4, 0.3], "budgets of elastic rows", **BUDGET | SOME)
    control_budgets: list[float] = option([], "budgets of controls and variants; empty: budgets=", **BUDGET)
    steps: list[int] = option([8, 12, 16, 25, 50, 100], "step counts of fewer_steps", **STEPS, **SOME)
    elastic_steps: list[int] = option([], "step counts of elastic rows; empty: baseline_steps", **STEPS)
    control_steps: int = option(0, "steps of controls and variants; 0: baseline_steps", ge=0, le=1000)
    baseline_steps: int | None = option(None, "steps of dense; null: the model's default", **STEPS)
    reference_steps: int = option(100, "steps of the dense results that all others are paired with", **STEPS)
    seeds: list[int] = option([0, 1, 2], "of the noise; two give the seed floor", ge=0, le=2**63 - 1, **SOME)
    cache: BlockCacheConfig | None = option(None, "cache of elastic rows; null: the model's default")
    intervals: list[int] = option(
        [2, 3], "of rivals that compute every N-th step, one row each", ge=2, le=1000
    )
    warmup: int = option(3, "of the same: steps that are computed first", **STEPS)
    dampings: list[float] = option(
        [1.0], "dense_cache: one row each (1: a line) and the routers' own", ge=0, le=1
    )
    limit: int = option(0, "items, spread evenly over all; 0 takes all", ge=0, le=MANY)
    phases: list[Phase] = option([Phase.quality, Phase.timing], "what to do before the report", **SOME)
    guidance: float | None = option(None, "guidance scale; null: the model's default", **THRESHOLD)
    resolution: int | None = option(None, "cells or pixels a side; null: the model's default", ge=8, le=512)
    batch_size: int = option(8, "quality: items generated at a time", **COUNT)
    batches: list[int] = option([1, 4], "timing: batch sizes", ge=1, le=4096, **SOME)
    timing_items: int = option(4, "timing: images or prompts, spread evenly", **COUNT)
    repeats: int = option(5, "timing: rounds of the DiT alone, after a warm one", **COUNT)
    end_to_end_repeats: int = option(2, "timing: rounds of everything, after a warm one", ge=0, le=MANY)
    cpu_time: bool = option(False, "timing: CPU time of all threads, where other programs run; not on a GPU")
    calibration: Path | None = option(None, "items that controls and mag_cache go by; null: the first ones")
    calibration_samples: int = option(8, "items that controls and mag_cache go by", **COUNT)
    caches: list[CacheName] = option(ON_ANY_MODEL, "training-free rivals to put beside")
    cache_steps: list[int] = option([], "step counts of these; empty: baseline_steps", **STEPS)
    policies: list[PolicyName] = option(
        list(PolicyName), "of training_free; all but early need a calibration"
    )
    policy_calibration: Path | None = option(None, "of scripts/calibrate.py; null: that of the weights")
    forecasts: list[ForecastName] = option(list(ForecastName), "forecast: one row each and interval")
    batched_decisions: bool = option(
        False, "run rivals that decide for a whole batch in batches: faster, but samples depend on others"
    )
    device: DeviceChoice = option(DeviceChoice.auto, "where the model runs")
    dtype: DTypeChoice = option(DTypeChoice.auto, "number format of the model")
    threads: int = option(0, "CPU threads of PyTorch; 0: its default", ge=0, le=MANY)

    def check(self) -> None:
        """Rows have names of their own; the quick phase is by itself."""
        if Phase.quick in self.phases and len(self.phases) > 1:
            raise ValueError("phases has quick and others, expected it alone")
        for name in self.variants:
            known = {*Method.__members__, *CacheName.__members__, "model"}
            if name in known or not name.isidentifier():
                raise ValueError(f"variants has {name!r}, expected another name, of letters, digits and _")


@dataclass(kw_only=True)
class MeshBenchmarkConfig(BenchmarkOptions):
    """An image-to-mesh model with routers against its dense self, fewer steps, controls and training-free caches."""

    images: Path = option(..., "folder of images, each of one object")
    gt: Path | None = option(None, "folder of ground truth meshes named as the images; null: no F-scores")
    model: str = option("default", "folder of the elastic model; default is the bundled one")
    dense: str = option("", "folder of the dense model; empty: `model` without its routers")
    protocol: ProtocolConfig = option(ProtocolConfig, "how a mesh is scored: a file of configs/protocol")
    workers: int = option(0, "processes that score; 0 takes one a core", ge=0, le=MANY)

    def check(self) -> None:
        """Caches of diffusers run on its models alone."""
        super().check()
        if others := [name.name for name in self.caches if name not in ON_ANY_MODEL]:
            raise ValueError(f"caches has {others[0]}, for models of diffusers: expected forecast, hicache")


@dataclass(kw_only=True)
class ImageBenchmarkConfig(BenchmarkOptions):
    """An elastic text-to-image model against its dense self, fewer steps, controls, and caches of others."""

    task: TaskName = option(TaskName.images, "what is made")
    backbone: BackboneName = option(BackboneName.small, "family of the pipeline")
    weights: str = option("", "folder of the pipeline as published; empty: the bundled one")
    routers: str = option("", "folder of routers; empty: `routers` in the folder of the weights, if there")
    prompts: Path = option(Path("data/prompts/image-small.txt"), "text file, one prompt a line")
    steps: list[int] = option([4, 6, 8, 10, 12, 16, 20, 25], "step counts of fewer_steps", **STEPS, **SOME)
    batch_size: int = option(16, "quality: images generated at a time", **COUNT)
    caches: list[CacheName] = option(list(CacheName), "training-free rivals to put beside")
    first_block_thresholds: list[float] = option(CHANGES, "first_block_cache: one row each", **THRESHOLD)
    mag_thresholds: list[float] = option([0.06, 0.12, 0.24, 0.5], "mag_cache: one row each", **THRESHOLD)
    db_thresholds: list[float] = option(CHANGES, "db_cache: a row for each, blocks, calibrator", **THRESHOLD)
    db_blocks: list[int] = option([1], "db_cache: first blocks that are always computed", **STEPS)
    db_calibrators: list[Calibrator] = option(list(Calibrator), "db_cache: how residuals are continued")
    prepared: Path | None = option(None, "shapes, whose held-out views are real; null: data/prepared, if any")
    splits: Path = option(Path("data/splits"), "folder of train.txt, val.txt and test.txt")
    references: Path | None = option(None, "real images with captions (a.png, a.txt) instead; no classifier")
    feature_size: int = option(128, "pixels a side that EfficientNet sees", ge=32, le=1024, multiple_of=32)

    def check(self) -> None:
        """A published pipeline has a folder."""
        super().check()
        if not self.weights and self.backbone is not BackboneName.small:
            raise ValueError(f"weights= is missing: the folder of the {self.backbone.name} pipeline")
