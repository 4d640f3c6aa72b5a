"""Text-to-image models: the small one, which learns flow matching on cached images; and the flow of a published one,
with the stages that train its routers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from elastic3d.diffusion.flow import interpolate, sample_timesteps, velocity
from elastic3d.diffusion.sampler import integrate
from elastic3d.elastic.attachment import session_of
from elastic3d.elastic.config import RouterConfig
from elastic3d.elastic.diffusers_loop import drive
from elastic3d.errors import UserError
from elastic3d.pipelines.backbones import Backbone, Text
from elastic3d.pipelines.image_loading import encoder_files, quiet, weight_files
from elastic3d.pipelines.options import BackboneName
from elastic3d.pipelines.pixel_flux import (
    MiniLM,
    PixelFluxPipeline,
    PixelModelConfig,
    SmallBackbone,
    build_transformer,
)
from elastic3d.pipelines.runtime import find_model, resolve_device
from elastic3d.pipelines.text_to_image import load_backbone
from elastic3d.training.block_router import BlockRouterConfig
from elastic3d.training.datasets import Batch, Shuffle, even_times, item_generator
from elastic3d.training.distributed import first_process_first
from elastic3d.training.flow import Flow
from elastic3d.training.image_data import (
    ImageCache,
    ImageDataConfig,
    PipelineImagesConfig,
    build_image_cache,
    text_of,
)
from elastic3d.training.journal import contact_sheet
from elastic3d.training.loop import Stage
from elastic3d.training.options import GenerationTrainConfig, Precision, StageName, TrainConfig
from elastic3d.training.router import DecodedTermConfig, RoutingConfig
from elastic3d.utils.files import file_sha256
from elastic3d.utils.options import Options, option

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


# -------------------------------------------------------------------------------- the routers of published models


@dataclass(kw_only=True)
class BackboneConfig(PipelineImagesConfig):
    """A published pipeline, and the images with captions that its routers learn from."""

    backbone: BackboneName = option(BackboneName.small, "family whose DiT gets routers")
    weights: Path = option(..., "folder of the pipeline, in the layout in which it is published")


class ImageFlow(Flow):
    """A text-to-image pipeline without its text encoders, on images and texts that were cached with them. Its own
    guidance is what is distilled: both branches, or its input."""

    def __init__(
        self,
        config: TrainConfig,
        image: BackboneConfig,
        options: Any,
        precision: Precision = Precision.fp32,
    ) -> None:
        """`options`: `guidance` (None is the pipeline's), how many validation images there are, and the `image` term
        of the loss; `precision` of the DiT. UserError for a pipeline that can't be loaded, and for images that are
        missing."""
        if image.backbone is not BackboneName.small and image.images is None:
            raise UserError("image.images= is missing: a folder of images with captions")
        self.folder = find_model(image.weights)
        with first_process_first(config):
            device = resolve_device(config.device)
            encoder = load_backbone(image.backbone, self.folder, device, torch.float32)
            steps, fewest = min(options.min_steps, np.min(options.val_steps)), encoder.fewest_steps
            if steps < fewest:
                raise UserError(
                    f"{image.weights} can't be sampled in {steps} step, expected at least {fewest}"
                )
            build_image_cache(image, config.data, encoder, config.seed, encoder_files(self.folder))
            del encoder  # with its text encoders, which are larger than the rest
        dtype = torch.bfloat16 if precision is Precision.bf16_master else torch.float32
        cpu = torch.device("cpu")
        self._backbone = load_backbone(image.backbone, self.folder, cpu, dtype, encoders=False)
        self._backbone.pipe.vae.float()  # the loss is a small difference of what it decodes
        self.dit = self._backbone.transformer
        own = self._backbone.default_sampling()[1]
        self.guidance = own if options.guidance is None else options.guidance
        self.term = options.image
        self.embeds_guidance = self._backbone.embeds_guidance
        self.paired = not self.embeds_guidance and self.guidance > 1
        train, val = ImageCache(image.cache, "train"), ImageCache(image.cache, "val", options.val_shapes)
        self._train, self._val = ImageItems(train), ImageItems(val)
        self.negative, self.size = train.negative(), (train.settings["size"],) * 2
        first = train.read(0, 0)
        self.lengths = len(first["latents"]), len(text_of(first)["prompt_embeds"])
        self.weights = torch.ones(first["latents"].shape[-1])
        weights = {"weights_sha256": file_sha256(*weight_files(self.folder))}
        self.record = record_of_images(train, val) | weights

    @property
    def backbone(self) -> Backbone:
        """The pipeline's family, its VAE where the DiT is."""
        device = next(self.dit.parameters()).device
        self._backbone.pipe.vae.requires_grad_(False).eval().to(device)
        return self._backbone

    @contextmanager
    def attaching(self) -> Iterator[None]:
        """Around what puts routers on the DiT, which the pipeline's own loop drives from then on."""
        try:
            yield
            drive(self._backbone.pipe, session_of(self.dit))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{self.folder} can't be routed: {error}") from error

    def times(self, steps: int) -> Tensor:
        """The pipeline's, for images of the size of the cached ones."""
        return self._backbone.times(steps, self.size)

    def default_sampling(self) -> tuple[int, float]:
        return self._backbone.default_sampling()

    def velocities(self, x_t: Tensor, batch: Batch) -> Tensor:
        """Velocity (B,N,C) or (2B,N,C) under `text/...` (B,...)."""
        text, t = text_of(batch), batch["t"]
        if self.paired:
            x_t, t = x_t.repeat(2, 1, 1), t.repeat(2)
            for name, value in self.negative.items():
                text[name] = torch.cat([text[name], value.to(text[name]).expand_as(text[name])])
        return self.backbone.velocity(self.dit, x_t, t, text, self.size, self.guidance)

    def gain(self, conditional: Tensor, unconditional: Tensor) -> Tensor | float:
        return self._backbone.gain(conditional, unconditional, self.guidance)

    def integrate(self, batch: Batch, steps: int) -> Tensor:
        """By the sampler of shapes, whose condition here are numbers of prompts: 0 is that of the second branch."""
        backbone, prompts = self.backbone, Text()
        for name, value in text_of(batch).items():
            if value.is_floating_point():  # autocast on a CPU takes no fp16
                value = value.to(batch["noise"].dtype)
            prompts[name] = torch.cat([self.negative[name].to(value).expand_as(value[:1]), value])

        def guided(latents: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None) -> Tensor:
            found = {name: value[condition[:, 0, 0]] for name, value in prompts.items()}
            v = backbone.velocity(self.dit, latents, t, found, self.size, self.guidance).float()
            if not self.paired:
                return v
            branches = v.chunk(2)  # guidance adds them up later: a factor of both is one of the sum
            return torch.cat([part * self.gain(*branches) for part in branches])

        numbers = torch.arange(1, len(batch["noise"]) + 1, device=batch["noise"].device)
        scale = self.guidance if self.paired else 1.0
        return integrate(
            guided, numbers[:, None, None], batch["noise"], self.times(steps), scale,
            session=session_of(self.dit),
        )  # fmt: skip

    def sampled(self, count: int, steps: int, guidance: float) -> Tensor:
        """By the pipeline's own loop, of validation captions."""
        text = text_of(self._val.fixed(count or len(self._val)))
        return generate_latents(self.backbone, text, self.negative, self.size, steps, guidance)

    def decoded(self, found: Tensor, batch: Batch, dense: Tensor | None = None) -> dict[str, Tensor]:
        """Mean absolute difference of decoded images at several scales; what is compared with has no gradient."""
        backbone, true = self.backbone, batch["latents"][: len(found)] if dense is None else dense
        with torch.no_grad():
            wanted = backbone.decode(true, self.size).float()
        return {"image": image_loss(backbone.decode(found, self.size).float(), wanted)}

    def sheet(self, rows: list[Tensor]) -> np.ndarray:
        return image_sheet(self.backbone, rows, self.size)

    def stream(self) -> ImageItems:
        """Those of the small model's training, every one with its caption."""
        return self._train

    def pair(self, number: int, seed: int) -> Batch:
        """An image's latents with `noise` (N,C) and a caption."""
        rng = item_generator(seed, number)
        return self._train.draw(number % len(self._train), int(rng.integers(1 << 16)), rng)

    def val_pairs(self) -> Batch:
        """Noise and captions of the validation images."""
        return self._val.fixed(len(self._val))


def image_loss(found: Tensor, true: Tensor, scales: int = 3) -> Tensor:
    """Images (B,3,H,W) -> mean absolute difference (B,), averaged over resolutions, each half the one before: edges
    count at the first, colours of areas at the last."""
    losses = []
    for scale in range(scales):
        if scale:
            found, true = (nn.functional.avg_pool2d(x, 2, ceil_mode=True) for x in (found, true))
        losses.append((found - true).abs().flatten(1).mean(1))
    return torch.stack(losses).mean(0)


# --------------------------------------------------------------------------------------------------------- the stages


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

    def flow(self) -> ImageFlow:
        """The dense model and its data."""
        return ImageFlow(self, self.image, self.routing)


@dataclass(kw_only=True)
class EndImageLossConfig(ImageTermConfig):
    """Image reconstruction loss at the end of a generation: what the last latents decode to, against what the dense
    model's of the same noise do."""

    weight: float = option(1.0, "of the whole term; 0 leaves it out", ge=0, le=1e6)


@dataclass(kw_only=True)
class ImageBlockRouterConfig(BlockRouterConfig):
    """Training of per-block routers and few-step LoRA of a text-to-image DiT."""

    guidance: float | None = option(
        None, "guidance scale; null: the pipeline's; of two branches each has its own routes", ge=0, le=100
    )
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

    def flow(self) -> ImageFlow:
        """The dense model and its data."""
        return ImageFlow(self, self.image, self.blocks, self.precision)
