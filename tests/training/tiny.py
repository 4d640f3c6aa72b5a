"""Configurations small enough to train in a test."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from elastic3d.models.options import VAEConfig
from elastic3d.training.export import ExportConfig, ExportStageConfig
from elastic3d.training.options import DataConfig, Precision, StageName, TrainConfig
from elastic3d.training.stages import stage_config
from elastic3d.training.vae import AugmentConfig, VAEStageConfig
from elastic3d.utils.devices import DeviceChoice
from elastic3d.utils.options import hints


def config_of(stage: StageName, **options: Any) -> Any:
    """The configuration of a stage, from the options of any; nested ones as objects or as dicts."""
    return _fitting(stage_config(stage), {**options, "stage": stage})


def _fitting(kind: Any, options: dict[str, Any]) -> Any:
    known = {item.name: options[item.name] for item in fields(kind) if item.name in options}
    return kind(**{n: _fitting(hints(kind)[n], v) if isinstance(v, dict) else v for n, v in known.items()})


def export_of(config: TrainConfig, output: Path | None = None, **changes: Any) -> ExportStageConfig:
    """The export of a run."""
    export = ExportConfig(output=output, **changes.pop("export", {}))
    return config_of(StageName.export, name=config.name, runs=config.runs, export=export, **changes)


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


def vae_config(root: Path, stage: StageName = StageName.vae, **changes: Any) -> Any:
    """A run, of the VAE stage or another, on the `prepared` fixture's shapes."""
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
    return config_of(stage, **{**options, **changes})
