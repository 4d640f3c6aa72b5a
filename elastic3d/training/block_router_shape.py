"""Per-block routers of a shape DiT: generations end in a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from elastic3d.diffusion.flow import sampling_times
from elastic3d.diffusion.options import PipelineConfig
from elastic3d.elastic import adapter_for
from elastic3d.elastic.config import RouterConfig
from elastic3d.elastic.cost import block_flops
from elastic3d.errors import UserError
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import SkipDiT, load_dit
from elastic3d.pipelines.image_to_3d import ROUTERS_NAME
from elastic3d.training.block_router import (
    BlockRouterConfig,
    BlockRouterObjective,
    RouteDraw,
    attach_block_routers,
)
from elastic3d.training.block_router_stage import BlockRouterStage
from elastic3d.training.datasets import (
    Batch,
    PreparedShapes,
    Shuffle,
    open_split,
    read_split,
    record_of_shapes,
    stack,
)
from elastic3d.training.generations import (
    ShapeGenerationConfig,
    channel_weights,
    draw_pair,
    integrate_shapes,
    pipeline_config,
)
from elastic3d.training.latents import LatentCacheConfig, LatentInfo
from elastic3d.training.options import Precision, StageName, TrainConfig
from elastic3d.training.reconstruction import MeshReconstruction, MeshTermsConfig, load_vae, mesh_item
from elastic3d.training.sensitivity import load_sensitivity
from elastic3d.training.vae import FieldLossConfig
from elastic3d.utils.options import option


@dataclass(kw_only=True)
class EndMeshLossConfig(MeshTermsConfig):
    """The mesh reconstruction loss at the end of a generation."""

    dense: float = option(
        1.0, "weight of the distance to the field that the dense model's latents decode to", ge=0, le=1e6
    )


@dataclass(kw_only=True)
class ShapeBlockRouterConfig(BlockRouterConfig, ShapeGenerationConfig):
    """Training of per-block routers and few-step LoRA of a shape DiT."""

    model: Path = option(Path("data/pretrained/shape-small"), "folder of a pipeline, with or without routers")
    mesh: EndMeshLossConfig = option(EndMeshLossConfig, "mesh reconstruction loss")


@dataclass(kw_only=True)
class BlockRouterTrainConfig(TrainConfig):
    """Everything `scripts/train.py stage=block_router` takes."""

    stage: StageName = option(StageName.block_router, "what to do")
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
        self,
        dit: ShapeDiT | SkipDiT,
        vae: ShapeVAE,
        pipeline: PipelineConfig,
        config: BlockRouterTrainConfig,
    ) -> None:
        options = config.blocks
        attach_block_routers(
            dit,
            options,
            config.router,
            options.model / ROUTERS_NAME,
            partial(sampling_times, pipeline),
            pipeline.guidance if options.guidance else None,
            options.guided_times,
        )
        anchors = vae.config.channels - vae.config.latent_channels
        weights = channel_weights(dit.config.in_channels, anchors, options.anchor_weight)
        super().__init__(dit, options, weights, partial(sampling_times, pipeline))
        self.pipeline = pipeline
        self.meshes = MeshReconstruction(vae, options.mesh, config.vae)

    def integrate(self, batch: Batch, steps: int) -> Tensor:
        """As the pipeline samples."""
        return integrate_shapes(cast(ShapeDiT, self.dit), self.pipeline, batch, steps)

    def reconstruction(
        self, found: Tensor, dense: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The mesh loss, against the true mesh and the dense model's field."""
        config = self.config.mesh
        if not config.weight or "points" not in batch:
            return None
        losses = self.meshes.losses(found, batch)
        if config.dense:
            losses["mesh_dense"] = self.meshes.distance(found, dense, batch["points"])
        return config.weight * config.total(losses), losses


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

    def __len__(self) -> int:
        return self.config.pairs

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the stream."""
        place, item = self.draw(position, seed)
        pair = self._shuffle(place, seed)
        item |= draw_pair(self.shapes, self.info, pair, seed) | {"pair": torch.tensor(pair)}
        if self.meshes is not None:
            id, rng = self.shapes.ids[pair % len(self.shapes)], np.random.default_rng([seed, place, 7])
            item |= mesh_item(self.meshes, id, self.config.mesh, rng)
        return item


class ShapeBlockRouterStage(BlockRouterStage):
    """What the loop needs to train per-block routers of a shape DiT."""

    def __init__(self, config: BlockRouterTrainConfig) -> None:
        options = config.blocks
        self.info = info = LatentInfo.load(config.latents.output)
        pipeline = pipeline_config(options.model)
        dtype = torch.bfloat16 if config.precision is Precision.bf16_master else torch.float32
        dit = load_dit(options.model / "dit", dtype)
        for name, wanted, found in (
            ("latent channels", info.latents[1], dit.config.in_channels),
            ("condition channels", info.tokens[1], dit.config.condition_channels),
        ):
            if wanted != found:
                raise UserError(f"{options.model} has {found} {name}, but the cache has {wanted}")
        vae = load_vae(config.latents.output, config.vae if options.mesh.weight else None)
        flow = ShapeBlockRouters(dit, vae, pipeline, config)
        train, val = read_split(config.data.train), read_split(config.data.val)
        preload = ("tokens",) if config.data.preload else ()
        self._train = PreparedShapes(config.latents.output, train, preload, config.data.limit)
        self._val = PreparedShapes(config.latents.output, val, (), options.val_shapes)
        stored = options.mesh.stored
        self._meshes = open_split(config.data, config.data.train, stored) if options.mesh.weight else None
        flops = block_flops(dit, adapter_for(dit), (info.latents[0], info.tokens[0]))
        draw = RouteDraw(
            options,
            flow.session.router_config,
            flops,
            flow.times,
            config.batch,
            load_sensitivity(options.sensitivity, [block.name for block in flow.session.blocks]),
        )
        super().__init__(config, flow, draw)

    def items(self) -> ShapeRolloutItems:
        """Pairs of cached training views and noise."""
        return ShapeRolloutItems(self._train, self.info, self.config.blocks, self.draw, self._meshes)

    def record(self) -> dict[str, str | int]:
        """What the run trains on."""
        return record_of_shapes(self._train, self._val) | {"encoder": self.info.settings["encoder"]["kind"]}

    def val_batch(self, count: int) -> Batch:
        """Pairs of the first `count` validation shapes."""
        items = [draw_pair(self._val, self.info, pair, 0) for pair in range(min(count, len(self._val)))]
        return stack(
            [{**item, "condition": item["condition"].float()} for item in items]
        )  # no fp16 in autocast
