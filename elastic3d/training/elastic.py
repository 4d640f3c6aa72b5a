"""Routers of a dense shape DiT; the reconstruction term is the mesh that its latents decode to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.diffusion.sampler import sample, sampling_times
from elastic3d.elastic.config import RouterConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.training.datasets import Batch, PreparedShapes, open_split
from elastic3d.training.dit import DiTStageConfig, LatentFlowConfig, LatentItems
from elastic3d.training.elastic_objective import (
    DecodedTermConfig,
    RoutedStage,
    RouterObjective,
    RoutingConfig,
    SamplerDraw,
)
from elastic3d.training.journal import contact_sheet, mesh_row
from elastic3d.training.latents import LatentCache, LatentCacheConfig
from elastic3d.training.mesh_loss import MESH_STORED, MeshReconstruction, MeshTermsConfig, mesh_item
from elastic3d.training.options import DataConfig, StageName, TrainConfig
from elastic3d.training.vae import FieldLossConfig
from elastic3d.utils.options import option


@dataclass(kw_only=True)
class MeshLossConfig(MeshTermsConfig, DecodedTermConfig):
    """The mesh reconstruction loss of the shape that the elastic velocity implies."""


@dataclass(kw_only=True)
class RouterStageConfig(RoutingConfig):
    """The training of a shape DiT's routers."""

    model: Path = option(Path("runs/dit/export"), "folder of the dense pipeline")
    mesh: MeshLossConfig = option(MeshLossConfig, "mesh reconstruction loss")


@dataclass(kw_only=True)
class RouterTrainConfig(TrainConfig):
    """Everything `scripts/train.py stage=router` takes."""

    stage: StageName = option(StageName.router, "what to do")
    data: DataConfig = option(DataConfig, "prepared shapes")
    latents: LatentCacheConfig = option(LatentCacheConfig, "cache of latents and image tokens")
    vae: FieldLossConfig = option(FieldLossConfig, "the loss that the VAE was trained with")
    dit: LatentFlowConfig = option(LatentFlowConfig, "shape DiT")
    router: RouterConfig = option(RouterConfig, "architecture of the routers: a file of configs/router")
    routing: RouterStageConfig = option(RouterStageConfig, "training of the routers")

    def sample_bytes(self) -> int:
        """The points of the mesh loss."""
        return self.routing.mesh.sample_bytes()


class ShapeRouterObjective(RouterObjective):
    """Routers of a shape DiT; what its latents decode to is compared with the true surface."""

    config: RouterStageConfig

    def __init__(self, dit: ShapeDiT | SkipDiT, vae: ShapeVAE, config: RouterTrainConfig) -> None:
        embedded = dit.config.guidance_embed
        paired = config.routing.guidance != 1.0 and not embedded
        super().__init__(dit, config.routing, config.router, config.routing.mesh, paired)
        self.embedded = embedded
        self.meshes = MeshReconstruction(vae, config.vae)

    def velocities(self, dit: nn.Module, x_t: Tensor, batch: Batch) -> Tensor:
        """Velocity (B,N,C) or (2B,N,C)."""
        t, condition = batch["t"], batch["condition"].float()
        if self.embedded:
            return dit(x_t, t, condition, torch.full_like(t, self.config.guidance))
        if not self.paired:
            return dit(x_t, t, condition)
        return dit(x_t.repeat(2, 1, 1), t.repeat(2), torch.cat([condition, torch.zeros_like(condition)]))

    def decoded(self, data: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The mesh loss."""
        return self.meshes.losses(data, batch)


class RouterItems(LatentItems):
    """Items of the DiT, at the times of a random sampler, with its step size, a budget, and the true surface."""

    def __init__(
        self,
        cache: LatentCache,
        config: RouterTrainConfig,
        scale: float,
        flow: ShapeRouterObjective,
        sampler: SamplerDraw,
    ) -> None:
        # Without the other branch beside it, half of the samples are unconditional, if the model has that branch.
        drop = 0.0 if flow.paired or flow.embedded else 0.5
        items = DiTStageConfig(match_channels=config.dit.match_channels, drop_condition=drop)
        self.sampler, self.mesh = sampler, config.routing.mesh
        self.meshes: PreparedShapes | None = None
        if self.mesh.weight:
            self.meshes = open_split(config.data, config.data.train, MESH_STORED)
        mirror = self.meshes is None  # a stored surface is no mirror image
        super().__init__(cache.train, cache.info, items, scale, mirror)

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the shuffled stream."""
        item = super().item(position, seed)
        rng = self.sampler(item, position, seed)
        item["branch"] = torch.tensor(float(not item["condition"].any()))
        if self.meshes is not None:
            item |= mesh_item(self.meshes, self.shapes.ids[self._shuffle(position, seed)], self.mesh, rng)
        return item


class RouterStage(RoutedStage):
    """What the loop needs to train routers of a shape DiT."""

    def __init__(self, config: RouterTrainConfig) -> None:
        self.config, routing = config, config.routing
        self.cache = cache = LatentCache(config.latents.output, config.data, routing.val_shapes)
        self.vae = cache.info.load_vae(config.vae if routing.mesh.weight else None)
        dit, self.pipeline = cache.load_dense(routing.model)
        self.flow = ShapeRouterObjective(dit, self.vae, config)
        self.objective, self.record = self.flow, cache.record
        scale, sampler = (
            self.vae.config.scale_factor,
            self.flow.sampler(partial(sampling_times, self.pipeline)),
        )
        self.items = RouterItems(cache, config, scale, self.flow, sampler)
        items = DiTStageConfig(match_channels=config.dit.match_channels)
        self._val_items = LatentItems(cache.val, cache.info, items, scale)

    def sampler_times(self) -> Tensor:
        """Those of the pipeline."""
        return sampling_times(self.pipeline, self.config.routing.val_steps)

    def compared(self, latents: Tensor) -> Tensor:
        """Of anchored latents the anchors (B,N,3) alone: curves with a smaller error of all channels but a larger one
        of the anchors were seen to make worse meshes."""
        vae = self.vae.config
        return latents[..., : vae.channels - vae.latent_channels or None]

    def sheet(self, rows: list[Tensor]) -> np.ndarray:
        """The meshes of each row."""
        self.vae.to(rows[0].device)
        return contact_sheet([mesh_row(self.vae, row, self.config.dit.sample_resolution) for row in rows])

    def sampled(self, count: int) -> Tensor:
        """As the pipeline samples, of validation views."""
        flow, val = self.flow, self.cache.val
        indices = range(min(count or len(val), len(val)))
        items = [self._val_items.fixed(i) for i in indices]
        tokens = torch.stack([item["condition"].float() for item in items])  # a CPU can't autocast fp16
        return sample(
            flow.dit,
            tokens.to(next(flow.dit.parameters()).device),
            cast(tuple[int, int], tuple(self.cache.info.latents)),
            self.sampler_times(),
            self.config.dit.sample_guidance,
            [torch.Generator().manual_seed(i) for i in indices],
            solver=self.pipeline.solver,
            guidance_embed=flow.embedded,
            session=flow.session,
        )
