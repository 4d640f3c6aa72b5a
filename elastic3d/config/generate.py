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


class SamplingGrid(Enum):
    """Where sampling times lie: `uniform`; `endpoint` (Hunyuan3D-2: n times are n - 1 moves); `consistency` (turbo);
    `late_start` (Step1X-3D: n times, of which the first moves nothing)."""

    uniform = "uniform"
    endpoint = "endpoint"
    consistency = "consistency"
    late_start = "late_start"


class Solver(Enum):
    """How the sampler steps: by the velocity found (`euler`), or by its line through the last two (`ab2`)."""

    euler = "euler"
    ab2 = "ab2"


@dataclass(kw_only=True)
class PipelineConfig:
    """`pipeline.json` beside the components: the model's name and how it is sampled by default."""

    model: str = option("unnamed", "name of the model, for receipts")
    version: str = option("", "version of elastic3d that wrote the folder")
    steps: int = option(25, "sampling steps")
    guidance: float = option(3.0, "classifier-free guidance scale; 1 is none")
    resolution: int = option(256, "grid cells a side of the decoding")
    box: float = option(1.01, "half side of the cube that is decoded")
    shift: float = option(1.0, "timestep shift of the sampler; above 1 spends more steps on noise")
    grid: SamplingGrid = option(SamplingGrid.uniform, "where the sampling times lie")
    solver: Solver = option(Solver.euler, "how the sampler steps: euler, ab2 (Adams-Bashforth, second order)")
    segments: int = option(100, "grid consistency: segments of the distillation")
    elastic: ElasticConfig = option(ElasticConfig, "how a model with routers runs")

    def __post_init__(self) -> None:
        check_sampling(self.steps, self.guidance, self.resolution)
        check_range("shift", self.shift, 1e-3, 1e3)
        check_range("box", self.box, 1e-3, 1e3)
        check_range("segments", self.segments, 1, 1000)


@dataclass(kw_only=True)
class GenerateConfig:
    """Options of `scripts/gen_mesh.py`."""

    image: str = option("", "Picture of one object: a file, a folder, or a glob such as 'photos/*.png'.")
    prompt: str = option("", "Instead of image=: what the object is; a picture of it is made first.")
    image_model: str = option(
        "", "With prompt=: folder of the small text-to-image model; empty: that of this repository."
    )
    output: str = option("", "Mesh file (.glb, .ply, .obj, .stl) for one picture, else a folder.")
    model: str = option(
        "",
        f"Folder of the model; empty: {DEFAULT_MODEL} of this repository. Or a published model whose weights you have:"
        " hunyuan3d2, hunyuan3d2_mini, hunyuan3d2_mv, hunyuan3d2_turbo, hunyuan3d2_mini_turbo, hunyuan3d2_1,"
        " triposg, step1x3d.",
    )
    weights: str = option(
        "",
        "Folder with a published model's weights, or its name on the Hugging Face Hub; empty: looked for in"
        " $HY3DGEN_MODELS, ~/.cache/hy3dgen, the Hub's cache in $HF_HOME and on the Hub.",
    )
    subfolder: str = option("", "Folder of the checkpoint in weights; empty: the published one.")
    vae_subfolder: str = option(
        "", "Take the VAE from this folder in weights, such as hunyuan3d-vae-v2-0-turbo."
    )
    dinov2: str = option("", "Folder of a DINOv2, for a checkpoint without its image encoder.")
    routers: str = option("", "Folder of trained routers for this model.")
    image_left: str = option("", "Multi-view models: the object seen from its left.")
    image_back: str = option("", "Multi-view models: seen from behind.")
    image_right: str = option("", "Multi-view models: seen from its right.")
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
    shared: bool | None = option(
        None,
        "Routes are shared in a batch: faster, but a result then depends on its batch; null: the default.",
    )
    updates: bool | None = option(
        None, "Use the routers' updates of the blocks where few calls are left; null: the model's default."
    )
    trace: str = option("", "Also draw what every block did at every step, one panel a mesh, to this PNG.")
    seed: int = option(0, "Seed of the noise; the same seed on the same machine gives the same mesh.")
    num_samples: int = option(1, "Meshes of each picture, with seeds seed, seed + 1, ...")
    preview: bool = option(False, "Also write a turntable strip of each mesh as a PNG beside it.")
    format: MeshFormat = option(MeshFormat.glb, "Format of the meshes where output is a folder.")
    resume: bool = option(False, "Skip what already has an output file.")
    batch_size: int = option(8, "Meshes generated at a time.")
    device: DeviceChoice = option(DeviceChoice.auto, "Where the model runs.")
    dtype: DTypeChoice = option(DTypeChoice.auto, "Number format of the model.")
    low_memory: bool = option(
        False,
        "One part of the model on the device at a time, one mesh and one branch of the guidance at a time.",
    )
    memory_budget: float | None = option(
        None, "Published models: use at most this many GB; null: what is free. Less means smaller chunks."
    )
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
        if self.memory_budget is not None:
            check_range("memory_budget", self.memory_budget, 0.01, 1e5)

    @property
    def rows(self) -> int:
        """Meshes generated at a time."""
        return 1 if self.low_memory else self.batch_size

    @property
    def views(self) -> dict[str, str]:
        """Further pictures of the object by the direction they are taken from."""
        named = {name: getattr(self, f"image_{name}") for name in ("left", "back", "right")}
        return {name: path for name, path in named.items() if path}


def check_sampling(steps: int | None, guidance: float | None, resolution: int | None) -> None:
    """Raise ValueError for a value that is out of range; None is a default to be filled in."""
    if steps is not None:
        check_range("steps", steps, 1, 1000)
    if guidance is not None:
        check_range("guidance", guidance, 0.0, 100.0)
    if resolution is not None:
        check_range("resolution", resolution, 8, 512)
