"""Configurations small enough to train in a test."""

from pathlib import Path
from typing import Any

from elastic3d.config.base import DeviceChoice
from elastic3d.config.models import VAEConfig
from elastic3d.config.train import AugmentConfig, DataConfig, Precision, TrainConfig, VAEStageConfig


def tiny_vae(**changes: Any) -> VAEConfig:
    options = dict(
        num_latents=8,
        latent_channels=4,
        width=32,
        heads=2,
        encoder_layers=1,
        decoder_layers=1,
        num_freqs=4,
        anchored=True,
    )
    return VAEConfig(**{**options, **changes})


def vae_config(root: Path, **changes: Any) -> TrainConfig:
    """A run of the VAE stage on the `prepared` fixture's shapes."""
    options: dict[str, Any] = dict(
        name="tiny", runs=root / "runs", steps=6, batch=4, warmup=2, learning_rate=1e-2, seed=3,
        device=DeviceChoice.cpu, precision=Precision.fp32,
        log_every=1, validate_every=0, sample_every=0, save_every=3,
        data=DataConfig(prepared=root / "prepared", train=[root / "train.txt"], val=[root / "val.txt"]),
        vae=VAEStageConfig(
            model=tiny_vae(), surface_points=64, near_queries=48, volume_queries=16,
            val_shapes=2, val_queries=64,
            augment=AugmentConfig(scale_min=0.9), sample_resolution=16,
        ),
    )  # fmt: skip
    return TrainConfig(**{**options, **changes})
