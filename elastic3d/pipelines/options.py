"""Options of `scripts/gen_mesh.py` and `scripts/gen_image.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from elastic3d.diffusion.options import MAX_ENSEMBLE, Combine, Quality
from elastic3d.elastic.config import ElasticOptions
from elastic3d.evaluation.options import Runner
from elastic3d.geometry.options import CleanupConfig
from elastic3d.models.options import ForegroundConfig
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.options import Options, check_range, option

DEFAULT_MODEL = "data/pretrained/shape-small"
DEFAULT_IMAGE_MODEL = "data/pretrained/image-small"
NO_ROUTERS_NAME = "none"  # leaves out the routers that a model has
MAX_PIXELS = 4096  # a side
MAX_PROMPT = 4000  # characters; every text encoder here takes fewer tokens


class MeshFormat(Enum):
    """File formats of meshes; only glb holds the metadata."""

    glb = "glb"
    ply = "ply"
    obj = "obj"
    stl = "stl"


class Up(Enum):
    """The axis that points up in the file."""

    y = "y"
    z = "z"


class Texture(Enum):
    """Where the mesh's colours come from: it has none, or the image's are projected onto it."""

    none = "none"
    project = "project"


@dataclass(kw_only=True)
class AssetConfig(Options):
    """Options of the file that a mesh is saved to."""

    size_mm: float | None = option(
        None,
        "Longest side in millimetres (.glb counts in metres, as glTF does; the others in mm); null: the model's frame,"
        " about 2 units.",
        ge=1e-3,
        le=1e6,
    )
    up: Up = option(Up.y, "Axis that points up in the file; z: facing -y, as Blender and slicers have it.")
    min_wall_mm: float = option(
        0.8, "Thinnest wall that prints; a thinner one at size_mm= is warned about.", ge=0, le=1e3
    )
    texture: Texture = option(
        Texture.none, "project: the image's colours on the mesh, as vertex colours or (uv=true) as a texture."
    )
    texture_size: int = option(1024, "Pixels a side of the texture.", ge=16, le=8192)


@dataclass(kw_only=True)
class MeshRequestConfig(Options):
    """What a mesh is made of, by which model, and how finely."""

    image: str = option("", "Image of one object: a file, a folder, or a glob such as 'photos/*.png'.")
    prompt: str = option(
        "",
        "Instead of image=: what the object is; an image of it is made first and kept beside the mesh. The nouns that"
        " the bundled model knows are in data/pretrained/image-small/nouns.txt.",
    )
    image_model: str = option(
        "", "With prompt=: folder of the small text-to-image model; empty: that of this repository."
    )
    output: str = option("", "Mesh file (.glb, .ply, .obj, .stl) for one image, else a folder.")
    model: str = option(
        "",
        f"Folder of the model; empty: {DEFAULT_MODEL} of this repository. Or a published model whose weights you have:"
        " hunyuan3d2, hunyuan3d2_mini, hunyuan3d2_mv, hunyuan3d2_turbo, hunyuan3d2_mini_turbo, hunyuan3d2_1,"
        " triposg, step1x3d.",
    )
    weights: str = option(
        "",
        "Folder with a published model's weights, or its name on the Hugging Face Hub; empty: looked for in"
        " $HY3DGEN_MODELS, ~/.cache/hy3dgen and on the Hub.",
    )
    subfolder: str = option("", "Folder of the checkpoint in weights; empty: the published one.")
    vae_subfolder: str = option(
        "", "Take the VAE from this folder in weights, such as hunyuan3d-vae-v2-0-turbo."
    )
    dinov2: str = option("", "Folder of a DINOv2, for a checkpoint without its image encoder.")
    routers: str = option(
        "",
        "Folder of other routers, or its name in the model's folder: per_block; none: leave out the model's.",
    )
    calibration: str = option(
        "", "For a budget without routers: file or folder of elastic3d calibrate; empty: beside the weights."
    )
    image_left: str = option("", "Multi-view models: the object seen from its left.")
    image_back: str = option("", "Multi-view models: seen from behind.")
    image_right: str = option("", "Multi-view models: seen from its right.")
    steps: int | None = option(
        None, "Sampling steps; null: by budget=, or the model's default.", ge=1, le=1000
    )
    guidance: float | None = option(
        None, "How strictly the image is followed; 1 or less: one branch; null: the model's.", ge=0, le=100
    )
    resolution: int | None = option(
        None, "Grid cells a side; null: that of quality=, or the model's default.", ge=8, le=512
    )
    quality: Quality | None = option(
        None, "Instead of budget=: the model's fastest setting, its default, or its most faithful one."
    )
    ensemble: int = option(
        1,
        "Make one mesh of N generations of each object, for N times the work; see combine.",
        ge=1,
        le=MAX_ENSEMBLE,
    )
    combine: Combine = option(
        Combine.mean, "Of ensemble=N: the mean shape, or (fit) the one that fits the image best."
    )


@dataclass(kw_only=True)
class GenerateConfig(ElasticOptions, MeshRequestConfig):
    """Options of `scripts/gen_mesh.py`."""

    trace: str = option("", "Also draw what every block did at every step, one panel a mesh, to this PNG.")
    seed: int = option(
        0, "Seed of the noise; the same seed on the same machine gives the same mesh.", ge=0, le=2**63 - 1
    )
    num_samples: int = option(1, "Meshes of each image, with seeds seed, seed + 1, ...", ge=1, le=100_000)
    preview: bool = option(False, "Also write a turntable strip of each mesh as a PNG beside it.")
    format: MeshFormat | None = option(
        None, "Format of the meshes where output is a folder, or a file without a suffix; null: glb."
    )
    resume: bool = option(
        False, "Skip what already has an output file; one that was made otherwise is refused."
    )
    batch_size: int = option(8, "Generations at a time: of ensemble=4 two meshes.", ge=1, le=4096)
    runner: Runner = option(
        Runner.local,
        "Where a folder is generated: this process, or workers on the Ray cluster of RAY_ADDRESS.",
    )
    workers: int = option(2, "With runner=ray: models that work at a time.", ge=1, le=4096)
    device: DeviceChoice = option(DeviceChoice.auto, "Where the model runs.")
    dtype: DTypeChoice = option(DTypeChoice.auto, "Number format of the model.")
    low_memory: bool = option(
        False,
        "One part of the model on the device at a time, one mesh and one branch of the guidance at a time.",
    )
    compile: bool = option(
        False,
        "Compile the DiT where all its blocks run (default, quality=fast, elastic=false), on a GPU as CUDA graphs:"
        " takes minutes at first, for many meshes. Needs a C++ compiler, on a GPU Triton.",
    )
    memory_budget: float | None = option(
        None,
        "Published models: use at most this many GB; null: what is free. Less means smaller chunks.",
        ge=0.01,
        le=1e5,
    )
    foreground: ForegroundConfig = option(ForegroundConfig, "How the object is cut out.")
    cleanup: CleanupConfig = option(CleanupConfig, "What is done to the mesh.")
    asset: AssetConfig = option(AssetConfig, "What the file holds: size, axis, colour.")

    def check(self) -> None:
        """There is one input and one output."""
        if self.image and self.prompt:
            raise ValueError("image= and prompt= are both there, expected one of them")
        if not (self.image or self.prompt):
            raise ValueError("image= is missing, for example image=chair.png")
        if not self.output:
            raise ValueError("output= is missing, for example output=chair.glb")
        if self.trace:
            _check_trace(self.trace, self.elastic)
        if self.runner is Runner.ray and self.prompt:
            raise ValueError("runner=ray is for images, but prompt= is given")
        if self.views and self.prompt:
            raise ValueError(f"image_{next(iter(self.views))}= is for image=, but prompt= is given")
        if self.image_model and not self.prompt:
            raise ValueError(f"image_model is {self.image_model}, which is for prompt=, but image= is given")
        if self.compile and self.low_memory:
            raise ValueError("compile is true, expected false with low_memory=true, which moves the weights")

    @property
    def rows(self) -> int:
        """Meshes generated at a time."""
        return 1 if self.low_memory else max(self.batch_size // self.ensemble, 1)

    @property
    def inputs(self) -> dict[str, str]:
        """The images that are given, by the names of their options."""
        named = {name: getattr(self, name) for name in ("image", "image_left", "image_back", "image_right")}
        return {name: path for name, path in named.items() if path}

    @property
    def views(self) -> dict[str, Path]:
        """Further images of the object by the direction they are taken from."""
        return {
            name.removeprefix("image_"): Path(path) for name, path in self.inputs.items() if name != "image"
        }


class BackboneName(Enum):
    """Families of text-to-image pipelines; `small` is the one of this repository."""

    small = "small"
    flux = "flux"
    qwen_image = "qwen_image"


@dataclass(kw_only=True)
class ImageRequestConfig(Options):
    """What an image shows, by which pipeline, and how large."""

    prompt: str = option("", "What the image shows.")
    output: str = option("", "Image file (.png); it holds the metadata of how it was made.")
    backbone: BackboneName = option(BackboneName.small, "Family of the pipeline.")
    weights: str = option(
        "", f"Folder of the pipeline as published; empty: {DEFAULT_IMAGE_MODEL} of this repository."
    )
    routers: str = option(
        "",
        "Folder of routers, or its name in the folder of the weights: per_block; empty: `routers` there, if there; "
        "none: leave these out.",
    )
    calibration: str = option(
        "", "For a budget without routers: file or folder of elastic3d calibrate; empty: beside the weights."
    )
    lora: str = option("", "LoRA (.safetensors) to merge into the weights; needs peft.")
    steps: int | None = option(
        None, "Sampling steps; null: by budget=, or the pipeline's default.", ge=1, le=1000
    )
    guidance: float | None = option(
        None, "How strictly the prompt is followed; null: the default.", ge=0, le=100
    )
    size: str = option("", "Pixels: 512, or 768x512 (width x height); empty: the pipeline's default.")
    quality: Quality | None = option(
        None, "Instead of budget=: the model's fastest setting, its default, or its most faithful one."
    )


@dataclass(kw_only=True)
class GenerateImageConfig(ElasticOptions, ImageRequestConfig):
    """Options of `scripts/gen_image.py`."""

    trace: str = option("", "Also draw what every block did at every step, one panel an image, to this PNG.")
    seed: int = option(
        0, "Seed of the noise; the same seed on the same machine gives the same image.", ge=0, le=2**63 - 1
    )
    num_samples: int = option(1, "Images, with seeds seed, seed + 1, ...", ge=1, le=100_000)
    batch_size: int = option(8, "Images generated at a time.", ge=1, le=4096)
    device: DeviceChoice = option(DeviceChoice.auto, "Where the model runs.")
    dtype: DTypeChoice = option(DTypeChoice.auto, "Number format of the model.")
    offload: bool = option(False, "Keep parts of the pipeline in main memory while they do not run (a GPU).")

    def check(self) -> None:
        """There is a prompt, an output and a pipeline."""
        for name, example in (("prompt", '"a wooden chair"'), ("output", "chair.png")):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}= is missing, for example {name}={example}")
        _check_png("output", self.output)
        if self.trace:
            _check_trace(self.trace, self.elastic)
        if not self.weights and self.backbone is not BackboneName.small:
            raise ValueError(f"weights= is missing: the folder of the {self.backbone.name} pipeline")
        parse_size(self.size)


@dataclass(kw_only=True)
class CalibratePolicyConfig(Options):
    """Options of `scripts/calibrate.py`."""

    image: str = option("", "For meshes: images like those to come, a folder or a glob.")
    prompts: str = option("", "For images: a text file, one prompt a line.")
    samples: int = option(6, "How many of them are generated, spread evenly.", ge=1, le=1000)
    output: str = option("", "Folder or .json file to write; empty: beside the weights.")
    model: str = option("", "For meshes: as for gen_mesh.py, a folder or a published model.")
    backbone: BackboneName = option(BackboneName.small, "For images: family of the pipeline.")
    weights: str = option("", "Folder of a published model's weights; empty: the bundled model.")
    subfolder: str = option("", "Folder of the checkpoint in weights; empty: the published one.")
    vae_subfolder: str = option("", "Take the VAE from this folder in weights.")
    dinov2: str = option("", "Folder of a DINOv2, for a checkpoint without its image encoder.")
    steps: int | None = option(
        None, "Sampling steps; null: the model's default. Others are interpolated.", ge=3, le=1000
    )
    guidance: float | None = option(None, "Guidance scale; null: the model's default.", ge=0, le=100)
    size: str = option("", "For images: pixels, 512 or 768x512; empty: the pipeline's default.")
    seed: int = option(0, "Seed of the first noise, the others follow.", ge=0, le=2**63 - 1)
    device: DeviceChoice = option(DeviceChoice.auto, "Where the model runs.")
    dtype: DTypeChoice = option(DTypeChoice.auto, "Number format of the model.")
    low_memory: bool = option(False, "For meshes: one part of the model on the device at a time.")
    offload: bool = option(False, "For images: keep parts in main memory while they do not run (a GPU).")

    def check(self) -> None:
        """Either images or prompts, for one kind of model."""
        if bool(self.image) == bool(self.prompts):
            raise ValueError("one of image= (for meshes) and prompts= (for images) is expected")
        if self.prompts and self.model:
            raise ValueError("model= is for meshes, but prompts= is given: expected backbone= and weights=")
        if self.image and self.backbone is not BackboneName.small:
            raise ValueError(
                f"backbone= is for images, but image= is given, and backbone is {self.backbone.name}"
            )
        parse_size(self.size)


def _check_trace(trace: str, elastic: bool | None) -> None:
    """ValueError where routes can't be drawn to this file."""
    _check_png("trace", trace)
    if elastic is False:
        raise ValueError(f"trace is {trace}, but elastic is false: the dense model has no routes to draw")


def _check_png(name: str, path: str) -> None:
    if not path.lower().endswith(".png"):
        raise ValueError(f"{name} is {path}, expected a .png file")


def parse_size(text: str) -> tuple[int, int] | None:
    """`512` or `768x512` -> (width, height) in pixels; None for an empty text. ValueError for anything else."""
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match:
        raise ValueError(f"size is {text!r}, expected pixels such as 512 or 768x512")
    width, height = int(match[1]), int(match[2] or match[1])
    for side in (width, height):
        check_range("size", side, 16, MAX_PIXELS)
    return width, height
