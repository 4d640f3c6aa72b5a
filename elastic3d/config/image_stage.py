"""Options of training on pictures with captions: the small text-to-image model, and routers for any backbone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from elastic3d.config.base import check_range, option
from elastic3d.config.routing import ElasticConfig
from elastic3d.config.text_to_image import BackboneName


class Prediction(Enum):
    """What a DiT's output is: the velocity, as in FLUX; or the clean picture, from which the velocity follows. It is
    far simpler than noise where a token has many pixels (2511.13720)."""

    velocity = "velocity"
    clean = "clean"


SAMPLING_DEFAULTS = ("steps", "guidance", "shift", "elastic", "name")


@dataclass(kw_only=True)
class PixelModelConfig:
    """A small `FluxTransformer2DModel` on pixels. `SAMPLING_DEFAULTS` may be chosen anew when it is exported."""

    size: int = option(64, "pixels a side")
    patch: int = option(8, "pixels a side of a token")
    text_length: int = option(16, "tokens of a prompt; longer ones are refused")
    width: int = option(256, "channels of a token")
    heads: int = option(4, "attention heads")
    double_blocks: int = option(2, "blocks with weights of their own for text and picture")
    single_blocks: int = option(14, "blocks with the same weights for both")
    steps: int = option(30, "sampling steps by default")
    guidance: float = option(3.0, "guidance by default")
    shift: float = option(1.0, "timestep shift of the sampler; above 1 spends more steps on noise")
    predicts: Prediction = option(Prediction.clean, "what the DiT's output is")
    elastic: ElasticConfig = option(ElasticConfig, "how it runs by default once it has routers")
    name: str = option("image-small", "name of the model, for receipts")

    def __post_init__(self) -> None:
        if self.patch % 2 or self.size % self.patch:
            raise ValueError(f"image.model: patch {self.patch} is odd, or no divisor of size {self.size}")
        if self.width % self.heads or (self.width // self.heads) % 16:
            raise ValueError(
                f"image.model: width {self.width} / heads {self.heads} is no multiple of 16 (rotary axes)"
            )
        check_range("image.model.text_length", self.text_length, 3, 512)


@dataclass(kw_only=True)
class ImageStageConfig:
    """Pictures with captions, and the model that learns from them."""

    backbone: BackboneName | None = option(
        None, "stage=router: family whose DiT gets routers; null: the shape DiT"
    )
    weights: Path | None = option(None, "its folder, in the layout in which it is published")
    images: Path | None = option(
        None,
        "folder of pictures with captions (a.png with a.txt, or captions.jsonl); null: the prepared shapes' views",
    )
    cache: Path = option(Path("data/prepared/images"), "folder of the cached pictures and texts")
    size: int | None = option(None, "pixels a side; null: the model's")
    text_length: int = option(256, "tokens of a cached prompt; the small model has its own")
    model: PixelModelConfig = option(PixelModelConfig, "stage=image: architecture")
    views: int = option(12, "prepared shapes: views of each")
    recolour: float = option(
        0.5, "prepared shapes: share of views that get one colour, which the caption names"
    )
    background: float = option(0.15, "prepared shapes: share on a coloured ground, which the caption names")
    val_every: int = option(50, "folder of pictures: every so-manieth is for validation")
    shard: int = option(512, "pictures in a file of the cache")
    encode_batch: int = option(8, "pictures or prompts encoded at once")
    drop_caption: float = option(0.1, "share of samples without caption (classifier-free guidance)")
    logit_normal: bool = option(True, "timesteps from a logit-normal distribution; false: uniform")
    shift: float = option(1.0, "timestep shift; above 1 trains more on noise")
    val_pictures: int = option(128, "pictures to validate on")
    sample_pictures: int = option(8, "sample pictures")
    sample_steps: int = option(25, "sampling steps of the sample pictures")
    sample_guidance: float = option(3.0, "their guidance")

    def __post_init__(self) -> None:
        for name in (
            "views",
            "val_every",
            "shard",
            "encode_batch",
            "val_pictures",
            "sample_pictures",
            "sample_steps",
        ):
            check_range(f"image.{name}", getattr(self, name), 1, 1 << 20)
        for name in ("recolour", "background", "drop_caption"):
            check_range(f"image.{name}", getattr(self, name), 0, 1)
        check_range("image.text_length", self.text_length, 3, 1024)
        if self.size is not None:
            check_range("image.size", self.size, 16, 4096)
        if self.backbone is not None and self.weights is None:
            raise ValueError(f"weights= is missing: the folder of the {self.backbone.name} pipeline")
