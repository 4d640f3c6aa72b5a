"""A pipeline with random weights, a few thousand of them, whose fields have a surface."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from elastic3d.diffusion.options import PipelineConfig
from elastic3d.geometry.decode import node_points
from elastic3d.models.image_encoder import ImageEncoder, build_image_encoder
from elastic3d.models.options import DiTConfig, ImageEncoderConfig, VAEConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline

LATENTS, CHANNELS = 8, 7


def tiny_pipeline(blocks: int = 2) -> ImageTo3DPipeline:
    """Width 32, 8 latents, 4 condition tokens from images of 64 pixels, `blocks` of each kind; always the same.

    Each has weights of its own, but for the encoder, whose weights nothing changes and which takes longest to build.
    """
    vae, dit, encoder = _models(blocks)
    config = PipelineConfig(model="tiny", steps=3, guidance=2.0, resolution=16)
    return ImageTo3DPipeline(copy.deepcopy(vae), copy.deepcopy(dit), encoder, config)


@cache
def _models(blocks: int) -> tuple[ShapeVAE, ShapeDiT, ImageEncoder]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = ShapeVAE(
            VAEConfig(
                num_latents=LATENTS, latent_channels=CHANNELS - 3, width=32, heads=2, encoder_layers=1,
                decoder_layers=1, anchored=True,
            )
        )  # fmt: skip
        dit = ShapeDiT(
            DiTConfig(
                in_channels=CHANNELS, width=32, heads=2, double_blocks=blocks, single_blocks=blocks,
                num_latents=LATENTS, condition_tokens=4,
            )
        )  # fmt: skip
        for parameter in dit.parameters():
            if not parameter.any():  # zero at the start of training; here every part shall have an effect
                torch.nn.init.normal_(parameter, std=0.05)
    encoder = build_image_encoder(ImageEncoderConfig(image_size=64))
    _centre_field(vae)
    return vae, dit, encoder


def _centre_field(vae: ShapeVAE) -> None:
    """Shift the output so that a third of the cube is inside for typical latents."""
    generator = torch.Generator().manual_seed(0)
    points = node_points(torch.arange(9**3), 8, 1.01)[None]
    with torch.no_grad():
        tokens = vae.decode(torch.randn(1, LATENTS, CHANNELS, generator=generator))
        vae.geo_decoder.output_proj.bias -= vae.query(points, tokens).quantile(0.67)


def image(colour: str = "maroon", x: int = 30) -> Image.Image:
    """An ellipse on a transparent background."""
    image = Image.new("RGBA", (100, 80), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((x, 10, x + 30, 70), fill=colour)
    return image


def save_image(path: Path, colour: str = "maroon", x: int = 30) -> Path:
    """Write `image` to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image(colour, x).save(path)
    return path
