"""Shapes from images: the flow of a shape DiT, which ends in a mesh, and the stages that train on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from elastic3d.diffusion.sampler import integrate, sampling_times
from elastic3d.elastic.attachment import session_of
from elastic3d.elastic.config import RouterConfig
from elastic3d.models.options import VAEConfig
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.weights import load_config
from elastic3d.pipelines.runtime import find_model
from elastic3d.training.block_router import BlockRouterConfig
from elastic3d.training.datasets import Batch, PreparedShapes, item_generator, open_split
from elastic3d.training.dit import DiTStageConfig, LatentFlowConfig, LatentItems, channel_weights
from elastic3d.training.few_step import ShapeFewStepConfig, ShapeGenerationConfig
from elastic3d.training.flow import Flow
from elastic3d.training.journal import contact_sheet, mesh_row
from elastic3d.training.latents import STORED, LatentCache, LatentCacheConfig
from elastic3d.training.mesh_loss import (
    MESH_STORED,
    EndMeshLossConfig,
    MeshReconstruction,
    MeshTermsConfig,
    mesh_item,
)
from elastic3d.training.options import DataConfig, GenerationTrainConfig, Precision, StageName, TrainConfig
from elastic3d.training.router import DecodedTermConfig, RoutingConfig
from elastic3d.training.vae import FieldLossConfig
from elastic3d.utils.options import option

TOKENS = ("tokens",)


class ShapeFlow(Flow):
    """A shape DiT in a pipeline's folder, on a cache of latents and image tokens."""

    def __init__(
        self,
        config: Any,
        options: Any,
        guidance: float | None = None,
        stored: Sequence[str] = TOKENS,
        precision: Precision = Precision.fp32,
    ) -> None:
        """
        Args:
            config: of the stage, with `data` and `latents`.
            options: name the `model`, how many validation shapes there are, and the terms of a `mesh` loss.
            guidance: None is the pipeline's.
            stored: tensors of the cache that are read at once where data are preloaded.

        Raises:
            UserError: no finished cache, one of other latents, an autoencoder that learned with another loss, or
                shapes of the cache without the true surface that the mesh loss needs.
        """
        self.config, self.term = config, options.mesh
        self.folder = find_model(options.model)
        self.cache = cache = LatentCache(config.latents.output, config.data, options.val_shapes, stored)
        self.dit, self.pipeline = cache.load_dense(self.folder, precision)
        self.record, self.lengths = cache.record, cache.info.token_counts
        self.guidance = self.pipeline.guidance if guidance is None else guidance
        self.embeds_guidance = self.dit.config.guidance_embed
        self.paired = self.guidance > 1.0 and not self.embeds_guidance
        vae: VAEConfig = load_config(self.folder / "vae", VAEConfig, "ShapeVAE")
        self.anchors = vae.channels - vae.latent_channels
        anchor_weight = getattr(options, "anchor_weight", 1.0)
        self.weights = channel_weights(self.dit.config.in_channels, self.anchors, anchor_weight)
        self._surfaces: PreparedShapes | None = None
        self.meshes: MeshReconstruction | None = None
        if self.term.weight:
            self._surfaces = open_split(config.data, config.data.train, MESH_STORED)
            self._surfaces.require(cache.train.ids)
            self.vae = cache.info.load_vae(config.vae)
            self.meshes = MeshReconstruction(self.vae, config.vae)

    @cached_property
    def vae(self) -> ShapeVAE:
        """The autoencoder of the cached latents."""
        return self.cache.info.load_vae()

    def times(self, steps: int) -> Tensor:
        return sampling_times(self.pipeline, steps)

    def default_sampling(self) -> tuple[int, float]:
        return self.pipeline.steps, self.pipeline.guidance

    def velocities(self, x_t: Tensor, batch: Batch) -> Tensor:
        """Velocity (B,N,C) or (2B,N,C) under `condition` (B,M,Cc)."""
        t, condition = batch["t"], batch["condition"].float()
        if self.embeds_guidance:
            return self.dit(x_t, t, condition, torch.full_like(t, self.guidance))
        if not self.paired:
            return self.dit(x_t, t, condition)
        return self.dit(x_t.repeat(2, 1, 1), t.repeat(2), torch.cat([condition, torch.zeros_like(condition)]))

    def integrate(self, batch: Batch, steps: int, guidance: float | None = None) -> Tensor:
        """As the pipeline samples, under `condition` (B,M,Cc)."""
        return integrate(
            self.dit,
            batch["condition"].float(),
            batch["noise"],
            self.times(steps),
            self.guidance if guidance is None else guidance,
            solver=self.pipeline.solver,
            guidance_embed=self.embeds_guidance,
            session=session_of(self.dit),
        )

    @torch.no_grad()
    def sampled(self, count: int, steps: int, guidance: float) -> Tensor:
        """Of validation views, each from its own seed."""
        info, val, device = self.cache.info, self.cache.val, next(self.dit.parameters()).device
        views = enumerate(val.ids[: count or None])
        tokens = [val.read(id, "tokens", i % info.settings["views"]).float() for i, id in views]
        generators = [torch.Generator().manual_seed(i) for i in range(len(tokens))]
        noise = [torch.randn(info.latents, generator=generator) for generator in generators]
        batch = {"condition": torch.stack(tokens).to(device), "noise": torch.stack(noise).to(device)}
        return self.integrate(batch, steps, guidance)

    def decoded(self, found: Tensor, batch: Batch, dense: Tensor | None = None) -> dict[str, Tensor]:
        """The mesh loss: against the true surface, and against the field of the dense model."""
        assert self.meshes is not None
        losses = self.meshes.losses(found, batch) if dense is None or self.term.true_mesh else {}
        if dense is not None and self.term.dense:
            losses["mesh_dense"] = self.meshes.distance(found, dense, batch["points"])
        return losses

    def sheet(self, rows: list[Tensor]) -> np.ndarray:
        self.vae.to(rows[0].device)
        return contact_sheet([mesh_row(self.vae, row, self.config.dit.sample_resolution) for row in rows])

    def compared(self, latents: Tensor) -> Tensor:
        """Of anchored latents the anchors (B,N,3) alone: curves with a smaller error of all channels but a larger one
        of the anchors were seen to make worse meshes."""
        return latents[..., : self.anchors or None]

    def stream(self) -> LatentItems:
        """Those of the DiT. Without the other branch beside it, half of the samples are unconditional, if the model has
        that branch; a stored surface is no mirror image."""
        drop = 0.0 if self.paired or self.embeds_guidance else 0.5
        items = DiTStageConfig(match_channels=self.config.dit.match_channels, drop_condition=drop)
        scale, mirror = self.vae.config.scale_factor, self._surfaces is None
        return LatentItems(self.cache.train, self.cache.info, items, scale, mirror=mirror)

    def pair(self, number: int, seed: int) -> Batch:
        """`noise` (N,C) and `condition` (M,Cc), one view of a shape; a stored surface is no mirror image."""
        views = self.cache.info.settings["views"]
        mirrored = self._surfaces is not None and bool(self.cache.mirrored)
        return self._pair(self.cache.train, number, seed, views // 2 if mirrored else views)

    def val_pairs(self) -> Batch:
        """Of the validation shapes."""
        views = self.cache.info.settings["views"]
        items = [self._pair(self.cache.val, number, 0, views) for number in range(len(self.cache.val))]
        # autocast stacks no fp16
        return default_collate([item | {"condition": item["condition"].float()} for item in items])

    def _pair(self, shapes: PreparedShapes, number: int, seed: int, views: int) -> Batch:
        """Of one of the first `views` views."""
        rng = item_generator(seed, number)
        view = int(rng.integers(views))
        noise = rng.standard_normal(tuple(self.cache.info.latents), dtype=np.float32)
        id = shapes.ids[number % len(shapes)]
        return {"noise": torch.from_numpy(noise), "condition": shapes.read(id, "tokens", view)}

    def truth(self, index: int, rng: np.random.Generator) -> Batch:
        """Points of the true surface, where the mesh loss has a weight."""
        if self._surfaces is None:
            return {}
        id = self.cache.train.ids[index % len(self.cache.train)]
        return mesh_item(self._surfaces, id, self.term, rng)


# --------------------------------------------------------------------------------------------------------- the stages


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
        return self.routing.mesh.sample_bytes()

    def flow(self) -> ShapeFlow:
        """The dense model and its data."""
        return ShapeFlow(self, self.routing, self.routing.guidance, stored=STORED)


@dataclass(kw_only=True)
class FewStepTrainConfig(GenerationTrainConfig):
    """Everything `scripts/train.py stage=few_step` takes."""

    stage: StageName = option(StageName.few_step, "what to do")
    data: DataConfig = option(DataConfig, "prepared shapes")
    latents: LatentCacheConfig = option(LatentCacheConfig, "cache of latents and image tokens")
    vae: FieldLossConfig = option(FieldLossConfig, "the loss that the VAE was trained with")
    few_step: ShapeFewStepConfig = option(ShapeFewStepConfig, "training of the routers' few-step LoRA")

    def sample_bytes(self) -> int:
        return self.few_step.mesh.sample_bytes()

    def flow(self) -> ShapeFlow:
        """The dense model and its data."""
        return ShapeFlow(self, self.few_step, precision=self.precision)


@dataclass(kw_only=True)
class ShapeBlockRouterConfig(BlockRouterConfig, ShapeGenerationConfig):
    """Training of per-block routers and few-step LoRA of a shape DiT."""

    model: Path = option(Path("data/pretrained/shape-small"), "folder of a pipeline, with or without routers")
    mesh: EndMeshLossConfig = option(EndMeshLossConfig, "mesh reconstruction loss")


@dataclass(kw_only=True)
class BlockRouterTrainConfig(GenerationTrainConfig):
    """Everything `scripts/train.py stage=block_router` takes."""

    stage: StageName = option(StageName.block_router, "what to do")
    data: DataConfig = option(DataConfig, "prepared shapes")
    latents: LatentCacheConfig = option(LatentCacheConfig, "cache of latents and image tokens")
    vae: FieldLossConfig = option(FieldLossConfig, "the loss that the VAE was trained with")
    router: RouterConfig = option(RouterConfig, "architecture of the routers: a file of configs/router")
    blocks: ShapeBlockRouterConfig = option(ShapeBlockRouterConfig, "training of routers and LoRA")

    def check(self) -> None:
        """Routers that decide by block, batches with every kind of route."""
        super().check()
        self.blocks.check_run(self.router, self.batch, self.accumulate)

    def sample_bytes(self) -> int:
        return self.blocks.mesh.sample_bytes()

    def flow(self) -> ShapeFlow:
        """The dense model and its data."""
        return ShapeFlow(self, self.blocks, precision=self.precision)
