"""Text to image: which pipeline, and the options of `scripts/gen_image.py`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from elastic3d.config.base import DeviceChoice, DTypeChoice, check_range, option
from elastic3d.config.generate import check_sampling
from elastic3d.config.routing import BlockCacheConfig, check_budget

DEFAULT_IMAGE_MODEL = "data/pretrained/image-small"
MAX_PIXELS = 4096  # a side
MAX_PROMPT = 4000  # characters; every text encoder here takes fewer tokens


class BackboneName(Enum):
    """Families of text-to-image pipelines; `small` is the one of this repository."""

    small = "small"
    flux = "flux"
    qwen_image = "qwen_image"


@dataclass(kw_only=True)
class GenerateImageConfig:
    """Options of `scripts/gen_image.py`."""

    prompt: str = option("", "What the picture shows.")
    output: str = option("", "Picture file (.png); it holds the receipt of how it was made.")
    backbone: BackboneName = option(BackboneName.small, "Family of the pipeline.")
    weights: str = option(
        "", f"Folder of the pipeline as published; empty: {DEFAULT_IMAGE_MODEL} of this repository."
    )
    routers: str = option("", "Folder of routers; empty: `routers` in the folder of the weights, if there.")
    lora: str = option("", "LoRA (.safetensors) to merge into the weights; needs peft.")
    steps: int | None = option(None, "Sampling steps, 1 to 1000; null: the pipeline's default.")
    guidance: float | None = option(None, "How strictly the prompt is followed, 0 to 100; null: the default.")
    size: str = option("", "Pixels: 512, or 768x512 (width x height); empty: the pipeline's default.")
    elastic: bool | None = option(
        None, "Let the routers decide; false: the dense model; null: if it has any."
    )
    budget: float | None = option(
        None, "Share of the dense blocks' FLOPs to execute, 0.3 to 1; null: the default."
    )
    width: bool | None = option(None, "Let the routers narrow the MLPs; null: the default.")
    cache: BlockCacheConfig | None = option(None, "Reuse of blocks between steps; null: the default.")
    shared: bool | None = option(
        None,
        "Routes are shared in a batch: faster, but a result then depends on its batch; null: the default.",
    )
    updates: bool | None = option(
        None, "Use the routers' updates of the blocks where few calls are left; null: the model's default."
    )
    trace: str = option("", "Also draw what every block did at every step, one panel a picture, to this PNG.")
    seed: int = option(0, "Seed of the noise; the same seed on the same machine gives the same picture.")
    num_samples: int = option(1, "Pictures, with seeds seed, seed + 1, ...")
    batch_size: int = option(8, "Pictures generated at a time.")
    device: DeviceChoice = option(DeviceChoice.auto, "Where the model runs.")
    dtype: DTypeChoice = option(DTypeChoice.auto, "Number format of the model.")
    offload: bool = option(False, "Keep parts of the pipeline in main memory while they do not run (a GPU).")

    def __post_init__(self) -> None:
        for name, example in (("prompt", '"a wooden chair"'), ("output", "chair.png")):
            if not getattr(self, name).strip():
                raise ValueError(f"{name}= is missing, for example {name}={example}")
        for name in ("output", "trace"):
            value = getattr(self, name)
            if value and not value.lower().endswith(".png"):
                raise ValueError(f"{name} is {value}, expected a .png file")
        if not self.weights and self.backbone is not BackboneName.small:
            raise ValueError(f"weights= is missing: the folder of the {self.backbone.name} pipeline")
        check_sampling(self.steps, self.guidance, None)
        if self.budget is not None:
            check_budget(self.budget)
        parse_size(self.size)
        check_range("seed", self.seed, 0, 2**63 - 1)
        check_range("num_samples", self.num_samples, 1, 100_000)
        check_range("batch_size", self.batch_size, 1, 4096)


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
