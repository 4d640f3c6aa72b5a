"""A call of the image-to-mesh pipeline and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import trimesh
from PIL import Image
from torch import Tensor

from elastic3d.diffusion.options import Combine, PipelineConfig
from elastic3d.errors import UserError
from elastic3d.geometry.options import CleanupConfig, DecodeConfig
from elastic3d.models.images import VIEW_NAMES, ImageInput
from elastic3d.models.options import ForegroundConfig

OnStep = Callable[[int, int], None]
OnProgress = Callable[[str, int, int], None]
"""on_progress(stage, done, total); the stages are those of the metadata's `ms`: condition (images), dit (sampling
steps), decode (generations that are combined and levels of the grid, over all meshes), cleanup (meshes)."""
OnResult = Callable[[int, "Result"], None]
"""on_result(number in the batch, result), as soon as it is known, failures included."""


@dataclass
class Result:
    """One sample: its mesh, or the reason why there is none."""

    metadata: dict[str, Any]
    """What was done, as stored in a glb: version, model, seed, steps, FLOPs, milliseconds, ..."""
    latents: Tensor | None = None
    """Sampled latents (N,C) fp32 on the CPU, of an ensemble (K,N,C); None if the image could not be used."""
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


@dataclass(frozen=True)
class Call:
    """One call of the pipeline: a batch, what is asked for with defaults filled in, and who is told.

    `config` holds the call's own steps, guidance, resolution and elastic options. `dial` is metadata of that name: what
    was requested of the dial, and the cost of the row that runs; empty where it is not asked.
    """

    images: Sequence[ImageInput]
    seeds: Sequence[int]
    config: PipelineConfig
    decode: DecodeConfig
    cleanup: CleanupConfig
    foreground: ForegroundConfig
    ensemble: int
    combine: Combine
    dial: dict[str, Any]
    on_progress: OnProgress
    on_result: OnResult

    def __post_init__(self) -> None:
        if self.combine is not Combine.mean and self.ensemble == 1:
            raise UserError(f"combine is {self.combine.value}, expected ensemble= of 2 or more with it")
        for views in self.images if self.combine is Combine.fit else ():
            if isinstance(views, Mapping) and VIEW_NAMES[0] not in views:
                raise UserError(f"combine is fit, expected an image from the {VIEW_NAMES[0]} with it")
