"""Routers of the DiT of a text-to-image pipeline; the reconstruction term is the decoded image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.elastic.config import ElasticConfig, RouterConfig
from elastic3d.elastic.cost import trace_share
from elastic3d.elastic.diffusers_loop import drive
from elastic3d.errors import UserError
from elastic3d.pipelines.backbones import Backbone
from elastic3d.pipelines.image_loading import load_backbone, weight_files
from elastic3d.pipelines.options import BackboneName
from elastic3d.pipelines.runtime import resolve_device
from elastic3d.training.calibration import CurvesConfig, as_trained, calibrate, compare_budgets
from elastic3d.training.datasets import Batch
from elastic3d.training.elastic_objective import Grid, RouterObjective, RoutingConfig, add_route
from elastic3d.training.image import ImageFlowConfig, ImageItems, generate_latents, image_sheet
from elastic3d.training.image_cache import ImageCache, build_image_cache, text_of
from elastic3d.training.image_data import ImageDataConfig
from elastic3d.training.options import StageName, TrainConfig
from elastic3d.training.runtime import first_process_first
from elastic3d.utils.files import file_sha256
from elastic3d.utils.options import Options, option


@dataclass(kw_only=True)
class ImageLossConfig(Options):
    """Image reconstruction loss: what the elastic velocity implies, decoded, against the true image."""

    weight: float = option(0.1, "of the whole term; 0 leaves it out", ge=0, le=1e6)
    share: float = option(0.25, "share of a batch's samples that are decoded", ge=0, le=1)
    scales: int = option(
        3,
        "resolutions at which images are compared, each half the one before",
        ge=1,
        le=8,
        advanced=True,
    )
    time_power: float = option(
        2.0,
        "a sample counts t to this power: noisy latents imply no sharp image",
        ge=0,
        le=20,
        advanced=True,
    )


@dataclass(kw_only=True)
class BackboneConfig(ImageDataConfig):
    """A published pipeline, and the images with captions that its routers learn from."""

    backbone: BackboneName = option(BackboneName.small, "family whose DiT gets routers")
    weights: Path = option(..., "folder of the pipeline, in the layout in which it is published")


@dataclass(kw_only=True)
class ImageRoutingConfig(RoutingConfig):
    """The training of a text-to-image DiT's routers."""

    image: ImageLossConfig = option(ImageLossConfig, "image reconstruction loss")


@dataclass(kw_only=True)
class ImageRouterTrainConfig(TrainConfig):
    """Everything `scripts/train.py stage=image_router` takes."""

    stage: StageName = option(StageName.image_router, "what to do")
    image: BackboneConfig = option(..., "the pipeline, and images with captions")
    router: RouterConfig = option(RouterConfig, "architecture of the routers: a file of configs/router")
    routing: ImageRoutingConfig = option(ImageRoutingConfig, "training of the routers")


class ImageRouterObjective(RouterObjective):
    """Routers of a text-to-image DiT. The pipeline's own guidance is what is distilled: both branches, or its input."""

    config: ImageRoutingConfig

    def __init__(self, backbone: Backbone, config: ImageRouterTrainConfig, images: ImageCache) -> None:
        paired = not backbone.embeds_guidance and config.routing.guidance > 1
        super().__init__(backbone.transformer, config.routing, config.router, paired)
        self.size = (images.settings["size"],) * 2
        self._parts = (backbone, images.negative())  # no part of the state dict

    @property
    def backbone(self) -> Backbone:
        """The pipeline's family, its VAE where the DiT is."""
        backbone = self._parts[0]
        backbone.pipe.vae.requires_grad_(False).eval().to(next(self.dit.parameters()).device)
        return backbone

    def velocities(self, dit: nn.Module, x_t: Tensor, batch: Batch) -> Tensor:
        """Velocity (B,N,C) or (2B,N,C)."""
        text, t = text_of(batch), batch["t"]
        if self.paired:
            x_t, t = x_t.repeat(2, 1, 1), t.repeat(2)
            for name, value in self._parts[1].items():
                text[name] = torch.cat([text[name], value.to(text[name]).expand_as(text[name])])
        return self.backbone.velocity(dit, x_t, t, text, self.size, self.config.guidance)

    def reconstruction(self, data: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Mean absolute difference of decoded images at several scales."""
        config = self.config.image
        if not config.weight or not config.share:
            return None
        count = math.ceil(config.share * len(data))
        with torch.no_grad():
            true = self.backbone.decode(batch["latents"][:count], self.size).float()
        found = self.backbone.decode(data[:count], self.size).float()
        trust = batch["t"][:count] ** config.time_power
        loss = (image_loss(found, true, config.scales) * trust).mean()
        return config.weight * loss, {"image": loss}


def image_loss(found: Tensor, true: Tensor, scales: int) -> Tensor:
    """Images (B,3,H,W) -> mean absolute difference (B,), averaged over resolutions, each half the one before."""
    losses = []
    for scale in range(scales):
        if scale:
            found, true = (nn.functional.avg_pool2d(x, 2, ceil_mode=True) for x in (found, true))
        losses.append((found - true).abs().flatten(1).mean(1))
    return torch.stack(losses).mean(0)


class RoutedImageItems(ImageItems):
    """Items at the times of a random sampler, with its step size and a budget."""

    def __init__(
        self,
        images: ImageCache,
        routing: RoutingConfig,
        router: RouterConfig,
        blocks: int,
        paired: bool,
        grid: Grid,
    ) -> None:
        self.routing, self.router, self.blocks, self.paired = routing, router, blocks, paired
        self.grid = grid
        super().__init__(images, ImageFlowConfig(), 0.0)

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the shuffled stream."""
        item = super().item(position, seed)
        rng = np.random.default_rng([seed, position, 3])
        item["branch"] = torch.tensor(0.0)
        add_route(item, self.routing, self.router, self.blocks, self.paired, self.grid, rng)
        return item


class ImageRouterStage:
    """What the loop needs to train routers for a text-to-image pipeline."""

    def __init__(self, config: ImageRouterTrainConfig) -> None:
        self.config, image = config, config.image
        if image.backbone.name != "small" and image.images is None:
            raise UserError("image.images= is missing: a folder of images with captions")
        with first_process_first(config):
            encoder = load_backbone(
                image.backbone, image.weights, resolve_device(config.device), torch.float32
            )
            build_image_cache(image, config.data, encoder, config.seed)
            del encoder  # with its text encoders, which are larger than the rest
        backbone = load_backbone(
            image.backbone, image.weights, torch.device("cpu"), torch.float32, encoders=False
        )
        self._train = ImageCache(image.cache, "train")
        self._val = ImageCache(image.cache, "val", config.routing.val_shapes)
        try:
            self.flow = ImageRouterObjective(backbone, config, self._train)
        except ValueError as error:
            raise UserError(f"{image.weights} can't be routed: {error}") from error
        self.objective: nn.Module = self.flow
        drive(backbone.pipe, self.flow.session)
        blocks = len(self.flow.session.blocks)
        self._items = RoutedImageItems(
            self._train, config.routing, config.router, blocks, self.flow.paired, backbone.grid
        )
        self._val_items = ImageItems(self._val, ImageFlowConfig(), 0.0)

    def items(self) -> RoutedImageItems:
        """Cached training images, shuffled, with what routers see."""
        return self._items

    def rate_factor(self, name: str) -> float:
        """The base model learns more slowly than its routers."""
        return 1.0 if name.startswith("routers.") else self.config.routing.base_rate

    def record(self) -> dict[str, Any]:
        """What the run trains on."""
        return {
            "train_images": len(self._train),
            "val_images": len(self._val),
            "images": self._train.settings,
            "weights_sha256": file_sha256(*weight_files(self.config.image.weights)),
        }

    def validate(self) -> dict[str, float]:
        """Executed share and distance to the dense latents of the same seed, sampling at each budget."""
        return compare_budgets(self._generate, self.config.routing.val_budgets)

    def samples(self) -> dict[str, np.ndarray]:
        """Rows: the dense model's images, then those at each validation budget, same seeds."""
        budgets = self.config.routing.val_budgets
        settings = [ElasticConfig(elastic=False), *(ElasticConfig(budget=b) for b in budgets)]
        rows = [self._generate(each)[0] for each in settings]
        return {"generated": image_sheet(self.flow.backbone, rows, self.flow.size)}

    def calibrate(self, curves: CurvesConfig, points: int = 24) -> None:
        """Measure on the validation images how urgent times are, and make the cost that is asked for the one that is
        executed."""
        times = self.flow.backbone.grid(self.config.routing.val_steps)
        calibrate(self.flow.session, self._generate, times, curves, points)

    def _generate(self, settings: ElasticConfig, count: int = 0) -> tuple[Tensor, Tensor]:
        """Latents (B,N,C) of the first `count` (0: all) validation captions, and the executed share (B,)."""
        flow, routing = self.flow, self.config.routing
        items = self._val_items.fixed(count or len(self._val))
        before, flow.session.settings = flow.session.settings, settings
        try:
            with as_trained(self.config.precision, next(flow.dit.parameters()).device):
                latents = generate_latents(
                    flow.backbone,
                    text_of(items),
                    self._val.negative(),
                    flow.size,
                    routing.val_steps,
                    routing.guidance,
                )
            count, trace = len(latents), flow.session.trace
            if not settings.elastic:
                return latents, torch.ones(count)
            assert trace is not None
            return latents, trace_share(trace)
        finally:
            flow.session.settings = before
