"""Changes to a training shape that leave its signed distances right, or honest lower bounds."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from elastic3d.config.train import AugmentConfig

HALF_EXTENT = 0.95  # of the longest side of a prepared shape


def augment(item: dict[str, Tensor], config: AugmentConfig, rng: np.random.Generator) -> dict[str, Tensor]:
    """Mirror, stretch, rotate and scale an item: `surface` and `sharp` (P,6), `points` (Q,3), `distance`
    (Q,).

    Mirror (x), rotation (Y) and uniform scale transform distances exactly. A stretch by factors s per axis
    keeps the sign; the distance becomes d * min(s), the largest value that is never too long. A shape that a
    rotation carries out of its box is scaled back into it.
    """
    stretch = torch.from_numpy(rng.uniform(config.stretch_min, 1.0, 3)).float()
    scale = rng.uniform(config.scale_min, 1.0)
    angle = math.radians(rng.uniform(-config.rotate_degrees, config.rotate_degrees))
    side = -1.0 if config.mirror and rng.random() < 0.5 else 1.0
    turn = torch.tensor(
        [[math.cos(angle), 0.0, math.sin(angle)], [0.0, 1.0, 0.0], [-math.sin(angle), 0.0, math.cos(angle)]]
    )
    matrix = turn @ torch.diag(stretch) @ torch.diag(torch.tensor([side, 1.0, 1.0]))
    reach = (item["surface"][:, :3] @ matrix.T).abs().max().item()
    scale *= min(1.0, HALF_EXTENT / max(reach, 1e-6)) if angle else 1.0
    cofactor = turn @ torch.diag(1 / stretch) @ torch.diag(torch.tensor([side, 1.0, 1.0]))

    def moved(points: Tensor) -> Tensor:
        normals = torch.nn.functional.normalize(points[:, 3:] @ cofactor.T, dim=-1)
        return torch.cat([points[:, :3] @ (scale * matrix).T, normals], dim=-1)

    changed: dict[str, Tensor] = {name: moved(item[name]) for name in ("surface", "sharp") if name in item}
    changed["points"] = item["points"] @ (scale * matrix).T
    changed["distance"] = item["distance"] * (scale * stretch.min().item())
    return {**item, **changed}
