"""Configurations small enough to train in a test."""

import io
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from elastic3d.models.options import DiTConfig, VAEConfig
from elastic3d.training.datasets import micro_batches
from elastic3d.training.dit import DiTStageConfig
from elastic3d.training.export import ExportConfig, ExportStageConfig
from elastic3d.training.latents import LatentsConfig
from elastic3d.training.options import DataConfig, Precision, StageName, TrainConfig
from elastic3d.training.stages import stage_config
from elastic3d.training.vae import AugmentConfig, VAEStageConfig
from elastic3d.utils.devices import DeviceChoice
from elastic3d.utils.options import hints


def config_of(stage: StageName, **options: Any) -> Any:
    """The configuration of a stage, from the options of any; nested ones as objects or as dicts.

    Options of other stages are left out. TypeError for a nested one that this stage's has not.
    """
    kind, options = stage_config(stage), {**options, "stage": stage}
    return _built(kind, {item.name: options[item.name] for item in fields(kind) if item.name in options})


def _built(kind: Any, options: dict[str, Any]) -> Any:
    return kind(**{n: _built(hints(kind)[n], v) if isinstance(v, dict) else v for n, v in options.items()})


def defaults(stage: StageName, name: str, **options: Any) -> dict[str, Any]:
    """Of what a helper sets for several stages in the nested options `name`, that which this stage has."""
    kind = hints(stage_config(stage)).get(name)
    known = {item.name for item in fields(kind)} if kind is not None else set()
    return {option: value for option, value in options.items() if option in known}


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


def views(count: int) -> dict[str, torch.Tensor]:
    """Images of a disc, as prepared shards keep them."""
    files = []
    for i in range(count):
        row, column = np.mgrid[:64, :64] - 32
        disc = (row**2 + column**2 < (12 + i) ** 2).astype(np.uint8) * 255
        stream = io.BytesIO()
        Image.fromarray(np.stack([disc // 2, disc // 3, disc, disc], axis=-1)).save(stream, "png")
        files.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    data = torch.from_numpy(np.frombuffer(b"".join(files), np.uint8).copy())
    camera = [0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 40.0, 0.0]  # eye, target, angle of view, elevation
    return {
        "views": data,
        "view_offsets": torch.from_numpy(offsets),
        "cameras": torch.tensor([camera] * count),
    }


def dit_config(root: Path, **changes: Any) -> Any:
    """A run of the DiT stage, or another, on those shapes."""
    options = dict(
        stage=StageName.dit,
        name="dit",
        latents=LatentsConfig(output=root / "latents", vae=root / "vae", variants=2, views=2, batch=2),
        dit=DiTStageConfig(
            model=DiTConfig(width=32, heads=2, double_blocks=1, single_blocks=1),
            sample_shapes=1,
            sample_steps=2,
            sample_resolution=16,
        ),
    )
    return vae_config(root, **{**options, **changes})


def gradients(stage: Any, accumulate: int) -> torch.Tensor:
    """Those (P,) of the first optimizer step in that many micro-batches."""
    batches = next(micro_batches(stage.items, replace(stage.config, accumulate=accumulate), 0))
    stage.objective.zero_grad()
    for batch in batches:
        (stage.objective(batch)[0] / accumulate).backward()
    return torch.cat([p.grad.flatten() for p in stage.objective.parameters() if p.grad is not None])


def change_prepared(root: Path, id: str, tensors: dict[str, torch.Tensor] | None) -> None:
    """Other tensors of a prepared shape, or none of it any more."""
    for shard in (root / "prepared" / "balls").glob("*.safetensors"):
        stored = load_file(shard)
        if own := {key for key in stored if key.startswith(f"{id}/")}:
            kept = {key: tensor for key, tensor in stored.items() if key not in own or tensors is not None}
            save_file(kept | {f"{id}/{name}": tensor for name, tensor in (tensors or {}).items()}, shard)


def add_views(root: Path) -> None:
    """Give every prepared shape three images."""
    for shard in (root / "prepared" / "balls").glob("*.safetensors"):
        tensors = load_file(shard)
        for id in {key.partition("/")[0] for key in tensors}:
            tensors |= {f"{id}/{name}": tensor for name, tensor in views(3).items()}
        save_file(tensors, shard)
