"""Generation with checkpoints as published: found, examined, and loaded where the memory suffices."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from elastic3d.checkpoints import step1x3d, triposg
from elastic3d.checkpoints.bundle import Bundle, Inspection, on_meta
from elastic3d.checkpoints.folders import INDEX_NAME, open_folder
from elastic3d.checkpoints.hunyuan3d import find_checkpoint, inspect_hunyuan3d, load_hunyuan3d
from elastic3d.checkpoints.options import PRESETS, ImportConfig
from elastic3d.diffusion.options import PipelineConfig
from elastic3d.elastic.attachment import adapter_for, attach, load_router_config
from elastic3d.errors import UserError
from elastic3d.geometry.options import DecodeConfig
from elastic3d.models.weights import find_weights
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.memory import GB, LOW_MEMORY_CHUNK, free_memory, memory_need, points_within, require
from elastic3d.pipelines.options import DEFAULT_MODEL, NO_ROUTERS_NAME, GenerateConfig
from elastic3d.pipelines.runtime import find_model, resolve_device, resolve_dtype
from elastic3d.utils.files import file_sha256

LAYOUTS = {"triposg": triposg.LAYOUT, "step1x3d": step1x3d.LAYOUT}  # families but Hunyuan3D's


@dataclass(frozen=True)
class Memory:
    """What generations with a checkpoint may take: `budget` bytes of a device, the weights included."""

    found: Inspection
    dtype: torch.dtype
    device: torch.device
    budget: int
    low_memory: bool

    def max_points(self, sampling: PipelineConfig, batch: int, least: int = LOW_MEMORY_CHUNK) -> int:
        """Points in one call of the field that fit beside a batch of generations. UserError if `least` do not."""
        parts, low = self.found.config, self.low_memory
        two = sampling.guidance > 1.0 and not parts.dit.guidance_embed and not low
        need = memory_need(
            parts.dit,
            parts.vae,
            self.found.sizes,
            self.dtype,
            rows=batch * (2 if two else 1),
            resolution=sampling.resolution,
            max_points=least,
            encoder_width=parts.dit.condition_channels,
            encoder_tokens=parts.encoder.views * ((parts.encoder.image_size // 14) ** 2 + 1),
        )
        require(need, self.budget, low, self.device)
        free = self.budget - (need.weights["decode"] if low else sum(need.weights.values()))
        limit = LOW_MEMORY_CHUNK if low else DecodeConfig.max_points
        return points_within(free, parts.vae, self.dtype, sampling.resolution, limit)


def calibration_home(config: GenerateConfig) -> Path:
    """The folder beside whose weights a model without routers has its calibration; of published weights the one where
    they are found. UserError as the family's loader."""
    if config.model not in PRESETS:
        return find_model(config.model or DEFAULT_MODEL)
    preset = PRESETS[config.model]
    folder, subfolder = config.weights or preset.repository, config.subfolder or preset.subfolder
    if preset.family == "hunyuan3d":
        return find_checkpoint(folder, subfolder)[0].parent
    return open_folder(folder, config.model, subfolder).root


def published_pipeline(config: GenerateConfig, batch: int) -> ImageTo3DPipeline:
    """The pipeline of `model=` a preset, with the routers of `routers=`; its memory is estimated before the weights are
    read.

    Raises:
        UserError: as the family's loader; no image encoder anywhere; too little memory; views for a model of one; no
            routers in that folder.
    """
    own = config.routers in ("", NO_ROUTERS_NAME)
    routers = None if own else find_weights(Path(config.routers))
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    found = _inspect(config)
    if routers is not None:
        found = _with_adapted_weights(found, routers.parent)
    parts = found.config
    if config.views and parts.encoder.views == 1:
        raise UserError(
            f"image_{next(iter(config.views))}= is for a multi-view model, but model is {config.model}"
        )
    if found.note:
        raise UserError(found.note)
    budget = free_memory(device)
    if config.memory_budget is not None:
        budget = min(budget, int(config.memory_budget * GB))
    memory = Memory(found, dtype, device, budget, config.low_memory)
    given = {name: getattr(config, name) for name in ("guidance", "resolution")}
    sampling = replace(parts.pipeline, **{name: value for name, value in given.items() if value is not None})
    bounded = config.low_memory or config.memory_budget is not None
    memory.max_points(sampling, batch, LOW_MEMORY_CHUNK if bounded else DecodeConfig.max_points)
    pipeline = _load(config, dtype, torch.device("cpu") if config.low_memory else device)
    pipeline.device, pipeline.calibration = device, calibration_home(config)
    pipeline.fit = memory.max_points
    if routers is not None:
        attach(pipeline.dit, routers.parent)
        pipeline.weights_sha256 = f"{pipeline.weights_sha256}+{file_sha256(routers)}"
    return pipeline


def import_checkpoint(config: ImportConfig) -> str:
    """Write a published checkpoint as a model folder, in bf16 -> what was written, in one sentence.

    Raises:
        UserError: as the family's loader; no image encoder anywhere; the output is a published folder, whose files it
            would replace.
    """
    if (Path(config.output) / INDEX_NAME).is_file():
        raise UserError(f"output is {config.output}, which is a published model: choose another folder")
    pipeline = _load(config, torch.bfloat16, torch.device("cpu"))
    pipeline.save_pretrained(config.output, torch.bfloat16)
    encoder = "has an" if pipeline.vae.config.encoder_layers else "has no"
    return f"{config.output}: {config.model}, whose VAE {encoder} encoder"


def _with_adapted_weights(found: Inspection, routers: Path) -> Inspection:
    """With the copy of the blocks' linear weights that the few-step LoRA of the routers in a folder makes, if any."""
    dit = on_meta(found.config.dit)
    adapter = adapter_for(dit)
    if not load_router_config(routers, adapter.family).few_step_rank:
        return found
    blocks = (block for _, _, blocks, _ in adapter.block_lists(dit) for block in blocks)
    copied = sum(p.weight.numel() for block in blocks for p in block.modules() if type(p) is nn.Linear)
    return replace(found, sizes=found.sizes | {"dit": found.sizes["dit"] + copied})


def _inspect(config: GenerateConfig | ImportConfig) -> Inspection:
    preset = PRESETS[config.model]
    folder, subfolder = config.weights or preset.repository, config.subfolder or preset.subfolder
    if preset.family == "hunyuan3d":
        return inspect_hunyuan3d(folder, subfolder, config.vae_subfolder, config.dinov2)
    if config.vae_subfolder:
        raise UserError(f"vae_subfolder= is for Hunyuan3D-2, but model is {config.model}")
    return LAYOUTS[preset.family].inspect(folder, subfolder, config.dinov2)


def _load(
    config: GenerateConfig | ImportConfig, dtype: torch.dtype, device: torch.device
) -> ImageTo3DPipeline:
    """The checkpoint that the options name, as a pipeline; UserError if there is no image encoder for it."""
    preset = PRESETS[config.model]
    folder, subfolder = config.weights or preset.repository, config.subfolder or preset.subfolder
    dinov2 = config.dinov2 or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a missing image encoder is an error here
        bundle: Bundle
        if preset.family == "hunyuan3d":
            bundle = load_hunyuan3d(folder, subfolder, dtype, device, config.vae_subfolder or None, dinov2)
        else:
            bundle = LAYOUTS[preset.family].load(folder, dtype, device, dinov2, subfolder)
    if bundle.conditioner is None:
        raise UserError(bundle.note)
    bundle.config.pipeline.model = config.model
    sha256 = file_sha256(*bundle.weights)
    return ImageTo3DPipeline(bundle.vae, bundle.dit, bundle.conditioner, bundle.config.pipeline, sha256)
