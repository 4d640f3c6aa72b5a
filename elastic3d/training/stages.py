"""What `scripts/train.py` does: each stage's configuration, and what runs it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from elastic3d.errors import UserError
from elastic3d.models.options import ImageEncoderConfig
from elastic3d.models.weights import load_config
from elastic3d.pipelines.memory import require_memory
from elastic3d.pipelines.runtime import fast_bfloat16, resolve_device
from elastic3d.training.checkpoint import (
    CLASSES,
    STATE,
    check_fit,
    find_start,
    model_part,
    newest_checkpoint,
    read_record,
)
from elastic3d.training.datasets import use_own_lists
from elastic3d.training.distributed import state_bytes
from elastic3d.training.loop import Stage, train
from elastic3d.training.options import Precision, SeededConfig, StageConfig, StageName, TrainConfig
from elastic3d.utils.files import load_json
from elastic3d.utils.options import to_dict

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # mallopt(3)
SHAPE_STAGES = (StageName.vae, StageName.cache, StageName.dit)

# Stage -> its configuration, and the class that trains or the function that does it.
_STAGES = {
    StageName.vae: ("vae.VAETrainConfig", "vae.VAEStage"),
    StageName.cache: ("latents.CacheConfig", "latents.build_cache"),
    StageName.dit: ("dit.DiTTrainConfig", "dit.DiTStage"),
    StageName.image: ("image.ImageTrainConfig", "image.ImageStage"),
    StageName.router: ("shape_flow.RouterTrainConfig", "router.RouterStage"),
    StageName.image_router: ("image.ImageRouterTrainConfig", "router.RouterStage"),
    StageName.few_step: ("shape_flow.FewStepTrainConfig", "few_step.FewStepStage"),
    StageName.block_router: ("shape_flow.BlockRouterTrainConfig", "block_router.BlockRouterStage"),
    StageName.image_block_router: (
        "image.ImageBlockRouterTrainConfig",
        "block_router.BlockRouterStage",
    ),
    StageName.sensitivity: ("measure.SensitivityStageConfig", "measure.measure_sensitivity"),
    StageName.export: ("export.ExportStageConfig", "export.export_run"),
    StageName.calibrate: ("measure.CalibrateConfig", "measure.calibrate_exported"),
}


def stage_config(stage: StageName) -> type[StageConfig]:
    """The dataclass of a stage's options."""
    found: type[StageConfig] = _part(stage, 0)
    return found


def require_sizes(config: TrainConfig) -> None:
    """UserError before anything is allocated, where a network or a batch is larger than the machine, or the processes
    can't share a batch."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    samples = config.micro_batch(processes)
    with torch.device("meta"):
        network = config.network()
    if network is not None:
        count = sum(parameter.numel() for parameter in network.parameters())
        need = state_bytes(network, config, processes)
        require_memory(need, f"{count:,} parameters, their gradients and optimizer state need")
    require_memory(samples * config.sample_bytes(), f"{samples:,} samples in each process need")


def build_stage(config: TrainConfig) -> Stage:
    """What `config` trains, ready for the loop."""
    stage: Stage = _part(config.stage, 1)(config)
    return stage


def run_stage(config: StageConfig) -> int:
    """Do what `config.stage` says -> the process' exit code; UserError for whatever the user can mend."""
    keep_memory_mapped()
    settle_precision(config)
    if isinstance(config, SeededConfig):
        torch.manual_seed(config.seed)
    if config.stage in SHAPE_STAGES:
        use_own_lists(config.data)  # type: ignore[attr-defined]
    if isinstance(config, TrainConfig) and config.init_from is None:
        keep_start(config)
    elif config.stage in SHAPE_STAGES:
        adopt_architecture(config)
    if not isinstance(config, TrainConfig):
        written = _part(config.stage, 1)(config)
        if isinstance(written, Path):
            tqdm.write(f"written: {written}", file=sys.stderr)
        return 0
    require_sizes(config)
    outcome = train(build_stage(config), config, config.folder, {"config": to_dict(config)})
    return {"SIGINT": 130, "SIGTERM": 143}.get(outcome.reason, 0)


def settle_precision(config: StageConfig) -> None:
    """Choose the number format where that is left to the device, and warn where bf16 is asked for and emulated."""
    if not hasattr(config, "precision"):
        return
    device, precision = resolve_device(config.device), config.precision
    fast = fast_bfloat16(device)
    if precision is Precision.auto:
        config.precision = Precision.bf16_master if fast else Precision.fp32
    elif precision is not Precision.fp32 and not fast:
        warnings.warn(
            f"precision is {precision.name}, but this {device.type} has no bf16 matrix products in hardware:"
            " precision=fp32 is several times faster",
            stacklevel=2,
        )


def _part(stage: StageName, index: int) -> Any:
    """A stage's configuration (0), or the class or function that does it (1)."""
    file, name = _STAGES[stage][index].split(".")
    return getattr(import_module(f"elastic3d.training.{file}"), name)


def keep_start(config: TrainConfig) -> None:
    """Where the run goes on: what it began from, and the architecture that it had from there, by its own record."""
    path, _ = newest_checkpoint(config.folder / "checkpoints")
    values = load_json(path / STATE).get("config") if path else None
    if path is None or not isinstance(values, dict) or not values.get("init_from"):
        return
    began, part = read_record(values, type(config), path), config.stage.name
    config.init_from, config.init_new = began.init_from, began.init_new
    if part in CLASSES and not began.init_new:
        getattr(config, part).model = getattr(began, part).model


def adopt_architecture(config: Any) -> None:
    """Give the run the architecture of the model folder that it starts from, and its cache that model's image tokens.

    Nothing changes where `init_from` is a checkpoint, or where `init_new` says that the two differ.
    """
    if config.init_from is None or getattr(config, "init_new", []):
        return
    path = find_start(config.init_from)
    if config.stage is StageName.vae and (folder := model_part(path, "vae")):
        config.vae.model = load_config(folder, *CLASSES["vae"])
    elif config.stage is StageName.dit and (folder := model_part(path, "dit")):
        config.dit.model = load_config(folder, *CLASSES["dit"])
        from elastic3d.training.latents import LatentInfo

        info = LatentInfo.load(config.latents.output)
        check_fit(config.latents.output, info.record, info.encoder, path)
    elif config.stage is StageName.cache:
        if model_part(path, "dit") is None:
            raise UserError(
                f"stage=cache init_from={config.init_from} needs a model with a DiT that goes on from its latents"
            )
        config.latents.encoder = load_config(path / "image_encoder", ImageEncoderConfig, "ImageEncoder")


def keep_memory_mapped() -> None:
    """Let glibc keep freed memory instead of giving it back to the kernel after every tensor.

    By default each large tensor is mapped and unmapped anew, and every page of it faults in again. Does
    nothing where there is no glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, 256 << 20)
