"""Decisions without routers: routes from a table.

They are actions as `TableRoutes` plays them back: 0 skips, k in 1..K runs at width number k - 1. Axis letters: S steps,
2 guidance branches, B samples, I blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic3d.elastic.context import StepContext
from elastic3d.elastic.families import BlockFlops
from elastic3d.elastic.router import RouteDecision
from elastic3d.elastic.trace import NOT_RUN, SKIPPED


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

    def begin(self, steps: int, times: Sequence[float], budgets: Sequence[float]) -> None:
        """A table is the same in every generation."""

    def decide(self, context: StepContext, block: int) -> RouteDecision:
        """The route of every row of a pass through one block."""
        steps, branches, samples, _ = self.actions.shape
        picked = [
            self.actions[
                step if steps > 1 else 0, branch if branches > 1 else 0, sample if samples > 1 else 0, block
            ]
            for step, (branch, sample) in zip(context.steps, context.rows, strict=True)
        ]
        actions = torch.stack(picked).to(context.t.device)
        return RouteDecision.fixed(actions > 0, (actions - 1).clamp_min(0), self.widths)


def action_flops(blocks: Sequence[BlockFlops], ratios: Sequence[float]) -> Tensor:
    """FLOPs (I, 1 + K) fp64 of each action of each block, skipping first."""
    return torch.tensor([[0.0, *(b.at(ratio) for ratio in ratios)] for b in blocks], dtype=torch.float64)


def executed_share(actions: Tensor, blocks: Sequence[BlockFlops], ratios: Sequence[float]) -> float:
    """Share of the dense blocks' FLOPs that actions (..., I) execute; passes that did not run count nowhere."""
    actions = actions.long()
    table, index = action_flops(blocks, ratios), torch.arange(len(blocks))
    executed = table[index, actions.clamp_min(SKIPPED)].sum()
    dense = ((actions != NOT_RUN).double() * table[:, -1]).sum()
    return float(executed / dense)


def fill(
    priority: Tensor,
    action: Tensor,
    ran: Tensor,
    blocks: Sequence[BlockFlops],
    ratios: Sequence[float],
    share: float,
) -> Tensor:
    """Give cells (S,2,I) their `action`, highest priority first, while this brings the executed share nearer."""
    table = action_flops(blocks, ratios)
    cost = (table[torch.arange(len(blocks)), action] * ran).flatten()
    target = share * float((ran.double() * table[:, -1]).sum())
    order = priority.masked_fill(~ran, -1).flatten().argsort(descending=True, stable=True)
    # a cell is taken where more than half of it still fits
    taken = (cost[order].cumsum(0) - cost[order] / 2 < target) & ran.flatten()[order]
    routes = torch.zeros(action.numel(), dtype=torch.long)
    routes[order[taken]] = action.flatten()[order[taken]]
    return routes.view(action.shape)
