"""What `scripts/train.py` does: one function a stage."""

from __future__ import annotations

import torch

from elastic3d.config.serialize import to_dict
from elastic3d.config.train import StageName, TrainConfig
from elastic3d.errors import UserError
from elastic3d.training.datasets import use_own_lists
from elastic3d.training.init_from import adopt_architecture
from elastic3d.training.loop import Stage, train
from elastic3d.training.runtime import keep_memory_mapped

SHAPE_STAGES = (StageName.vae, StageName.cache, StageName.dit)


def run_stage(config: TrainConfig) -> int:
    """Run `config.stage` -> the process' exit code; UserError for whatever the user can mend."""
    keep_memory_mapped()
    torch.manual_seed(config.seed)
    if config.stage in SHAPE_STAGES:
        use_own_lists(config.data)
        adopt_architecture(config)
    if config.stage is StageName.cache:
        from elastic3d.training.latents import build_cache

        build_cache(config)
    elif config.stage is StageName.export:
        from elastic3d.training.export import export_run

        export_run(config)
    elif config.stage is StageName.calibrate:
        from elastic3d.training.calibrate_stage import calibrate_exported

        calibrate_exported(config)
    else:
        outcome = train(build_stage(config), config, config.folder, {"config": to_dict(config)})
        return 130 if outcome.reason == "SIGINT" else 0
    return 0


def build_stage(config: TrainConfig) -> Stage:
    """The stage that `config` describes, ready to train."""
    if config.stage is StageName.vae:
        from elastic3d.training.vae_stage import VAEStage

        return VAEStage(config)
    if config.stage is StageName.dit:
        from elastic3d.training.dit_stage import DiTStage

        return DiTStage(config)
    if config.stage is StageName.image:
        from elastic3d.training.image_stage import ImageStage

        return ImageStage(config)
    if config.stage is StageName.router and config.image.backbone is not None:
        from elastic3d.training.image_router_stage import ImageRouterStage

        return ImageRouterStage(config)
    if config.stage is StageName.router:
        from elastic3d.training.router_stage import RouterStage

        return RouterStage(config)
    if config.stage is StageName.updates:
        from elastic3d.training.updates_stage import UpdatesStage

        return UpdatesStage(config)
    raise UserError(f"stage={config.stage.name} trains nothing")
