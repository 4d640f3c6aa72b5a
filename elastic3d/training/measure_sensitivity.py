"""The command that measures the sensitivity table of a model, on validation shapes or images."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from elastic3d.elastic.config import RouterConfig
from elastic3d.pipelines.runtime import resolve_device
from elastic3d.training.block_router_image import (
    ImageBlockRouterConfig,
    ImageBlockRouterStage,
    ImageBlockRouterTrainConfig,
)
from elastic3d.training.block_router_shape import (
    BlockRouterTrainConfig,
    EndMeshLossConfig,
    ShapeBlockRouterConfig,
    ShapeBlockRouterStage,
)
from elastic3d.training.calibrate import CalibrationImagesConfig
from elastic3d.training.elastic_image import BackboneConfig
from elastic3d.training.latents import LatentCacheConfig
from elastic3d.training.options import DataConfig, Precision, StageConfig, StageName
from elastic3d.utils.options import Options, option


@dataclass(kw_only=True)
class SensitivityConfig(Options):
    """What is measured, and how."""

    model: Path = option(Path("data/pretrained/shape-small"), "folder of a shape pipeline")
    rank: int = option(48, "rank of the few-step LoRA, at least the model's", ge=1, le=4096)
    learned_guidance: bool = option(
        False, "the few-step LoRA has learned the guidance: the conditional branch runs alone"
    )
    guided_times: list[float] = option(
        [], "with it: first and last time between which both branches run", ge=0, le=1, ascending=True
    )
    guidance: float = option(3.0, "guidance scale of a text-to-image pipeline", ge=0, le=100)
    steps: int = option(6, "sampling steps: rows of the table", ge=1, le=1000)
    reference_steps: int = option(60, "sampling steps of the dense results", ge=1, le=10_000)
    val_shapes: int = option(12, "validation shapes or images", ge=1, le=1 << 16)
    output: Path = option(Path("runs/sensitivity.json"), "file to write")


@dataclass(kw_only=True)
class SensitivityStageConfig(StageConfig):
    """Everything `scripts/train.py stage=sensitivity` takes."""

    stage: StageName = option(StageName.sensitivity, "what to do")
    precision: Precision = option(Precision.bf16_master, "number format")
    data: DataConfig = option(DataConfig, "prepared shapes")
    latents: LatentCacheConfig = option(LatentCacheConfig, "cache of latents and image tokens")
    image: CalibrationImagesConfig = option(
        CalibrationImagesConfig, "of a text-to-image pipeline: images with captions"
    )
    router: RouterConfig = option(RouterConfig, "architecture of the routers: a file of configs/router")
    blocks: SensitivityConfig = option(SensitivityConfig, "what is measured")


def measure_sensitivity(config: SensitivityStageConfig) -> Path:
    """Write the table that `blocks.output` names: the relative squared error of the last latents to the dense ones,
    with each block left out at each step alone.

    Raises:
        UserError: what `stage=block_router` raises of such a model.
    """
    stage = _stage_for(config)
    stage.flow.to(resolve_device(config.device)).eval()
    stage.sensitivity(config.blocks.steps).save(config.blocks.output)
    return config.blocks.output


def _stage_for(config: SensitivityStageConfig) -> ShapeBlockRouterStage | ImageBlockRouterStage:
    """A stage that starts from the model as a training does."""
    options, image = config.blocks, config.image
    shared = {name: getattr(config, name) for name in ("seed", "device", "precision", "data", "router")}
    common: dict[str, Any] = {
        "rank": options.rank,
        "min_steps": 1,
        "max_steps": max(options.steps, 10),
        "reference_steps": max(options.reference_steps, options.steps, 10),
        "val_shapes": options.val_shapes,
        "val_steps": [options.steps],
    }
    if image.backbone is None:
        shape = ShapeBlockRouterConfig(
            model=options.model,
            guidance=options.learned_guidance,
            guided_times=options.guided_times,
            mesh=EndMeshLossConfig(weight=0.0),  # needs no data of true surfaces then
            **common,
        )
        return ShapeBlockRouterStage(BlockRouterTrainConfig(**shared, latents=config.latents, blocks=shape))
    images = BackboneConfig(**{item.name: getattr(image, item.name) for item in fields(BackboneConfig)})
    blocks = ImageBlockRouterConfig(guidance=options.guidance, **common)
    return ImageBlockRouterStage(ImageBlockRouterTrainConfig(**shared, image=images, blocks=blocks))
