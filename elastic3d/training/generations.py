"""Whole generations as training: from noise through all steps to the last latents, held to the dense model's of the
same noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.diffusion.flow import sampling_times
from elastic3d.diffusion.options import PipelineConfig
from elastic3d.diffusion.sampler import integrate
from elastic3d.elastic.attachment import router_modules, session_of, todays_keys
from elastic3d.elastic.config import ElasticConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.pipelines.image_to_3d import PIPELINE_NAME
from elastic3d.training.datasets import Batch, PreparedShapes, item_generator
from elastic3d.training.latents import LatentInfo
from elastic3d.utils.options import Options, from_dict, option
from elastic3d.utils.structured import load_json


@dataclass(kw_only=True)
class GenerationConfig(Options):
    """Training through whole generations."""

    rank: int = option(32, "rank of the few-step LoRA", ge=1, le=4096)
    min_steps: int = option(4, "fewest sampling steps", ge=1, le=1000)
    max_steps: int = option(25, "most of them", ge=1, le=1000)
    reference_steps: int = option(
        60, "sampling steps of the dense results that are to be reached", ge=1, le=10_000
    )
    pairs: int = option(
        8192, "pairs of a condition and noise, whose dense results are kept in memory", ge=1, le=1 << 24
    )
    floor: float = option(
        1e-3,
        "relative squared error below which little is to be gained; the loss is the logarithm of what is above",
        ge=1e-9,
        le=1,
        advanced=True,
    )
    val_shapes: int = option(
        28, "validation shapes or images that are generated", ge=1, le=1 << 16, advanced=True
    )

    def check(self) -> None:
        """The range of steps is not empty, and the dense results are in no fewer."""
        super().check()
        for name, low, high in (
            ("max_steps", self.min_steps, 1000),
            ("reference_steps", self.max_steps, 10_000),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a value from {low} to {high}")


@dataclass(kw_only=True)
class ShapeGenerationConfig(GenerationConfig):
    """Of shapes: guidance, and what counts."""

    guidance: bool = option(
        False, "learn the pipeline's guidance too: generations with the LoRA run the conditional branch alone"
    )
    guided_times: list[float] = option(
        [],
        "with it: first and last time between which both branches run all the same; empty: nowhere",
        ge=0,
        le=1,
        ascending=True,
    )
    anchor_weight: float = option(
        1.0,
        "weight of the anchors' channels over the others': errors there cost a mesh the most",
        ge=0,
        le=1e6,
    )

    def check(self) -> None:
        """Times of guidance come with guidance."""
        super().check()
        if len(self.guided_times) not in (0, 2):
            raise ValueError(f"guided_times is {self.guided_times}, expected none or two")
        if self.guided_times and not self.guidance:
            raise ValueError(f"guided_times is {self.guided_times}, expected none: guidance is false")


class GenerationObjective(nn.Module, ABC):
    """A frozen model with routers, generating. Subclasses say how, and train the routers or their few-step LoRA."""

    gradient_checkpointing = False  # set by the loop
    weights: Tensor

    def __init__(self, dit: nn.Module, reference_steps: int, weights: Tensor) -> None:
        """`weights` (C,): how much an error of each channel counts."""
        super().__init__()
        self.reference_steps = reference_steps
        self.register_buffer("weights", weights, persistent=False)
        self.session = session_of(dit)
        dit.requires_grad_(False)
        for part in router_modules(dit).values():
            part.requires_grad_(False)
        self._dit = (dit.eval(),)  # in a tuple: no part of the state dict, nor trained
        self._dense: dict[int, Tensor] = {}

    @property
    def dit(self) -> nn.Module:
        """The model with its routers, where these are."""
        dit, device = self._dit[0], next(self.parameters()).device
        return dit if next(dit.parameters()).device == device else dit.to(device)

    @abstractmethod
    def integrate(self, batch: Batch, steps: int) -> Tensor:
        """`noise` (B,N,C) and a condition -> latents (B,N,C) in `steps` steps, as the session's settings say."""

    def generate(self, batch: Batch, steps: int, settings: ElasticConfig) -> Tensor:
        """Latents (B,N,C) in `steps` steps, with gradients to what learns."""
        session, before = self.session, self.session.settings
        session.settings, session.recompute = settings, self.gradient_checkpointing
        try:
            return self.integrate(batch, steps)
        finally:
            session.settings, session.recompute = before, False

    @torch.no_grad()
    def dense_results(self, batch: Batch) -> Tensor:
        """Latents (B,N,C) of the dense model in many steps; computed when they are first needed, and kept."""
        pairs = batch["pair"].tolist()
        missing = list({pair: row for row, pair in enumerate(pairs) if pair not in self._dense}.values())
        if missing:
            part = {name: value[missing] for name, value in batch.items()}
            found = self.generate(part, self.reference_steps, ElasticConfig(elastic=False)).cpu()
            self._dense |= {pairs[row]: latents for row, latents in zip(missing, found, strict=True)}
        return torch.stack([self._dense[pair] for pair in pairs]).to(batch["noise"].device)


def integrate_shapes(dit: ShapeDiT | SkipDiT, pipeline: PipelineConfig, batch: Batch, steps: int) -> Tensor:
    """`noise` (B,N,C), `condition` (B,M,Cc) -> latents (B,N,C), as a pipeline samples shapes, with gradients."""
    return integrate(
        dit,
        batch["condition"].float(),
        batch["noise"],
        steps,
        pipeline.guidance,
        times=sampling_times(pipeline, steps),
        solver=pipeline.solver,
        guidance_embed=dit.config.guidance_embed,
        session=session_of(dit),
    )


def draw_pair(shapes: PreparedShapes, info: LatentInfo, pair: int, seed: int) -> Batch:
    """`noise` (N,C) and `condition` (M,Cc), one view of a shape: the same for the same number of a pair."""
    rng = item_generator(seed, pair)
    view = int(rng.integers(info.settings["views"]))
    noise = rng.standard_normal(tuple(info.latents), dtype=np.float32)
    id = shapes.ids[pair % len(shapes)]
    return {"noise": torch.from_numpy(noise), "condition": shapes.read(id, "tokens", view)}


def relative_errors(found: Tensor, true: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """(B,N,C) each, weights of channels (C,) -> squared distance over the squared norm (B,)."""
    return (weights * (found - true).square()).mean((1, 2)) / (weights * true.square()).mean((1, 2))


def channel_weights(channels: int, anchors: int, weight: float) -> Tensor:
    """(C,): `weight` for the anchors' channels, which come first, 1 for the others."""
    weights = torch.ones(channels)
    weights[:anchors] = weight
    return weights


def pipeline_config(model: Path) -> PipelineConfig:
    """The sampling defaults in a pipeline's folder."""
    path = model / PIPELINE_NAME
    found: PipelineConfig = from_dict(PipelineConfig, load_json(path), str(path))
    return found


def with_lora(fresh: Mapping[str, Tensor], trained: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """A state of routers with a few-step LoRA: fresh, with what was trained; its LoRA only where it is to be kept."""
    trained = todays_keys(trained)
    lora = {key for key in trained if ".few_step." in key}
    found = {key: value for key, value in trained.items() if key not in lora}
    if keep:
        found |= {key: widened(trained[key], fresh[key]) for key in lora & fresh.keys()}
        found |= {key: trained[key] for key in lora - fresh.keys()}
    return {**fresh, **found}


def widened(trained: Tensor, fresh: Tensor) -> Tensor:
    """A fresh tensor of the same or a larger rank, with what was trained at its start: with fresh `up`s of zero both
    change a layer alike. As it is where it is no part of the fresh one."""
    if trained.ndim != fresh.ndim or any(a > b for a, b in zip(trained.shape, fresh.shape, strict=True)):
        return trained
    result = fresh.clone()
    result[tuple(map(slice, trained.shape))] = trained.to(fresh)
    return result
