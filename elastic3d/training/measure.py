"""What is measured of a model that is trained already: the budgets of its routers, calibrated anew without the
checkpoint of their training (`stage=calibrate`), and what leaving out each block costs at each step
(`stage=sensitivity`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic3d import __version__
from elastic3d.diffusion.dial import save_dial
from elastic3d.elastic.attachment import ROUTER_RECORDS, load_router_config, load_routers, save_router_config
from elastic3d.elastic.config import RouterConfig
from elastic3d.errors import UserError
from elastic3d.models.weights import CONFIG_NAME, WEIGHTS_NAME
from elastic3d.pipelines.image_to_3d import ROUTERS_NAME
from elastic3d.pipelines.options import BackboneName
from elastic3d.pipelines.runtime import find_model, resolve_device
from elastic3d.training.block_router import BlockRouterStage
from elastic3d.training.calibration import CurvesConfig
from elastic3d.training.export import copy_files
from elastic3d.training.image import (
    BackboneConfig,
    ImageBlockRouterConfig,
    ImageBlockRouterTrainConfig,
    ImageRouterTrainConfig,
    ImageRoutingConfig,
)
from elastic3d.training.image_data import PipelineImagesConfig
from elastic3d.training.latents import LatentCacheConfig
from elastic3d.training.mesh_loss import EndMeshLossConfig
from elastic3d.training.options import DataConfig, LimitedSplitsConfig, Precision, SeededConfig, StageName
from elastic3d.training.router import RouterStage
from elastic3d.training.shape_flow import (
    BlockRouterTrainConfig,
    MeshLossConfig,
    RouterStageConfig,
    RouterTrainConfig,
    ShapeBlockRouterConfig,
)
from elastic3d.utils.files import load_json, save_json
from elastic3d.utils.options import Options, option

NOTE_NAME = "calibration.json"


@dataclass(kw_only=True)
class CalibratedRoutersConfig(CurvesConfig):
    """Which routers, and on how much they are measured."""

    model: Path = option(Path("runs/dit/export"), "folder of a shape pipeline with routers")
    val_shapes: int = option(
        8, "validation shapes or images that are generated at each budget", ge=1, le=1 << 16
    )


@dataclass(kw_only=True)
class CalibrationImagesConfig(PipelineImagesConfig):
    """For routers of a text-to-image pipeline: which, and the images with captions."""

    backbone: BackboneName | None = option(None, "family of the pipeline; null: a shape pipeline")
    weights: Path | None = option(None, "its folder, with `routers` inside")

    def check(self) -> None:
        """A pipeline has a folder."""
        super().check()
        if self.backbone is not None and self.weights is None:
            raise ValueError(f"weights= is missing: the folder of the {self.backbone.name} pipeline")


@dataclass(kw_only=True)
class CalibrationOutputConfig(Options):
    """Where calibrated routers go."""

    output: Path | None = option(None, "folder to write; null: the model's own")


@dataclass(kw_only=True)
class MeasureConfig(SeededConfig):
    """On what a trained model is measured."""

    precision: Precision = option(Precision.auto, "number format of the training")
    data: LimitedSplitsConfig = option(LimitedSplitsConfig, "prepared shapes")
    latents: LatentCacheConfig = option(LatentCacheConfig, "cache of latents and image tokens")
    image: CalibrationImagesConfig = option(
        CalibrationImagesConfig, "of a text-to-image pipeline: images with captions"
    )

    def training(self, router: RouterConfig) -> dict[str, Any]:
        """What a stage that trains such routers takes of it."""
        found = {name: getattr(self, name) for name in ("seed", "device", "precision", "data")}
        if self.image.backbone is not None:
            return found | {"image": BackboneConfig(**vars(self.image)), "router": router}
        return found | {"data": DataConfig(**vars(self.data)), "latents": self.latents, "router": router}


@dataclass(kw_only=True)
class CalibrateConfig(MeasureConfig):
    """Everything `scripts/train.py stage=calibrate` takes."""

    stage: StageName = option(StageName.calibrate, "what to do")
    routing: CalibratedRoutersConfig = option(CalibratedRoutersConfig, "the routers")
    export: CalibrationOutputConfig = option(CalibrationOutputConfig, "what is written")


def calibrate_exported(config: CalibrateConfig) -> Path:
    """Calibrate `routers/` of the model that `config` names as an export does, at the model's own steps and guidance.

    Their `curves.json` is written anew, with `calibration.json` beside it: what it was measured on. A `dial.json` there
    goes: it was measured with what they were. Weights and the records of their training stay as they are; another
    `export.output` gets copies of them.

    Raises:
        UserError: there are no routers, they are those of another model, or were trained for a few steps alone.
    """
    model = config.routing.model if config.image.backbone is None else config.image.weights
    assert model is not None
    model = find_model(model)
    source, output = (folder / ROUTERS_NAME for folder in (model, config.export.output or model))
    stage = _router_stage(config, _router_config(source))
    load_routers(stage.flow.dit, source)
    stage.sampling = stage.flow.default_sampling()
    stage.objective.to(resolve_device(config.device)).eval()
    stage.calibrate(config.routing)
    copy_files((WEIGHTS_NAME, *ROUTER_RECORDS), source, output)
    save_dial(None, output.parent)
    save_router_config(stage.flow.dit, output)
    save_json(_note(stage, config), output / NOTE_NAME)
    return output


def _router_config(folder: Path) -> RouterConfig:
    """Of the routers in a folder."""
    if not folder.is_dir():
        raise UserError(f"{folder.parent} has no routers to calibrate: there is no folder {folder}")
    family = str(load_json(folder / CONFIG_NAME).get("_class_name", "")).removesuffix("Routers")
    found: RouterConfig = load_router_config(folder, family)  # `load_routers` looks at the family
    if found.trained_steps:
        raise UserError(
            f"{folder} has per-block routers for few steps, which stage=calibrate does not sample in: stage=export of"
            " the run that trained them calibrates them"
        )
    return found


def _router_stage(config: CalibrateConfig, router: RouterConfig) -> RouterStage:
    """A stage with such routers, which learns nothing."""
    training, count = config.training(router), config.routing.val_shapes
    if config.image.backbone is not None:
        return RouterStage(ImageRouterTrainConfig(**training, routing=ImageRoutingConfig(val_shapes=count)))
    no_loss = MeshLossConfig(weight=0.0)  # needs no data of true surfaces then
    routing = RouterStageConfig(model=config.routing.model, val_shapes=count, mesh=no_loss)
    return RouterStage(RouterTrainConfig(**training, routing=routing))


def _note(stage: RouterStage, config: CalibrateConfig) -> dict[str, object]:
    """How the calibration came about."""
    steps, guidance = stage.sampling
    return {
        "steps": steps,
        "guidance": guidance,
        "dampings": config.routing.dampings.name,
        "gate_bias": config.routing.gate_bias.name,
        "precision": config.precision.name,
        "data": {name: value for name, value in stage.record.items() if not name.startswith("train_")},
        "versions": {"elastic3d": __version__, "torch": torch.__version__},
    }


# ------------------------------------------------------------------------------------------------------ sensitivity


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
    anchor_weight: float = option(
        1.0, "weight of the anchors' channels over the others', as in stage=block_router", ge=0, le=1e6
    )
    guidance: float | None = option(
        None, "guidance scale of a text-to-image pipeline; null: its own", ge=0, le=100
    )
    steps: int = option(6, "sampling steps: rows of the table", ge=1, le=1000)
    reference_steps: int = option(60, "sampling steps of the dense results", ge=1, le=10_000)
    val_shapes: int = option(12, "validation shapes or images", ge=1, le=1 << 16)
    output: Path = option(Path("runs/sensitivity.json"), "file to write")


@dataclass(kw_only=True)
class SensitivityStageConfig(MeasureConfig):
    """Everything `scripts/train.py stage=sensitivity` takes."""

    stage: StageName = option(StageName.sensitivity, "what to do")
    router: RouterConfig = option(RouterConfig, "architecture of the routers: a file of configs/router")
    blocks: SensitivityConfig = option(SensitivityConfig, "what is measured")


def measure_sensitivity(config: SensitivityStageConfig) -> Path:
    """Write the table that `blocks.output` names: the relative squared error of the last latents to the dense ones,
    with each block left out at each step alone.

    Raises:
        UserError: what `stage=block_router` raises of such a model.
    """
    stage = _block_router_stage(config)
    stage.objective.to(resolve_device(config.device)).eval()
    stage.sensitivity(config.blocks.steps).save(config.blocks.output)
    return config.blocks.output


def _block_router_stage(config: SensitivityStageConfig) -> BlockRouterStage:
    """A stage that starts from the model as a training does."""
    options, training = config.blocks, config.training(config.router)
    common: dict[str, Any] = {
        "rank": options.rank,
        "min_steps": options.steps,
        "max_steps": max(options.steps, 10),
        "reference_steps": max(options.reference_steps, options.steps, 10),
        "val_shapes": options.val_shapes,
        "val_steps": [options.steps],
    }
    if config.image.backbone is not None:
        images = ImageBlockRouterConfig(guidance=options.guidance, **common)
        return BlockRouterStage(ImageBlockRouterTrainConfig(**training, blocks=images))
    shapes = ShapeBlockRouterConfig(
        model=options.model,
        guidance=options.learned_guidance,
        guided_times=options.guided_times,
        anchor_weight=options.anchor_weight,
        mesh=EndMeshLossConfig(weight=0.0),  # needs no data of true surfaces then
        **common,
    )
    return BlockRouterStage(BlockRouterTrainConfig(**training, blocks=shapes))
