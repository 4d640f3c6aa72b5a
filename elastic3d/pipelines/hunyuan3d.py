"""Generation with Hunyuan3D-2 checkpoints as published, and the choice of a model by the command line."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from elastic3d.adapters import attach
from elastic3d.config.hunyuan3d import PRESETS, VIEW_NAMES, Hunyuan3DConfig, ImportConfig, parse_config
from elastic3d.errors import UserError
from elastic3d.models.hunyuan3d import load_hunyuan3d
from elastic3d.models.hunyuan3d_files import find_checkpoint
from elastic3d.models.image_encoder import dinov2_files
from elastic3d.models.weights import find_weights
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.memory import (
    GB,
    LOW_MEMORY_CHUNK,
    MemoryNeed,
    free_memory,
    memory_need,
    points_within,
    require,
)
from elastic3d.pipelines.options import GenerateConfig
from elastic3d.pipelines.runtime import resolve_device, resolve_dtype
from elastic3d.utils.files import file_sha256
from elastic3d.utils.structured import load_yaml
from elastic3d.utils.tensors import tensor_heads

_STAGES = {"conditioner": "condition", "model": "dit", "vae": "decode"}


def load_pipeline(config: GenerateConfig, default: Path, meshes: int) -> ImageTo3DPipeline:
    """The model that the options ask for, with the options that concern its memory and its routers applied.

    Args:
        default: folder of the model where none is named.
        meshes: how many will be generated.

    Raises:
        UserError: a missing or broken file, too little memory, options that the model can't honour.
    """
    routers = find_weights(Path(config.routers)) if config.routers else None
    if config.model in PRESETS:
        pipeline = hunyuan3d_pipeline(config, min(meshes, config.rows))
    else:
        for name in ("weights", "subfolder", "vae_subfolder", "dinov2"):
            if getattr(config, name):
                raise UserError(f"{name}= is for model={', '.join(PRESETS)}, but model is {config.model!r}")
        pipeline = ImageTo3DPipeline.from_pretrained(config.model or default, config.device, config.dtype)
        if config.memory_budget is not None:
            raise UserError(f"memory_budget= is for model={', '.join(PRESETS)}")
    if routers is not None:
        if pipeline.session is not None:
            raise UserError(f"routers={config.routers}: this model has routers of its own")
        attach(pipeline.dit, config.routers)
        pipeline.weights_sha256 = f"{pipeline.weights_sha256}+{file_sha256(routers)}"
    if config.low_memory:
        pipeline.use_less_memory()
    return pipeline


def hunyuan3d_pipeline(config: GenerateConfig, batch: int) -> ImageTo3DPipeline:
    """The pipeline of `model=` a preset; its memory is estimated before the weights are read.

    Raises:
        UserError: as `load_hunyuan3d`; no image encoder anywhere; too little memory; views for a model of one.
    """
    preset = PRESETS[config.model]
    folder, subfolder = config.weights or preset.repository, config.subfolder or preset.subfolder
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    config_path, weights_path = find_checkpoint(folder, subfolder)
    parts = parse_config(load_yaml(config_path), str(config_path))
    if config.views and parts.encoder.views == 1:
        raise UserError(
            f"image_{next(iter(config.views))}= is for a multi-view model, but model is {config.model}"
        )
    limit = LOW_MEMORY_CHUNK if config.low_memory else 65536
    sizes = part_sizes(weights_path)
    if config.vae_subfolder:
        sizes["decode"] = sum(part_sizes(find_checkpoint(folder, config.vae_subfolder)[1]).values())
    if config.dinov2:
        sizes["condition"] = sum(
            head.numel for path in dinov2_files(Path(config.dinov2)) for head in tensor_heads(path).values()
        )
    if weights_path.suffix == ".safetensors" and not sizes["condition"]:
        raise UserError(
            f"{weights_path} holds no image encoder (conditioner.*): give dinov2=, a DINOv2's folder"
        )
    need = _need(parts, sizes, config, dtype, batch, limit)
    budget = free_memory(device)
    if config.memory_budget is not None:
        budget = min(budget, int(config.memory_budget * GB))
    require(need, budget, config.low_memory, device)
    pipeline = _load(config, dtype, torch.device("cpu") if config.low_memory else device)
    pipeline.placement.device = device
    resident = need.weights["decode"] if config.low_memory else sum(need.weights.values())
    resolution = parts.pipeline.resolution if config.resolution is None else config.resolution
    pipeline.max_points = points_within(budget - resident, pipeline.vae.config, dtype, resolution, limit)
    return pipeline


def import_checkpoint(config: ImportConfig) -> str:
    """Write a published checkpoint as a model folder, in bf16 -> what was written, in one sentence.

    Raises:
        UserError: as `load_hunyuan3d`; no image encoder anywhere.
    """
    pipeline = _load(config, torch.bfloat16, torch.device("cpu"))
    pipeline.save_pretrained(config.output, torch.bfloat16)
    encoder = "has an" if pipeline.vae.config.encoder_layers else "has no"
    return f"{config.output}: {config.model}, whose VAE {encoder} encoder"


def _load(
    config: GenerateConfig | ImportConfig, dtype: torch.dtype, device: torch.device
) -> ImageTo3DPipeline:
    """The checkpoint that the options name, as a pipeline; UserError if there is no image encoder for it."""
    preset = PRESETS[config.model]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a missing image encoder is an error here
        bundle = load_hunyuan3d(
            config.weights or preset.repository,
            config.subfolder or preset.subfolder,
            dtype,
            device,
            config.vae_subfolder or None,
            config.dinov2 or None,
        )
    if bundle.conditioner is None:
        raise UserError(bundle.note)
    bundle.config.pipeline.model = config.model
    sha256 = file_sha256(*bundle.weights)
    return ImageTo3DPipeline(bundle.vae, bundle.dit, bundle.conditioner, bundle.config.pipeline, sha256)


def views_of(image: Path, config: GenerateConfig) -> Path | dict[str, Path]:
    """What the pipeline is given for a picture: with the further views, if any were named."""
    if not config.views:
        return image
    return {VIEW_NAMES[0]: image, **{name: Path(path) for name, path in config.views.items()}}


def _need(
    parts: Hunyuan3DConfig,
    sizes: dict[str, int],
    config: GenerateConfig,
    dtype: torch.dtype,
    batch: int,
    max_points: int,
) -> MemoryNeed:
    guidance = parts.pipeline.guidance if config.guidance is None else config.guidance
    two = guidance != 1.0 and not parts.dit.guidance_embed and not config.low_memory
    encoder = parts.encoder
    return memory_need(
        parts.dit,
        parts.vae,
        sizes,
        dtype,
        rows=batch * (2 if two else 1),
        resolution=parts.pipeline.resolution if config.resolution is None else config.resolution,
        max_points=max_points if config.memory_budget is None else min(max_points, LOW_MEMORY_CHUNK),
        encoder_width=int(parts.dinov2["hidden_size"]),
        encoder_tokens=encoder.views * ((encoder.image_size // 14) ** 2 + 1),
    )


def part_sizes(path: Path) -> dict[str, int]:
    """Parameters of each stage's weights in a checkpoint, from the head of the file alone.

    A `.ckpt` has no such head: its bytes are taken for half-precision weights of the diffusion model. Tensors of no
    stage (those of a VAE that is a file of its own) count as the field decoder's.
    """
    sizes = dict.fromkeys(_STAGES.values(), 0)
    if path.suffix != ".safetensors":
        sizes["dit"] = path.stat().st_size // 2
        return sizes
    for name, head in tensor_heads(path).items():
        sizes[_STAGES.get(name.partition(".")[0], "decode")] += head.numel
    return sizes
