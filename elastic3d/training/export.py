"""A trained run as a folder that `from_pretrained` reads."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic3d import __version__
from elastic3d.adapters import save_routers
from elastic3d.config.generate import PipelineConfig
from elastic3d.config.image_stage import SAMPLING_DEFAULTS, PixelModelConfig
from elastic3d.config.router_stage import TrainedParts
from elastic3d.config.routing import ElasticConfig
from elastic3d.config.serialize import from_dict
from elastic3d.config.train import StageName, TrainConfig
from elastic3d.errors import UserError
from elastic3d.models.image_encoder import build_image_encoder
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import load_dit
from elastic3d.models.weights import load_strict
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.routing.attach import load_router_state, router_state, session_of
from elastic3d.training.checkpoint import load_checkpoint, newest_checkpoint
from elastic3d.training.journal import METRICS_NAME, read_metrics
from elastic3d.training.latents import LatentInfo
from elastic3d.training.low_rank import merge_low_rank
from elastic3d.training.router_stage import RouterStage
from elastic3d.training.updates_stage import attach_for_updates, pipeline_config
from elastic3d.utils.files import atomic_path
from elastic3d.utils.structured import check_shape, save_json

RECORD_NAME = "training.json"
CURVES_NAME = "training.csv"


def export_run(config: TrainConfig) -> Path:
    """Write the averaged weights of the run `config.name` in bf16, with the record of its training.

    A VAE becomes one model folder; a DiT a folder for `ImageTo3DPipeline.from_pretrained`, with the VAE whose
    latents it learned and their statistics, and the image encoder's configuration. Routers become such a folder too,
    that of their dense model with `routers/` inside and `export.pipeline.elastic` as its default; those of a
    text-to-image pipeline are written alone. The small text-to-image model's sampling defaults are those of `config`,
    and so are `routing.val_shapes`, the number of shapes or pictures on which routers are calibrated,
    `routing.urgency` and `routing.trends`. Updates become `routers/` with the routers that they belong to, used up to
    `updates.used_calls`.

    Raises:
        UserError: the run has no whole checkpoint.
    """
    path, _ = newest_checkpoint(config.folder / "checkpoints")
    if path is None:
        raise UserError(
            f"{config.folder} has no whole checkpoint to export: train it first, or name another run with name="
        )
    checkpoint = load_checkpoint(path)
    check_shape(checkpoint.values, {"config": dict}, str(path / "state.json"))
    trained: TrainConfig = from_dict(TrainConfig, checkpoint.values["config"], str(path))
    trained.routing.val_shapes = config.routing.val_shapes  # to calibrate on
    trained.updates.used_calls = config.updates.used_calls
    trained.routing.urgency, trained.routing.trends = config.routing.urgency, config.routing.trends
    output = config.export.output or config.folder / "export"
    weights = checkpoint.part("average")
    if trained.stage is StageName.vae:
        vae = ShapeVAE(trained.vae.model)
        load_strict(vae, _inside("vae.", weights), str(path))
        vae.save_pretrained(output, torch.bfloat16)
        _write_record(output, config.folder, checkpoint.step, checkpoint.values)
    elif trained.stage is StageName.image:
        sampling = {name: getattr(config.image.model, name) for name in SAMPLING_DEFAULTS}
        model = replace(trained.image.model, **sampling)
        _export_image_model(output, model, _inside("dit.", weights), str(path))
        _write_record(output, config.folder, checkpoint.step, checkpoint.values)
    elif trained.stage is StageName.router and trained.image.backbone is not None:
        _export_image_routers(output, trained, weights, str(path))
        _write_record(output / "routers", config.folder, checkpoint.step, checkpoint.values)
    elif trained.stage is StageName.router:
        _export_routers(output, config.export.pipeline.elastic, trained, weights, str(path))
        _write_record(output / "routers", config.folder, checkpoint.step, checkpoint.values)
    elif trained.stage is StageName.updates:
        _export_updates(output / "routers", trained, weights, str(path))
        _write_record(output / "routers", config.folder, checkpoint.step, checkpoint.values, "updates")
    else:
        _export_pipeline(output, config.export.pipeline, trained, _inside("dit.", weights), str(path))
        _write_record(output / "dit", config.folder, checkpoint.step, checkpoint.values)
    return output


def _export_pipeline(
    output: Path, pipeline: PipelineConfig, trained: TrainConfig, weights: dict[str, Tensor], source: str
) -> None:
    info = LatentInfo.load(trained.latents.output)
    dit = ShapeDiT(trained.dit.model)
    load_strict(dit, weights, source)
    vae = ShapeVAE.from_pretrained(info.vae)
    vae.set_latent_statistics(info.mean, info.std)
    encoder = build_image_encoder(info.encoder)
    ImageTo3DPipeline(vae, dit, encoder, pipeline).save_pretrained(output, torch.bfloat16)
    for name in (RECORD_NAME, CURVES_NAME):
        if (info.vae / name).is_file():
            shutil.copyfile(info.vae / name, output / "vae" / name)


def _export_routers(
    output: Path, elastic: ElasticConfig, trained: TrainConfig, weights: dict[str, Tensor], source: str
) -> None:
    """The dense pipeline with calibrated `routers/` inside; a base model that learned too is written as it is now."""
    stage = RouterStage(trained)
    objective = stage.flow
    load_strict(objective, weights, source)
    objective.eval()
    stage.calibrate()
    pipeline = ImageTo3DPipeline.from_pretrained(trained.routing.model, "cpu", "float32")
    if trained.routing.parts is not TrainedParts.routers:
        merge_low_rank(objective.dit.modules())
        pipeline.dit.load_state_dict(objective.dit.state_dict())
    pipeline.config.elastic = elastic
    pipeline.save_pretrained(output, torch.bfloat16)
    save_routers(objective.dit, output / "routers")


def _export_updates(output: Path, trained: TrainConfig, weights: dict[str, Tensor], source: str) -> None:
    """The model's routers with their updates, in bf16, and what is known of the routers."""
    routers = trained.updates.model / "routers"
    dit = load_dit(trained.updates.model / "dit")
    attach_for_updates(dit, trained.updates, pipeline_config(trained.updates.model).guidance)
    own = {key: tensor for key, tensor in router_state(dit).items() if ".updates." not in key}
    updates = {key.removeprefix("updates.").replace("/", "."): tensor for key, tensor in weights.items()}
    try:
        load_router_state(dit, own | updates)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    session = session_of(dit)
    used = trained.updates.used_calls or trained.updates.max_calls
    session.router_config = replace(session.router_config, updates_calls=used)
    for block in session.blocks:
        assert block.updates is not None
        block.updates.rebase(used / trained.updates.max_calls)
        block.updates.to(torch.bfloat16)
    for name in (RECORD_NAME, CURVES_NAME, "calibration.json"):
        if routers.resolve() != output.resolve() and (routers / name).is_file():
            with atomic_path(output / name) as temporary:
                shutil.copyfile(routers / name, temporary)
    save_routers(dit, output)


def _export_image_model(
    output: Path, config: PixelModelConfig, weights: dict[str, Tensor], source: str
) -> None:
    from elastic3d.pipelines.pixel_flux import build_transformer, save_pixel_flux

    transformer = build_transformer(config)
    load_strict(transformer, weights, source)
    save_pixel_flux(config, transformer, output, torch.bfloat16)


def _export_image_routers(
    output: Path, trained: TrainConfig, weights: dict[str, Tensor], source: str
) -> None:
    """Calibrated `routers/`; where the DiT learned too, it as it is now in `transformer/`."""
    from elastic3d.adapters import detach
    from elastic3d.training.image_router_stage import ImageRouterStage

    stage = ImageRouterStage(trained)
    load_strict(stage.flow, weights, source)
    stage.flow.eval()
    stage.calibrate()
    save_routers(stage.flow.dit, output / "routers")
    if trained.routing.parts is not TrainedParts.routers:
        dit: Any = stage.flow.dit
        merge_low_rank(dit.modules())
        detach(stage.flow.backbone.pipe)
        dit.to(torch.bfloat16).save_pretrained(output / "transformer")


def _inside(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part of the objective, under the part's own names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _write_record(folder: Path, run: Path, step: int, values: dict[str, Any], name: str = "training") -> None:
    """`training.json`: versions, configuration, data; `training.csv`: every recorded scalar by step."""
    versions = {"elastic3d": __version__, "torch": torch.__version__}
    save_json({"steps": step, "versions": versions, **values}, folder / f"{name}.json")
    lines = read_metrics(run / METRICS_NAME)
    names = sorted({key for line in lines for key in line} - {"step", "time"})
    with atomic_path(folder / f"{name}.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "time", *names])
        writer.writeheader()
        writer.writerows(lines)
