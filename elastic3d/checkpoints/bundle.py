"""What a published checkpoint becomes: the parts of one model, and the strict way in which they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic3d.checkpoints.options import CheckpointConfig
from elastic3d.diffusion.sampler import integrate, sampling_times
from elastic3d.models.image_encoder import DinoV2
from elastic3d.models.options import DiTConfig, SkipDiTConfig, VAEConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.models.weights import empty_model, fill


@dataclass
class Bundle:
    """The parts of one checkpoint, in evaluation mode on one device.

    `dit(latents, t, condition)` is the velocity data - noise, with t = 0 noise and 1 data, whatever the original's
    direction. `vae.decode(latents)` divides by the scale factor itself; `vae.query(points, tokens)` is the field (B,P),
    positive inside. `conditioner` is None where the checkpoint holds none: see `note`.
    """

    dit: ShapeDiT | SkipDiT
    vae: ShapeVAE
    conditioner: DinoV2 | None
    config: CheckpointConfig
    weights: tuple[Path, ...]
    note: str = ""

    @torch.no_grad()
    def sample(
        self, condition: Tensor, noise: Tensor, steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        """Condition (B,M,Cc) and standard normal noise (B,N,C) -> latents (B,N,C) in fp32, by the published scheduler.

        Args:
            steps: as the original counts them; None is the published default.
            guidance: classifier-free guidance scale; 1 or less is none; None is the published default.

        Raises:
            ValueError: fewer than one step, or (UserError) more than a consistency model has segments.
        """
        sampling = self.config.pipeline
        steps = sampling.steps if steps is None else steps
        guidance = sampling.guidance if guidance is None else guidance
        return integrate(
            self.dit,
            condition,
            noise.float(),
            sampling_times(sampling, steps),
            guidance,
            guidance_embed=self.dit.config.guidance_embed,
        )


@dataclass(frozen=True)
class Inspection:
    """What is known of a checkpoint before its weights are read.

    Attributes:
        sizes: parameters of each stage of a generation: condition, dit, decode.
        note: why there is no image encoder; empty where there is one.
    """

    config: CheckpointConfig
    sizes: dict[str, int]
    note: str = ""


@dataclass(frozen=True)
class Loader:
    """Where loaded parameters go."""

    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, dtype: torch.dtype | None, device: torch.device | str | None) -> Loader:
        """None: fp32, on the CPU."""
        return cls(dtype or torch.float32, torch.device(device or "cpu"))

    def build(self, config: Any, state: Mapping[str, Tensor], source: str) -> Any:
        """A model that takes over `state`: no memory is spent on initial weights."""
        return fill(on_meta(config), state, source, self.dtype, self.device)


def on_meta(config: DiTConfig | SkipDiTConfig | VAEConfig) -> Any:
    """The model of a configuration, without memory."""
    return empty_model(model_class(config), config)


def model_class(config: DiTConfig | SkipDiTConfig | VAEConfig) -> Any:
    """The class that a configuration is for."""
    kinds: dict[type[Any], Any] = {DiTConfig: ShapeDiT, SkipDiTConfig: SkipDiT, VAEConfig: ShapeVAE}
    return kinds[type(config)]


def parameter_count(config: DiTConfig | SkipDiTConfig | VAEConfig) -> int:
    """Parameters of the model that a configuration describes; none is allocated."""
    return sum(parameter.numel() for parameter in on_meta(config).parameters())
