"""Some rows of a batch: taken, exchanged, each with a factor. What all rows share costs no copy to a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rows = slice | Tensor  # consecutive rows, or their indices (k,) long


def rows_index(rows: Sequence[int], device: torch.device) -> Rows:
    """Row numbers as an index: a slice (a view, nothing is copied) where they are consecutive."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def take_rows(streams: tuple[Tensor, ...], rows: Sequence[int]) -> tuple[Tensor, ...]:
    """Some rows of streams (B,L,D); all of them are not gathered."""
    if len(rows) == len(streams[0]):
        return streams
    index = rows_index(rows, streams[0].device)
    return tuple(stream[index] for stream in streams)


def put_rows(whole: Tensor, index: Rows, part: Tensor) -> Tensor:
    """(B,...) with the rows at an index exchanged for (k,...). A new tensor: gradients may need the old one."""
    if len(part) == len(whole):
        return part
    whole = whole.clone()
    whole[index] = part
    return whole


def row_factor(values: Sequence[float], like: Tensor) -> float | Tensor:
    """One number where all rows have the same, else (k,1,1): in fp32, as PyTorch takes a number, so that a row is
    rounded alike whatever the others have."""
    if min(values) == max(values):
        return values[0]
    return like.new_tensor(values, dtype=torch.float32)[:, None, None]
