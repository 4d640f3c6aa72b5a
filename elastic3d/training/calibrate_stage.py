"""Budgets of routers that are exported already, calibrated anew: the checkpoint of their training is not needed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from elastic3d import __version__
from elastic3d.adapters.storage import load_routers, save_router_config
from elastic3d.config.router_stage import TrainedParts
from elastic3d.config.routing import RouterConfig, RouterVariant
from elastic3d.config.serialize import from_dict
from elastic3d.config.train import TrainConfig
from elastic3d.errors import UserError
from elastic3d.models.weights import CONFIG_NAME, WEIGHTS_NAME
from elastic3d.pipelines.image_to_3d import ROUTERS_NAME
from elastic3d.pipelines.runtime import resolve_device
from elastic3d.training.export import CURVES_NAME, RECORD_NAME
from elastic3d.training.image_router_stage import ImageRouterStage
from elastic3d.training.router_stage import RouterStage
from elastic3d.utils.files import atomic_path
from elastic3d.utils.structured import load_json, save_json

NOTE_NAME = "calibration.json"


def calibrate_exported(config: TrainConfig) -> Path:
    """Calibrate `routers/` of the model that `config` names as an export does, at the model's own steps and guidance.

    Their `config.json` is written anew, with `calibration.json` beside it: what it was measured on. Weights and the
    record of the training stay as they are; another `export.output` gets copies of them.

    Raises:
        UserError: there are no routers, they are those of another model, or they take no budget.
    """
    model = config.routing.model if config.image.backbone is None else config.image.weights
    assert model is not None
    source, output = (folder / ROUTERS_NAME for folder in (model, config.export.output or model))
    config = _for_routers(config, source)
    stage = RouterStage(config) if config.image.backbone is None else ImageRouterStage(config)
    load_routers(stage.flow.dit, source)
    _sample_as_the_model_does(stage)
    stage.flow.to(resolve_device(config.device)).eval()
    stage.calibrate()
    if output.resolve() != source.resolve():
        for name in (WEIGHTS_NAME, RECORD_NAME, CURVES_NAME):
            if (source / name).is_file():
                with atomic_path(output / name) as temporary:
                    shutil.copyfile(source / name, temporary)
    save_router_config(stage.flow.dit, output)
    save_json(_note(stage), output / NOTE_NAME)
    return output


def _for_routers(config: TrainConfig, folder: Path) -> TrainConfig:
    """The configuration of a stage with routers like those in `folder`, which learns nothing."""
    if not folder.is_dir():
        raise UserError(f"{folder.parent} has no routers to calibrate: there is no folder {folder}")
    values = load_json(folder / CONFIG_NAME)
    values.pop("_class_name", None)  # `load_routers` looks at it
    router: RouterConfig = from_dict(RouterConfig, values, str(folder / CONFIG_NAME))
    if router.variant is RouterVariant.paper:
        raise UserError(
            f"{folder} has the paper's routers, which take no budget: there is nothing to calibrate"
        )
    mesh = replace(config.routing.mesh, weight=0.0)  # needs no data of true surfaces then
    routing = replace(config.routing, parts=TrainedParts.routers, mesh=mesh)
    return replace(config, router=router, routing=routing, dit=replace(config.dit))


def _sample_as_the_model_does(stage: RouterStage | ImageRouterStage) -> None:
    """Validation samples in the model's own number of steps, at its own guidance."""
    if isinstance(stage, RouterStage):
        steps, guidance = stage.pipeline.steps, stage.pipeline.guidance
    else:
        steps, guidance = stage.flow.backbone.default_sampling()
    stage.config.routing.val_steps = steps
    stage.config.routing.guidance = stage.config.dit.sample_guidance = guidance


def _note(stage: RouterStage | ImageRouterStage) -> dict[str, object]:
    """How the calibration came about."""
    routing = stage.config.routing
    return {
        "steps": routing.val_steps,
        "guidance": routing.guidance,
        "trends": routing.trends.name,
        "urgency": routing.urgency.name,
        "precision": stage.config.precision.name,
        "data": {name: value for name, value in stage.record().items() if not name.startswith("train_")},
        "versions": {"elastic3d": __version__, "torch": torch.__version__},
    }
