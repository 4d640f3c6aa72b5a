"""Residuals of blocks, kept from one sampling step to later ones.

The state is explicit: a bank belongs to one generation, block and set of guidance branches, and holds at most two
residuals for each of its rows, so that memory is bounded by those of two dense passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from elastic3d.elastic.config import BlockCacheConfig, CacheRule
from elastic3d.elastic.rows import put_rows, row_factor, rows_index, take_rows

Streams = tuple[Tensor, ...]  # (B,L,D) each
Forecast = Callable[[int, int, int, int, int | None], tuple[float, float]]
"""How residuals go on in one generation, where that is not along a damped line: (span, stream, step, newest, older) ->
shares of what the span of blocks that begins with `span` added to a stream at its last two computed steps."""
Key = tuple[int, int]  # block, first branch of the batch
NEVER = -(1 << 30)  # a step so long ago that nothing of it lives


@dataclass
class Bank:
    """What one block remembers of each row of its batch.

    steps: when `newest` was computed, NEVER for a row without; `older` are the residuals before, computed at `before`
    (None: none are kept).
    """

    steps: list[int]
    before: list[int]
    newest: Streams
    older: Streams | None

    def known_before(self, row: int) -> int | None:
        """When a row's older residual was computed; None where it has none."""
        return self.before[row] if self.older is not None and self.before[row] > NEVER else None

    def enlarge(self, size: int) -> None:
        """Make room for more rows."""
        more = size - len(self.steps)
        if more > 0:
            self.steps, self.before = self.steps + [NEVER] * more, self.before + [NEVER] * more
            behind = (0, 0, 0, 0, 0, more)  # rows of zeros
            self.newest = tuple(F.pad(r, behind) for r in self.newest)
            self.older = None if self.older is None else tuple(F.pad(r, behind) for r in self.older)


class ResidualCache:
    """Banks, and the policy that says when a residual may stand in for a block.

    Calls name the bank by its key, some of its rows in ascending order, and the sampling step of each.
    """

    def __init__(
        self, config: BlockCacheConfig, times: Sequence[float], forecast: Forecast | None = None
    ) -> None:
        """`times` of the steps; `forecast`: how residuals go on, where that is not along the damped line of
        `config`."""
        self.config, self.forecast = config, forecast
        self.first_step = math.ceil(config.start * len(times))
        self.dampings = [config.damping] * len(times)  # by the step that is forecast
        if config.dampings:
            self.dampings = np.interp(times, config.times, config.dampings).tolist()
        self._banks: dict[Key, Bank] = {}

    def __len__(self) -> int:
        return sum(step > NEVER for bank in self._banks.values() for step in bank.steps)

    def clear(self) -> None:
        """Forget all residuals: the generation is over."""
        self._banks.clear()

    def ages(self, key: Key, rows: Sequence[int], steps: Sequence[int]) -> list[int]:
        """Of each row: steps since the living residual was computed, 0 without one."""
        bank, ages = self._banks.get(key), []
        for row, step in zip(rows, steps, strict=True):
            age = step - bank.steps[row] if bank is not None and row < len(bank.steps) else 0
            ages.append(age if age <= self.config.longest and step >= self.first_step else 0)
        return ages

    def reuse(self, age: int, keep: bool, keep_prob: float, threshold: float) -> bool:
        """Whether a residual of this age stands in for a block: where it is skipped, or, with E-DiT's rule, where its
        gate is in a band above the threshold."""
        rule = self.config.rule
        if not age:
            return False
        if not keep:
            return self.config.skipped_reuse
        return rule is CacheRule.age or (rule is CacheRule.band and keep_prob <= threshold + self.config.band)

    def apply(self, key: Key, rows: Sequence[int], steps: Sequence[int], streams: Streams) -> Streams:
        """Streams (k,L,D) of the rows with what stands in for their residuals added.

        This is what the forecast makes of the last two. Without one it is the newest and, with a damping, what is left
        of their change a step: of 1 a line, as TaylorSeer forecasts features (2503.06923), less flattens with each step
        (damped trend, Gardner and McKenzie 1985).
        """
        bank, at, output = self._banks[key], list(zip(rows, steps, strict=True)), []
        newest = take_rows(bank.newest, rows)
        older = newest if bank.older is None else take_rows(bank.older, rows)
        for stream, (x, new, old) in enumerate(zip(streams, newest, older, strict=True)):
            if self.forecast is None:
                slopes = [self._slope(bank, row, step) for row, step in at]
                added = _between(old, new, [1 + s for s in slopes]) if any(slopes) else new
            else:
                shares = [
                    self.forecast(key[0], stream, step, bank.steps[row], bank.known_before(row))
                    for row, step in at
                ]
                of_newest, of_older = zip(*shares, strict=True)
                added = _scaled(new, of_newest)
                if any(of_older):
                    added = added + _scaled(old, of_older)
            output.append(x + added)
        return tuple(output)

    def store(
        self, key: Key, rows: Sequence[int], steps: Sequence[int], inputs: Streams, outputs: Streams
    ) -> None:
        """Keep outputs - inputs (each (k,L,D) a stream) of the rows, with their gradients."""
        found = tuple(y - x for x, y in zip(inputs, outputs, strict=True))
        bank = self._banks.get(key)
        if bank is None:
            nothing = tuple(r[:0] for r in found)
            bank = self._banks[key] = Bank([], [], nothing, nothing if self.config.extrapolates else None)
        bank.enlarge(rows[-1] + 1)
        index = rows_index(rows, found[0].device)
        if bank.older is not None:
            moved = zip(bank.older, bank.newest, strict=True)
            bank.older = tuple(put_rows(old, index, new[index]) for old, new in moved)
        exchanged = zip(bank.newest, found, strict=True)
        bank.newest = tuple(put_rows(whole, index, part) for whole, part in exchanged)
        for row, step in zip(rows, steps, strict=True):
            bank.before[row], bank.steps[row] = bank.steps[row], step

    def _slope(self, bank: Bank, row: int, step: int) -> float:
        """How many times the change between a row's two residuals is added to the newest."""
        gap = bank.steps[row] - bank.before[row]
        if not self.config.extrapolates or gap > self.config.longest + 1:
            return 0.0
        return damped_steps(step - bank.steps[row], self.dampings[step]) / gap


def damped_steps(age: int, damping: float) -> float:
    """Steps of a change that go on within `age` steps, where each keeps a share `damping` of the one before."""
    return float(age) if damping == 1 else damping * (1 - damping**age) / (1 - damping)


def _scaled(x: Tensor, values: Sequence[float]) -> Tensor:
    """x (k,L,D) with each row times its value, rounded once, to the format of x."""
    return (x * row_factor(values, x)).to(x.dtype)


def _between(old: Tensor, new: Tensor, shares: Sequence[float]) -> Tensor:
    """(k,L,D) each row's share of the way from old to new, rounded once, to their format."""
    return torch.lerp(old.float(), new.float(), row_factor(shares, new)).to(new.dtype)
