"""Files of tensors as they are published: read without running code, and renamed to this project's names and back."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic3d.errors import UserError
from elastic3d.models.weights import Stored, check_fit, read_weights, tensor_heads


@dataclass(frozen=True)
class Row:
    """One tensor of ours, and the published ones whose rows lie one below the other in it.

    Attributes:
        shares: how many rows each of them has, as shares; empty: all as many.
        negative: ours is minus theirs.
        swapped: the two halves of the rows change places.
    """

    ours: str
    theirs: tuple[str, ...]
    shares: tuple[int, ...] = ()
    negative: bool = False
    swapped: bool = False

    def split(self, rows: int) -> list[int]:
        """The rows of each published tensor; `rows` in all."""
        shares = self.shares or (1,) * len(self.theirs)
        return [rows * share // sum(shares) for share in shares]


def rename_linear(
    ours: str, theirs: str | Sequence[str], bias: bool = True, **options: Any
) -> tuple[Row, ...]:
    """The weight and the bias of a linear layer or a norm."""
    names = (theirs,) if isinstance(theirs, str) else tuple(theirs)
    parts = ("weight", "bias") if bias else ("weight",)
    return tuple(
        Row(f"{ours}.{part}", tuple(f"{name}.{part}" for name in names), **options) for part in parts
    )


def to_ours(
    state: Mapping[str, Tensor], rows: Sequence[Row], shapes: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Published tensors under this project's names.

    Args:
        shapes: our tensors, for their shapes alone.

    Raises:
        UserError: published tensors that are missing, unknown or mis-shaped; names the first ones and their number.
    """
    wanted: dict[str, Stored] = {}
    for row in rows:
        first, *rest = shapes[row.ours].shape
        sizes = zip(row.theirs, row.split(first), strict=True)
        wanted |= {name: Stored((size, *rest), "") for name, size in sizes}
    check_fit(wanted, state, f"{source} does not fit its config.json")
    found = {}
    for row in rows:
        parts = [state[name] for name in row.theirs]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        found[row.ours] = _turned(value, row)
    return found


def to_published(state: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    found: dict[str, Tensor] = {}
    for row in rows:
        value = _turned(state[row.ours], row)
        parts = value.split(row.split(len(value)))
        found |= {name: part.clone() for name, part in zip(row.theirs, parts, strict=True)}
    return found


def _turned(value: Tensor, row: Row) -> Tensor:
    """Its own inverse: the sign, and the order of the halves."""
    value = torch.cat(value.chunk(2)[::-1]) if row.swapped else value
    return -value if row.negative else value


def tensor_sizes(path: Path) -> dict[str, int]:
    """Elements of every tensor of a file by its full name, without a look at the values; UserError if it is broken.

    A `.ckpt` or `.bin` as PyTorch wrote it before 1.6 can't be mapped: its bytes are taken for one tensor `model` in
    half precision.
    """
    if path.suffix == ".safetensors":
        return {name: head.numel for name, head in tensor_heads(path).items()}
    if not zipfile.is_zipfile(path):
        return {"model": path.stat().st_size // 2}
    return {name: tensor.numel() for name, tensor in read_checkpoint(path).items()}


def count_parameters(path: Path) -> int:
    """Elements of all tensors of a file, as `tensor_sizes`."""
    return sum(tensor_sizes(path).values())


def has_encoder(state: Mapping[str, Any]) -> bool:
    """Whether a VAE's tensors, by their published names, are also those of its encoder."""
    return any(name.startswith("encoder.") for name in state)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Every tensor of a `.safetensors` or `.ckpt` file by its full name; a `.ckpt` can't run code.

    Raises:
        UserError: the file is truncated, or a `.ckpt` that holds anything else than tensors in dictionaries.
    """
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported operand ([\w.]+)", str(error))
        what = f" ({found[1] or found[2]})" if found else ""
        raise UserError(f"{path} holds code{what}, expected nothing but tensors: it was not run") from error
    except Exception as error:  # truncated archives surface as RuntimeError, EOFError, OSError, KeyError, ...
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path} is truncated or no checkpoint ({reason[0]})") from error
    tensors: dict[str, Tensor] = {}
    _flatten(content.get("state_dict", content) if isinstance(content, dict) else content, "", path, tensors)
    return tensors


def _flatten(content: Any, prefix: str, path: Path, into: dict[str, Tensor]) -> None:
    """Nested dictionaries of tensors -> dotted names."""
    if isinstance(content, Tensor):
        into[prefix] = content
    elif isinstance(content, dict):
        for name, value in content.items():
            _flatten(value, f"{prefix}.{name}" if prefix else str(name), path, into)
    else:
        kind = type(content).__name__
        raise UserError(f"{path} has a value of type {kind} at {prefix or 'its top'}, expected tensors")
