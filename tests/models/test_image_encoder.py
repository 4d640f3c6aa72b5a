"""The frozen image encoders: shapes, determinism, independence of the batch, strict loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from elastic3d.errors import UserError
from elastic3d.models.image_encoder import (
    EfficientNetLite,
    ImageEncoder,
    build_image_encoder,
    load_image_encoder,
    save_image_encoder,
)
from elastic3d.models.images import to_tensor
from elastic3d.models.options import EncoderFeatures, EncoderKind, ImageEncoderConfig


@pytest.fixture(scope="module")
def encoder() -> EfficientNetLite:
    encoder = build_image_encoder(ImageEncoderConfig())
    assert isinstance(encoder, EfficientNetLite)
    return encoder


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    images = []
    for x in (60, 64, 120):
        image = Image.new("RGB", (224, 224), "white")
        ImageDraw.Draw(image).ellipse((x, 40, x + 60, 160), fill="maroon")
        images.append(image)
    return to_tensor(images)


def test_efficientnet_shapes(encoder: EfficientNetLite, images: torch.Tensor) -> None:
    tokens = encoder(images)
    assert tokens.shape == (3, encoder.tokens, encoder.channels) == (3, 49, 768)
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    assert encoder.pooled(images).shape == (3, 1280)
    head = build_image_encoder(ImageEncoderConfig(features=EncoderFeatures.head, image_size=256))
    assert head(torch.rand(1, 3, 256, 256)).shape == (1, 64, 1280) == (1, head.tokens, head.channels)


def test_head_features_equal_the_package_own(encoder: EfficientNetLite, images: torch.Tensor) -> None:
    network = encoder.network
    assert isinstance(network, EfficientNet)
    with torch.no_grad():
        expected = network.extract_features((images * 255 - 127) / 128)
    torch.testing.assert_close(encoder.pooled(images), expected.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)


def test_tokens_lie_where_the_object_is(encoder: EfficientNetLite, images: torch.Tensor) -> None:
    """Moving the object by one token moves its features by one token, much more than it changes them."""
    left = torch.ones(1, 3, 224, 224)
    left[:, :, 96:128, 64:96] = 0.2
    right = left.roll(32, dims=3)
    a, b = (encoder(x).view(7, 7, -1) for x in (left, right))
    moved = (a.roll(1, dims=1) - b)[2:5, 2:6].norm()
    assert moved < 0.6 * (a - b)[2:5, 2:6].norm()


def test_parts_have_comparable_scale(encoder: EfficientNetLite, images: torch.Tensor) -> None:
    tokens = encoder(images)
    for part in (tokens[..., :448], tokens[..., 448:]):
        assert 0.3 < part.std() < 2.0


def test_a_sample_does_not_depend_on_its_batch(encoder: EfficientNetLite, images: torch.Tensor) -> None:
    alone = torch.cat([encoder(image[None]) for image in images])
    torch.testing.assert_close(encoder(images), alone, rtol=1e-4, atol=1e-4)


def test_it_stays_in_evaluation_mode(encoder: EfficientNetLite, images: torch.Tensor) -> None:
    before = encoder(images)
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    torch.testing.assert_close(encoder(images), before, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_wrong_image_shapes_are_refused(encoder: EfficientNetLite) -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3, 64, 64\), expected \(B, 3, 224, 224\)"):
        encoder(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match="image_size is 200, expected a multiple of 32"):
        ImageEncoderConfig(image_size=200)


def test_round_trip(tmp_path: Path, encoder: EfficientNetLite) -> None:
    save_image_encoder(encoder, tmp_path)
    assert load_image_encoder(tmp_path).config == encoder.config
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.fixture
def dinov2_folder(tmp_path: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


def _dinov2(folder: Path) -> ImageEncoder:
    return build_image_encoder(ImageEncoderConfig(kind=EncoderKind.dinov2, image_size=56, path=str(folder)))


def test_dinov2(tmp_path: Path, dinov2_folder: Path) -> None:
    encoder = _dinov2(dinov2_folder)
    images = torch.rand(2, 3, 56, 56)
    tokens = encoder(images)
    assert tokens.shape == (2, 17, 32) == (2, encoder.tokens, encoder.channels)
    torch.testing.assert_close(encoder.pooled(images), tokens[:, 0])
    save_image_encoder(encoder, tmp_path / "pipeline")
    (tmp_path / "pipeline").rename(tmp_path / "moved")
    torch.testing.assert_close(load_image_encoder(tmp_path / "moved")(images), tokens)


def test_broken_dinov2_folders(tmp_path: Path, dinov2_folder: Path) -> None:
    with pytest.raises(UserError, match="there is no file .*nowhere"):
        _dinov2(tmp_path / "nowhere")
    weights = dinov2_folder / "model.safetensors"
    state = load_file(weights)
    state.pop("layernorm.weight")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="do not fit Dinov2Model: .*layernorm.weight"):
        _dinov2(dinov2_folder)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match="can't load a DINOv2 model"):
        _dinov2(dinov2_folder)
    weights.rename(dinov2_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors file"):
        _dinov2(dinov2_folder)
    (dinov2_folder / "x.safetensors").touch()
    (dinov2_folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="type 'bert', expected 'dinov2'"):
        _dinov2(dinov2_folder)
