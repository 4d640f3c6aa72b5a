"""Residuals of blocks, kept from one sampling step to later ones.

The state is explicit: a bank belongs to one generation, block and set of guidance branches, and holds at most two
residuals for each row of the batch, so that memory is bounded by those of two dense passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic3d.config.routing import BlockCacheConfig, CacheRule
from elastic3d.routing.protocol import rows_index

Key = tuple[int, int]  # block, first branch of the batch
Streams = tuple[Tensor, ...]  # (B,L,D) each
NEVER = -(1 << 30)  # a step so long ago that nothing of it lives


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

    def ages(self, key: Key, count: int, step: int) -> list[int]:
        """Of `count` rows: steps since the living residual was computed, 0 without one."""
        bank = self._banks.get(key)
        if bank is None or step < self.first_step:
            return [0] * count
        return [age if age <= self.config.longest else 0 for age in (step - at for at in bank.steps)]

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

    def apply(self, key: Key, rows: Sequence[int], step: int, streams: Streams) -> Streams:
        """Streams (k,L,D) of `rows` with what stands in for their residuals at `step` added.

        These are the newest ones and, with a `trend`, what is left of their change a step: of 1 a line, as TaylorSeer
        forecasts features (2503.06923), less flattens with each step (damped trend, Gardner and McKenzie 1985).
        """
        bank = self._banks[key]
        weights = [self._weight(bank, row, step) for row in rows]
        newest = _take(bank.newest, rows, len(bank.steps))
        if bank.older is None or max(weights) == 1:
            return tuple(x + r for x, r in zip(streams, newest, strict=True))
        older = _take(bank.older, rows, len(bank.steps))
        same = min(weights) == max(weights)
        weight = weights[0] if same else newest[0].new_tensor(weights)[:, None, None]
        forecast = (torch.lerp(old, new, weight) for old, new in zip(older, newest, strict=True))
        return tuple(r.add_(x) for x, r in zip(streams, forecast, strict=True))

    def store(
        self, key: Key, rows: Sequence[int], count: int, step: int, inputs: Streams, outputs: Streams
    ) -> None:
        """Keep outputs - inputs (each (k,L,D) a stream) of `rows`, out of a batch of `count`."""
        found = tuple((y - x).detach() for x, y in zip(inputs, outputs, strict=True))
        probe = self._probe(inputs).detach().clone() if self.config.rule is CacheRule.drift else None
        bank = self._banks.get(key)
        if bank is None:
            bank = self._banks[key] = _bank_of(found, probe, len(rows), count)
        elif len(rows) == count:
            bank.older, bank.newest, bank.probe = bank.newest, found, probe
        if not self.config.trend:
            bank.older = None
        if len(rows) < count:
            self._store_some(bank, rows, found, probe)
        for row in rows:
            bank.before[row], bank.steps[row] = bank.steps[row], step

    def _store_some(self, bank: Bank, rows: Sequence[int], found: Streams, probe: Tensor | None) -> None:
        index = rows_index(rows, found[0].device)
        if self.config.trend and bank.older is None:
            bank.older = tuple(torch.zeros_like(r) for r in bank.newest)
        for place, (whole, part) in enumerate(zip(bank.newest, found, strict=True)):
            if self.config.trend:
                assert bank.older is not None
                bank.older[place][index] = whole[index]
            whole[index] = part
        if probe is not None:
            assert bank.probe is not None
            bank.probe[index] = probe

    def _weight(self, bank: Bank, row: int, step: int) -> float:
        """Of the newest residual in a forecast, where the older one has one minus that."""
        gap = bank.steps[row] - bank.before[row]
        if not self.config.trend or gap > self.config.longest + 1:
            return 1.0
        return 1 + damped_steps(step - bank.steps[row], self.config.trend) / gap

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


def _take(streams: Streams, rows: Sequence[int], count: int) -> Streams:
    """Some rows of a bank; all of them are not gathered."""
    if len(rows) == count:
        return streams
    index = rows_index(rows, streams[0].device)
    return tuple(stream[index] for stream in streams)
