"""Several generations of one object become one field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import trimesh

from elastic3d.diffusion.options import Combine
from elastic3d.geometry.decode import FieldFunction
from elastic3d.geometry.ensemble import OnField, best_field, mean_field
from elastic3d.geometry.options import DecodeConfig
from elastic3d.models.images import ImageInput
from elastic3d.models.options import ForegroundConfig


def combined(
    fields: Sequence[FieldFunction],
    how: Combine,
    image: ImageInput,
    foreground: ForegroundConfig,
    config: DecodeConfig,
    device: torch.device,
    on_field: OnField = lambda *_: None,
) -> tuple[FieldFunction, dict[str, Any]]:
    """The field of an object's generations, and what its metadata says of the choice.

    Args:
        image: what they were generated from.
        on_field: called with (generations done, generations).
    """
    if how is Combine.mean:
        return mean_field(fields, config, device, on_field), {}
    # these load Embree and SciPy's optimizers, which no other generation needs
    from elastic3d.geometry.pose import find_pose
    from elastic3d.pipelines.assets import object_pixels

    pixels = object_pixels(image, foreground)

    def fit(mesh: trimesh.Trimesh) -> float:
        return find_pose(mesh, pixels).fit

    chosen, fits = best_field(fields, fit, config, device, on_field)
    known = [round(fit, 3) if math.isfinite(fit) else None for fit in fits]  # None: without a surface
    return fields[chosen], {"ensemble_fits": known, "ensemble_chosen": chosen}
