"""Per-block routers of the DiT of a text-to-image pipeline: generations end in an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic3d.diffusion.sampler import integrate
from elastic3d.elastic.config import RouterConfig
from elastic3d.errors import UserError
from elastic3d.pipelines.backbones import Text
from elastic3d.pipelines.image_to_3d import ROUTERS_NAME
from elastic3d.training.block_router import (
    BlockRouterConfig,
    BlockRouterObjective,
    BlockRouterStage,
    RouteDraw,
    attach_block_routers,
)
from elastic3d.training.datasets import Batch, Shuffle, item_generator
from elastic3d.training.elastic_image import BackboneConfig, ImageTermConfig, PublishedPipeline
from elastic3d.training.image import ImageItems
from elastic3d.training.image_data import ImageCache, text_of
from elastic3d.training.options import GenerationTrainConfig, StageName
from elastic3d.utils.options import option


@dataclass(kw_only=True)
class EndImageLossConfig(ImageTermConfig):
    """Image reconstruction loss at the end of a generation: what the last latents decode to, against what the dense
    model's of the same noise do."""

    weight: float = option(1.0, "of the whole term; 0 leaves it out", ge=0, le=1e6)


@dataclass(kw_only=True)
class ImageBlockRouterConfig(BlockRouterConfig):
    """Training of per-block routers and few-step LoRA of a text-to-image DiT."""

    guidance: float = option(3.0, "guidance scale; of two branches each has its own routes", ge=0, le=100)
    image: EndImageLossConfig = option(EndImageLossConfig, "image reconstruction loss")


@dataclass(kw_only=True)
class ImageBlockRouterTrainConfig(GenerationTrainConfig):
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

    def __init__(self, pipeline: PublishedPipeline, config: ImageBlockRouterTrainConfig) -> None:
        dit, times, start = (
            pipeline.backbone.transformer,
            pipeline.backbone.grid,
            pipeline.weights / ROUTERS_NAME,
        )
        attach_block_routers(dit, config.blocks, config.router, start, times)
        channels = pipeline.train.read(0, 0)["latents"].shape[-1]
        super().__init__(dit, config.blocks, config.blocks.image, torch.ones(channels), times)
        self.pipeline = pipeline

    def integrate(self, batch: Batch, steps: int) -> Tensor:
        """By the sampler of shapes, whose condition here are numbers of prompts: 0 is that of the second branch."""
        dit, backbone, scale = self.dit, self.pipeline.backbone, self.config.guidance
        prompts = _with_negative(text_of(batch), self.pipeline.negative, batch["noise"].dtype)

        def velocity(latents: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None) -> Tensor:
            text = {name: value[condition[:, 0, 0]] for name, value in prompts.items()}
            return backbone.velocity(dit, latents, t, text, self.pipeline.size, scale)

        numbers = torch.arange(1, len(batch["noise"]) + 1, device=batch["noise"].device)
        one = backbone.embeds_guidance or scale <= 1
        return integrate(
            velocity,
            numbers[:, None, None],
            batch["noise"],
            backbone.grid(steps),
            1.0 if one else scale,
            session=self.session,
        )

    def decoded(self, found: Tensor, dense: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Mean absolute difference of decoded images at several scales."""
        return self.pipeline.decoded_loss(found, dense)


def _with_negative(text: Text, negative: Text, dtype: torch.dtype) -> Text:
    """Prompts (1 + B, ...), the second branch's first; embeddings in `dtype`, as autocast on a CPU takes no fp16."""
    text = {name: value.to(dtype) if value.is_floating_point() else value for name, value in text.items()}
    return {name: torch.cat([negative[name].to(v).expand_as(v[:1]), v]) for name, v in text.items()}


@dataclass
class ImageRolloutItems:
    """Pairs of a caption and noise, with what `RouteDraw` says of the generation."""

    images: ImageCache
    pairs: int
    draw: RouteDraw

    def __post_init__(self) -> None:
        self._shuffle = Shuffle(self.pairs)
        self._items = ImageItems(self.images)

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the stream."""
        item, pair = self.draw(position, seed), self._shuffle(position, seed)
        rng = item_generator(seed, pair)
        drawn = self._items.draw(pair % len(self.images), int(rng.integers(1 << 16)), rng)
        return item | drawn | {"pair": torch.tensor(pair)}


class ImageBlockRouterStage(BlockRouterStage):
    """What the loop needs to train per-block routers for a text-to-image pipeline."""

    def __init__(self, config: ImageBlockRouterTrainConfig) -> None:
        self.pipeline = pipeline = PublishedPipeline(config, config.image, config.blocks.val_shapes)
        try:
            flow = ImageBlockRouters(pipeline, config)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{config.image.weights} can't be routed: {error}") from error
        first = pipeline.train.read(0, 0)
        super().__init__(config, flow, (len(first["latents"]), len(text_of(first)["prompt_embeds"])))
        self.items = ImageRolloutItems(pipeline.train, config.blocks.pairs, self.draw)
        self.record = pipeline.record

    def val_batch(self) -> Batch:
        """Noise and captions of the validation images."""
        return ImageItems(self.pipeline.val).fixed(len(self.pipeline.val))
