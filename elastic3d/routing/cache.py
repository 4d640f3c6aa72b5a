"""Residuals of blocks, kept from one sampling step to later ones.

The state is explicit: an entry belongs to one generation, guidance branch, block and sample, and there is at
most one for each, so that memory is bounded by the residuals of one dense pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic3d.config.routing import BlockCacheConfig, CacheRule

Key = tuple[int, int, int, int]  # generation, branch, block, sample


@dataclass(frozen=True)
class Entry:
    """A residual: the step that computed it, one (L,D) tensor a stream, a probe of the block's input then, and, where
    its change is continued, how much it changes a step."""

    step: int
    residuals: tuple[Tensor, ...]
    probe: Tensor | None
    change: tuple[Tensor, ...] | None = None


class ResidualCache:
    """Entries and the policy that says when one may stand in for a block."""

    def __init__(self, config: BlockCacheConfig, steps: int) -> None:
        self.config = config
        self.first_step = math.ceil(config.start * steps)
        self._entries: dict[Key, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Memory of all entries."""
        tensors = [
            t
            for e in self._entries.values()
            for t in (*e.residuals, *(e.change or ()), e.probe)
            if t is not None
        ]
        return sum(t.numel() * t.element_size() for t in tensors)

    def alive(self, key: Key, step: int) -> bool:
        """Whether there is a residual for `key` that is young enough for `step`."""
        return self.age(key, step) > 0

    def age(self, key: Key, step: int) -> int:
        """Steps since the living residual for `key` was computed, 0 without one."""
        entry = self._entries.get(key)
        if entry is None or step < self.first_step or step - entry.step > self.config.longest:
            return 0
        return step - entry.step

    def drift(self, keys: Sequence[Key], streams: Sequence[Tensor]) -> Tensor | None:
        """Relative L1 change (B,) of the first stream since each entry was computed; infinite without an
        entry.

        None where the rule needs none.
        """
        if self.config.rule is not CacheRule.drift:
            return None
        probe = self._probe(streams)
        entries = [self._entries.get(key) for key in keys]
        drift = probe.new_full((len(keys),), math.inf)
        known = [row for row, entry in enumerate(entries) if entry is not None and entry.probe is not None]
        if known:
            before = torch.stack([entries[row].probe for row in known])  # type: ignore[misc, union-attr]
            change = (probe[known] - before).abs().sum((1, 2)) / before.abs().sum((1, 2))
            drift[known] = change
        return drift

    def reuse(self, key: Key, step: int, keep_prob: float, threshold: float, drift: float) -> bool:
        """Whether the residual of `key` stands in for a block with this gate and this change of its input."""
        if not self.alive(key, step):
            return False
        if keep_prob <= threshold:
            return self.config.closed_reuse
        if self.config.rule is CacheRule.age:
            return True
        if self.config.rule is CacheRule.band:
            return keep_prob <= threshold + self.config.band
        return self.config.rule is CacheRule.drift and drift < self.config.drift

    def residuals(self, keys: Sequence[Key], step: int) -> tuple[Tensor, ...]:
        """What stands in for the residuals of `keys` at `step`: a batch (k,L,D) a stream.

        The newest ones, or (`order` 1) these and their change a step times their age, as TaylorSeer forecasts features
        (2503.06923).
        """
        rows = [_forecast(self._entries[key], step) for key in keys]
        return tuple(torch.stack(stream) for stream in zip(*rows, strict=True))

    def store(
        self, keys: Sequence[Key], step: int, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        """Keep outputs - inputs (each (k,L,D) a stream) for `keys`, in tensors of their own."""
        probe = self._probe(inputs) if self.config.rule is CacheRule.drift else None
        for row, key in enumerate(keys):
            residuals = tuple((y[row] - x[row]).detach() for x, y in zip(inputs, outputs, strict=True))
            kept = None if probe is None else probe[row].detach().clone()
            self._entries[key] = Entry(step, residuals, kept, self._change(key, step, residuals))

    def _change(self, key: Key, step: int, residuals: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """How much the residuals of `key` changed a step since those before, if those lived until now."""
        before = self._entries.get(key)
        if not self.config.order or before is None or step - before.step > self.config.longest + 1:
            return None
        return tuple((r - b) / (step - before.step) for r, b in zip(residuals, before.residuals, strict=True))

    def _probe(self, streams: Sequence[Tensor]) -> Tensor:
        return streams[0][:, :: self.config.probe_stride]


def _forecast(entry: Entry, step: int) -> tuple[Tensor, ...]:
    """The residuals of an entry, continued to `step`."""
    if entry.change is None:
        return entry.residuals
    age = step - entry.step
    return tuple(r + age * change for r, change in zip(entry.residuals, entry.change, strict=True))
