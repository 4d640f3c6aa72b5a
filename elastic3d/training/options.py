"""What stages share: the loop's options, the data, and where a run lies. Each stage's own are beside it. Also those of
scripts that measure a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from elastic3d.errors import UserError
from elastic3d.pipelines.options import DEFAULT_MODEL
from elastic3d.preparation.options import PrepareConfig
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.options import Options, option

if TYPE_CHECKING:
    from torch import nn

MAX_STEPS = 1 << 40


class StageName(Enum):
    """What `scripts/train.py` does."""

    vae = "vae"
    cache = "cache"
    dit = "dit"
    image = "image"
    router = "router"
    image_router = "image_router"
    few_step = "few_step"
    block_router = "block_router"
    image_block_router = "image_block_router"
    sensitivity = "sensitivity"
    export = "export"
    calibrate = "calibrate"


class Precision(Enum):
    """Number format of training; masters, moments and averages are fp32 in all of them.

    `bf16_master` keeps the model itself in bf16, the optimizer steps fp32 copies of its weights;
    `bf16_autocast` keeps fp32 weights and casts inside the forward pass. `auto` is `bf16_master` where the device has
    bf16 matrix products in hardware, else `fp32`.
    """

    auto = "auto"
    bf16_master = "bf16_master"
    bf16_autocast = "bf16_autocast"
    fp32 = "fp32"


class Schedule(Enum):
    """Learning rate after the warm-up; `trapezoid` is constant, then linear to zero over `decay_steps`."""

    constant = "constant"
    cosine = "cosine"
    linear = "linear"
    trapezoid = "trapezoid"


class OptimizerName(Enum):
    """How weights are stepped; `muon` orthogonalises the steps of the blocks' matrices, AdamW does the rest."""

    adamw = "adamw"
    muon = "muon"


@dataclass(kw_only=True)
class StageConfig(Options):
    """What every stage has."""

    stage: StageName = option(StageName.vae, "what to do")
    device: DeviceChoice = option(DeviceChoice.auto, "where to compute")


@dataclass(kw_only=True)
class SeededConfig(StageConfig):
    """What a stage has that draws random numbers."""

    seed: int = option(0, "of initialisation, data order, augmentation and noise", ge=0, le=2**63 - 1)


@dataclass(kw_only=True)
class LoopConfig(SeededConfig):
    """Optimisation, validation and checkpoints."""

    steps: int = option(10_000, "optimizer steps", ge=1, le=MAX_STEPS)
    batch: int = option(
        8, "samples of one optimizer step, over all processes and micro-batches", ge=1, le=1 << 24
    )
    accumulate: int = option(
        1,
        "micro-batches of one optimizer step; budgets and thresholds of routers are kept in each by itself",
        ge=1,
        le=1 << 24,
    )
    learning_rate: float = option(1e-3, "peak learning rate", ge=0, le=10)
    optimizer: OptimizerName = option(OptimizerName.adamw, "how weights are stepped")
    warmup: int = option(200, "steps of linear warm-up", ge=0, le=MAX_STEPS)
    schedule: Schedule = option(Schedule.cosine, "learning rate after the warm-up")
    decay_steps: int = option(1000, "last steps, in which the trapezoid goes to zero", ge=0, le=MAX_STEPS)
    weight_decay: float = option(
        0.01, "AdamW's decoupled weight decay; vectors and scalars are exempt", ge=0, le=100
    )
    ema: float = option(0.999, "decay of the averaged weights, after its own warm-up", ge=0, lt=1)
    precision: Precision = option(Precision.auto, "number format of training")
    gradient_checkpointing: bool = option(False, "recompute the blocks' activations in the backward pass")
    compile: bool = option(False, "compile the model's blocks with torch.compile; needs a C++ compiler")
    workers: int = option(0, "processes that read data; 0 reads in the training process", ge=0, le=1024)
    max_minutes: float = option(
        0.0, "stop cleanly, with a checkpoint, after this time; 0 never does", ge=0, le=1e9
    )
    resume: bool = option(True, "go on from the newest whole checkpoint of this run")
    init_from: Path | None = option(
        None,
        "what a new run starts from: a checkpoint folder (its averaged weights) or a model, such as shape-small",
    )
    init_new: list[str] = option(
        [],
        "parameters that init_from's checkpoint may lack, by name: they keep their initial values",
        advanced=True,
    )
    log_every: int = option(20, "steps between scalars", ge=1, le=MAX_STEPS)
    validate_every: int = option(500, "steps between validations; 0 never validates", ge=0, le=MAX_STEPS)
    sample_every: int = option(2000, "steps between sample images; 0 never draws any", ge=0, le=MAX_STEPS)
    save_every: int = option(500, "steps between checkpoints", ge=1, le=MAX_STEPS)
    keep: int = option(2, "newest checkpoints to keep", ge=1, le=1 << 20)

    def check(self) -> None:
        """Micro-batches are of one size."""
        super().check()
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is no multiple of accumulate {self.accumulate}")

    def micro_batch(self, processes: int) -> int:
        """Samples of a micro-batch in each process. UserError where the processes can't share a batch."""
        if self.batch % (processes * self.accumulate):
            raise UserError(
                f"batch is {self.batch}, expected a multiple of {processes} processes x {self.accumulate}"
                " micro-batches (accumulate=)"
            )
        return self.batch // (processes * self.accumulate)


@dataclass(kw_only=True)
class SplitsConfig(Options):
    """Where prepared shapes lie and which of them to use."""

    prepared: Path = option(Path("data/prepared"), "folder of prepared sources (scripts/prepare_data.py)")
    train: list[Path] = option([Path("data/splits/train.txt")], "lists of source/id to train on")
    val: list[Path] = option([Path("data/splits/val.txt")], "lists of source/id to validate on")


@dataclass(kw_only=True)
class LimitedSplitsConfig(SplitsConfig):
    """Of the training shapes all, or a few."""

    limit: int = option(0, "training shapes, spread evenly over the lists; 0 takes all", ge=0, le=1 << 40)


@dataclass(kw_only=True)
class DataConfig(LimitedSplitsConfig):
    """Shapes that training itself reads."""

    preload: bool = option(False, "read every shape into memory at the start instead of mapping the files")


@dataclass(kw_only=True)
class RunConfig(StageConfig):
    """A run has a name, and a folder of that name."""

    name: str = option("vae", "name of the run: its folder under `runs`", lengths=(1, 200))
    runs: Path = option(Path("runs"), "folder of all runs")

    def check(self) -> None:
        """The name is that of one folder."""
        super().check()
        if "/" in self.name or "\0" in self.name or self.name in (".", ".."):
            raise ValueError(f"name is {self.name!r}, expected a folder name")

    @property
    def folder(self) -> Path:
        """Where this run's checkpoints and curves go."""
        return self.runs / self.name


@dataclass(kw_only=True)
class TrainConfig(LoopConfig, RunConfig):
    """What every stage that trains has."""

    data: LimitedSplitsConfig = option(LimitedSplitsConfig, "prepared shapes")

    def network(self) -> nn.Module | None:
        """A network of the architecture that is trained; None where it comes from a file."""
        return None

    def sample_bytes(self) -> int:
        """Memory that a sample needs at the very least, in bytes: its data, and each block's input."""
        return 0


@dataclass(kw_only=True)
class GenerationTrainConfig(TrainConfig):
    """Training through whole generations. What validation makes of them is numbers, and the model is no part of what
    is trained, so that nothing of it is compiled."""

    sample_every: int = option(
        0, "without effect: there are no sample images", ge=0, le=MAX_STEPS, internal=True
    )
    compile: bool = option(False, "no model to compile", internal=True)


@dataclass(kw_only=True)
class HeldOutConfig(Options):
    """What a model makes of held-out shapes, as folders of meshes that `scripts/evaluate.py` compares."""

    model: str = option(DEFAULT_MODEL, "folder of the model")
    output: Path = option(Path("outputs/held_out"), "folder for the folders of meshes")
    split: Path = option(Path("data/splits/test.txt"), "list of source/id to take held-out shapes from")
    train: Path = option(
        Path("data/splits/train.txt"), "list of source/id the nearest shape is looked for in"
    )
    data: PrepareConfig = option(PrepareConfig, "source of the shapes; its output is where the shards are")
    limit: int = option(64, "held-out shapes, spread evenly over the list; 0 takes all", ge=0, le=1 << 20)
    view: int = option(0, "which of the stored views is the input", ge=0, le=1000)
    seeds: list[int] = option(
        [0, 1, 2], "seeds of generation; empty: no generation", ge=0, le=2**63 - 1, unique=True
    )
    steps: int | None = option(None, "sampling steps; null: the model's default", ge=1, le=1000)
    guidance: float | None = option(None, "guidance scale; null: the model's default", ge=0, le=100)
    resolution: int = option(256, "grid cells a side of the decoding", ge=8, le=512)
    surface_points: int = option(2048, "surface points the VAE's encoder reads", ge=1, le=1 << 20)
    bank_views: int = option(4, "views of each training shape that retrieval compares with", ge=1, le=1 << 20)
    batch_size: int = option(8, "meshes generated at a time", ge=1, le=1 << 20)
    device: DeviceChoice = option(DeviceChoice.auto, "where the model runs")
    dtype: DTypeChoice = option(DTypeChoice.auto, "number format of the model")


@dataclass(kw_only=True)
class FamiliarityConfig(Options):
    """Which images a model was trained on, and how seldom one like them may be called unfamiliar."""

    model: Path = option(Path(DEFAULT_MODEL), "folder of the model; the statistics are written into it")
    prepared: Path = option(Path("data/prepared"), "folder of prepared shapes, whose views are the images")
    train: list[Path] = option(
        [Path("data/splits/train.txt")], "lists of the shapes the model was trained on"
    )
    val: list[Path] = option([Path("data/splits/val.txt")], "lists of shapes that the threshold is chosen on")
    sources: list[str] = option(
        ["infinigen", "sweethome3d"], "sources that the model was trained on", lengths=(1, 100)
    )
    views: int = option(4, "views of each shape, from the first", ge=1, le=1000)
    components: int = option(64, "principal components with a variance of their own", ge=1, le=1 << 16)
    false_alarms: float = option(
        0.02, "share of the validation images that may be called unfamiliar", gt=0, lt=1
    )
    batch: int = option(16, "images encoded at a time", ge=1, le=4096)
    probe: list[Path] = option([], "folders of other images: how many of each are called unfamiliar")

    def check(self) -> None:
        """The record has a name for each folder of other images."""
        names = [folder.name for folder in self.probe]
        if len(set(names)) < len(names):
            raise ValueError(f"probe has folders named {', '.join(names)}, expected different names")
