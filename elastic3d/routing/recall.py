"""Residuals of earlier passes for a training pass: what a cache would hold at that moment of a generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic3d.routing.cache import damped_steps

Residuals = dict[int, tuple[Tensor, ...]]  # by block: outputs - inputs, each (B,L,D)


@dataclass
class Recall:
    """Dense passes at P earlier steps, the newest first, and which of them each block of each row remembers.

    passes: P residuals of all blocks; ages (B,P) long: steps since each; picks (B,I) long in [-1,P): the pass that
    computed what is remembered, -1 nothing; trend: share of their change since the pass before, where there is one
    (age 0: there is none), that goes on.
    """

    passes: Sequence[Residuals]
    ages: Tensor
    picks: Tensor
    trend: float

    def age(self, block: int) -> Tensor:
        """Steps (B,) long since what a block remembers was computed, 0 for nothing."""
        picked = self.picks[:, block]
        return self.ages.gather(1, picked.clamp_min(0)[:, None])[:, 0] * (picked >= 0)

    def residuals(self, block: int) -> tuple[Tensor, ...]:
        """What stands in for the block: (B,L,D) a stream, zero for rows that remember nothing."""
        weights = self._weights(self.picks[:, block])
        streams = zip(*(residuals[block] for residuals in self.passes), strict=True)
        return tuple(
            sum((w.to(r.dtype)[:, None, None] * r for w, r in zip(weights, stream, strict=True)), start=0)
            for stream in streams
        )

    def _weights(self, picked: Tensor) -> Tensor:
        """Share (P,B) of each pass in the forecast: 1 + n / gap of the picked one, - n / gap of the one before, where n
        are the damped steps of its age."""
        passes = self.ages.shape[1]
        newest = torch.nn.functional.one_hot(picked.clamp_min(0), passes).float() * (picked >= 0)[:, None]
        if not self.trend or passes == 1:
            return newest.T
        older = torch.cat([self.ages[:, 1:], torch.zeros_like(self.ages[:, :1])], dim=1)
        known = (older > self.ages) & (self.ages > 0)
        steps = torch.tensor([[damped_steps(age, self.trend) for age in row] for row in self.ages.tolist()])
        gaps = (older - self.ages).clamp_min(1)
        slope = torch.where(known, steps.to(gaps.device) / gaps, 0.0)  # (B,P)
        going_on = newest * slope
        before = torch.cat([torch.zeros_like(going_on[:, :1]), going_on[:, :-1]], dim=1)
        return (newest + going_on - before).T
