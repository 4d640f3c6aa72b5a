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

from elastic3d.config.routing import BlockCacheConfig, CacheRule
from elastic3d.routing.protocol import Rows, rows_index

Key = tuple[int, int]  # block, first branch of the batch
Streams = tuple[Tensor, ...]  # (B,L,D) each
NEVER = -(1 << 30)  # a step so long ago that nothing of it lives


@dataclass(frozen=True)
class Moments:
    """When rows are computed or wanted, and where their bank keeps them.

    rows: their places in a bank of `count`; steps: the sampling step of each, times: its time in [0,1].
    """

    rows: list[int]
    count: int
    steps: list[int]
    times: list[float]

    def some(self, places: Sequence[int]) -> Moments:
        """Those at some places of this list."""
        if len(places) == len(self.rows):
            return self
        rows, steps = ([values[i] for i in places] for values in (self.rows, self.steps))
        return Moments(rows, self.count, steps, [self.times[i] for i in places])


@dataclass
class Bank:
    """What one block remembers of each row of its batch.

    steps: when `newest` was computed, NEVER for a row without; `older` are the residuals before (None: none are kept),
    computed at `before`; probe: the block's input when `newest` was computed.
    """

    steps: list[int]
    before: list[int]
    newest: Streams
    older: Streams | None = None
    probe: Tensor | None = None


class ResidualCache:
    """Banks, and the policy that says when a residual may stand in for a block. Rows are positions in the batch."""

    def __init__(self, config: BlockCacheConfig, steps: int) -> None:
        self.config = config
        self.first_step = math.ceil(config.start * steps)
        self._banks: dict[Key, Bank] = {}

    def __len__(self) -> int:
        return sum(step > NEVER for bank in self._banks.values() for step in bank.steps)

    @property
    def bytes(self) -> int:
        """Memory of all banks."""
        tensors = [
            t for b in self._banks.values() for t in (*b.newest, *(b.older or ()), b.probe) if t is not None
        ]
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

    def drift(self, key: Key, streams: Streams) -> Tensor | None:
        """Relative L1 change (B,) of the first stream since each residual was computed; infinite without one.

        None where the rule needs none.
        """
        if self.config.rule is not CacheRule.drift:
            return None
        probe, bank = self._probe(streams), self._banks.get(key)
        if bank is None or bank.probe is None:
            return probe.new_full((len(probe),), math.inf)
        change = (probe - bank.probe).abs().sum((1, 2)) / bank.probe.abs().sum((1, 2))
        unknown = torch.tensor([step == NEVER for step in bank.steps], device=change.device)
        return change.masked_fill(unknown, math.inf)

    def reuse(self, age: int, keep_prob: float, threshold: float, drift: float) -> bool:
        """Whether a residual of this age stands in for a block with this gate and this change of its input."""
        if not age:
            return False
        if keep_prob <= threshold:
            return self.config.closed_reuse
        if self.config.rule is CacheRule.age:
            return True
        if self.config.rule is CacheRule.band:
            return keep_prob <= threshold + self.config.band
        return self.config.rule is CacheRule.drift and drift < self.config.drift

    def apply(self, key: Key, when: Moments, streams: Streams) -> Streams:
        """Streams (k,L,D) of the rows with what stands in for their residuals added.

        These are the newest ones and, with a trend, what is left of their change a step: of 1 a line, as TaylorSeer
        forecasts features (2503.06923), less flattens with each step (damped trend, Gardner and McKenzie 1985).
        """
        bank = self._banks[key]
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
        probe = self._probe(inputs).detach().clone() if self.config.rule is CacheRule.drift else None
        bank, whole = self._banks.get(key), len(when.rows) == when.count
        if bank is None:
            bank = self._banks[key] = _bank_of(found, probe, len(when.rows), when.count)
        elif whole:
            bank.older, bank.newest, bank.probe = bank.newest, found, probe
        if not self.config.extrapolates:
            bank.older = None
        if not whole:
            self._store_some(bank, when.rows, found, probe)
        for row, step in zip(when.rows, when.steps, strict=True):
            bank.before[row], bank.steps[row] = bank.steps[row], step

    def _store_some(self, bank: Bank, rows: Sequence[int], found: Streams, probe: Tensor | None) -> None:
        """Exchange some rows. Tensors are made anew: gradients may need the old ones."""
        index = rows_index(rows, found[0].device)
        if self.config.extrapolates:
            older = bank.older or tuple(torch.zeros_like(r) for r in bank.newest)
            moved = zip(older, bank.newest, strict=True)
            bank.older = tuple(_put(old, index, new[index]) for old, new in moved)
        exchanged = zip(bank.newest, found, strict=True)
        bank.newest = tuple(_put(whole, index, part) for whole, part in exchanged)
        if probe is not None:
            assert bank.probe is not None
            bank.probe = _put(bank.probe, index, probe)

    def _slope(self, bank: Bank, row: int, step: int, time: float) -> float:
        """How many times the change between a row's two residuals is added to the newest."""
        gap, config = bank.steps[row] - bank.before[row], self.config
        if not config.extrapolates or gap > config.longest + 1:
            return 0.0
        trend = float(np.interp(time, config.times, config.trends)) if config.trends else config.trend
        return damped_steps(step - bank.steps[row], trend) / gap

    def _probe(self, streams: Streams) -> Tensor:
        return streams[0][:, :: self.config.probe_stride]


def damped_steps(age: int, trend: float) -> float:
    """Steps of a change that go on within `age` steps, where each keeps a share `trend` of the one before."""
    return float(age) if trend == 1 else trend * (1 - trend**age) / (1 - trend)


def _bank_of(found: Streams, probe: Tensor | None, rows: int, count: int) -> Bank:
    """A bank for `count` rows: of these residuals if they are of all, else of zeros."""
    never = [NEVER] * count
    if rows == count:
        return Bank(never, list(never), found, None, probe)
    blank = None if probe is None else probe.new_zeros((count, *probe.shape[1:]))
    return Bank(never, list(never), tuple(r.new_zeros((count, *r.shape[1:])) for r in found), None, blank)


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
