"""Train the shape VAE or the shape DiT, cache latents and image tokens between the two, train routers, export a
trained model, calibrate the budgets of exported routers.

`stage=` says which; each stage has options of its own: `stage=dit --help` lists those of the DiT. Start several
processes with `accelerate launch scripts/train.py ...`. Calling the same command again goes on where the run stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from _cli import CONFIG_DIR, options_of, run

from elastic3d.training.options import StageConfig, StageName
from elastic3d.utils.files import check_paths


def main(config: StageConfig) -> int:
    """Do what `stage` says."""
    from elastic3d.training.stages import run_stage

    outputs = {"name": _path(config, "folder"), "export.output": _path(config, "export.output")}
    if config.stage is StageName.cache:
        outputs["latents.output"] = _path(config, "latents.output")
    inputs = {name: _path(config, name) for name in ("data.prepared", "init_from")}
    inputs["latents.vae"] = _path(config, "vae_folder")
    check_paths(inputs, {}, outputs)
    return run_stage(config)


def _path(config: StageConfig, name: str) -> Path | None:
    """An option of some stages, by its dotted name; None where this one does not have it."""
    found: Any = config
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def with_own_stage(arguments: Sequence[str]) -> list[str]:
    """`stage=router backbone=...` means the routers of a text-to-image pipeline: `stage=image_router`."""
    images = any(argument.split("=")[0] in ("backbone", "image.backbone") for argument in arguments)
    routers = ("stage=router", "stage=block_router")
    return [a.replace("=", "=image_") if a in routers and images else a for a in arguments]


def chosen_stage(arguments: Sequence[str]) -> StageName:
    """The stage of the last `stage=`, a file of configs/stage; the VAE's where there is none, or no such file."""
    names = [argument.partition("=")[2] for argument in arguments if argument.startswith("stage=")]
    files = {path.stem: path for path in (CONFIG_DIR / "stage").glob("*.yaml")}
    path = files.get(names[-1] if names else "vae", files["vae"])
    return StageName[yaml.safe_load(path.read_text())["stage"]]


def options_of_stages() -> Mapping[str, set[str]]:
    """`stage=dit` -> names of its options, in full and their last parts."""
    from elastic3d.training.stages import stage_config

    found = {}
    for stage in StageName:
        names = set(options_of(stage_config(stage)))
        found[f"stage={stage.name}"] = names | {name.rpartition(".")[2] for name in names}
    return found


if __name__ == "__main__":
    from elastic3d.training.stages import stage_config

    given = with_own_stage(sys.argv[1:])
    run(main, stage_config(chosen_stage(given)), "train", given, options_of_stages)
