"""Routes from a table instead of from routers: for replaying, for controls, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic3d.routing.decision import RouteDecision
from elastic3d.routing.passes import Pass
from elastic3d.routing.trace import SKIPPED, Trace


class TableRoutes:
    """Plays back actions (S,2,B,I): steps, branches, samples, blocks; an axis of length 1 holds for all.

    0 skips, k in 1..K runs at width number k - 1. A route shuffled between samples, a static mask and a
    timestep-only schedule are all tables.
    """

    def __init__(self, actions: Tensor, widths: int) -> None:
        if actions.ndim != 4:
            raise ValueError(
                f"actions have {actions.ndim} axes, expected 4: steps, branches, samples, blocks"
            )
        if actions.min() < 0 or actions.max() > widths:
            raise ValueError(
                f"actions from {int(actions.min())} to {int(actions.max())}, expected 0 to {widths}"
            )
        self.actions, self.widths = actions.long(), widths
        self.alike = bool((actions == actions[..., :1]).all())

    @staticmethod
    def from_trace(trace: Trace) -> TableRoutes:
        """The routes of a generation; reused residuals and passes that did not run count as skipped."""
        return TableRoutes(trace.actions.clamp_min(SKIPPED), len(trace.ratios))

    def decide(self, current: Pass, block: int) -> RouteDecision:
        """The route of every row of `current` through one block."""
        steps, branches, samples, _ = self.actions.shape
        picked = [
            self.actions[
                step if steps > 1 else 0, branch if branches > 1 else 0, sample if samples > 1 else 0, block
            ]
            for step, (branch, sample) in zip(current.when.steps, current.rows, strict=True)
        ]
        actions = torch.stack(picked).to(current.situation.t.device)
        return RouteDecision.fixed(actions > 0, (actions - 1).clamp_min(0), self.widths)
