"""The error at the end of a generation that leaving out one block at one step causes: a measured table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic3d.errors import UserError
from elastic3d.utils.files import printable
from elastic3d.utils.structured import Number, load_json, save_json

_SHAPE = {
    "blocks": [str],
    "times": [Number(0, 1)],
    "full": Number(0, 1e9),
    "errors": [[Number(0, 1e9)]],
    "measured": dict,
}
LEAST_EXCESS = 0.02  # of the full route's error: what is smaller is noise


@dataclass(frozen=True)
class Sensitivity:
    """blocks: I names; times: S, where steps begin; full: relative squared error of the last latents with every block;
    errors (S,I): with one block left out at one step; measured: on what."""

    blocks: Sequence[str]
    times: Sequence[float]
    full: float
    errors: Sequence[Sequence[float]]
    measured: dict[str, Any]

    def at(self, times: Sequence[float]) -> Tensor:
        """(S,I) for steps at other times: logarithms of what leaving out adds to the error, linear between times."""
        excess = np.maximum(np.asarray(self.errors) - self.full, LEAST_EXCESS * self.full)
        table = np.log(np.maximum(excess, 1e-12))
        columns = [np.interp(times, self.times, column) for column in table.T]
        return torch.from_numpy(np.stack(columns, axis=1)).float()

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all."""
        save_json({name: getattr(self, name) for name in _SHAPE}, path)


def load_sensitivity(path: Path | None, blocks: Sequence[str]) -> Sensitivity | None:
    """The table in a file, None for none; UserError unless it is of a model with these blocks."""
    if path is None:
        return None
    values = load_json(path, _SHAPE)
    found = Sensitivity(**{name: values[name] for name in _SHAPE})
    if list(found.blocks) != list(blocks):
        raise UserError(
            f"{printable(path)} is of a model with {len(found.blocks)} blocks, {', '.join(found.blocks[:2])}, ...,"
            f" expected the {len(blocks)} of this one, {', '.join(blocks[:2])}, ..."
        )
    shape = (len(found.errors), {len(row) for row in found.errors})
    if list(found.times) != sorted(set(found.times)) or shape != (len(found.times), {len(found.blocks)}):
        raise UserError(
            f"{printable(path)}: errors and times do not belong together, expected ascending times, a row of errors for"
            f" each, and {len(found.blocks)} errors in a row"
        )
    return found
