"""Train the shape VAE or the shape DiT, cache latents and image tokens between the two, train routers, export a
trained model, calibrate the budgets of exported routers.

Start several processes with `accelerate launch scripts/train.py ...`. Calling the same command again goes on
where the run stopped.
"""

from _cli import run

from elastic3d.config.train import StageName, TrainConfig
from elastic3d.utils.paths import check_distinct


def main(config: TrainConfig) -> int:
    """Do what `stage` says."""
    from elastic3d.training.stages import run_stage

    stage = config.stage
    outputs = {
        "name": config.folder,
        "latents.output": config.latents.output if stage is StageName.cache else None,
        "export.output": config.export.output if stage is StageName.export else None,
    }
    inputs = {
        "data.prepared": config.data.prepared,
        "init_from": config.init_from,
        "latents.vae": config.latents.vae if stage is StageName.cache else None,
    }
    check_distinct(inputs, outputs)
    return run_stage(config)


if __name__ == "__main__":
    run(main, TrainConfig, "train")
