"""Residuals of blocks, kept from one sampling step to later ones.

The state is explicit: a bank belongs to one generation, block and set of guidance branches, and holds at most two
residuals for each of its rows, so that memory is bounded by those of two dense passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from elastic3d.elastic.config import BlockCacheConfig, CacheRule
from elastic3d.elastic.context import Forecast, Moments, Streams
from elastic3d.elastic.family import Rows, rows_index

Key = tuple[int, int]  # block, first branch of the batch
Residuals = dict[int, Streams]  # by block: outputs - inputs, each (B,L,D)
NEVER = -(1 << 30)  # a step so long ago that nothing of it lives


@dataclass
class Bank:
    """What one block remembers of each row of its batch.

    steps: when `newest` was computed, NEVER for a row without; `older` are the residuals before (None: none are kept),
    computed at `before`.
    """

    steps: list[int]
    before: list[int]
    newest: Streams
    older: Streams | None = None


class ResidualCache:
    """Banks, and the policy that says when a residual may stand in for a block. Rows are positions in the batch."""

    def __init__(self, config: BlockCacheConfig, steps: int, forecast: Forecast | None = None) -> None:
        """`forecast`: how residuals go on, where that is not along the damped line of `config`."""
        self.config, self.forecast = config, forecast
        self.first_step = math.ceil(config.start * steps)
        self._banks: dict[Key, Bank] = {}

    def __len__(self) -> int:
        return sum(step > NEVER for bank in self._banks.values() for step in bank.steps)

    @property
    def bytes(self) -> int:
        """Memory of all banks."""
        tensors = [t for bank in self._banks.values() for t in (*bank.newest, *(bank.older or ()))]
        return sum(t.numel() * t.element_size() for t in tensors)

    def ages(self, key: Key, when: Moments) -> list[int]:
        """Of each row: steps since the living residual was computed, 0 without one."""
        bank = self._banks.get(key)
        if bank is None:
            return [0] * len(when.rows)
        ages = (step - bank.steps[row] for row, step in zip(when.rows, when.steps, strict=True))
        return [
            age if age <= self.config.longest and step >= self.first_step else 0
            for age, step in zip(ages, when.steps, strict=True)
        ]

    def reuse(self, age: int, keep: bool, keep_prob: float, threshold: float) -> bool:
        """Whether a residual of this age stands in for a block: where it is skipped, or, with E-DiT's rule, where its
        gate is in a band above the threshold."""
        if not age:
            return False
        if not keep:
            return self.config.skipped_reuse
        if self.config.rule is CacheRule.age:
            return True
        return self.config.rule is CacheRule.band and keep_prob <= threshold + self.config.band

    def apply(self, key: Key, when: Moments, streams: Streams) -> Streams:
        """Streams (k,L,D) of the rows with what stands in for their residuals added.

        These are what the forecast says; without one the newest ones and, with a damping, what is left of their
        change a step: of 1 a line, as TaylorSeer forecasts features (2503.06923), less flattens with each step
        (damped trend, Gardner and McKenzie 1985).
        """
        bank = self._banks[key]
        if self.forecast is not None:
            added = [self._forecast(bank, key[0], number, when) for number in range(len(streams))]
            return tuple(x + r for x, r in zip(streams, added, strict=True))
        slopes = [
            self._slope(bank, *moment) for moment in zip(when.rows, when.steps, when.times, strict=True)
        ]
        newest = _take(bank.newest, when)
        if bank.older is None or not any(slopes):
            forecast = newest
        else:
            older, weight = _take(bank.older, when), _factor([1 + slope for slope in slopes], newest[0])
            forecast = tuple(torch.lerp(old, new, weight) for old, new in zip(older, newest, strict=True))
        return tuple(x + r for x, r in zip(streams, forecast, strict=True))

    def store(self, key: Key, when: Moments, inputs: Streams, outputs: Streams) -> None:
        """Keep outputs - inputs (each (k,L,D) a stream) of the rows, with their gradients."""
        found = tuple(y - x for x, y in zip(inputs, outputs, strict=True))
        bank, whole = self._banks.get(key), len(when.rows) == when.count
        if bank is None:
            bank = self._banks[key] = _bank_of(found, len(when.rows), when.count)
        elif whole:
            bank.older, bank.newest = bank.newest, found
        if not self.config.extrapolates:
            bank.older = None
        if not whole:
            self._store_some(bank, when.rows, found)
        for row, step in zip(when.rows, when.steps, strict=True):
            bank.before[row], bank.steps[row] = bank.steps[row], step

    def _store_some(self, bank: Bank, rows: Sequence[int], found: Streams) -> None:
        """Exchange some rows. Tensors are made anew: gradients may need the old ones."""
        index = rows_index(rows, found[0].device)
        if self.config.extrapolates:
            older = bank.older or tuple(torch.zeros_like(r) for r in bank.newest)
            moved = zip(older, bank.newest, strict=True)
            bank.older = tuple(_put(old, index, new[index]) for old, new in moved)
        exchanged = zip(bank.newest, found, strict=True)
        bank.newest = tuple(_put(whole, index, part) for whole, part in exchanged)

    def _forecast(self, bank: Bank, span: int, number: int, when: Moments) -> Tensor:
        """What stands in for the residuals (k,L,D) of one stream."""
        assert self.forecast is not None
        weights = []
        for row, step in zip(when.rows, when.steps, strict=True):
            before = bank.before[row] if bank.before[row] > NEVER else None
            weights.append(self.forecast.weights(span, number, step, bank.steps[row], before))
        of_newest, of_older = zip(*weights, strict=True)
        (newest,) = _take(bank.newest[number : number + 1], when)
        found = newest * _factor(of_newest, newest)
        if bank.older is None or not any(of_older):
            return found
        (older,) = _take(bank.older[number : number + 1], when)
        return found + older * _factor(of_older, older)

    def _slope(self, bank: Bank, row: int, step: int, time: float) -> float:
        """How many times the change between a row's two residuals is added to the newest."""
        gap, config = bank.steps[row] - bank.before[row], self.config
        if not config.extrapolates or gap > config.longest + 1:
            return 0.0
        damping = float(np.interp(time, config.times, config.dampings)) if config.dampings else config.damping
        return damped_steps(step - bank.steps[row], damping) / gap


def damped_steps(age: int, damping: float) -> float:
    """Steps of a change that go on within `age` steps, where each keeps a share `damping` of the one before."""
    return float(age) if damping == 1 else damping * (1 - damping**age) / (1 - damping)


def _bank_of(found: Streams, rows: int, count: int) -> Bank:
    """A bank for `count` rows: of these residuals if they are of all, else of zeros."""
    if rows < count:
        found = tuple(r.new_zeros((count, *r.shape[1:])) for r in found)
    return Bank([NEVER] * count, [NEVER] * count, found)


def _put(whole: Tensor, index: Rows, part: Tensor) -> Tensor:
    """A copy with some rows exchanged."""
    whole = whole.clone()
    whole[index] = part
    return whole


def _take(streams: Streams, when: Moments) -> Streams:
    """Some rows of a bank; all of them are not gathered."""
    if len(when.rows) == when.count:
        return streams
    index = rows_index(when.rows, streams[0].device)
    return tuple(stream[index] for stream in streams)


def _factor(values: Sequence[float], like: Tensor) -> float | Tensor:
    """One number where all rows have the same, else (k,1,1)."""
    return values[0] if min(values) == max(values) else like.new_tensor(values)[:, None, None]


@dataclass
class SimulatedCache:
    """What a cache would hold in a training pass: dense passes at P earlier steps, the newest first.

    passes: P residuals of all blocks; ages (B,P) long: steps since each; picks (B,I) long in [-1,P): the pass that
    computed what a block of a row remembers, -1 nothing; damping: share of their change since the pass before, where
    there is one (age 0: there is none), that goes on.
    """

    passes: Sequence[Residuals]
    ages: Tensor
    picks: Tensor
    damping: float

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
        if not self.damping or passes == 1:
            return newest.T
        older = torch.cat([self.ages[:, 1:], torch.zeros_like(self.ages[:, :1])], dim=1)
        known = (older > self.ages) & (self.ages > 0)
        steps = torch.tensor([[damped_steps(age, self.damping) for age in row] for row in self.ages.tolist()])
        gaps = (older - self.ages).clamp_min(1)
        slope = torch.where(known, steps.to(gaps.device) / gaps, 0.0)  # (B,P)
        going_on = newest * slope
        before = torch.cat([torch.zeros_like(going_on[:, :1]), going_on[:, :-1]], dim=1)
        return (newest + going_on - before).T
