"""Published configurations at full size, on paper: nothing is allocated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hunyuan_tiny import config_21, dit_shapes_21, tiny_config

from elastic3d.checkpoints.bundle import on_meta, parameter_count
from elastic3d.checkpoints.dinov2 import build_network
from elastic3d.checkpoints.hunyuan3d import dinov2_config, parse_config, parse_vae
from elastic3d.elastic.families import dense_flops
from elastic3d.elastic.families.shape_dit import ADAPTER
from elastic3d.models.options import DiTConfig, SkipDiTConfig


def full_size(**changes: Any) -> DiTConfig:
    fields = dict(
        in_channels=64, condition_channels=1536, width=1024, heads=16, double_blocks=16, single_blocks=32,
        num_latents=3072, condition_tokens=1370,
    )  # fmt: skip
    return DiTConfig(**{**fields, **changes})  # type: ignore[arg-type]


def test_published_sizes() -> None:
    """Parameters and FLOPs of one pass as published: 1.113 B and 9.25 T, 0.559 B and 1.48 T."""
    mini = full_size(double_blocks=8, single_blocks=16, num_latents=512)
    for config, parameters, flops in ((full_size(), 1.113e9, 9.25e12), (mini, 0.559e9, 1.48e12)):
        assert parameter_count(config) == pytest.approx(parameters, rel=0.005)
        found = dense_flops(on_meta(config), ADAPTER, [config.num_latents, config.condition_tokens])
        assert found == pytest.approx(flops, rel=0.05)


def test_published_size_of_21() -> None:
    """The values of hunyuan3d-dit-v2-1/config.yaml make the 7,366,389,768 bytes of its model.fp16.ckpt.

    That is 3.051 B parameters of the DiT (published as 3.3 B for the shape model), 0.328 B of the VAE with its encoder
    and 0.304 B of DINOv2-large in half precision, and 0.01 % for the file's own structure.
    """
    values = config_21()
    values["model"]["params"] |= {
        "input_size": 4096, "in_channels": 64, "hidden_size": 2048, "context_dim": 1024, "depth": 21,
        "num_heads": 16, "text_len": 1370, "num_moe_layers": 6, "num_experts": 8, "moe_top_k": 2,
    }  # fmt: skip
    values["vae"]["params"] |= {
        "num_latents": 4096, "embed_dim": 64, "width": 1024, "heads": 16, "num_encoder_layers": 8,
        "num_decoder_layers": 16, "scale_factor": 1.0039506158752403, "pc_size": 81920,
    }  # fmt: skip
    values["conditioner"]["params"]["main_image_encoder"]["kwargs"] = {
        "config": dinov2_config("dinov2-large"), "image_size": 518,
    }  # fmt: skip
    config = parse_config(values, "config.yaml")
    assert config.dit == SkipDiTConfig()
    dit = parameter_count(config.dit)
    vae = parameter_count(parse_vae(values["vae"], "config.yaml", has_encoder=True))
    shapes = dit_shapes_21(values["model"]["params"])
    assert dit == sum(math.prod(shape) for shape in shapes.values()) == 3_050_758_720
    with torch.device("meta"):
        encoder = sum(p.numel() for p in build_network(config.dinov2, "test").parameters())
    assert 2 * (dit + vae + encoder) == pytest.approx(7_366_389_768, rel=2e-4)


def test_a_published_config_file() -> None:
    """The values of hunyuan3d-dit-v2-0/config.yaml as far as the public facts name them."""
    values = tiny_config()
    values["model"]["params"] = {
        "in_channels": 64, "context_in_dim": 1536, "hidden_size": 1024, "mlp_ratio": 4.0, "num_heads": 16,
        "depth": 16, "depth_single_blocks": 32, "axes_dim": [64], "theta": 10000, "qkv_bias": True,
    }  # fmt: skip
    values["vae"]["params"] |= {
        "num_latents": 3072, "embed_dim": 64, "width": 1024, "heads": 16, "num_decoder_layers": 16,
        "scale_factor": 0.9990943042622529,
    }  # fmt: skip
    values["conditioner"]["params"]["main_image_encoder"]["kwargs"] = {
        "config": dinov2_config("dinov2-giant"), "image_size": 518,
    }  # fmt: skip
    config = parse_config(values, "config.yaml")
    assert config.dit == full_size()
    assert config.vae.scale_factor == 0.9990943042622529 and config.vae.encoder_layers == 0
    assert (config.encoder.image_size, config.encoder.prepared_size) == (518, 40)
    with torch.device("meta"):
        network = build_network(config.dinov2, "test")
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(1.136e9, rel=0.005)  # DINOv2-giant


# ---------------------------------------------------------------------------------------------------- bad input
