"""Routers of a dense shape DiT; the reconstruction term is the mesh that its latents decode to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.diffusion.flow import sampling_times
from elastic3d.diffusion.options import PipelineConfig
from elastic3d.diffusion.sampler import sample
from elastic3d.elastic.config import ElasticConfig, RouterConfig
from elastic3d.elastic.cost import trace_share
from elastic3d.errors import UserError
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import SkipDiT, load_dit
from elastic3d.pipelines.image_to_3d import PIPELINE_NAME
from elastic3d.training.calibration import CurvesConfig, as_trained, calibrate, compare_budgets
from elastic3d.training.datasets import (
    Batch,
    PreparedShapes,
    item_generator,
    open_split,
    read_split,
    record_of_shapes,
)
from elastic3d.training.dit import STORED, DiTStageConfig, LatentFlowConfig, LatentItems
from elastic3d.training.elastic_objective import Grid, RouterObjective, RoutingConfig, add_route
from elastic3d.training.latents import LatentCacheConfig, LatentInfo
from elastic3d.training.options import StageName, TrainConfig
from elastic3d.training.reconstruction import MeshReconstruction, MeshTermsConfig, load_vae, mesh_item
from elastic3d.training.samples import contact_sheet, field_meshes, mesh_image
from elastic3d.training.vae import FieldLossConfig
from elastic3d.utils.options import from_dict, option
from elastic3d.utils.structured import load_json


@dataclass(kw_only=True)
class MeshLossConfig(MeshTermsConfig):
    """The mesh reconstruction loss of the shape that the elastic velocity implies."""

    share: float = option(0.25, "share of a batch's samples that are decoded", ge=0, le=1)
    time_power: float = option(
        2.0,
        "a sample counts t to this power: noisy latents imply no sharp shape",
        ge=0,
        le=20,
        advanced=True,
    )


@dataclass(kw_only=True)
class RouterStageConfig(RoutingConfig):
    """The training of a shape DiT's routers."""

    model: Path = option(Path("runs/dit/export"), "folder of the dense pipeline")
    mesh: MeshLossConfig = option(MeshLossConfig, "mesh reconstruction loss")


@dataclass(kw_only=True)
class RouterTrainConfig(TrainConfig):
    """Everything `scripts/train.py stage=router` takes."""

    stage: StageName = option(StageName.router, "what to do")
    latents: LatentCacheConfig = option(LatentCacheConfig, "cache of latents and image tokens")
    vae: FieldLossConfig = option(FieldLossConfig, "the loss that the VAE was trained with")
    dit: LatentFlowConfig = option(LatentFlowConfig, "shape DiT")
    router: RouterConfig = option(RouterConfig, "architecture of the routers: a file of configs/router")
    routing: RouterStageConfig = option(RouterStageConfig, "training of the routers")

    def sample_bytes(self) -> int:
        """The points of the mesh loss."""
        return self.routing.mesh.sample_bytes()


class ShapeRouterObjective(RouterObjective):
    """Routers of a shape DiT; what its latents decode to is held to the true surface."""

    config: RouterStageConfig

    def __init__(self, dit: ShapeDiT | SkipDiT, vae: ShapeVAE, config: RouterTrainConfig) -> None:
        embedded = dit.config.guidance_embed
        paired = config.routing.guidance != 1.0 and not embedded
        super().__init__(dit, config.routing, config.router, paired)
        self.embedded = embedded
        self.meshes = MeshReconstruction(vae, config.routing.mesh, config.vae)

    def velocities(self, dit: nn.Module, x_t: Tensor, batch: Batch) -> Tensor:
        """Velocity (B,N,C) or (2B,N,C)."""
        t, condition = batch["t"], batch["condition"].float()
        if self.embedded:
            return dit(x_t, t, condition, torch.full_like(t, self.config.guidance))
        if not self.paired:
            return dit(x_t, t, condition)
        return dit(x_t.repeat(2, 1, 1), t.repeat(2), torch.cat([condition, torch.zeros_like(condition)]))

    def reconstruction(self, data: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The mesh loss."""
        config = self.config.mesh
        if not config.weight or not config.share:
            return None
        mesh, parts = self.mesh_loss(data, batch)
        return config.weight * mesh, parts

    def mesh_loss(self, latents: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the shapes that predicted clean latents (B,N,C) decode to, on a share of the batch."""
        config = self.config.mesh
        count = math.ceil(config.share * len(latents))
        trust = batch["t"][:count] ** config.time_power
        losses = self.meshes.losses(latents[:count], batch)
        means = {name: (value * trust).mean() for name, value in losses.items()}
        return config.total(means), means


class RouterItems(LatentItems):
    """Items of the DiT, at the times of a random sampler, with its step size, a budget, and the true surface."""

    def __init__(
        self,
        shapes: PreparedShapes,
        info: LatentInfo,
        config: RouterTrainConfig,
        scale: float,
        meshes: PreparedShapes | None,
        flow: ShapeRouterObjective,
        grid: Grid,
    ) -> None:
        self.routing, self.router, self.meshes, self.grid = config.routing, config.router, meshes, grid
        self.paired = flow.paired
        self.blocks = len(flow.session.blocks)
        # Without the other branch beside it, half of the samples are unconditional, if the model has that branch.
        drop = 0.0 if flow.paired or flow.embedded else 0.5
        items = DiTStageConfig(match_channels=config.dit.match_channels, drop_condition=drop)
        super().__init__(
            shapes, info, items, scale, mirror=meshes is None
        )  # a stored surface is no mirror image

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the shuffled stream."""
        item, routing = super().item(position, seed), self.routing
        rng = np.random.default_rng([seed, position, 3])
        add_route(item, routing, self.router, self.blocks, self.paired, self.grid, rng)
        item["branch"] = torch.tensor(float(not item["condition"].any()))
        if self.meshes is not None:
            id = self.shapes.ids[self._shuffle(position, seed)]
            item |= mesh_item(self.meshes, id, routing.mesh, rng)
        return item


class RouterStage:
    """What the loop needs to train routers."""

    def __init__(self, config: RouterTrainConfig) -> None:
        self.config = config
        self.info = info = LatentInfo.load(config.latents.output)
        self.vae = load_vae(config.latents.output, config.vae if config.routing.mesh.weight else None)
        dit = load_dit(config.routing.model / "dit")
        for name, wanted, found in (
            ("latent channels", info.latents[1], dit.config.in_channels),
            ("condition channels", info.tokens[1], dit.config.condition_channels),
        ):
            if wanted != found:
                raise UserError(f"{config.routing.model} has {found} {name}, but the cache has {wanted}")
        self.flow = ShapeRouterObjective(dit, self.vae, config)
        self.objective: nn.Module = self.flow
        train, val = read_split(config.data.train), read_split(config.data.val)
        preload = STORED if config.data.preload else ()
        self._train = PreparedShapes(config.latents.output, train, preload, config.data.limit)
        self._val = PreparedShapes(config.latents.output, val, (), config.routing.val_shapes)
        mesh, meshes = config.routing.mesh, None
        if mesh.weight:
            meshes = open_split(config.data, config.data.train, mesh.stored)
        scale = self.vae.config.scale_factor
        settings = config.routing.model / PIPELINE_NAME
        self.pipeline = from_dict(PipelineConfig, load_json(settings), str(settings))
        grid = partial(sampling_times, self.pipeline)
        self._items = RouterItems(self._train, info, config, scale, meshes, self.flow, grid)
        items = DiTStageConfig(match_channels=config.dit.match_channels)
        self._val_items = LatentItems(self._val, info, items, scale)

    def items(self) -> RouterItems:
        """Cached training shapes, shuffled, with what routers see."""
        return self._items

    def rate_factor(self, name: str) -> float:
        """The base model learns more slowly than its routers."""
        return 1.0 if name.startswith("routers.") else self.config.routing.base_rate

    def record(self) -> dict[str, str | int]:
        """What the run trains on."""
        return record_of_shapes(self._train, self._val) | {"vae_sha256": self.info.settings["vae_sha256"]}

    def validate(self) -> dict[str, float]:
        """Executed share and distance to the dense latents of the same seed, sampling at each budget."""
        return compare_budgets(self._generate, self.config.routing.val_budgets)

    def samples(self) -> dict[str, np.ndarray]:
        """Rows: the dense model's shapes, then those at each validation budget, same seeds."""
        settings = [ElasticConfig(elastic=False)] + [
            ElasticConfig(budget=b) for b in self.config.routing.val_budgets
        ]
        self.vae.to(next(self.flow.dit.parameters()).device)
        rows = []
        for each in settings:
            meshes = field_meshes(self.vae, self._generate(each)[0], self.config.dit.sample_resolution)
            rows.append([mesh_image(mesh) for mesh in meshes])
        return {"generated": contact_sheet(rows)}

    def calibrate(self, curves: CurvesConfig, points: int = 24) -> None:
        """Measure on the validation shapes how urgent times are, and make the cost that is asked for the one that is
        executed."""
        times = sampling_times(self.pipeline, self.config.routing.val_steps)
        calibrate(self.flow.session, self._anchors, times, curves, points)

    def _anchors(self, settings: ElasticConfig, count: int = 0) -> tuple[Tensor, Tensor]:
        """What `_generate` does, of anchored latents the anchors (B,N,3) alone: curves with a smaller error of all
        channels but a larger one of the anchors were seen to make worse meshes."""
        latents, share = self._generate(settings, count)
        vae = self.vae.config
        return latents[..., : vae.channels - vae.latent_channels or None], share

    def _generate(self, settings: ElasticConfig, count: int = 0) -> tuple[Tensor, Tensor]:
        """Latents (B,N,C) of the first `count` (0: all) validation shapes, and the executed share (B,)."""
        flow, count = self.flow, min(count or len(self._val), len(self._val))
        views = self.info.settings["views"]
        items = [
            self._val_items.draw(self._val.ids[i], 0, i % views, item_generator(0, i)) for i in range(count)
        ]
        tokens = torch.stack([item["condition"].float() for item in items])  # a CPU can't autocast fp16
        condition = tokens.to(next(flow.dit.parameters()).device)
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        before, flow.session.settings = flow.session.settings, settings
        try:
            shape = cast(tuple[int, int], tuple(self.info.latents))
            steps, guidance = self.config.routing.val_steps, self.config.dit.sample_guidance
            with as_trained(self.config.precision, condition.device):
                latents = sample(
                    flow.dit,
                    condition,
                    shape,
                    steps,
                    guidance,
                    generators,
                    times=sampling_times(self.pipeline, steps),
                    solver=self.pipeline.solver,
                    guidance_embed=flow.embedded,
                    session=flow.session,
                )
            trace = flow.session.trace
            assert trace is not None
            return latents, trace_share(trace) if settings.elastic else torch.ones(count)
        finally:
            flow.session.settings = before
