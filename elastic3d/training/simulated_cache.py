"""What a cache of residuals would hold in a training pass, so that routers learn from what forecasts would be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from elastic3d.elastic.cache import Key, ResidualCache, Streams, damped_steps
from elastic3d.elastic.config import BlockCacheConfig

Residuals = dict[int, Streams]  # by list of blocks: outputs - inputs, each (B,L,D)


class SimulatedCache(ResidualCache):
    """Dense passes at P earlier steps, the newest first. It stands in for every block, whatever the routers decide."""

    def __init__(self, passes: Sequence[Residuals], ages: Tensor, picks: Tensor, damping: float) -> None:
        """
        Args:
            passes: P residuals of all lists of blocks.
            ages: (B,P) long: steps since each.
            picks: (B,I) long in [-1,P): the pass that computed what a block of a row remembers, -1 nothing.
            damping: share of their change since the pass before, where there is one (age 0: there is none), that goes
                on.
        """
        super().__init__(BlockCacheConfig(skipped_reuse=True), [0.0])
        self.passes, self.row_ages, self.picks, self.damping = passes, ages, picks, damping

    def ages(self, key: Key, rows: Sequence[int], steps: Sequence[int]) -> list[int]:
        """Of each row: steps since what a block remembers was computed, 0 for nothing."""
        return [int(age) for age in self.age(key[0])[list(rows)].tolist()]

    def reuse(self, age: int, keep: bool, keep_prob: float, threshold: float) -> bool:
        """It always stands in."""
        return True

    def apply(self, key: Key, rows: Sequence[int], steps: Sequence[int], streams: Streams) -> Streams:
        """Streams (k,L,D) of the rows with what stands in for their residuals added."""
        added = self.residuals(key[0])
        return tuple(x + r[list(rows)].to(x.dtype) for x, r in zip(streams, added, strict=True))

    def age(self, block: int) -> Tensor:
        """Steps (B,) long since what a block remembers was computed, 0 for nothing."""
        picked = self.picks[:, block]
        return self.row_ages.gather(1, picked.clamp_min(0)[:, None])[:, 0] * (picked >= 0)

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
        passes = self.row_ages.shape[1]
        newest = F.one_hot(picked.clamp_min(0), passes).float() * (picked >= 0)[:, None]
        if not self.damping or passes == 1:
            return newest.T
        older = torch.cat([self.row_ages[:, 1:], torch.zeros_like(self.row_ages[:, :1])], dim=1)
        known = (older > self.row_ages) & (self.row_ages > 0)
        steps = torch.tensor(
            [[damped_steps(age, self.damping) for age in row] for row in self.row_ages.tolist()]
        )
        gaps = (older - self.row_ages).clamp_min(1)
        slope = torch.where(known, steps.to(gaps.device) / gaps, 0.0)  # (B,P)
        going_on = newest * slope
        before = torch.cat([torch.zeros_like(going_on[:, :1]), going_on[:, :-1]], dim=1)
        return (newest + going_on - before).T
