"""Budgets of routers that are exported already, calibrated anew: the checkpoint of their training is not needed."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from elastic3d import __version__
from elastic3d.diffusion.dial import save_dial
from elastic3d.elastic.attachment import load_routers, save_router_config
from elastic3d.elastic.config import RouterConfig, RouterVariant
from elastic3d.errors import UserError
from elastic3d.geometry.mesh_io import atomic_path
from elastic3d.models.weights import CONFIG_NAME, WEIGHTS_NAME, load_json, save_json
from elastic3d.pipelines.image_to_3d import ROUTERS_NAME
from elastic3d.pipelines.options import BackboneName
from elastic3d.pipelines.runtime import resolve_device
from elastic3d.training.calibration import CurvesConfig
from elastic3d.training.elastic import MeshLossConfig, RouterStage, RouterStageConfig, RouterTrainConfig
from elastic3d.training.elastic_image import (
    BackboneConfig,
    ImageRouterStage,
    ImageRouterTrainConfig,
    ImageRoutingConfig,
)
from elastic3d.training.export import CURVES_NAME, RECORD_NAME
from elastic3d.training.image_data import ImageDataConfig
from elastic3d.training.latents import LatentCacheConfig
from elastic3d.training.options import DataConfig, Precision, StageConfig, StageName
from elastic3d.utils.options import Options, from_dict, option

NOTE_NAME = "calibration.json"


@dataclass(kw_only=True)
class CalibratedRoutersConfig(CurvesConfig):
    """Which routers, and on how much they are measured."""

    model: Path = option(Path("runs/dit/export"), "folder of a shape pipeline with routers")
    val_shapes: int = option(
        8, "validation shapes or images that are generated at each budget", ge=1, le=1 << 16
    )


@dataclass(kw_only=True)
class CalibrationImagesConfig(ImageDataConfig):
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
class CalibrateConfig(StageConfig):
    """Everything `scripts/train.py stage=calibrate` takes."""

    stage: StageName = option(StageName.calibrate, "what to do")
    precision: Precision = option(Precision.bf16_master, "number format that routers were trained in")
    data: DataConfig = option(DataConfig, "prepared shapes")
    latents: LatentCacheConfig = option(LatentCacheConfig, "cache of latents and image tokens")
    image: CalibrationImagesConfig = option(CalibrationImagesConfig, "images with captions")
    routing: CalibratedRoutersConfig = option(CalibratedRoutersConfig, "the routers")
    export: CalibrationOutputConfig = option(CalibrationOutputConfig, "what is written")


def calibrate_exported(config: CalibrateConfig) -> Path:
    """Calibrate `routers/` of the model that `config` names as an export does, at the model's own steps and guidance.

    Their `config.json` is written anew, with `calibration.json` beside it: what it was measured on. A `dial.json` there
    goes: it was measured with what they were. Weights and the
    record of the training stay as they are; another `export.output` gets copies of them.

    Raises:
        UserError: there are no routers, they are those of another model, or they take no budget.
    """
    model = config.routing.model if config.image.backbone is None else config.image.weights
    assert model is not None
    source, output = (folder / ROUTERS_NAME for folder in (model, config.export.output or model))
    stage = _stage_for(config, _router_config(source))
    load_routers(stage.flow.dit, source)
    _sample_as_the_model_does(stage)
    stage.flow.to(resolve_device(config.device)).eval()
    stage.calibrate(config.routing)
    if output.resolve() != source.resolve():
        for name in (WEIGHTS_NAME, RECORD_NAME, CURVES_NAME):
            if (source / name).is_file():
                with atomic_path(output / name) as temporary:
                    shutil.copyfile(source / name, temporary)
    save_dial(None, output.parent)
    save_router_config(stage.flow.dit, output)
    save_json(_note(stage, config), output / NOTE_NAME)
    return output


def _router_config(folder: Path) -> RouterConfig:
    """Of routers that take a budget."""
    if not folder.is_dir():
        raise UserError(f"{folder.parent} has no routers to calibrate: there is no folder {folder}")
    values = load_json(folder / CONFIG_NAME)
    values.pop("_class_name", None)  # `load_routers` looks at it
    router: RouterConfig = from_dict(RouterConfig, values, str(folder / CONFIG_NAME))
    if router.variant is RouterVariant.paper:
        raise UserError(
            f"{folder} has the paper's routers, which take no budget: there is nothing to calibrate"
        )
    return router


def _stage_for(config: CalibrateConfig, router: RouterConfig) -> RouterStage | ImageRouterStage:
    """A stage with such routers, which learns nothing."""
    shared = {name: getattr(config, name) for name in ("seed", "device", "precision", "data")}
    image, count = config.image, config.routing.val_shapes
    if image.backbone is None:
        no_loss = MeshLossConfig(weight=0.0)  # needs no data of true surfaces then
        routing = RouterStageConfig(model=config.routing.model, val_shapes=count, mesh=no_loss)
        return RouterStage(
            RouterTrainConfig(**shared, latents=config.latents, router=router, routing=routing)
        )
    images = BackboneConfig(**{item.name: getattr(image, item.name) for item in fields(BackboneConfig)})
    return ImageRouterStage(
        ImageRouterTrainConfig(
            **shared, image=images, router=router, routing=ImageRoutingConfig(val_shapes=count)
        )
    )


def _sample_as_the_model_does(stage: RouterStage | ImageRouterStage) -> None:
    """Validation samples in the model's own number of steps, at its own guidance."""
    routing = stage.config.routing
    if isinstance(stage, RouterStage):
        routing.val_steps, routing.guidance = stage.pipeline.steps, stage.pipeline.guidance
        stage.config.dit.sample_guidance = routing.guidance
    else:
        routing.val_steps, routing.guidance = stage.flow.backbone.default_sampling()


def _note(stage: RouterStage | ImageRouterStage, config: CalibrateConfig) -> dict[str, object]:
    """How the calibration came about."""
    routing = stage.config.routing
    return {
        "steps": routing.val_steps,
        "guidance": routing.guidance,
        "dampings": config.routing.dampings.name,
        "gate_bias": config.routing.gate_bias.name,
        "precision": config.precision.name,
        "data": {name: value for name, value in stage.record().items() if not name.startswith("train_")},
        "versions": {"elastic3d": __version__, "torch": torch.__version__},
    }
