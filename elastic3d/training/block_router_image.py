"""Per-block routers of the DiT of a text-to-image pipeline: generations end in an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic3d.diffusion.sampler import integrate
from elastic3d.elastic import adapter_for
from elastic3d.elastic.config import RouterConfig
from elastic3d.elastic.cost import block_flops
from elastic3d.errors import UserError
from elastic3d.pipelines.backbones import Backbone, Text
from elastic3d.pipelines.image_loading import load_backbone, weight_files
from elastic3d.pipelines.image_to_3d import ROUTERS_NAME
from elastic3d.pipelines.runtime import resolve_device
from elastic3d.training.block_router import (
    BlockRouterConfig,
    BlockRouterObjective,
    RouteDraw,
    attach_block_routers,
)
from elastic3d.training.block_router_stage import BlockRouterStage
from elastic3d.training.datasets import Batch, Shuffle, item_generator
from elastic3d.training.elastic_image import BackboneConfig, image_loss
from elastic3d.training.image import ImageFlowConfig, ImageItems
from elastic3d.training.image_cache import ImageCache, build_image_cache, text_of
from elastic3d.training.options import StageName, TrainConfig
from elastic3d.training.runtime import first_process_first
from elastic3d.training.sensitivity import load_sensitivity
from elastic3d.utils.files import file_sha256
from elastic3d.utils.options import Options, option


@dataclass(kw_only=True)
class ImageTermConfig(Options):
    """Image reconstruction loss at the end of a generation: what the last latents decode to, against what the dense
    model's of the same noise do."""

    weight: float = option(1.0, "of the whole term; 0 leaves it out", ge=0, le=1e6)
    scales: int = option(
        3, "resolutions at which images are compared, each half the one before", ge=1, le=8, advanced=True
    )


@dataclass(kw_only=True)
class ImageBlockRouterConfig(BlockRouterConfig):
    """Training of per-block routers and few-step LoRA of a text-to-image DiT."""

    guidance: float = option(3.0, "guidance scale; of two branches each has its own routes", ge=0, le=100)
    image: ImageTermConfig = option(ImageTermConfig, "image reconstruction loss")


@dataclass(kw_only=True)
class ImageBlockRouterTrainConfig(TrainConfig):
    """Everything `scripts/train.py stage=image_block_router` takes."""

    stage: StageName = option(StageName.image_block_router, "what to do")
    image: BackboneConfig = option(..., "the pipeline, and images with captions")
    router: RouterConfig = option(RouterConfig, "architecture of the routers: a file of configs/router")
    blocks: ImageBlockRouterConfig = option(ImageBlockRouterConfig, "training of routers and LoRA")

    def check(self) -> None:
        """Routers that decide by block, batches with every kind of route."""
        super().check()
        self.blocks.check_run(self.router, self.batch, self.accumulate)


class ImageBlockRouters(BlockRouterObjective):
    """Routers and LoRA of a text-to-image DiT, called as its pipeline calls it."""

    config: ImageBlockRouterConfig

    def __init__(self, backbone: Backbone, config: ImageBlockRouterTrainConfig, images: ImageCache) -> None:
        options = config.blocks
        attach_block_routers(
            backbone.transformer, options, config.router, config.image.weights / ROUTERS_NAME, backbone.grid
        )
        channels = images.read(0, 0)["latents"].shape[-1]
        super().__init__(backbone.transformer, options, torch.ones(channels), backbone.grid)
        self.size = (images.settings["size"],) * 2
        self._parts = (backbone, images.negative())  # no part of the state dict

    @property
    def backbone(self) -> Backbone:
        """The pipeline's family, its VAE where the routers are."""
        backbone = self._parts[0]
        device = next(self.routers.parameters()).device
        backbone.pipe.vae.requires_grad_(False).eval().to(device)
        return backbone

    def integrate(self, batch: Batch, steps: int) -> Tensor:
        """By the sampler of shapes, whose condition here are numbers of prompts: 0 is that of the second branch."""
        backbone, dit, scale = self.backbone, self.dit, self.config.guidance
        prompts = _with_negative(text_of(batch), self._parts[1])

        def velocity(latents: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None) -> Tensor:
            text = {name: value[condition[:, 0, 0]] for name, value in prompts.items()}
            return backbone.velocity(dit, latents, t, text, self.size, scale)

        numbers = torch.arange(1, len(batch["noise"]) + 1, device=batch["noise"].device)
        one = backbone.embeds_guidance or scale <= 1
        return integrate(
            velocity,
            numbers[:, None, None],
            batch["noise"],
            steps,
            1.0 if one else scale,
            times=backbone.grid(steps),
            session=self.session,
        )

    def reconstruction(
        self, found: Tensor, dense: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Mean absolute difference of decoded images at several scales."""
        config = self.config.image
        if not config.weight:
            return None
        backbone = self.backbone
        with torch.no_grad():
            wanted = backbone.decode(dense, self.size).float()
        loss = image_loss(backbone.decode(found, self.size).float(), wanted, config.scales)
        return config.weight * loss, {"image": loss}


def _with_negative(text: Text, negative: Text) -> Text:
    """Prompts (1 + B, ...), the second branch's first."""
    return {
        name: torch.cat([negative[name].to(value).expand_as(value[:1]), value])
        for name, value in text.items()
    }


@dataclass
class ImageRolloutItems:
    """Pairs of a caption and noise, with what `RouteDraw` says of the generation."""

    images: ImageCache
    config: ImageBlockRouterConfig
    draw: RouteDraw

    def __post_init__(self) -> None:
        self._shuffle = Shuffle(self.config.pairs)
        self._items = ImageItems(self.images, ImageFlowConfig(), 0.0)

    def __len__(self) -> int:
        return self.config.pairs

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the stream."""
        place, item = self.draw(position, seed)
        pair = self._shuffle(place, seed)
        rng = item_generator(seed, pair)
        drawn = self._items.draw(pair % len(self.images), int(rng.integers(1 << 16)), rng)
        return item | drawn | {"pair": torch.tensor(pair)}


class ImageBlockRouterStage(BlockRouterStage):
    """What the loop needs to train per-block routers for a text-to-image pipeline."""

    def __init__(self, config: ImageBlockRouterTrainConfig) -> None:
        image, options = config.image, config.blocks
        if image.backbone.name != "small" and image.images is None:
            raise UserError("image.images= is missing: a folder of images with captions")
        with first_process_first(config):
            device = resolve_device(config.device)
            encoder = load_backbone(image.backbone, image.weights, device, torch.float32)
            build_image_cache(image, config.data, encoder, config.seed)
            del encoder  # with its text encoders, which are larger than the rest
        backbone = load_backbone(
            image.backbone, image.weights, torch.device("cpu"), torch.float32, encoders=False
        )
        self._train = ImageCache(image.cache, "train")
        self._val = ImageCache(image.cache, "val", options.val_shapes)
        try:
            flow = ImageBlockRouters(backbone, config, self._train)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{image.weights} can't be routed: {error}") from error
        first, dit = self._train.read(0, 0), backbone.transformer
        lengths = (len(first["latents"]), len(text_of(first)["prompt_embeds"]))
        draw = RouteDraw(
            options,
            flow.session.router_config,
            block_flops(dit, adapter_for(dit), lengths),
            flow.times,
            config.batch,
            load_sensitivity(options.sensitivity, [block.name for block in flow.session.blocks]),
        )
        super().__init__(config, flow, draw)

    def items(self) -> ImageRolloutItems:
        """Pairs of cached training captions and noise."""
        return ImageRolloutItems(self._train, self.config.blocks, self.draw)

    def record(self) -> dict[str, Any]:
        """What the run trains on."""
        return {
            "train_images": len(self._train),
            "val_images": len(self._val),
            "images": self._train.settings,
            "weights_sha256": file_sha256(*weight_files(self.config.image.weights)),
        }

    def val_batch(self, count: int) -> Batch:
        """Of the first validation captions."""
        return ImageItems(self._val, ImageFlowConfig(), 0.0).fixed(count)
