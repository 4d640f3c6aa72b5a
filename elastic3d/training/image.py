"""The small text-to-image model: flow matching on cached images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from elastic3d.diffusion.flow import interpolate, sample_timesteps, velocity
from elastic3d.pipelines.backbones import Backbone, Text
from elastic3d.pipelines.image_loading import quiet
from elastic3d.pipelines.pixel_flux import (
    MiniLM,
    PixelFluxPipeline,
    PixelModelConfig,
    SmallBackbone,
    build_transformer,
)
from elastic3d.training.datasets import Batch, Shuffle, even_times, item_generator
from elastic3d.training.distributed import first_process_first
from elastic3d.training.image_data import ImageCache, ImageDataConfig, build_image_cache, text_of
from elastic3d.training.journal import contact_sheet
from elastic3d.training.loop import Stage
from elastic3d.training.options import StageName, TrainConfig
from elastic3d.utils.options import option

DROPPED_CAPTIONS = 0.1  # share of samples without caption, as is usual for classifier-free guidance


@dataclass(kw_only=True)
class ImageStageConfig(ImageDataConfig):
    """Images with captions, and the model that learns from them."""

    model: PixelModelConfig = option(PixelModelConfig, "architecture")
    shift: float = option(1.0, "timestep shift; above 1 trains more on noise", ge=1e-3, le=1e3)
    val_images: int = option(128, "images to validate on", ge=1, le=1 << 20)
    sample_images: int = option(8, "sample images", ge=1, le=1 << 16)
    sample_steps: int = option(25, "sampling steps of the sample images", ge=1, le=1000)
    sample_guidance: float = option(3.0, "their guidance", ge=0, le=100)


@dataclass(kw_only=True)
class ImageTrainConfig(TrainConfig):
    """Everything `scripts/train.py stage=image` takes."""

    stage: StageName = option(StageName.image, "what to do")
    gradient_checkpointing: bool = option(False, "activations of the small model are small", internal=True)
    image: ImageStageConfig = option(ImageStageConfig, "images with captions")

    def network(self) -> nn.Module:
        """The transformer."""
        return build_transformer(self.image.model)

    def sample_bytes(self) -> int:
        """The image's and the prompt's tokens in every block."""
        model = self.image.model
        tokens = (model.size // model.patch) ** 2 + model.text_length
        return 2 * model.width * tokens * (model.double_blocks + model.single_blocks)


class ImageObjective(nn.Module):
    """Flow matching: mean squared error of the velocity (2210.02747)."""

    def __init__(self, backbone: Backbone, size: int, guidance: float) -> None:
        super().__init__()
        self.backbone, self.size, self.guidance = backbone, (size, size), guidance
        self.dit = backbone.transformer

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """`latents`, `noise` (B,N,C), `t` (B,), `text/...` -> loss, nothing else to record."""
        return self.squared_error(batch).mean(), {}

    def squared_error(self, batch: Batch) -> Tensor:
        """Of the predicted velocity, (B,N,C) fp32."""
        x_t = interpolate(batch["noise"], batch["latents"], batch["t"])
        found = self.backbone.velocity(
            self.dit, x_t, batch["t"], text_of(batch), self.size, self.guidance
        ).float()
        return (found - velocity(batch["noise"], batch["latents"])).square()


@dataclass
class ImageItems:
    """Items: `latents`, `noise` (N,C), `t` (), `text/<name>`, that of the unconditional branch where it is dropped."""

    images: ImageCache
    shift: float = 1.0  # of timesteps
    drop_caption: float = 0.0

    def __post_init__(self) -> None:
        self.index = Shuffle(len(self.images))
        self._negative = _in_fp32(
            {f"text/{name}": value[0] for name, value in self.images.negative().items()}
        )

    def __len__(self) -> int:
        return len(self.images)

    def item(self, position: int, seed: int) -> Batch:
        """Item `position` of the shuffled stream."""
        rng = item_generator(seed, position)
        item = self.draw(self.index(position, seed), int(rng.integers(1 << 16)), rng)
        if rng.random() < self.drop_caption:
            item |= self._negative
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        item["t"] = sample_timesteps(1, generator, shift=self.shift)[0]
        return item

    def draw(self, index: int, caption: int, rng: np.random.Generator) -> Batch:
        """An image, noise, and one of its captions."""
        item = _in_fp32(self.images.read(index, caption))
        noise = rng.standard_normal(tuple(item["latents"].shape), dtype=np.float32)
        return {**item, "noise": torch.from_numpy(noise)}

    def fixed(self, count: int) -> Batch:
        """The first `count` images with their first captions, the same noise every time."""
        return default_collate([self.draw(i, 0, item_generator(0, i)) for i in range(min(count, len(self)))])


class ImageStage(Stage):
    """What the loop needs to train the small text-to-image model."""

    objective: ImageObjective

    def __init__(self, config: ImageTrainConfig) -> None:
        self.config = image = config.image
        with first_process_first(config):
            with quiet():
                text = MiniLM(image.model.text_length)
            encoder = SmallBackbone(PixelFluxPipeline.build(image.model, None, text))
            build_image_cache(image, config.data, encoder, config.seed)
        self.dit = build_transformer(image.model)
        self.backbone = SmallBackbone(PixelFluxPipeline.build(image.model, self.dit, None))
        self.objective = ImageObjective(self.backbone, image.model.size, image.model.guidance)
        train = ImageCache(image.cache, "train")
        self._val = ImageCache(image.cache, "val", image.val_images)
        self.items = ImageItems(train, image.shift, DROPPED_CAPTIONS)
        self.record = record_of_images(train, self._val)
        self._val_items = ImageItems(self._val)

    def validate(self, batch: int = 32) -> dict[str, float]:
        """Velocity error on validation images at fixed noise and even times, with and without caption."""
        device, whole = next(self.dit.parameters()).device, self._val_items.fixed(len(self._val))
        count = len(whole["latents"])
        whole["t"] = even_times(count)
        blind = {**whole, **_all_rows(self._val.negative(), count)}
        means = []
        for items in (whole, blind):
            parts = [
                self.objective.squared_error(
                    {k: v[first : first + batch].to(device) for k, v in items.items()}
                )
                for first in range(0, count, batch)
            ]
            means.append(torch.cat([part.mean((1, 2)).cpu() for part in parts]).mean().item())
        return {"val/flow": means[0], "val/flow_without_caption": means[1]}

    def samples(self) -> dict[str, np.ndarray]:
        """Rows of validation images: the image, what is generated from its caption."""
        image, backbone, size = self.config, self.backbone, self.objective.size
        items = self._val_items.fixed(image.sample_images)
        text, negative = text_of(items), self._val.negative()
        latents = generate_latents(backbone, text, negative, size, image.sample_steps, image.sample_guidance)
        return {"generated": image_sheet(backbone, [items["latents"], latents], size)}


def record_of_images(train: ImageCache, val: ImageCache) -> dict[str, Any]:
    """What a run trains on and is validated on."""
    return {"train_images": len(train), "val_images": len(val), "images": train.settings}


def generate_latents(
    backbone: Backbone, text: Text, negative: Text, size: tuple[int, int], steps: int, guidance: float
) -> Tensor:
    """Latents (B,N,C) of cached prompts from the pipeline's own loop, sample b from seed b."""
    dit = backbone.transformer
    parameter = next(dit.parameters())

    def placed(part: Text) -> Text:
        return {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in part.items()
        }

    text = placed(text)
    count = len(next(iter(text.values())))
    return backbone.pipe(
        **text,
        **backbone.guidance_arguments(guidance, count, placed(negative)),
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(i) for i in range(count)],
        output_type="latent",
        return_dict=False,
    )[0].float()


def image_sheet(backbone: Backbone, rows: list[Tensor], size: tuple[int, int]) -> np.ndarray:
    """Rows of latents (B,N,C) as one image."""
    device = next(backbone.pipe.vae.parameters(), torch.zeros(0)).device
    sheet = []
    for row in rows:
        images = backbone.decode(row.to(device), size).float().clamp(0, 1)
        sheet.append(list((255 * images).round().byte().permute(0, 2, 3, 1).cpu().numpy()))
    return contact_sheet(sheet)


def _in_fp32(item: Batch) -> Batch:
    """What is fp16 in the cache in fp32: autocast on a CPU neither stacks nor concatenates fp16."""
    return {name: value.float() if value.is_floating_point() else value for name, value in item.items()}


def _all_rows(text: Text, count: int) -> Batch:
    return {f"text/{name}": value.expand(count, *value.shape[1:]) for name, value in text.items()}
