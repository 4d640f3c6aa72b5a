"""What a generation pipeline is made of, and the options of `scripts/gen_mesh.py`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elastic3d.config.base import DeviceChoice, DTypeChoice, check_range, option
from elastic3d.config.geometry import CleanupConfig
from elastic3d.config.images import ForegroundConfig
from elastic3d.config.routing import BlockCacheConfig, ElasticConfig, check_budget

DEFAULT_MODEL = "data/pretrained/shape-small"


class MeshFormat(Enum):
    """File formats of meshes; only glb holds the receipt."""

    glb = "glb"
    ply = "ply"
    obj = "obj"
    stl = "stl"


@dataclass(kw_only=True)
class PipelineConfig:
    """`pipeline.json` beside the components: the model's name and how it is sampled by default."""

    model: str = option("unnamed", "name of the model, for receipts")
    version: str = option("", "version of elastic3d that wrote the folder")
    steps: int = option(25, "sampling steps")
    guidance: float = option(3.0, "classifier-free guidance scale; 1 is none")
    resolution: int = option(256, "grid cells a side of the decoding")
    shift: float = option(1.0, "timestep shift of the sampler; above 1 spends more steps on noise")
    elastic: ElasticConfig = option(ElasticConfig, "how a model with routers runs")

    def __post_init__(self) -> None:
        check_sampling(self.steps, self.guidance, self.resolution)
        check_range("shift", self.shift, 1e-3, 1e3)


@dataclass(kw_only=True)
class GenerateConfig:
    """Options of `scripts/gen_mesh.py`."""

    image: str = option("", "Picture of one object: a file, a folder, or a glob such as 'photos/*.png'.")
    prompt: str = option("", "Instead of image=: what the object is; a picture of it is made first.")
    image_model: str = option(
        "", "With prompt=: folder of the small text-to-image model; empty: that of this repository."
    )
    output: str = option("", "Mesh file (.glb, .ply, .obj, .stl) for one picture, else a folder.")
    model: str = option("", f"Folder of the model; empty: {DEFAULT_MODEL} of this repository.")
    steps: int | None = option(None, "Sampling steps, 1 to 1000; null: the model's default.")
    guidance: float | None = option(
        None, "How strictly the picture is followed, 0 to 100; null: the model's."
    )
    resolution: int | None = option(None, "Grid cells a side, 8 to 512; null: the model's default.")
    elastic: bool | None = option(
        None, "Let the routers decide; false: the dense model; null: if it has any."
    )
    budget: float | None = option(
        None, "Share of the dense blocks' FLOPs to execute, 0.3 to 1; null: the model's default."
    )
    width: bool | None = option(None, "Let the routers narrow the MLPs; null: the model's default.")
    cache: BlockCacheConfig | None = option(None, "Reuse of blocks between steps; null: the model's default.")
    trace: str = option("", "Also draw what every block did at every step, one panel a mesh, to this PNG.")
    seed: int = option(0, "Seed of the noise; the same seed on the same machine gives the same mesh.")
    num_samples: int = option(1, "Meshes of each picture, with seeds seed, seed + 1, ...")
    preview: bool = option(False, "Also write a turntable strip of each mesh as a PNG beside it.")
    format: MeshFormat = option(MeshFormat.glb, "Format of the meshes where output is a folder.")
    resume: bool = option(False, "Skip what already has an output file.")
    batch_size: int = option(8, "Meshes generated at a time.")
    device: DeviceChoice = option(DeviceChoice.auto, "Where the model runs.")
    dtype: DTypeChoice = option(DTypeChoice.auto, "Number format of the model.")
    foreground: ForegroundConfig = option(ForegroundConfig, "How the object is cut out.")
    cleanup: CleanupConfig = option(CleanupConfig, "What is done to the mesh.")

    def __post_init__(self) -> None:
        if self.image and self.prompt:
            raise ValueError("image= and prompt= are both there, expected one of them")
        for name, example in (("image", "chair.png"), ("output", "chair.glb")):
            if not getattr(self, name) and not (name == "image" and self.prompt):
                raise ValueError(f"{name}= is missing, for example {name}={example}")
        check_sampling(self.steps, self.guidance, self.resolution)
        if self.budget is not None:
            check_budget(self.budget)
        if self.trace and not self.trace.lower().endswith(".png"):
            raise ValueError(f"trace is {self.trace}, expected a .png file")
        check_range("seed", self.seed, 0, 2**63 - 1)
        check_range("num_samples", self.num_samples, 1, 100_000)
        check_range("batch_size", self.batch_size, 1, 4096)


def check_sampling(steps: int | None, guidance: float | None, resolution: int | None) -> None:
    """Raise ValueError for a value that is out of range; None is a default to be filled in."""
    if steps is not None:
        check_range("steps", steps, 1, 1000)
    if guidance is not None:
        check_range("guidance", guidance, 0.0, 100.0)
    if resolution is not None:
        check_range("resolution", resolution, 8, 512)
