"""Routes that are drawn: around a table of what leaving out each block at each step was measured to cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from elastic3d.elastic.families import BlockFlops
from elastic3d.errors import UserError
from elastic3d.utils.files import printable
from elastic3d.utils.structured import Number, load_json, save_json

_TABLE = {
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
        save_json({name: getattr(self, name) for name in _TABLE}, path)


def routes_around(
    sensitivity: Tensor,
    blocks: Sequence[BlockFlops],
    ratios: Sequence[float],
    share: float,
    spread: float,
    generator: torch.Generator,
) -> Tensor:
    """Actions (S,2,I) of one sample, the same in both branches: the cells that matter least are skipped or narrow,
    until about `share` is executed.

    sensitivity: (S,I), the logarithm of the error at the end of a generation that skipping each block alone causes.
    Gumbel noise of `spread` times its standard deviation is added, so that routes differ: 0 gives the best table by
    timestep. With it, what is saved is divided at random between blocks that are skipped and MLPs that are narrowed.
    """
    chance = torch.rand((), generator=generator).item() * min(1.0, 2 * (1 - share)) * (spread > 0)
    narrow = torch.rand(sensitivity.shape, generator=generator) < chance
    width = torch.randint(1, len(ratios) + 1, sensitivity.shape, generator=generator)
    action = torch.where(narrow, width, len(ratios))
    noise = -torch.rand(sensitivity.shape, generator=generator).clamp(1e-9, 1 - 1e-7).log().neg().log()
    scale = sensitivity.std(unbiased=False).item() or 1.0
    priority = (sensitivity + spread * scale * noise - sensitivity.min() + 1e3)[:, None]
    found = fill(
        priority, action[:, None], torch.ones_like(priority, dtype=torch.bool), blocks, ratios, share
    )
    return found.expand(-1, 2, -1).contiguous()


def load_sensitivity(path: Path | None, blocks: Sequence[str]) -> Sensitivity | None:
    """The table in a file, None for none; UserError unless it is of a model with these blocks."""
    if path is None:
        return None
    values = load_json(path, _TABLE)
    found = Sensitivity(**{name: values[name] for name in _TABLE})
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


def fill(
    priority: Tensor,
    action: Tensor,
    ran: Tensor,
    blocks: Sequence[BlockFlops],
    ratios: Sequence[float],
    share: float,
) -> Tensor:
    """Give cells (S,2,I) their `action`, highest priority first, while this brings the executed share nearer."""
    table = action_flops(blocks, ratios)
    cost = (table[torch.arange(len(blocks)), action] * ran).flatten()
    target = share * float((ran.double() * table[:, -1]).sum())
    order = priority.masked_fill(~ran, -1).flatten().argsort(descending=True, stable=True)
    # a cell is taken where more than half of it still fits
    taken = (cost[order].cumsum(0) - cost[order] / 2 < target) & ran.flatten()[order]
    routes = torch.zeros(action.numel(), dtype=torch.long)
    routes[order[taken]] = action.flatten()[order[taken]]
    return routes.view(action.shape)


def action_flops(blocks: Sequence[BlockFlops], ratios: Sequence[float]) -> Tensor:
    """FLOPs (I, 1 + K) fp64 of each action of each block, skipping first."""
    return torch.tensor([[0.0, *(b.at(ratio) for ratio in ratios)] for b in blocks], dtype=torch.float64)
