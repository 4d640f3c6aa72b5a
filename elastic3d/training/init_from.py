"""`init_from`: what a new run starts from, a checkpoint of a run or a model folder such as `shape-small`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig, VAEConfig
from elastic3d.models.weights import CONFIG_NAME, find_weights, load_config
from elastic3d.pipelines.runtime import find_model
from elastic3d.training.checkpoint import load_checkpoint, newest_checkpoint
from elastic3d.utils.structured import load_json
from elastic3d.utils.tensors import read_weights

CLASSES = {"vae": (VAEConfig, "ShapeVAE"), "dit": (DiTConfig, "ShapeDiT")}


def find_start(path: Path) -> Path:
    """A path as it is, or that of the bundled model of this name. UserError if there is neither."""
    found = find_model(path)
    if found.exists():
        return found
    raise UserError(
        f"init_from={path} does not exist, expected a checkpoint (runs/NAME/checkpoints/step-...), the folder of a"
        " run, a model folder that stage=export wrote, or shape-small"
    )


def model_part(path: Path, part: str) -> Path | None:
    """The folder of a model's `vae` or `dit`: inside a pipeline's folder, or the given one itself."""
    for folder in (path / part, path):
        if (folder / CONFIG_NAME).is_file() and _class_of(folder) == CLASSES[part][1]:
            return folder
    return None


def starting_weights(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, by their names in the objective, that a run starts from: averages of a checkpoint, a model's weights.

    Args:
        own: the objective's state, whose names begin with the part's (`vae.`, `dit.`).

    Raises:
        UserError: nothing to start from there, or a broken file.
    """
    path = find_start(path)
    part = next(iter(own)).partition(".")[0]
    folder = model_part(path, part) if part in CLASSES else None
    if folder is not None:
        weights = read_weights(find_weights(folder))
        return {f"{part}.{name}": value.float() for name, value in weights.items()}
    if (path / "checkpoints").is_dir():
        newest, _ = newest_checkpoint(path / "checkpoints")
        path = newest or path
    elif not list(path.glob("*.json")):
        raise UserError(
            f"init_from={path} is neither a checkpoint nor a model with a {part},"
            " expected the folder of one (runs/NAME/checkpoints/step-..., shape-small)"
        )
    return load_checkpoint(path).part("average")


def statistics_of(path: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latent channels that a model's DiT was trained on."""
    folder = model_part(find_start(path), "vae")
    vae: VAEConfig | None = load_config(folder, *CLASSES["vae"]) if folder else None
    if vae is None or not vae.latent_mean:
        raise UserError(
            f"{path} has no vae/{CONFIG_NAME} with statistics of its latents, expected an exported DiT"
        )
    return vae.latent_mean, vae.latent_std


def _class_of(folder: Path) -> str:
    return str(load_json(folder / CONFIG_NAME).get("_class_name", ""))
