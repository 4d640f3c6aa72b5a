"""The mean shape of several generations of one object: the Vorob'ev expectation of random sets.

The share of the shapes that hold a point is the coverage there. The mean shape is where the coverage is above a level,
and the level is the one at which its volume is the mean of theirs (Vorob'ev 1984; Molchanov, Theory of Random Sets,
2.2.2). A level of one half loses parts that stand a little elsewhere in each shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic3d.geometry.decode import FieldFunction, node_points
from elastic3d.geometry.options import DecodeConfig

_CELLS = 32  # a side of the grid on which volumes are compared
_EPS = 1e-6  # of a coverage, whose logit is finite then


def mean_field(
    fields: Sequence[FieldFunction], config: DecodeConfig, device: torch.device | str = "cpu"
) -> FieldFunction:
    """The field of the mean shape of some fields, positive inside.

    A field stands for the probability that a point is inside, as its logit, and so does the mean. `config` has the cube
    and the points in one call of a field.
    """

    @torch.no_grad()
    def coverage(points: Tensor) -> Tensor:
        return torch.stack([field(points) for field in fields]).float().sigmoid()

    nodes = torch.arange((_CELLS + 1) ** 3, device=device)
    parts = (coverage(node_points(some, _CELLS, config.box)) for some in nodes.split(config.max_points))
    level = _level(torch.cat(list(parts), dim=1))
    return lambda points: coverage(points).mean(0).logit(_EPS) - level


def _level(inside: Tensor) -> Tensor:
    """The logit (a scalar) of the coverage above which as many of P points are as on average in the shapes, whose
    probabilities are (K,P); 0 where they have none of the points, or all."""
    volume = round(float((inside > 0.5).sum(1).float().mean()))
    if not 0 < volume < inside.shape[1]:
        return inside.new_tensor(0.0)
    highest = inside.mean(0).sort(descending=True).values
    return highest[volume - 1 : volume + 1].logit(_EPS).mean()
