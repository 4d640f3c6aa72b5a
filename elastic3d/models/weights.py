"""Models on disk: a folder with `config.json` and `model.safetensors`, loaded strictly or not at all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elastic3d.config.serialize import from_dict, to_dict
from elastic3d.errors import UserError
from elastic3d.geometry.mesh_io import atomic_path
from elastic3d.models.initialise import without_random_weights

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_CLASS_KEY = "_class_name"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAGIC = {
    b"PK\x03\x04": "a pickle",  # torch.save since 1.6: a zip archive around a pickle
    b"\x80": "a pickle",
    b"version https://git-lfs": "a Git LFS pointer, so `git lfs pull` is needed",
}

Model = TypeVar("Model", bound="PretrainedMixin")


class PretrainedMixin:
    """`from_pretrained` and `save_pretrained` for an `nn.Module` that is built from its `config` alone."""

    config_class: ClassVar[type[Any]]
    config: Any

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Model:
        """The model saved in `folder`, in evaluation mode.

        Args:
            dtype: of the parameters; None is fp32, whatever the file holds. Buffers keep the model's own.
            device: None is the CPU.

        Raises:
            UserError: a missing, broken or foreign file; weights that do not fit the architecture or are not
                finite.
        """
        folder = Path(folder)
        config = load_config(folder, cls.config_class, cls.__name__)
        with without_random_weights():
            model = cls(config)  # type: ignore[call-arg]
        assert isinstance(model, nn.Module)
        path = find_weights(folder)
        load_strict(model, read_weights(path), str(path))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype or torch.float32)
        return model.to(device or "cpu").eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `model.safetensors` to `folder`, each whole or not at all.

        Args:
            dtype: of the floating-point weights in the file; None keeps the model's.
        """
        assert isinstance(self, nn.Module)
        folder = Path(folder)
        save_weights(self.state_dict(), folder / WEIGHTS_NAME, dtype)
        save_json({_CLASS_KEY: type(self).__name__, **to_dict(self.config)}, folder / CONFIG_NAME)


def save_json(values: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError if it is missing, broken or no object."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is broken: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a JSON object")
    return values


def load_config(folder: Path, config_class: type[Any], class_name: str) -> Any:
    """The configuration in `folder/config.json`, which must be of a `class_name`."""
    if not folder.exists():
        raise UserError(f"there is no folder {folder}, expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}")
    path = folder / CONFIG_NAME
    values = load_json(path)
    found = values.pop(_CLASS_KEY, class_name)
    if found != class_name:
        raise UserError(f"{path} describes a {found}, expected a {class_name}")
    return from_dict(config_class, values, str(path))


def find_weights(folder: Path) -> Path:
    """`folder/model.safetensors`; UserError if it is missing, also where only a pickle is there."""
    path = folder / WEIGHTS_NAME
    if path.is_file():
        return path
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}, expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise UserError(f"{folder} has {pickles[0]}, a pickle that could run code; expected {WEIGHTS_NAME}")
    raise UserError(f"there is no file {path}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU; UserError if missing, broken or something else."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if path.suffix in _PICKLE_SUFFIXES:
        raise UserError(f"{path} is a pickle, expected a safetensors file")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(_why_unreadable(path, error)) from error


def count_weights(path: Path) -> dict[str, int]:
    """Elements of every tensor of a safetensors file, from its head alone; UserError if it is broken."""
    try:
        with safe_open(path, "pt") as file:
            return {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(32)
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return f"{path} is {kind}, expected a safetensors file"
    return f"{path} is truncated or no safetensors file ({error})"


def save_weights(state: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors to a safetensors file, whole or not at all; `dtype` converts the floating-point ones."""
    tensors = {}
    for name, tensor in state.items():
        kept = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        tensors[name] = tensor.detach().to("cpu", kept).contiguous().clone()
    with atomic_path(path) as temporary:
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # save_file would leave it readable by its owner alone


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """Copy `state` into `model`; every key and shape must agree and every value be finite.

    Args:
        assign: let the model take the tensors themselves, with their dtype and device; for one that was built on
            the meta device.

    Raises:
        UserError: as `check_fit`; also naming the first tensor that is not finite.
    """
    check_fit(model, state, source)
    bad = [name for name, value in state.items() if not all_finite(value)]
    if bad:
        raise UserError(f"{source} has NaN or infinite values in {len(bad)} tensors, first in {bad[0]}")
    model.load_state_dict(dict(state), strict=True, assign=assign)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. The least and the largest say so, 30 times sooner than a mask in fp16."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    return bool(torch.stack(values.aminmax()).isfinite().all())


def check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Whether every key and shape of `state` agrees with `model`'s; no value is read.

    Raises:
        UserError: naming the first keys that are missing, unknown or mis-shaped, and how many there are.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for what, names in (("missing", missing), ("unknown", unknown), ("mis-shaped", shapes))
        if names
    ]
    if problems:
        raise UserError(f"{source} does not fit {type(model).__name__}: tensors {'; '.join(problems)}")


def file_sha256(*paths: Path) -> str:
    """SHA-256 (hex) of one file's bytes; of several, that of their digests one after the other."""
    digests = []
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digests.append(digest)
    if len(digests) == 1:
        return digests[0].hexdigest()
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def __getattr__(name: str) -> Any:
    """`load_hunyuan3d` is found here too; its module needs the models, which need this one."""
    if name in ("load_hunyuan3d", "load_hunyuan3d_vae"):
        from elastic3d.models import hunyuan3d

        return getattr(hunyuan3d, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
