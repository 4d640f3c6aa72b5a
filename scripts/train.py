"""Train the shape VAE or the shape DiT, cache latents and image tokens between the two, train routers, export a
trained model, calibrate the budgets of exported routers.

Start several processes with `accelerate launch scripts/train.py ...`. Calling the same command again goes on
where the run stopped.
"""

from _cli import run

from elastic3d.config.train import TrainConfig


def main(config: TrainConfig) -> int:
    """Do what `stage` says."""
    from elastic3d.training.stages import run_stage

    return run_stage(config)


if __name__ == "__main__":
    run(main, TrainConfig, "train")
