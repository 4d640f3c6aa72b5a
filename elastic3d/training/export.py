"""A trained run as a folder that `from_pretrained` reads."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from elastic3d import __version__
from elastic3d.diffusion.dial import save_dial
from elastic3d.diffusion.options import PipelineConfig, SamplingGrid, Solver
from elastic3d.elastic import save_routers
from elastic3d.elastic.attachment import ROUTER_RECORDS, load_router_state, remove_records, router_state
from elastic3d.elastic.config import ElasticConfig
from elastic3d.errors import UserError
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.weights import load_strict
from elastic3d.pipelines.image_to_3d import PIPELINE_NAME, ImageTo3DPipeline
from elastic3d.pipelines.pixel_flux import PixelSamplingConfig, build_transformer, save_pixel_flux
from elastic3d.pipelines.runtime import find_model, load_dit, resolve_device
from elastic3d.training.calibration import CurvesConfig
from elastic3d.training.checkpoint import (
    Checkpoint,
    check_latents,
    load_checkpoint,
    newest_checkpoint,
    read_record,
    stage_of,
)
from elastic3d.training.dit import DiTTrainConfig
from elastic3d.training.few_step import attach_few_step, rebase
from elastic3d.training.image import ImageTrainConfig
from elastic3d.training.journal import METRICS_NAME, read_metrics
from elastic3d.training.latents import LatentInfo, pipeline_config
from elastic3d.training.options import RunConfig, StageName
from elastic3d.training.shape_flow import FewStepTrainConfig, ShapeFlow
from elastic3d.training.stages import build_stage, stage_config
from elastic3d.training.vae import VAETrainConfig
from elastic3d.utils.files import atomic_path, save_json
from elastic3d.utils.options import Options, option

Config = TypeVar("Config")
RECORD_NAME, CURVES_NAME = "training.json", "training.csv"


def _inherited(name: str) -> Any:
    """The option of this name of `PipelineConfig`, null where it is not asked for."""
    own = PipelineConfig.__dataclass_fields__[name]
    default = own.default.name if isinstance(own.default, Enum) else own.default
    text = f"{own.metadata['help']}; null: of the model that it started from, else {default}"
    return field(default=None, metadata={**own.metadata, "help": text})


@dataclass(kw_only=True)
class SamplingExportConfig(Options):
    """How an exported DiT is sampled by default. See `PipelineConfig`."""

    model: str = option("unnamed", "name of the model, for metadata", lengths=(1, 200))
    steps: int | None = _inherited("steps")
    guidance: float | None = _inherited("guidance")
    resolution: int | None = _inherited("resolution")
    fast_resolution: int | None = _inherited("fast_resolution")
    best_resolution: int | None = _inherited("best_resolution")
    box: float | None = _inherited("box")
    shift: float | None = _inherited("shift")
    grid: SamplingGrid | None = _inherited("grid")
    solver: Solver | None = _inherited("solver")
    segments: int | None = _inherited("segments")
    elastic: ElasticConfig = option(ElasticConfig, "how a model with routers runs")


class StoredFormat(Enum):
    """How an export stores matrices: in the format of its kind, or in 8 bits with a scale for each row."""

    bf16 = "bf16"
    int8 = "int8"


@dataclass(kw_only=True)
class ExportConfig(Options):
    """Averaged weights of a run as a model folder."""

    weights: StoredFormat = option(
        StoredFormat.bf16,
        "matrices of a shape DiT, of routers and few-step LoRA: bf16 (but for routers, fp32), or int8, half of bf16",
    )
    output: Path | None = option(None, "folder to write; null: `export` in the run's folder")
    pipeline: SamplingExportConfig = option(
        SamplingExportConfig, "defaults of an exported DiT; of routers `elastic` alone"
    )

    def check(self) -> None:
        """What is written is a folder."""
        if self.output is not None and self.output.is_file():
            raise ValueError(f"output {self.output} is a file, expected a folder")

    @property
    def dtype(self) -> torch.dtype | None:
        """Of `save_routers`: None keeps what is there, routers in fp32 and their few-step LoRA in bf16."""
        return torch.int8 if self.weights is StoredFormat.int8 else None


@dataclass(kw_only=True)
class ImageExportConfig(Options):
    """What an exported text-to-image model gets besides its weights."""

    model: PixelSamplingConfig = option(PixelSamplingConfig, "its sampling defaults")


@dataclass(kw_only=True)
class RouterExportConfig(CurvesConfig):
    """How exported routers are calibrated."""

    val_shapes: int = option(
        8, "validation shapes or images that routers are calibrated on", ge=1, le=1 << 16
    )


@dataclass(kw_only=True)
class FewStepExportConfig(Options):
    """When an exported few-step LoRA is used."""

    used_nfe: float | None = option(
        None, "largest NFE at which the few-step LoRA will be used; null: few_step.max_nfe of the training",
        ge=0.1, le=1000,
    )  # fmt: skip


@dataclass(kw_only=True)
class ExportStageConfig(RunConfig):
    """Everything `scripts/train.py stage=export` takes."""

    stage: StageName = option(StageName.export, "what to do")
    export: ExportConfig = option(ExportConfig, "what is written")
    image: ImageExportConfig = option(ImageExportConfig, "of a text-to-image model")
    routing: RouterExportConfig = option(RouterExportConfig, "of routers")
    few_step: FewStepExportConfig = option(FewStepExportConfig, "of a few-step LoRA")


@dataclass
class _Run:
    """A checkpoint on its way to a model folder."""

    config: ExportStageConfig
    source: str
    checkpoint: Checkpoint
    output: Path

    def part(self, name: str) -> dict[str, Tensor]:
        """The averaged weights of one part of the objective, under the part's own names."""
        start, weights = f"{name}.", self.checkpoint.part("average")
        return {key.removeprefix(start): t for key, t in weights.items() if key.startswith(start)}

    def trained(self, config_class: type[Config]) -> Config:
        """The configuration it was trained with."""
        return read_record(self.checkpoint.values.get("config"), config_class, self.source)

    def write_record(self, folder: Path, name: str = "training") -> None:
        """`training.json`: versions, configuration, data; `training.csv`: every recorded scalar by step."""
        versions = {"elastic3d": __version__, "torch": torch.__version__}
        record = {"steps": self.checkpoint.step, "versions": versions, **self.checkpoint.values}
        save_json(record, folder / f"{name}.json")
        lines = read_metrics(self.config.folder / METRICS_NAME)
        names = sorted({key for line in lines for key in line} - {"step", "time"})
        with atomic_path(folder / f"{name}.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["step", "time", *names])
            writer.writeheader()
            writer.writerows(lines)


def export_run(config: ExportStageConfig) -> Path:
    """Write the averaged weights of the run `config.name` with the record of its training.

    A VAE becomes one model folder; a DiT a folder for `ImageTo3DPipeline.from_pretrained`, with the VAE whose
    latents it learned and their statistics, and the image encoder's configuration. Routers become such a folder too,
    that of their dense model with `routers/` inside and `export.pipeline.elastic` as its default; those of a
    text-to-image pipeline are written alone. The small text-to-image model's sampling defaults are those of `config`,
    and so is how routers are calibrated (`routing`). A few-step LoRA becomes `routers/` with the routers that it
    belongs to, used up to `few_step.used_nfe`. Records of routers that were there before go.

    Raises:
        UserError: the run has no whole checkpoint, or the cache holds other latents than it learned from.
    """
    path, _ = newest_checkpoint(config.folder / "checkpoints")
    if path is None:
        raise UserError(
            f"{config.folder} has no whole checkpoint to export: train it first, or name another run with name="
        )
    checkpoint = load_checkpoint(path)
    stage = stage_of(checkpoint.values.get("config"), path)
    if stage not in _EXPORTS:
        raise UserError(f"{path} was trained by stage={stage}, expected one of {', '.join(_EXPORTS)}")
    if config.export.dtype and stage in ("vae", "image"):
        raise UserError(
            f"export.weights=int8 is for a shape DiT, routers and few-step LoRA; stage={stage} stores bf16"
        )
    output = config.export.output or config.folder / "export"
    _EXPORTS[stage](_Run(config, str(path), checkpoint, output))
    return output


def copy_files(names: Sequence[str], source: Path, output: Path) -> None:
    """Copy those files of a folder that are there into another one, each whole or not at all; what is there of the
    others goes, as it is of something else."""
    if source.resolve() == output.resolve():
        return
    for name in names:
        if (source / name).is_file():
            with atomic_path(output / name) as temporary:
                shutil.copyfile(source / name, temporary)
        else:
            (output / name).unlink(missing_ok=True)


def _export_vae(run: _Run) -> None:
    vae = ShapeVAE(run.trained(VAETrainConfig).vae.model)
    load_strict(vae, run.part("vae"), run.source)
    vae.save_pretrained(run.output, torch.bfloat16)
    run.write_record(run.output)


def _export_pipeline(run: _Run) -> None:
    trained = run.trained(DiTTrainConfig)
    info = LatentInfo.load(trained.latents.output)
    check_latents(run.checkpoint, info.record)
    dit = ShapeDiT(trained.dit.model)
    load_strict(dit, run.part("dit"), run.source)
    sampling = sampling_defaults(run.config.export.pipeline, trained.init_from)
    pipeline = ImageTo3DPipeline(info.load_vae(), dit, info.load_encoder(), sampling)
    pipeline.save_pretrained(run.output, run.config.export.dtype or torch.bfloat16)
    copy_files((RECORD_NAME, CURVES_NAME), info.vae, run.output / "vae")
    run.write_record(run.output / "dit")


def sampling_defaults(requested: SamplingExportConfig, init_from: Path | None) -> PipelineConfig:
    """What is requested; for the rest what the model has whose folder a run started from, if it did.

    Not its name, and not its budget, which its routers keep: they are none of the new model.
    """
    model = find_model(init_from) if init_from is not None else None
    own = pipeline_config(model) if model and (model / PIPELINE_NAME).is_file() else PipelineConfig()
    return replace(own, **{name: value for name, value in vars(requested).items() if value is not None})


def _export_image_model(run: _Run) -> None:
    sampling = run.config.image.model
    model = replace(
        run.trained(ImageTrainConfig).image.model,
        **{item.name: getattr(sampling, item.name) for item in fields(PixelSamplingConfig)},
    )
    transformer = build_transformer(model)
    load_strict(transformer, run.part("dit"), run.source)
    save_pixel_flux(model, transformer, run.output, torch.bfloat16)
    run.write_record(run.output)


def _export_routers(run: _Run) -> None:
    """Calibrated `routers/`, with their few-step LoRA in bf16; those of shapes inside their dense pipeline."""
    stage_name = stage_of(run.checkpoint.values.get("config"), run.source)
    trained: Any = run.trained(stage_config(StageName[stage_name]))
    trained.device, device = run.config.device, resolve_device(run.config.device)
    options = trained.blocks if hasattr(trained, "blocks") else trained.routing
    options.val_shapes = run.config.routing.val_shapes
    if hasattr(options, "mesh"):
        options.mesh.weight = 0.0  # needs no data of true surfaces then
    stage: Any = build_stage(trained)
    check_latents(run.checkpoint, stage.record)
    load_strict(stage.objective, run.checkpoint.part("average"), run.source)
    stage.objective.to(device).eval()
    stage.calibrate(run.config.routing)
    for block in stage.objective.session.blocks:
        if block.few_step is not None:
            block.few_step.to(torch.bfloat16)
    if isinstance(stage.flow, ShapeFlow):
        pipeline = ImageTo3DPipeline.from_pretrained(stage.flow.folder, "cpu", "float32", dial=False)
        pipeline.config.elastic = run.config.export.pipeline.elastic
        pipeline.save_pretrained(run.output, run.config.export.dtype or torch.bfloat16)
        for part in ("vae", "dit"):
            copy_files((RECORD_NAME, CURVES_NAME), stage.flow.folder / part, run.output / part)
    save_dial(None, run.output)
    remove_records(run.output / "routers")
    save_routers(stage.flow.dit, run.output / "routers", run.config.export.dtype)
    run.write_record(run.output / "routers")


def _export_few_step(run: _Run) -> None:
    """The model's routers with their few-step LoRA, in bf16, and what is known of the routers."""
    trained = run.trained(FewStepTrainConfig).few_step
    model = find_model(trained.model)
    output, routers = run.output / "routers", model / "routers"
    dit = load_dit(model / "dit")
    session = attach_few_step(dit, trained, pipeline_config(model))
    own = {key: tensor for key, tensor in router_state(dit).items() if ".few_step." not in key}
    few_step = {key.replace("/", "."): tensor for key, tensor in run.part("few_step").items()}
    load_router_state(dit, own | few_step, run.source)
    used = run.config.few_step.used_nfe or trained.max_nfe
    session.router_config = replace(session.router_config, few_step_nfe=used)
    for block in session.blocks:
        assert block.few_step is not None
        rebase(block.few_step, used / trained.max_nfe)
        block.few_step.to(torch.bfloat16)
    copy_files(ROUTER_RECORDS, routers, output)
    save_dial(None, run.output)
    save_routers(dit, output, run.config.export.dtype)
    run.write_record(output, "few_step")


_EXPORTS: dict[Any, Callable[[_Run], None]] = {
    "vae": _export_vae,
    "dit": _export_pipeline,
    "image": _export_image_model,
    "router": _export_routers,
    "image_router": _export_routers,
    "few_step": _export_few_step,
    "block_router": _export_routers,
    "image_block_router": _export_routers,
}
