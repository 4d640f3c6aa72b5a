"""Routers of the DiT of a text-to-image pipeline; the reconstruction term is the decoded image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.elastic.config import RouterConfig
from elastic3d.elastic.diffusers_loop import drive
from elastic3d.errors import UserError
from elastic3d.pipelines.backbones import Backbone
from elastic3d.pipelines.image_loading import weight_files
from elastic3d.pipelines.options import BackboneName
from elastic3d.pipelines.runtime import resolve_device
from elastic3d.pipelines.text_to_image import load_backbone
from elastic3d.training.datasets import Batch
from elastic3d.training.distributed import first_process_first
from elastic3d.training.elastic_objective import (
    DecodedTermConfig,
    RoutedStage,
    RouterObjective,
    RoutingConfig,
    SamplerDraw,
)
from elastic3d.training.image import ImageItems, generate_latents, image_sheet, record_of_images
from elastic3d.training.image_data import ImageCache, PipelineImagesConfig, build_image_cache, text_of
from elastic3d.training.options import StageName, TrainConfig
from elastic3d.utils.files import file_sha256
from elastic3d.utils.options import Options, option


@dataclass(kw_only=True)
class ImageTermConfig(Options):
    """Image reconstruction loss: what latents decode to, against an image."""

    weight: float = option(0.1, "of the whole term; 0 leaves it out", ge=0, le=1e6)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The one there is."""
        return losses["image"]


@dataclass(kw_only=True)
class ImageLossConfig(ImageTermConfig, DecodedTermConfig):
    """Image reconstruction loss of the image that the elastic velocity implies, against the true one."""


@dataclass(kw_only=True)
class BackboneConfig(PipelineImagesConfig):
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
    gradient_checkpointing: bool = option(False, "diffusers' blocks recompute themselves", internal=True)
    image: BackboneConfig = option(..., "the pipeline, and images with captions")
    router: RouterConfig = option(RouterConfig, "architecture of the routers: a file of configs/router")
    routing: ImageRoutingConfig = option(ImageRoutingConfig, "training of the routers")


class PublishedPipeline:
    """A text-to-image pipeline without its text encoders, and the images and texts that were cached with them."""

    def __init__(self, config: TrainConfig, image: BackboneConfig, val_images: int) -> None:
        """UserError for a pipeline that can't be loaded, and for images that are missing."""
        if image.backbone is not BackboneName.small and image.images is None:
            raise UserError("image.images= is missing: a folder of images with captions")
        self.weights = image.weights
        with first_process_first(config):
            device = resolve_device(config.device)
            encoder = load_backbone(image.backbone, image.weights, device, torch.float32)
            build_image_cache(image, config.data, encoder, config.seed)
            del encoder  # with its text encoders, which are larger than the rest
        cpu = torch.device("cpu")
        self._backbone = load_backbone(image.backbone, image.weights, cpu, torch.float32, encoders=False)
        self.train, self.val = ImageCache(image.cache, "train"), ImageCache(image.cache, "val", val_images)
        self.negative, self.size = self.train.negative(), (self.train.settings["size"],) * 2
        weights = {"weights_sha256": file_sha256(*weight_files(image.weights))}
        self.record = record_of_images(self.train, self.val) | weights

    @property
    def backbone(self) -> Backbone:
        """The pipeline's family, its VAE where the DiT is."""
        device = next(self._backbone.transformer.parameters()).device
        self._backbone.pipe.vae.requires_grad_(False).eval().to(device)
        return self._backbone

    def decoded_loss(self, found: Tensor, true: Tensor) -> dict[str, Tensor]:
        """`image_loss` (B,) of what latents (B,N,C) decode to; the true ones have no gradient."""
        backbone = self.backbone
        with torch.no_grad():
            wanted = backbone.decode(true, self.size).float()
        return {"image": image_loss(backbone.decode(found, self.size).float(), wanted)}


class ImageRouterObjective(RouterObjective):
    """Routers of a text-to-image DiT. The pipeline's own guidance is what is distilled: both branches, or its input."""

    config: ImageRoutingConfig

    def __init__(self, pipeline: PublishedPipeline, config: ImageRouterTrainConfig) -> None:
        backbone = pipeline.backbone
        paired = not backbone.embeds_guidance and config.routing.guidance > 1
        routing = config.routing
        super().__init__(backbone.transformer, routing, config.router, routing.image, paired)
        self.pipeline = pipeline

    def velocities(self, dit: nn.Module, x_t: Tensor, batch: Batch) -> Tensor:
        """Velocity (B,N,C) or (2B,N,C)."""
        text, t, pipeline = text_of(batch), batch["t"], self.pipeline
        if self.paired:
            x_t, t = x_t.repeat(2, 1, 1), t.repeat(2)
            for name, value in pipeline.negative.items():
                text[name] = torch.cat([text[name], value.to(text[name]).expand_as(text[name])])
        return pipeline.backbone.velocity(dit, x_t, t, text, pipeline.size, self.config.guidance)

    def decoded(self, data: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Mean absolute difference of decoded images at several scales."""
        return self.pipeline.decoded_loss(data, batch["latents"][: len(data)])


def image_loss(found: Tensor, true: Tensor, scales: int = 3) -> Tensor:
    """Images (B,3,H,W) -> mean absolute difference (B,), averaged over resolutions, each half the one before: edges
    count at the first, colours of areas at the last."""
    losses = []
    for scale in range(scales):
        if scale:
            found, true = (nn.functional.avg_pool2d(x, 2, ceil_mode=True) for x in (found, true))
        losses.append((found - true).abs().flatten(1).mean(1))
    return torch.stack(losses).mean(0)


class RoutedImageItems(ImageItems):
    """Items at the times of a random sampler, with its step size and a budget."""

    def __init__(self, images: ImageCache, sampler: SamplerDraw) -> None:
        self.sampler = sampler
        super().__init__(images)

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the shuffled stream."""
        item = super().item(position, seed)
        self.sampler(item, position, seed)
        return item | {"branch": torch.tensor(0.0)}


class ImageRouterStage(RoutedStage):
    """What the loop needs to train routers for a text-to-image pipeline."""

    def __init__(self, config: ImageRouterTrainConfig) -> None:
        self.config = config
        self.pipeline = pipeline = PublishedPipeline(config, config.image, config.routing.val_shapes)
        try:
            self.flow = ImageRouterObjective(pipeline, config)
        except ValueError as error:
            raise UserError(f"{config.image.weights} can't be routed: {error}") from error
        self.objective, self.record = self.flow, pipeline.record
        drive(pipeline.backbone.pipe, self.flow.session)
        self.items = RoutedImageItems(pipeline.train, self.flow.sampler(pipeline.backbone.grid))
        self._val_items = ImageItems(pipeline.val)

    def sampler_times(self) -> Tensor:
        """Those of the pipeline's family."""
        return self.pipeline.backbone.grid(self.config.routing.val_steps)

    def sheet(self, rows: list[Tensor]) -> np.ndarray:
        """The images of each row."""
        return image_sheet(self.pipeline.backbone, rows, self.pipeline.size)

    def sampled(self, count: int) -> Tensor:
        """By the pipeline's own loop, of validation captions."""
        pipeline, routing = self.pipeline, self.config.routing
        text = text_of(self._val_items.fixed(count or len(pipeline.val)))
        return generate_latents(
            pipeline.backbone, text, pipeline.negative, pipeline.size, routing.val_steps, routing.guidance
        )
