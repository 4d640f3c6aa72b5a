"""Per-block routers of a shape DiT: generations end in a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from elastic3d.diffusion.options import PipelineConfig
from elastic3d.diffusion.sampler import sampling_times
from elastic3d.elastic.config import RouterConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.pipelines.image_to_3d import ROUTERS_NAME
from elastic3d.training.block_router import (
    BlockRouterConfig,
    BlockRouterObjective,
    BlockRouterStage,
    RouteDraw,
    attach_block_routers,
)
from elastic3d.training.datasets import Batch, PreparedShapes, Shuffle, open_split
from elastic3d.training.few_step import (
    TOKENS,
    ShapeGenerationConfig,
    channel_weights,
    draw_pair,
    integrate_shapes,
    val_pairs,
)
from elastic3d.training.latents import LatentCache, LatentCacheConfig, LatentInfo
from elastic3d.training.mesh_loss import MESH_STORED, MeshReconstruction, MeshTermsConfig, mesh_item
from elastic3d.training.options import DataConfig, GenerationTrainConfig, StageName
from elastic3d.training.vae import FieldLossConfig
from elastic3d.utils.options import option


@dataclass(kw_only=True)
class EndMeshLossConfig(MeshTermsConfig):
    """The mesh reconstruction loss at the end of a generation."""

    dense: float = option(
        1.0, "weight of the distance to the field that the dense model's latents decode to", ge=0, le=1e6
    )

    def check(self) -> None:
        """A loss with a weight has terms."""
        super().check()
        if self.weight and not (self.dense or self.true_mesh):
            raise ValueError(
                f"weight is {self.weight:g}, expected 0: field, chamfer, normals and dense have no weight"
            )


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
        """The points of the mesh loss."""
        return self.blocks.mesh.sample_bytes()


class ShapeBlockRouters(BlockRouterObjective):
    """Routers and LoRA of a shape DiT."""

    config: ShapeBlockRouterConfig

    def __init__(
        self, dit: ShapeDiT | SkipDiT, vae: ShapeVAE, pipeline: PipelineConfig, config: BlockRouterTrainConfig
    ) -> None:
        options, times = config.blocks, partial(sampling_times, pipeline)
        guidance = pipeline.guidance if options.guidance else None
        start = options.model / ROUTERS_NAME
        attach_block_routers(dit, options, config.router, start, times, guidance, options.guided_times)
        anchors = vae.config.channels - vae.config.latent_channels
        weights = channel_weights(dit.config.in_channels, anchors, options.anchor_weight)
        super().__init__(dit, options, options.mesh, weights, times)
        self.pipeline = pipeline
        self.meshes = MeshReconstruction(vae, config.vae)

    def integrate(self, batch: Batch, steps: int) -> Tensor:
        """As the pipeline samples."""
        return integrate_shapes(cast(ShapeDiT, self.dit), self.pipeline, batch, steps)

    def decoded(self, found: Tensor, dense: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The mesh loss, against the true mesh and the dense model's field."""
        losses = self.meshes.losses(found, batch) if self.term.true_mesh else {}
        if self.term.dense:
            losses["mesh_dense"] = self.meshes.distance(found, dense, batch["points"])
        return losses


@dataclass
class ShapeRolloutItems:
    """Pairs of a shape's view and noise, with the true surface and what `RouteDraw` says of the generation."""

    shapes: PreparedShapes
    info: LatentInfo
    config: ShapeBlockRouterConfig
    draw: RouteDraw
    meshes: PreparedShapes | None

    def __post_init__(self) -> None:
        self._shuffle = Shuffle(self.config.pairs)

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the stream."""
        item, pair = self.draw(position, seed), self._shuffle(position, seed)
        item |= draw_pair(self.shapes, self.info, pair, seed) | {"pair": torch.tensor(pair)}
        if self.meshes is not None:
            id, rng = self.shapes.ids[pair % len(self.shapes)], np.random.default_rng([seed, position, 7])
            item |= mesh_item(self.meshes, id, self.config.mesh, rng)
        return item


class ShapeBlockRouterStage(BlockRouterStage):
    """What the loop needs to train per-block routers of a shape DiT."""

    def __init__(self, config: BlockRouterTrainConfig) -> None:
        options, mesh = config.blocks, config.blocks.mesh
        self.cache = cache = LatentCache(config.latents.output, config.data, options.val_shapes, TOKENS)
        dit, pipeline = cache.load_dense(options.model, config.precision)
        vae = cache.info.load_vae(config.vae if mesh.weight else None)
        flow = ShapeBlockRouters(dit, vae, pipeline, config)
        meshes = open_split(config.data, config.data.train, MESH_STORED) if mesh.weight else None
        super().__init__(config, flow, cache.info.token_counts)
        self.items = ShapeRolloutItems(cache.train, cache.info, options, self.draw, meshes)
        self.record = cache.record

    def val_batch(self) -> Batch:
        """Pairs of the validation shapes."""
        return val_pairs(self.cache)
