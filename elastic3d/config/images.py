"""Options of the image encoder and of what happens to a picture before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from elastic3d.config.base import check_range, option


class EncoderKind(Enum):
    """Which pretrained network reads the image."""

    efficientnet_lite0 = "efficientnet_lite0"
    dinov2 = "dinov2"


class EncoderFeatures(Enum):
    """EfficientNet only: `multiscale` keeps where things are, `head` is the classifier's last feature map."""

    multiscale = "multiscale"
    head = "head"


class ForegroundMethod(Enum):
    """Where the object's mask comes from; `auto`: the first of alpha, plain background, rembg that fits."""

    auto = "auto"
    alpha = "alpha"
    plain = "plain"
    rembg = "rembg"


@dataclass(kw_only=True)
class ImageEncoderConfig:
    """A frozen image encoder."""

    kind: EncoderKind = option(EncoderKind.efficientnet_lite0, "pretrained network that reads the image")
    features: EncoderFeatures = option(EncoderFeatures.multiscale, "feature maps taken (EfficientNet only)")
    image_size: int = option(
        224, "side of the input in pixels, a multiple of 32 (EfficientNet) or 14 (DINOv2)"
    )
    picture_size: int = option(
        0, "DINOv2 only: pictures are prepared at this side and then resized; 0: image_size"
    )
    centre_crop: bool = option(
        False, "DINOv2 only: image_size pixels are cut out of the middle of picture_size, rather than resized"
    )
    border: float = option(0.15, "share of the square that stays free along the object's longer side")
    views: int = option(
        1, "DINOv2 only: pictures of one object, told apart by an embedding of their direction"
    )
    path: str = option("", "folder of the DINOv2 model (config.json and safetensors); unused by EfficientNet")

    def __post_init__(self) -> None:
        check_range("image_size", self.image_size, 28, 2048)
        check_range("picture_size", self.picture_size, 0, 2048)
        check_range("border", self.border, 0.0, 0.9)
        check_range("views", self.views, 1, 16)
        if self.centre_crop and self.picture_size < self.image_size:
            raise ValueError(
                f"picture_size is {self.picture_size}, expected at least image_size {self.image_size} to cut from"
            )
        step = 14 if self.kind is EncoderKind.dinov2 else 32
        if self.image_size % step:
            raise ValueError(
                f"image_size is {self.image_size}, expected a multiple of {step} ({self.kind.name})"
            )
        if self.kind is EncoderKind.dinov2 and not self.path:
            raise ValueError("path is empty, expected the folder of a DINOv2 model")


@dataclass(kw_only=True)
class ForegroundConfig:
    """How the object is cut out and centred."""

    method: ForegroundMethod = option(ForegroundMethod.auto, "where the object's mask comes from")
    border: float | None = option(
        None, "share of the square that stays free along the object's longer side; null: the model's own"
    )
    tolerance: int = option(20, "largest channel difference (0 to 255) within a plain background")

    def __post_init__(self) -> None:
        if self.border is not None:
            check_range("border", self.border, 0.0, 0.9)
        check_range("tolerance", self.tolerance, 0, 255)

    def for_encoder(self, encoder: ImageEncoderConfig) -> ForegroundConfig:
        """With the border that a model's images have, where none was chosen."""
        return replace(self, border=encoder.border) if self.border is None else self
