"""Options of the scripts that measure one part of a model: dial, colours, decoding, stages, times at full size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastic3d.checkpoints.options import PRESETS
from elastic3d.diffusion.options import Quality
from elastic3d.elastic.config import MIN_BUDGET
from elastic3d.models.options import MAX_TOKENS, MAX_WIDTH
from elastic3d.pipelines.options import DEFAULT_MODEL
from elastic3d.preparation.options import PrepareConfig
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.options import Options, option


@dataclass(kw_only=True)
class DialConfig(Options):
    """The dial of a model from the results of scripts/benchmark.py."""

    model: Path = option(Path("data/pretrained/shape-small"), "Folder of the model, which gets dial.json.")
    results: Path = option(..., "results.json of a benchmark of this model, with ground truth and times.")


@dataclass(kw_only=True)
class ColourConfig(Options):
    """Options of `scripts/measure_colour.py`."""

    data: PrepareConfig = option(PrepareConfig, "Where the shapes come from.")
    model: str = option("", "Folder of the model; empty: the bundled model.")
    quality: Quality | None = option(None, "Of the meshes; null: the model's default.")
    resolution: int = option(128, "Grid cells a side of the meshes.", ge=8, le=512)
    limit: int = option(10, "Held-out shapes, the first of the source.", ge=1, le=10_000)
    seed: int = option(0, "Of views, lights and noise.", ge=0, le=2**31)
    output: Path | None = option(None, "Also write the figures to this JSON file, after each shape.")


@dataclass(kw_only=True)
class StagesConfig(Options):
    """How long each stage from an image to a written mesh takes, also against another checkout."""

    image: Path = option(Path("data/samples/chair.png"), "image of one object")
    model: Path = option(Path(DEFAULT_MODEL), "folder of the model; both checkouts load this one")
    against: Path | None = option(
        None, "root of another checkout, measured in turn with this one; null: none"
    )
    output: Path = option(Path("outputs/stages.json"), "JSON file with every measurement")
    rounds: int = option(3, "fresh processes of each checkout", ge=1, le=1000)
    repeats: int = option(3, "meshes that such a process makes after its first", ge=1, le=1000)
    commands: bool = option(True, "also time the whole commands gen_mesh.py and gen_mesh.py --help")
    resolution: int | None = option(
        256, "grid cells a side of the decoding; null: that of quality=", ge=8, le=512
    )
    quality: Quality | None = option(None, "point of the model's dial; null: the default")
    budget: float | None = option(None, "share of the dense FLOPs; null: that of quality=", ge=0.01, le=1)
    elastic: bool = option(True, "let the routers decide; false: the dense model")
    compile: bool = option(False, "as of gen_mesh.py; the first mesh then waits for the compiler")
    threads: int = option(0, "threads of PyTorch; 0: its own choice", ge=0, le=1024)
    cpu: bool = option(
        False,
        "count time of the processor, not of the clock, on a machine that does other work; needs threads=1",
    )
    batch: int = option(0, "also a batch of that many meshes; 0: none", ge=0, le=4096)

    def check(self) -> None:
        """Threads that wait for each other count as work."""
        if self.cpu and self.threads != 1:
            raise ValueError(f"cpu is true and threads is {self.threads}, expected threads=1 with it")


@dataclass(kw_only=True)
class DecodingConfig(Options):
    """What resolution and tolerance of the decoding cost, and what they leave of the mesh."""

    model: str = option(DEFAULT_MODEL, "folder of the model")
    images: Path = option(Path("data/samples"), "folder of images to sample latents from")
    gt: Path | None = option(
        None,
        "folder of true meshes (.glb), named as their images are; they are encoded too; null: none but made shapes",
    )
    seeds: list[int] = option([0, 1, 2], "seeds of the latents of each image", ge=0, le=2**63 - 1)
    output: Path = option(
        Path("outputs/decoding"), "folder for latents.safetensors, shapes.json, settings.json and table.md"
    )
    reference: int = option(
        256,
        "cells a side of the references: the whole cube at 64 cells, by the network's own modules, then everywhere at"
        " the surface",
        ge=8,
        le=512,
    )
    resolutions: list[int] = option(
        [64, 96, 128, 192, 256], "cells a side to compare with it, by default ways", ge=8, le=512
    )
    points: int = option(20000, "points on each mesh that distances are measured from", ge=100, le=1 << 24)
    limit: int = option(0, "shapes, from the first; 0: all", ge=0, le=1 << 20)
    hunyuan3d_tokens: int = option(
        0,
        "count the time of Hunyuan3D-2's field decoder (random weights) with that many latent tokens, 512 or 3072; 0:"
        " of the model's own",
        ge=0,
        le=1 << 16,
    )


@dataclass(kw_only=True)
class FullSizeConfig(Options):
    """Times of published DiTs with random weights, dense and at budgets that a training-free policy keeps."""

    output: Path = option(Path("outputs/full_size.json"), "JSON file with every measurement")
    models: list[str] = option(
        ["hunyuan3d2", "triposg", "step1x3d"],
        "published models",
        choices=tuple(PRESETS),
        lengths=(1, 100),
        unique=True,
    )
    budgets: list[float] = option(
        [0.65, 0.5, 0.35], "shares of the blocks' FLOPs", ge=MIN_BUDGET, le=1, lengths=(1, 100), unique=True
    )
    batches: list[int] = option([1, 4], "batch sizes", ge=1, le=4096, lengths=(1, 100), unique=True)
    steps: int = option(20, "sampling steps", ge=5, le=1000)
    rounds: int = option(3, "rounds after a warm one", ge=1, le=1000)
    width: int = option(
        0, "width of the DiTs; 0: as published. For machines that hold no more", ge=0, le=MAX_WIDTH
    )
    latents: int = option(
        0, "latent tokens, condition tokens in proportion; 0: as published", ge=0, le=MAX_TOKENS
    )
    device: DeviceChoice = option(DeviceChoice.auto, "where the models run")
    dtype: DTypeChoice = option(DTypeChoice.auto, "number format of the models")
