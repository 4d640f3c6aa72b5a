"""Published checkpoints: where they lie, and what their configuration files say in this project's dataclasses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic3d.diffusion.options import PipelineConfig
from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig, ImageEncoderConfig, SkipDiTConfig, VAEConfig
from elastic3d.utils.files import printable
from elastic3d.utils.options import Options, option

INSIDE = "(inside the checkpoint)"  # the path of an encoder whose weights are in the checkpoint
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # a name on the Hugging Face Hub


@dataclass(kw_only=True)
class CheckpointConfig(Options):
    """One checkpoint: its parts, and how it is sampled."""

    dit: DiTConfig | SkipDiTConfig = option(DiTConfig, "the diffusion transformer")
    vae: VAEConfig = option(VAEConfig, "the shape VAE")
    encoder: ImageEncoderConfig = option(ImageEncoderConfig, "the image encoder")
    dinov2: dict[str, Any] = option(
        {}, "the image encoder's network: fields of transformers' configuration of it"
    )
    pipeline: PipelineConfig = option(PipelineConfig, "sampling defaults")


@dataclass(frozen=True)
class Preset:
    """A published checkpoint: its family, its name for people, and where it lies."""

    family: str
    title: str
    repository: str
    subfolder: str = ""


PRESETS = {
    "hunyuan3d2": Preset("hunyuan3d", "Hunyuan3D-2", "tencent/Hunyuan3D-2", "hunyuan3d-dit-v2-0"),
    "hunyuan3d2_mini": Preset(
        "hunyuan3d", "Hunyuan3D-2mini", "tencent/Hunyuan3D-2mini", "hunyuan3d-dit-v2-mini"
    ),
    "hunyuan3d2_mv": Preset("hunyuan3d", "Hunyuan3D-2mv", "tencent/Hunyuan3D-2mv", "hunyuan3d-dit-v2-mv"),
    "hunyuan3d2_turbo": Preset(
        "hunyuan3d", "Hunyuan3D-2 turbo", "tencent/Hunyuan3D-2", "hunyuan3d-dit-v2-0-turbo"
    ),
    "hunyuan3d2_mini_turbo": Preset(
        "hunyuan3d", "Hunyuan3D-2mini turbo", "tencent/Hunyuan3D-2mini", "hunyuan3d-dit-v2-mini-turbo"
    ),
    "hunyuan3d2_1": Preset("hunyuan3d", "Hunyuan3D-2.1", "tencent/Hunyuan3D-2.1", "hunyuan3d-dit-v2-1"),
    "triposg": Preset("triposg", "TripoSG", "VAST-AI/TripoSG"),
    "step1x3d": Preset("step1x3d", "Step1X-3D", "stepfun-ai/Step1X-3D", "Step1X-3D-Geometry-1300m"),
}
OPEN_MODELS = ("triposg", "step1x3d")
_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")  # no repository is named as a file of weights


def places(folder: str | Path) -> list[Path]:
    """Where a checkpoint's folder is looked for: as it is, then below $HY3DGEN_MODELS (or ~/.cache/hy3dgen)."""
    home = Path(os.environ.get("HY3DGEN_MODELS", "~/.cache/hy3dgen")).expanduser()
    return [Path(folder).expanduser(), home / folder]


def check_weights(weights: str) -> None:
    """UserError for `weights=` that is in no place on disk, and can't be a name on the Hub; empty is none."""
    on_hub = REPOSITORY.fullmatch(weights) and not weights.endswith(_FILES)
    if weights and not on_hub and not any(place.exists() for place in places(weights)):
        example = PRESETS["hunyuan3d2"].repository
        raise UserError(
            f"there is no folder {printable(weights)} for weights=, expected one, or a name on the Hugging Face Hub"
            f" such as {example}"
        )


@dataclass(kw_only=True)
class ImportConfig(Options):
    """Options of `scripts/import_weights.py`."""

    model: str = option(
        "hunyuan3d2", "which published model: its name as for gen_mesh.py", choices=tuple(PRESETS)
    )
    weights: str = option("", "folder with its weights; empty: looked for as gen_mesh.py does")
    subfolder: str = option("", "folder of the checkpoint in weights; empty: the published one")
    vae_subfolder: str = option(
        "", "Hunyuan3D-2: take the VAE from this folder in weights: one with an encoder"
    )
    dinov2: str = option("", "folder of a DINOv2, for a checkpoint without its image encoder")
    output: str = option("", "folder to write")

    def check(self) -> None:
        """There is an output."""
        if not self.output:
            raise ValueError(f"output= is missing, for example output=models/{self.model}")


@dataclass(kw_only=True)
class TinyWeightsConfig(Options):
    """Options of `scripts/make_tiny_weights.py`."""

    model: str = option("triposg", "whose layout is written", choices=OPEN_MODELS)
    output: str = option("", "folder to write")
    seed: int = option(0, "seed of the random weights", ge=0, le=2**63 - 1)

    def check(self) -> None:
        """There is an output."""
        if not self.output:
            raise ValueError(f"output= is missing, for example output=outputs/tiny-{self.model}")


REQUIRED = object()
"""In place of a default: a field that has to be there."""

Table = dict[str, tuple[Any, Any]]
"""Their parameter -> (our field, their default). Where our field is a tuple, the parameter has no effect here: the
values that we accept (an empty tuple accepts every value, see `ignored`)."""


def ignored(names: str) -> Table:
    """Rows of parameters without an effect here, whatever their values; names apart by spaces."""
    return dict.fromkeys(names.split(), ((), None))


def mapped(params: Mapping[str, Any], table: Table, source: str) -> dict[str, Any]:
    """Published parameters as fields of a dataclass of ours.

    Raises:
        UserError: an unknown or missing parameter, or a value that this project can't honour; names it.
    """
    for name in params:
        if name not in table:
            raise UserError(f"{source}: unknown parameter {name!r}")
    fields = {}
    for name, (ours, default) in table.items():
        value = params.get(name, default)
        if value is REQUIRED:
            raise UserError(
                f"{source}: there is no {name!r}, and the original's default differs from what was published"
            )
        if isinstance(ours, str):
            fields[ours] = value
        elif ours and value not in ours:
            raise UserError(f"{source}: {name} is {value!r}, expected {' or '.join(map(repr, ours))}")
    return fields


def check_partners(config: CheckpointConfig, source: str) -> None:
    """UserError unless the channels of the parts agree."""
    for name, wanted, found in (
        ("latent channels", config.vae.channels, config.dit.in_channels),
        ("condition channels", config.dinov2.get("hidden_size"), config.dit.condition_channels),
    ):
        if wanted is not None and wanted != found:
            raise UserError(f"{source}: the model has {found} {name}, but its partner has {wanted}")
