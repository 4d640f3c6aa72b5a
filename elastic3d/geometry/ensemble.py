"""One shape of several generations of an object: the one that fits best, or their mean.

The mean is the Vorob'ev expectation of random sets (Vorob'ev 1984; Molchanov, Theory of Random Sets, 2.2.2). The share
of the shapes that hold a point is the coverage there. The mean shape is where the coverage is above a level, and the
level is the one at which its volume is the mean of theirs. A level of one half loses parts that stand a little
elsewhere in each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import trimesh
from torch import Tensor

from elastic3d.geometry.cleanup import clean
from elastic3d.geometry.decode import FieldFunction, decode_field, node_points
from elastic3d.geometry.options import CleanupConfig, DecodeConfig
from elastic3d.geometry.surface import extract_surface

ROUGH = 64  # cells a side of the meshes that are compared with the image
_CELLS = 32  # a side of the grid on which volumes are compared
_EPS = 1e-6  # of a coverage, whose logit is finite then
OnField = Callable[[int, int], object]  # (fields done, fields)


def best_field(
    fields: Sequence[FieldFunction],
    fit: Callable[[trimesh.Trimesh], float],
    config: DecodeConfig,
    device: torch.device | str = "cpu",
    on_field: OnField = lambda *_: None,
) -> tuple[int, list[float]]:
    """Which of some fields has the surface that fits best, the first of equal ones, and how well each does.

    `fit` is of a mesh of `ROUGH` cells, larger is better; a field without a surface has -inf. `on_field` is called
    after each field.
    """
    rough = replace(config, resolution=min(config.resolution, ROUGH))

    def score(field: FieldFunction) -> float:
        try:
            values, _ = decode_field(field, rough, device)
            return fit(clean(extract_surface(values, config.box, config.surface), CleanupConfig()))
        except ValueError:  # no surface, or none that can be cleaned
            return -float("inf")

    fits: list[float] = []
    for field in fields:
        fits.append(score(field))
        on_field(len(fits), len(fields))
    return max(range(len(fits)), key=fits.__getitem__), fits


def mean_field(
    fields: Sequence[FieldFunction],
    config: DecodeConfig,
    device: torch.device | str = "cpu",
    on_field: OnField = lambda *_: None,
) -> FieldFunction:
    """The field of the mean shape of some fields, positive inside.

    A field stands for the probability that a point is inside, as its logit, and so does the mean. `config` has the cube
    and the points in one call of a field; `on_field` is called after each field.
    """
    nodes = torch.arange((_CELLS + 1) ** 3, device=device).split(config.max_points)
    inside: list[Tensor] = []
    for field in fields:
        parts = [_coverage(field, node_points(some, _CELLS, config.box)) for some in nodes]
        inside.append(torch.cat(parts))
        on_field(len(inside), len(fields))
    level = _level(torch.stack(inside))
    return lambda points: torch.stack([_coverage(f, points) for f in fields]).mean(0).logit(_EPS) - level


@torch.no_grad()
def _coverage(field: FieldFunction, points: Tensor) -> Tensor:
    """Probabilities (P,) that points (P,3) are inside."""
    return field(points).float().sigmoid()


def _level(inside: Tensor) -> Tensor:
    """The logit (a scalar) of the coverage above which as many of P points are as on average in the shapes, whose
    probabilities are (K,P); 0 where they have none of the points, or all."""
    volume = round(float((inside > 0.5).sum(1).float().mean()))
    if not 0 < volume < inside.shape[1]:
        return inside.new_tensor(0.0)
    highest = inside.mean(0).sort(descending=True).values
    return highest[volume - 1 : volume + 1].logit(_EPS).mean()
