"""Options of `scripts/train.py`: the loop that every stage shares, and each stage's own."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from elastic3d.config.base import DeviceChoice, check_range, option
from elastic3d.config.generate import PipelineConfig
from elastic3d.config.image_stage import ImageStageConfig
from elastic3d.config.images import ForegroundConfig, ImageEncoderConfig
from elastic3d.config.models import DiTConfig, VAEConfig
from elastic3d.config.router_stage import RouterStageConfig
from elastic3d.config.routing import RouterConfig
from elastic3d.config.updates_stage import UpdatesStageConfig


class StageName(Enum):
    """What `scripts/train.py` does."""

    vae = "vae"
    cache = "cache"
    dit = "dit"
    image = "image"
    router = "router"
    updates = "updates"
    export = "export"
    calibrate = "calibrate"


class Precision(Enum):
    """Number format of training; masters, moments and averages are fp32 in all of them.

    `bf16_master` keeps the model itself in bf16, the optimizer steps fp32 copies of its weights;
    `bf16_autocast` keeps fp32 weights and casts inside the forward pass.
    """

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


class FieldLoss(Enum):
    """What the field decoder learns."""

    occupancy = "occupancy"
    tsdf = "tsdf"


class Timesteps(Enum):
    """Distribution of training timesteps."""

    logit_normal = "logit_normal"
    uniform = "uniform"


@dataclass(kw_only=True)
class LoopConfig:
    """One training run, whatever it trains."""

    steps: int = option(10_000, "optimizer steps in all; a resumed run may change it")
    batch: int = option(16, "samples of one optimizer step, over all processes and micro-batches")
    accumulate: int = option(1, "micro-batches of one optimizer step")
    learning_rate: float = option(1e-3, "peak learning rate")
    optimizer: OptimizerName = option(OptimizerName.adamw, "how weights are stepped")
    warmup: int = option(200, "steps of linear warm-up")
    schedule: Schedule = option(Schedule.cosine, "learning rate after the warm-up")
    decay_steps: int = option(1000, "last steps, in which the trapezoid goes to zero")
    beta1: float = option(0.9, "AdamW's first-moment decay")
    beta2: float = option(0.99, "AdamW's second-moment decay")
    weight_decay: float = option(0.01, "AdamW's decoupled weight decay; vectors and scalars are exempt")
    clip: float = option(1.0, "largest gradient norm; 0 does not clip")
    ema: float = option(0.999, "decay of the averaged weights, after its own warm-up")
    precision: Precision = option(Precision.bf16_master, "number format of training")
    gradient_checkpointing: bool = option(False, "recompute the blocks' activations in the backward pass")
    compile: bool = option(False, "compile the model's blocks with torch.compile; needs a C++ compiler")
    seed: int = option(0, "of initialisation, data order, augmentation and noise")
    device: DeviceChoice = option(DeviceChoice.auto, "where to train")
    workers: int = option(0, "processes that read data; 0 reads in the training process")
    max_minutes: float = option(0.0, "stop cleanly, with a checkpoint, after this time; 0 never does")
    resume: bool = option(True, "go on from the newest whole checkpoint of this run")
    init_from: Path | None = option(
        None,
        "what a new run starts from: a checkpoint folder (its averaged weights) or a model, such as shape-small",
    )
    init_new: list[str] = option(
        [], "parameters that init_from's checkpoint may lack, by name: they keep their initial values"
    )
    log_every: int = option(20, "steps between scalars")
    validate_every: int = option(500, "steps between validations; 0 never validates")
    sample_every: int = option(2000, "steps between sample pictures; 0 never draws any")
    save_every: int = option(500, "steps between checkpoints")
    keep: int = option(2, "newest checkpoints to keep")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "log_every", "save_every", "keep"):
            check_range(name, getattr(self, name), 1, 1 << 40)
        for name in (
            "warmup",
            "decay_steps",
            "workers",
            "validate_every",
            "sample_every",
            "max_minutes",
            "clip",
        ):
            check_range(name, getattr(self, name), 0, 1 << 40)
        check_range("learning_rate", self.learning_rate, 0, 10)
        for name in ("beta1", "beta2", "ema"):
            check_range(name, getattr(self, name), 0, 1 - 1e-9)
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is no multiple of accumulate {self.accumulate}")


@dataclass(kw_only=True)
class DataConfig:
    """Where prepared shapes lie and which of them to use."""

    prepared: Path = option(Path("data/prepared"), "folder of prepared sources (scripts/prepare_data.py)")
    train: list[Path] = option([Path("data/splits/train.txt")], "lists of source/id to train on")
    val: list[Path] = option([Path("data/splits/val.txt")], "lists of source/id to validate on")
    limit: int = option(0, "use the first so many training shapes; 0 uses all")
    preload: bool = option(False, "read every shape into memory at the start instead of mapping the files")

    def __post_init__(self) -> None:
        check_range("data.limit", self.limit, 0, 1 << 40)


@dataclass(kw_only=True)
class AugmentConfig:
    """Changes to a training shape. Mirror, rotation and uniform scale keep distances exact."""

    mirror: bool = option(True, "mirror half of the shapes left to right (x)")
    scale_min: float = option(0.8, "smallest uniform scale; 1 does not scale")
    stretch_min: float = option(1.0, "smallest further scale of a single axis; distances become lower bounds")
    rotate_degrees: float = option(0.0, "largest rotation about the vertical axis")

    def __post_init__(self) -> None:
        check_range("augment.scale_min", self.scale_min, 0.1, 1)
        check_range("augment.stretch_min", self.stretch_min, 0.1, 1)
        check_range("augment.rotate_degrees", self.rotate_degrees, 0, 180)


@dataclass(kw_only=True)
class VAEStageConfig:
    """The shape VAE's training."""

    model: VAEConfig = option(VAEConfig, "architecture")
    augment: AugmentConfig = option(AugmentConfig, "changes to training shapes")
    surface_points: int = option(2048, "surface points the encoder reads")
    sharp_points: int = option(0, "points on sharp edges the encoder reads besides")
    near_queries: int = option(768, "field queries near the surface")
    volume_queries: int = option(256, "field queries anywhere in the box")
    loss: FieldLoss = option(FieldLoss.occupancy, "soft occupancy or truncated signed distance")
    softness: float = option(0.01, "distance over which soft occupancy goes from 1/2 to 0.73")
    truncation: float = option(0.1, "distance at which the signed distance is cut")
    kl_weight: float = option(1e-5, "weight of the KL term")
    anchor_spread: float = option(
        0.0, "anchored: standard deviation of an anchor's offset from the surface, before it is read"
    )
    val_shapes: int = option(64, "shapes to validate on")
    val_queries: int = option(4096, "field queries of each kind for a validation shape")
    sample_resolution: int = option(64, "grid cells a side of the sample pictures")

    def __post_init__(self) -> None:
        for name in ("surface_points", "val_shapes", "val_queries"):
            check_range(f"vae.{name}", getattr(self, name), 1, 1 << 20)
        check_range("vae.softness", self.softness, 1e-6, 1)
        check_range("vae.truncation", self.truncation, 1e-6, 2)
        check_range("vae.anchor_spread", self.anchor_spread, 0, 1)
        if self.near_queries + self.volume_queries < 1:
            raise ValueError(
                "vae.near_queries and vae.volume_queries are both 0, expected at least one query"
            )


@dataclass(kw_only=True)
class LatentsConfig:
    """Latents and image tokens of every shape, computed once for the DiT."""

    output: Path = option(Path("data/prepared/latents"), "folder of the cache")
    vae: Path = option(Path("runs/vae/export"), "folder of the trained shape VAE")
    variants: int = option(4, "encodings a shape, each of other surface points")
    views: int = option(6, "condition views a shape, spread over those that were rendered")
    images: Path | None = option(
        None, "pictures of the shapes, named as their meshes; a shape without one keeps its rendered views"
    )
    batch: int = option(8, "shapes encoded at once")
    standardise: bool = option(
        True, "measure the latents' statistics; false for a published model, which knows its own scale"
    )
    encoder: ImageEncoderConfig = option(ImageEncoderConfig, "image encoder")
    foreground: ForegroundConfig = option(ForegroundConfig, "what happens to a view before")

    def __post_init__(self) -> None:
        for name in ("variants", "views", "batch"):
            check_range(f"latents.{name}", getattr(self, name), 1, 1 << 16)


@dataclass(kw_only=True)
class DiTStageConfig:
    """The shape DiT's training."""

    model: DiTConfig = option(DiTConfig, "architecture; channel and token counts come from the cache")
    timesteps: Timesteps = option(Timesteps.logit_normal, "distribution of training timesteps")
    time_shift: float = option(1.0, "above 1 trains more on noisy timesteps")
    drop_condition: float = option(0.1, "share of samples that see no image (classifier-free guidance)")
    match_channels: int = option(
        3,
        "pair noise with the nearest latents by so many leading channels (3: the anchor's xyz); 0 pairs at random",
    )
    anchor_weight: float = option(1.0, "weight of an anchor channel's loss over that of a feature channel")
    val_shapes: int = option(128, "shapes to validate on")
    sample_shapes: int = option(8, "shapes of the sample pictures")
    sample_steps: int = option(25, "sampling steps of the sample pictures")
    sample_guidance: float = option(3.0, "guidance of the sample pictures")
    sample_resolution: int = option(64, "grid cells a side of the sample pictures")

    def __post_init__(self) -> None:
        check_range("dit.drop_condition", self.drop_condition, 0, 1)
        check_range("dit.time_shift", self.time_shift, 1e-3, 1e3)
        check_range("dit.match_channels", self.match_channels, 0, 1 << 20)
        check_range("dit.anchor_weight", self.anchor_weight, 0, 1e3)
        for name in ("val_shapes", "sample_shapes", "sample_steps"):
            check_range(f"dit.{name}", getattr(self, name), 1, 1 << 16)


@dataclass(kw_only=True)
class ExportConfig:
    """Averaged weights of a run as a model folder."""

    output: Path | None = option(
        None,
        "folder to write; null: `export` in the run's folder, with stage=calibrate the model's own folder",
    )
    pipeline: PipelineConfig = option(
        PipelineConfig, "defaults of an exported DiT; of routers `elastic` alone"
    )

    def __post_init__(self) -> None:
        if self.output is not None and self.output.is_file():
            raise ValueError(f"export.output {self.output} is a file, expected a folder")


@dataclass(kw_only=True)
class TrainConfig(LoopConfig):
    """Everything `scripts/train.py` takes."""

    stage: StageName = option(StageName.vae, "what to do")
    name: str = option("vae", "name of the run: its folder under `runs`")
    runs: Path = option(Path("runs"), "folder of all runs")
    data: DataConfig = option(DataConfig, "prepared shapes")
    vae: VAEStageConfig = option(VAEStageConfig, "shape VAE")
    latents: LatentsConfig = option(LatentsConfig, "cache of latents and image tokens")
    dit: DiTStageConfig = option(DiTStageConfig, "shape DiT")
    image: ImageStageConfig = option(ImageStageConfig, "pictures with captions")
    router: RouterConfig = option(RouterConfig, "architecture of the routers: a file of configs/router")
    routing: RouterStageConfig = option(RouterStageConfig, "training of the routers")
    updates: UpdatesStageConfig = option(UpdatesStageConfig, "training of the routers' low-rank updates")
    export: ExportConfig = option(ExportConfig, "export")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or "/" in self.name:
            raise ValueError(f"name is {self.name!r}, expected a folder name")

    @property
    def folder(self) -> Path:
        """Where this run's checkpoints and curves go."""
        return self.runs / self.name
