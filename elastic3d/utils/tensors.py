"""Safetensors files: one reader that knows what it expects, and a writer that leaves nothing half-written."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic3d.errors import UserError
from elastic3d.utils.files import atomic_path, check_file, printable

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Number formats that arithmetic here is defined for; float8 is not.
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
_MAGIC = {
    b"PK\x03\x04": "a pickle",  # torch.save since 1.6: a zip archive around a pickle
    b"\x80": "a pickle",
    b"version https://git-lfs": "a Git LFS pointer, so `git lfs pull` is needed",
}


@dataclass(frozen=True)
class Stored:
    """What the head of a file says of one tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, BF16, ...

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def open_tensors(path: Path, names: Collection[str] = ()) -> Any:
    """A safetensors file, mapped, not read: a `safetensors.safe_open` for PyTorch; errors as `tensor_heads`."""
    tensor_heads(path, names)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(_why_unreadable(path, error)) from error


def tensor_heads(path: Path, names: Collection[str] = ()) -> dict[str, Stored]:
    """Shape and number format of every tensor of a safetensors file, from its head alone.

    Args:
        names: of tensors that must be there.

    Raises:
        UserError: naming the file: it is missing, truncated, something else, of a number format such as float8, or
            lacks a tensor.
    """
    if path.suffix in PICKLE_SUFFIXES and path.is_file():
        raise UserError(f"{printable(path)} is a pickle, expected a safetensors file")
    check_file(path, "a safetensors file")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            found = {name: Stored(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(_why_unreadable(path, error)) from error
    odd = [name for name, tensor in found.items() if tensor.dtype not in _DTYPES]
    if odd:
        raise UserError(
            f"{printable(path)} has tensors of type {found[odd[0]].dtype}, first {odd[0]}; expected one of"
            f" {', '.join(_DTYPES)}"
        )
    lacking = [name for name in names if name not in found]
    if lacking:
        raise UserError(
            f"{printable(path)} has no tensor {lacking[0]!r}, expected {', '.join(sorted(names))}"
        )
    return found


def read_weights(path: Path, names: Collection[str] = ()) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU; arguments and errors as `tensor_heads`."""
    tensor_heads(path, names)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(_why_unreadable(path, error)) from error


def save_weights(state: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors to a safetensors file, whole or not at all; `dtype` converts the floating-point ones."""
    tensors = {}
    for name, tensor in state.items():
        kept = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        tensors[name] = tensor.detach().to("cpu", kept).contiguous().clone()
    with atomic_path(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # what it makes of an error of the operating system
            raise OSError(str(error)) from error
        temporary.chmod(mode)  # save_file would leave it readable by its owner alone


def _why_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(32)
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return f"{printable(path)} is {kind}, expected a safetensors file"
    return f"{printable(path)} is truncated or no safetensors file ({error})"
