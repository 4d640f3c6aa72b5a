"""What trainings of routers and of few-step LoRA need of a backbone: its dense model, and what that learned from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from elastic3d.training.datasets import Batch


class Flow(ABC):
    """A dense flow model with its sampler and its data: shapes from images, or images from captions.

    Attributes:
        folder: of its pipeline, which may have routers.
        dit: the model, which gets routers.
        guidance: the scale at which it is trained with them.
        embeds_guidance: that scale is an input of the model, which runs one branch.
        paired: both branches of guidance run as one batch.
        term: options of the reconstruction term, with its `weight` and the `total` of its parts.
        weights: (C,), how much an error of each latent channel counts.
        lengths: tokens of each stream of the model.
        record: plain values that say what data there are.
    """

    folder: Path
    dit: Any
    guidance: float
    embeds_guidance: bool
    paired: bool
    term: Any
    weights: Tensor
    lengths: tuple[int, int]
    record: dict[str, Any]

    def __getstate__(self) -> dict[str, object]:
        """For a process that reads the data, which needs no model."""
        return {name: v for name, v in self.__dict__.items() if name not in ("dit", "vae", "meshes")}

    @contextmanager
    def attaching(self) -> Iterator[None]:
        """Around what puts routers on the model. UserError where it can't have any."""
        yield

    # ------------------------------------------------------------------------------------- the model and its sampler

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """Sampling times (S+1,) of a number of steps."""

    @abstractmethod
    def default_sampling(self) -> tuple[int, float]:
        """The model's own sampling steps and guidance."""

    @abstractmethod
    def velocities(self, x_t: Tensor, batch: Batch) -> Tensor:
        """Velocity (B,N,C) at `t` (B,) under a condition, or (2B,N,C) of both branches where they are paired."""

    def gain(self, conditional: Tensor, unconditional: Tensor) -> Tensor | float:
        """Factor (B,N,1) that the sampler has on the guided velocity (B,N,C)."""
        return 1.0

    @abstractmethod
    def integrate(self, batch: Batch, steps: int) -> Tensor:
        """`noise` (B,N,C) and a condition -> latents (B,N,C) in a number of steps, as the session's settings say; with
        gradients."""

    @abstractmethod
    def sampled(self, count: int, steps: int, guidance: float) -> Tensor:
        """Latents (B,N,C) of the first `count` (0: all) validation samples, as the pipeline samples them."""

    @abstractmethod
    def decoded(self, found: Tensor, batch: Batch, dense: Tensor | None = None) -> dict[str, Tensor]:
        """Losses (B,) of what latents (B,N,C) decode to, those of a batch's first B samples: against the truth, or
        against what the `dense` model's decode to."""

    @abstractmethod
    def sheet(self, rows: list[Tensor]) -> np.ndarray:
        """Rows of latents (B,N,C) as one image."""

    def compared(self, latents: Tensor) -> Tensor:
        """What of latents (B,N,C) a calibration looks at."""
        return latents

    # --------------------------------------------------------------------------------------------------------- data

    @abstractmethod
    def stream(self) -> Any:
        """Training `Items` of flow matching: `latents`, `noise`, `t` and a condition. Their `index`, of a position and
        a seed, is the number of the shape or image."""

    @abstractmethod
    def pair(self, number: int, seed: int) -> Batch:
        """`noise` (N,C) and a condition of the training data: the same for the same number."""

    @abstractmethod
    def val_pairs(self) -> Batch:
        """Noise and conditions of the validation samples, the same every time."""

    def truth(self, index: int, rng: np.random.Generator) -> Batch:
        """What `decoded` compares number `index` of the training data with, beside its latents."""
        return {}
