"""What the published Hunyuan3D-2 models cost on paper: FLOPs and memory by shape, time by an assumed speed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elastic3d.config.hunyuan3d import PRESETS
from elastic3d.models.flops import dit_blocks_flops
from elastic3d.models.hunyuan3d import parameter_count
from elastic3d.models.options import DiTConfig, SkipDiTConfig, VAEConfig
from elastic3d.pipelines.memory import GB, LOW_MEMORY_CHUNK, memory_need

BUDGETS = (1.0, 0.7, 0.5, 0.3)
SUSTAINED = 150e12
"""Assumed FLOPs a second in half precision: about what a large data-centre GPU reaches in such models."""
_TOKENS = 1370  # of one picture
_DINOV2 = {1536: 1_136_480_768, 1024: 304_368_640}  # parameters by width: giant, large
_RESOLUTION = 384


@dataclass(frozen=True)
class Published:
    """Sizes of one published model, and how many passes of its DiT make a mesh."""

    dit: DiTConfig | SkipDiTConfig
    vae: VAEConfig
    passes: int


@dataclass(frozen=True)
class Estimate:
    """One mesh: FLOPs of the DiT's blocks, their seconds at `SUSTAINED`, and bytes at the worst moment."""

    flops: float
    seconds: float
    memory: int
    low_memory: int


def published(name: str) -> Published:
    """The sizes of a preset as published. KeyError for another name."""
    latents = {"hunyuan3d2_mini": 512, "hunyuan3d2_mini_turbo": 512, "hunyuan3d2_1": 4096}.get(name, 3072)
    turbo = name.endswith("turbo")
    vae = VAEConfig(
        num_latents=latents, latent_channels=64, width=1024, heads=16, encoder_layers=0, decoder_layers=16,
        neighbours_in=0, neighbours_out=0,
    )  # fmt: skip
    passes = 5 if turbo else 2 * 49  # of 50 times, 49 move; with guidance two passes each
    if PRESETS[name].subfolder.endswith("v2-1"):
        return Published(SkipDiTConfig(), vae, passes)
    depth = 8 if "mini" in name else 16
    dit = DiTConfig(
        in_channels=64, condition_channels=1536, width=1024, heads=16, double_blocks=depth, single_blocks=2 * depth,
        guidance_embed=turbo, num_latents=latents, condition_tokens=_TOKENS * (4 if name.endswith("_mv") else 1),
    )  # fmt: skip
    return Published(dit, vae, passes)


def estimate(name: str, budget: float) -> Estimate:
    """What one mesh of a preset costs at a budget, in half precision. Routers, embeddings and decoding are left out."""
    model = published(name)
    dit = model.dit
    one_pass = dit_blocks_flops(dit, dit.num_latents, dit.condition_tokens)
    parameters = {
        "condition": _DINOV2[dit.condition_channels],
        "dit": parameter_count(dit),
        "decode": parameter_count(model.vae),
    }

    def peak(low: bool) -> int:
        need = memory_need(
            dit,
            model.vae,
            parameters,
            torch.bfloat16,
            rows=1 if low or dit.guidance_embed else 2,
            resolution=_RESOLUTION,
            max_points=LOW_MEMORY_CHUNK if low else 65536,
            encoder_width=dit.condition_channels,
            encoder_tokens=dit.condition_tokens,
        )
        return need.peak(offload=low)

    flops = budget * model.passes * one_pass
    return Estimate(flops, flops / SUSTAINED, peak(False), peak(True))


def table() -> str:
    """The estimates of every preset and budget in Markdown."""
    lines = [
        "| model | budget | DiT, PFLOP a mesh | DiT, s a mesh | memory, GB | with `low_memory=true`, GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in PRESETS:
        for budget in BUDGETS:
            e = estimate(name, budget)
            memory = f"{e.memory / GB:.1f} | {e.low_memory / GB:.1f}"
            lines.append(f"| {name} | {budget:g} | {e.flops / 1e15:.3f} | {e.seconds:.2f} | {memory} |")
    return "\n".join(lines)
