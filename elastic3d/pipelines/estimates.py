"""What published models cost on paper: FLOPs and memory by shape, time by an assumed speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elastic3d.checkpoints.bundle import on_meta, parameter_count
from elastic3d.checkpoints.options import OPEN_MODELS, PRESETS
from elastic3d.models.options import DiTConfig, SkipDiTConfig, VAEConfig
from elastic3d.pipelines.memory import GB, LOW_MEMORY_CHUNK, memory_need
from elastic3d.pipelines.runtime import pass_flops

BUDGETS = (1.0, 0.7, 0.5, 0.3)
SUSTAINED = 150e12
"""Assumed FLOPs a second in half precision: about what a large data-centre GPU reaches in such models."""
_TOKENS = 1370  # of one image
_DINOV2 = {1536: 1_136_480_768, 1024: 304_368_640}  # parameters by width: giant, large


@dataclass(frozen=True)
class Published:
    """Sizes of one published model, and how many passes of its DiT make a mesh."""

    dit: DiTConfig | SkipDiTConfig
    vae: VAEConfig
    passes: int
    resolution: int = 384


@dataclass(frozen=True)
class Estimate:
    """One mesh: FLOPs of the DiT's blocks, their seconds at `SUSTAINED`, and bytes at the worst moment."""

    flops: float
    seconds: float
    memory: int
    low_memory: int


def published(name: str) -> Published:
    """The sizes of a preset as published. KeyError for another name."""
    if name in OPEN_MODELS:
        return _open_model(name)
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


def _open_model(name: str) -> Published:
    if name == "triposg":
        skip = SkipDiTConfig(expert_blocks=0, norm_eps=1e-5, num_latents=2048, condition_tokens=257)
        vae = VAEConfig(
            num_latents=2048, latent_channels=64, width=1024, heads=8, encoder_width=512, encoder_layers=8,
            decoder_layers=16, qk_norm=False, point_features=3, neighbours_in=0, neighbours_out=0,
        )  # fmt: skip
        return Published(skip, vae, 2 * 50, resolution=512)
    dit = DiTConfig(
        in_channels=64, condition_channels=1024, width=1280, heads=20, double_blocks=12, single_blocks=24,
        wide_time=True, num_latents=2048, condition_tokens=_TOKENS,
    )  # fmt: skip
    vae = VAEConfig(
        num_latents=2048, latent_channels=64, width=768, heads=12, encoder_layers=8, decoder_layers=16,
        qk_norm=False, point_features=3, sharp_attention=True, neighbours_in=0, neighbours_out=0,
    )  # fmt: skip
    return Published(dit, vae, 2 * 29)  # of 30 steps, the first moves nothing


def estimate(name: str, budget: float) -> Estimate:
    """What one mesh of a preset costs at a budget, in half precision. Routers, embeddings and decoding are left out."""
    model = published(name)
    dit = model.dit
    one_pass = sum(block.dense for block in pass_flops(on_meta(dit), dit.condition_tokens))
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
            resolution=model.resolution,
            max_points=LOW_MEMORY_CHUNK if low else 65536,
            encoder_width=dit.condition_channels,
            encoder_tokens=dit.condition_tokens,
        )
        return need.peak(offload=low)

    flops = budget * model.passes * one_pass
    return Estimate(flops, flops / SUSTAINED, peak(False), peak(True))


def table(names: Sequence[str]) -> str:
    """The estimates of some presets at every budget, in Markdown."""
    lines = [
        "| model | budget | DiT, PFLOP a mesh | DiT, s a mesh | memory, GB | with `low_memory=true`, GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        for budget in BUDGETS:
            e = estimate(name, budget)
            memory = f"{e.memory / GB:.1f} | {e.low_memory / GB:.1f}"
            lines.append(f"| {name} | {budget:g} | {e.flops / 1e15:.3f} | {e.seconds:.2f} | {memory} |")
    return "\n".join(lines)
