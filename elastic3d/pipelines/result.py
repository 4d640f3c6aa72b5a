"""What one call asks for, and what becomes of each sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import trimesh
from PIL import Image
from torch import Tensor

from elastic3d.elastic.config import ElasticConfig
from elastic3d.errors import UserError
from elastic3d.geometry.options import CleanupConfig, DecodeConfig
from elastic3d.models.options import ForegroundConfig


@dataclass
class Settings:
    """What one call asks for, defaults filled in."""

    steps: int
    guidance: float
    decode: DecodeConfig
    cleanup: CleanupConfig
    foreground: ForegroundConfig
    elastic: ElasticConfig
    dial: dict[str, Any] | None = None
    """What was requested of the dial, and the cost of the row that runs; None where it is not asked."""


@dataclass
class Result:
    """One sample: its mesh, or the reason why there is none."""

    metadata: dict[str, Any]
    """What was done, as stored in a glb: version, model, seed, steps, FLOPs, milliseconds, ..."""
    latents: Tensor | None = None
    """Sampled latents (N,C) fp32 on the CPU; None if the image could not be used."""
    error: UserError | None = None
    image: Image.Image | None = None
    """The (front) image as the model saw it: the object cut out, centred, on white; None if it could not be used."""
    warnings: list[str] = field(default_factory=list)
    """What may be wrong with the image, one sentence each."""
    _mesh: trimesh.Trimesh | None = field(default=None, repr=False)

    @property
    def mesh(self) -> trimesh.Trimesh:
        """The mesh, Y up, in the cube of the model's `box`; raises `error` if there is none."""
        if self.error is not None:
            raise self.error
        assert self._mesh is not None
        return self._mesh
