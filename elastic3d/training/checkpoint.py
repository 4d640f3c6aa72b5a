"""Checkpoints: folders that are whole or not there, verified before a byte of them is used."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic3d.errors import UserError
from elastic3d.models.weights import file_sha256, load_json, read_weights, save_weights

MANIFEST = "manifest.json"
_PREFIX = "step-"


@dataclass
class Checkpoint:
    """Everything a run needs to go on: tensors by file, and plain values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any] = field(default_factory=dict)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return folder / f"{_PREFIX}{step:08d}"


def write_part(folder: Path, step: int, name: str, value: Mapping[str, Any]) -> None:
    """Put one JSON file into the checkpoint that is being written; each process adds its own this way."""
    unfinished = _unfinished(folder, step)
    unfinished.mkdir(parents=True, exist_ok=True)
    (unfinished / name).write_text(json.dumps(value))


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint into `folder`, parts of other processes included, and drop all but the newest
    `keep`.

    The files are written beside, listed with their hashes in a manifest, flushed to disk, and the folder
    renamed: whatever moment the process dies at, no folder of the final name is incomplete.
    """
    final, unfinished = checkpoint_path(folder, checkpoint.step), _unfinished(folder, checkpoint.step)
    unfinished.mkdir(parents=True, exist_ok=True)
    for name, tensors in checkpoint.tensors.items():
        save_weights(tensors, unfinished / f"{name}.safetensors")
    (unfinished / "state.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.values}))
    hashes = {file.name: file_sha256(file) for file in sorted(unfinished.iterdir()) if file.name != MANIFEST}
    (unfinished / MANIFEST).write_text(json.dumps(hashes, indent=1))
    for path in (*unfinished.iterdir(), unfinished):
        _flush(path)
    if final.exists():  # the same step again, after a resume from an older checkpoint
        shutil.rmtree(final)
    unfinished.rename(final)
    _flush(folder)
    for old in _by_step(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying every file's hash.

    Raises:
        UserError: the folder is missing or half-written, or a file was changed or is gone.
    """
    verify_checkpoint(path)
    values = load_json(path / "state.json")
    tensors = {file.stem: read_weights(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(values.pop("step"), tensors, values)


def verify_checkpoint(path: Path) -> None:
    """Raise UserError unless `path` is a whole checkpoint."""
    if not path.is_dir():
        raise UserError(f"there is no checkpoint folder {path}")
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} is no whole checkpoint: it has no {MANIFEST}")
    for name, expected in load_json(path / MANIFEST).items():
        if not (path / name).is_file():
            raise UserError(f"{path} is no whole checkpoint: {name} is missing")
        if file_sha256(path / name) != expected:
            raise UserError(f"{path} is no whole checkpoint: {name} differs from its hash in {MANIFEST}")


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


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators in this process, as JSON values."""
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    inner = numpy_state["state"]
    cuda = [_encode(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {"key": inner["key"].tolist(), "pos": inner["pos"]}},
        "torch": _encode(torch.get_rng_state()),
        "cuda": cuda,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of `random_state`, in the same or another process."""
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    key = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": key, "pos": state["numpy"]["state"]["pos"]}})
    torch.set_rng_state(_decode(state["torch"]))
    for device, encoded in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_decode(encoded), device)


def _encode(tensor: Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _unfinished(folder: Path, step: int) -> Path:
    return folder / f".{checkpoint_path(folder, step).name}.unfinished"


def _by_step(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
