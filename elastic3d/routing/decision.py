"""What a router decides for one block: B samples, K nested widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouteDecision:
    """One route per sample through one block.

    keep (B,) bool: run the block; width (B,) long in [0, K): index of the MLP's nested width. keep_prob (B,)
    and width_prob (B,K) are what they were taken from, and carry the gradient.
    """

    keep: Tensor
    width: Tensor
    keep_prob: Tensor
    width_prob: Tensor

    def on_host(self) -> list[list[float]]:
        """keep_prob, width and keep as lists; waits for the device, once."""
        return torch.stack([self.keep_prob, self.width.float(), self.keep.float()]).tolist()

    @staticmethod
    def from_logits(logits: Tensor, threshold: float, urgency: Tensor | None = None) -> RouteDecision:
        """logits (B, 1 + K), the gate first; a block is kept where sigmoid(gate) > threshold (E-DiT, tau).

        `urgency` (B,) is added to the gate.
        """
        logits = logits.float()
        gate = logits[:, 0] if urgency is None else logits[:, 0] + urgency
        keep_prob = gate.sigmoid()
        width_prob = logits[:, 1:].softmax(dim=-1)
        return RouteDecision(keep_prob > threshold, width_prob.argmax(dim=-1), keep_prob, width_prob)

    @staticmethod
    def fixed(keep: Tensor, width: Tensor, widths: int) -> RouteDecision:
        """A route that nobody computed: keep (B,) bool and width (B,) long, with certain probabilities."""
        width_prob = torch.nn.functional.one_hot(width, widths).float()
        return RouteDecision(keep, width, keep.float(), width_prob)

    def opened(self, rows: Tensor) -> RouteDecision:
        """The same, but rows (B,) bool run at full width whatever the router says, which then learns nothing there."""
        full = self.width_prob.shape[-1] - 1
        sure = torch.nn.functional.one_hot(torch.full_like(self.width, full), full + 1)
        return RouteDecision(
            self.keep | rows,
            self.width.masked_fill(rows, full),
            torch.where(rows, 1.0, self.keep_prob),
            torch.where(rows[:, None], sure.to(self.width_prob.dtype), self.width_prob),
        )

    def at_full_width(self) -> RouteDecision:
        """The same gates, every kept block at its full width."""
        widths = self.width_prob.shape[-1]
        full = torch.full_like(self.width, widths - 1)
        prob = torch.nn.functional.one_hot(full, widths).to(self.width_prob.dtype)
        return replace(self, width=full, width_prob=prob)


def interpolated(x: Tensor, at: Sequence[float], values: Sequence[float]) -> Tensor:
    """Values (B,) at x (B,): linear between those at the ascending positions `at`, constant outside."""
    knots, found = x.new_tensor(at), x.new_tensor(values)
    if len(at) == 1:
        return found.expand_as(x)
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(at) - 1)
    low, high = knots[right - 1], knots[right]
    share = ((x - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    return torch.lerp(found[right - 1], found[right], share)
