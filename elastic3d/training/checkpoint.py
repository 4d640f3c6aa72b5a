"""Checkpoints: folders that are whole or not there, verified before a byte of them is used; the configuration that they
keep; and what a new run starts from (`init_from`), one of them or a model folder such as `shape-small`."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig, ImageEncoderConfig, VAEConfig
from elastic3d.models.weights import CONFIG_NAME, find_weights, load_config, read_weights, save_weights
from elastic3d.pipelines.runtime import find_model
from elastic3d.utils.files import Number, file_sha256, load_json
from elastic3d.utils.old_names import todays_stage
from elastic3d.utils.options import from_dict, hints, renamed, to_dict

Config = TypeVar("Config")
MANIFEST, STATE = "manifest.json", "state.json"
WEIGHTS = ("model.safetensors", "average.safetensors", "optimizer.safetensors")
CLASSES = {"vae": (VAEConfig, "ShapeVAE"), "dit": (DiTConfig, "ShapeDiT")}
_PREFIX = "step-"
# What is recorded of the latents that a run learns from, and in words.
_LATENTS = {"vae_sha256": "autoencoder", "encoder": "image encoder", "scale": "scale"}


@dataclass
class Checkpoint:
    """Everything a run needs to go on: tensors by file, and plain values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any] = field(default_factory=dict)
    source: str = ""  # its folder, for messages

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one file. UserError if it is not there."""
        if name not in self.tensors:
            raise UserError(f"{self.source} has no {name}.safetensors")
        return self.tensors[name]

    @property
    def stage(self) -> str | None:
        """The stage that its configuration names, None where it has none."""
        config = self.values.get("config")
        return todays_stage(config) if isinstance(config, Mapping) else None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint into `folder`, and drop all but the newest `keep`.

    Later ones, which a resumed run passed over as broken, neither count nor go.

    The files are written beside, listed with their hashes in a manifest, flushed to disk, and the folder
    renamed: whatever moment the process dies at, no folder of the final name is incomplete.
    """
    final = folder / f"{_PREFIX}{checkpoint.step:08d}"
    unfinished = folder / f".{final.name}.unfinished"
    try:
        _write(unfinished, checkpoint)
    except (OSError, UserError) as error:  # such as a full disk
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(f"can't write {final}: {error.strerror or error}") from error
    if final.exists():  # the same step again, after a resume from an older checkpoint
        shutil.rmtree(final)
    unfinished.rename(final)
    _flush(folder)
    paths = _by_step(folder)
    for old in paths[: paths.index(final) + 1][:-keep]:
        shutil.rmtree(old)
    return final


def _write(unfinished: Path, checkpoint: Checkpoint) -> None:
    """The files of a checkpoint and their manifest, on the disk for certain."""
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, tensors in checkpoint.tensors.items():
        save_weights(tensors, unfinished / f"{name}.safetensors")
    (unfinished / STATE).write_text(json.dumps({"step": checkpoint.step, **checkpoint.values}))
    names = [*(f"{name}.safetensors" for name in checkpoint.tensors), STATE]
    hashes = {name: file_sha256(unfinished / name) for name in sorted(names)}
    (unfinished / MANIFEST).write_text(json.dumps(hashes, indent=1))
    for path in (*(unfinished / name for name in (*names, MANIFEST)), unfinished):
        _flush(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying every file's hash.

    Raises:
        UserError: the folder is missing or half-written, a file was changed or is gone, or holds something else.
    """
    names = verify_checkpoint(path)
    values = load_json(path / STATE, {"step": Number(0, 1 << 50, whole=True)})
    weights = [path / name for name in sorted(names) if name.endswith(".safetensors")]
    tensors = {file.stem: read_weights(file) for file in weights}
    return Checkpoint(values.pop("step"), tensors, values, str(path))


def verify_checkpoint(path: Path) -> list[str]:
    """The names of a whole checkpoint's files. UserError if `path` is none."""
    if not path.is_dir():
        raise UserError(f"there is no checkpoint folder {path}")
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} is no whole checkpoint: it has no {MANIFEST}")
    hashes: dict[str, str] = load_json(path / MANIFEST, {str: str})
    if unlisted := [name for name in (STATE, *WEIGHTS) if name not in hashes]:
        raise UserError(f"{path} is no whole checkpoint: {MANIFEST} does not list {unlisted[0]}")
    for name, expected in hashes.items():
        if not (path / name).is_file():
            raise UserError(f"{path} is no whole checkpoint: {name} is missing")
        if file_sha256(path / name) != expected:
            raise UserError(f"{path} is no whole checkpoint: {name} differs from its hash in {MANIFEST}")
    return list(hashes)


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder` or None, and why each newer one was passed over."""
    reasons: list[str] = []
    for path in reversed(_by_step(folder)):
        try:
            verify_checkpoint(path)
        except UserError as error:
            reasons.append(str(error))
        else:
            return path, reasons
    return None, reasons


def clear_unfinished(folder: Path) -> None:
    """Drop what a killed process left of a checkpoint."""
    for path in folder.glob(f".{_PREFIX}*.unfinished"):
        shutil.rmtree(path)


def _by_step(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------------------------------------------------------------------------------------- the configuration in it


def read_record(values: Any, config_class: type[Config], source: Path | str) -> Config:
    """A saved configuration; UserError where it is none, or has a value that is not allowed.

    Records of earlier versions hold the options of all stages, and some that are gone since: both are left out.
    """
    stage = stage_of(values, source)
    found = {**values, "stage": stage} if stage else values
    return from_dict(config_class, _known(config_class, found), str(source))


def stage_of(values: Any, source: Path | str) -> Any:
    """The stage of a saved configuration. UserError where it is none, or of a training that there is no more."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source} has no configuration of a training")
    stage, routing = todays_stage(values), values.get("routing")
    parts = routing.get("parts", "routers") if isinstance(routing, Mapping) else "routers"
    if stage in ("router", "image_router") and parts != "routers":
        raise UserError(
            f"{source} is of routers with routing.parts={parts}, expected routers alone: the base model no longer"
            " learns with them"
        )
    return stage


def _known(config_class: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = hints(config_class)
    found = {}
    for name, value in renamed(config_class, values).items():
        if name in kinds:
            nested = is_dataclass(kinds[name]) and isinstance(value, Mapping)
            found[name] = _known(kinds[name], value) if nested else value
    return found


# ---------------------------------------------------------------------------------------- what a run starts from


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
        config = folder / CONFIG_NAME
        if config.is_file() and load_json(config).get("_class_name") == CLASSES[part][1]:
            return folder
    return None


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any], inside: str = "") -> Iterator[str]:
    """Each option that two saved configurations both have, with another value, in words."""
    for name, value in new.items():
        was = old.get(name, value)
        if isinstance(value, Mapping) and isinstance(was, Mapping):
            yield from changed_options(was, value, f"{inside}{name}.")
        elif was != value:
            yield f"{inside}{name} was {was}"


def check_latents(checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
    """UserError where a run learned from other latents than those of `record`; older checkpoints noted less of them."""
    before = checkpoint.values.get("data")
    if not isinstance(before, Mapping):
        return
    for name, what in _LATENTS.items():
        then, now = before.get(name, record.get(name)), record.get(name)
        if then != now and not (name == "scale" and _close(then, now)):
            raise UserError(
                f"{checkpoint.source} learned from latents of another {what} than those in the cache now: put that"
                " cache back, or train anew with another name="
            )


def _close(then: Any, now: Any) -> bool:
    """Whether two scales of latents differ by no more than the rounding of different processors."""
    return np.shape(then) == np.shape(now) and np.allclose(then, now, rtol=1e-3, atol=1e-4)


def starting_point(path: Path, own: Mapping[str, Tensor]) -> Checkpoint:
    """What a run starts from, as a checkpoint whose `average` has the tensors by their names in the objective: a
    checkpoint itself, the newest one of a run, or a model's weights.

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
        average = {f"{part}.{name}": value.float() for name, value in weights.items()}
        return Checkpoint(0, {"average": average}, source=str(path))
    if (path / "checkpoints").is_dir():
        newest, passed_over = newest_checkpoint(path / "checkpoints")
        if newest is None:
            reasons = "".join(f" ({reason})" for reason in passed_over)
            raise UserError(
                f"init_from={path} is a run without a whole checkpoint{reasons}: train it first, or give another"
                " init_from="
            )
        path = newest
    elif not (path / MANIFEST).is_file():
        model = f", or a model with a {part}, such as shape-small" if part in CLASSES else ""
        raise UserError(
            f"init_from={path} is neither a checkpoint nor a model to start a {part} from, expected a checkpoint"
            f" (runs/NAME/checkpoints/step-...), the folder of a run that has one{model}"
        )
    return load_checkpoint(path)


def statistics_of(path: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the latent channels that a model's DiT was trained on."""
    folder = model_part(find_start(path), "vae")
    vae: VAEConfig | None = load_config(folder, *CLASSES["vae"]) if folder else None
    if vae is None or not vae.latent_mean:
        raise UserError(
            f"{path} has no vae/{CONFIG_NAME} with statistics of its latents, expected an exported DiT"
        )
    return vae.latent_mean, vae.latent_std


def check_fit(cache: Path, record: Mapping[str, Any], encoder: ImageEncoderConfig, model: Path) -> None:
    """UserError unless a cache of latents, of this `record`, has image tokens of an `encoder` as the model's, and the
    scale that the model's DiT knows, where it says which; a warning where another autoencoder made them, as only one
    that was fine-tuned from the model's may."""
    if (model / "image_encoder" / CONFIG_NAME).is_file():
        own = load_config(model / "image_encoder", ImageEncoderConfig, "ImageEncoder")
        # its folder may be another one; published borders are quotients
        found, wanted = (to_dict(replace(each, border=round(each.border, 6))) for each in (encoder, own))
        for name, due in wanted.items():
            if name != "path" and found[name] != due:
                part = "foreground" if name == "border" else "encoder"
                raise UserError(
                    f"{cache} holds image tokens with {name} {found[name]}, but those of {model} have {due}: make"
                    f" them with latents.{part}.{name}={due} latents.output=another folder, and give that folder"
                )
    folder = model_part(model, "vae")
    vae: VAEConfig | None = load_config(folder, *CLASSES["vae"]) if folder else None
    if folder is None or vae is None or not vae.latent_mean:
        return
    if record["scale"] != [vae.latent_mean, vae.latent_std]:
        raise UserError(
            f"{cache} holds latents of another scale than {model} was trained on: make them with"
            f" stage=cache init_from={model} latents.output=another folder, and give that folder"
        )
    if record["vae_sha256"] not in (file_sha256(find_weights(folder)), _learned_from(model)):
        warnings.warn(
            f"{cache} holds latents of another autoencoder than {model} was trained on: they fit where that one"
            " was fine-tuned from the model's, and no other",
            stacklevel=2,
        )


def _learned_from(model: Path) -> Any:
    """SHA-256 of the autoencoder whose latents a DiT learned, by its record: it may have another decoder since. None
    where there is no record."""
    path = model / "dit" / "training.json"
    data = load_json(path).get("data") if path.is_file() else None
    return data.get("vae_sha256") if isinstance(data, Mapping) else None
