"""Decisions without routers: routes from a table, and controls that know less than routers do at the same FLOPs.

All are actions as `TableRoutes` plays them back: 0 skips, k in 1..K runs at width number k - 1. Axis letters: S steps,
2 guidance branches, B samples, I blocks.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic3d.elastic.context import StepContext
from elastic3d.elastic.family import BlockFlops
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


def as_one(blocks: Sequence[BlockFlops]) -> BlockFlops:
    """Blocks that are decided together."""
    return BlockFlops(sum(block.fixed for block in blocks), sum(block.mlp for block in blocks))


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


def random_routes(
    blocks: Sequence[BlockFlops],
    ratios: Sequence[float],
    steps: int,
    branches: int,
    share: float,
    generator: torch.Generator,
) -> Tensor:
    """Actions (S,2,I) of one sample: blocks at full width, drawn without replacement until `share` is executed."""
    ran = torch.zeros(steps, 2, len(blocks), dtype=torch.bool)
    ran[:, :branches] = True
    order = torch.rand(ran.shape, generator=generator)
    return _fill(order, torch.full(ran.shape, len(ratios)), ran, blocks, ratios, share)


def routes_around(
    sensitivity: Tensor,
    blocks: Sequence[BlockFlops],
    ratios: Sequence[float],
    share: float,
    spread: float,
    generator: torch.Generator,
) -> Tensor:
    """Actions (S,2,I) of one sample, the same in both branches: the cells that matter least are skipped or narrow,
    until about `share` is executed.

    sensitivity: (S,I), the logarithm of the error at the end of a generation that skipping each block alone causes.
    Gumbel noise of `spread` times its standard deviation is added, so that routes differ: 0 gives the best table by
    timestep. With it, what is saved is divided at random between blocks that are skipped and MLPs that are narrowed.
    """
    chance = torch.rand((), generator=generator).item() * min(1.0, 2 * (1 - share)) * (spread > 0)
    narrow = torch.rand(sensitivity.shape, generator=generator) < chance
    width = torch.randint(1, len(ratios) + 1, sensitivity.shape, generator=generator)
    action = torch.where(narrow, width, len(ratios))
    noise = -torch.rand(sensitivity.shape, generator=generator).clamp(1e-9, 1 - 1e-7).log().neg().log()
    scale = sensitivity.std(unbiased=False).item() or 1.0
    priority = (sensitivity + spread * scale * noise - sensitivity.min() + 1e3)[:, None].expand(-1, 2, -1)
    ran = torch.zeros(priority.shape, dtype=torch.bool)
    ran[:, 0] = True  # one branch stands for both
    found = _fill(priority, action[:, None].expand_as(priority), ran, blocks, ratios, share)
    return found[:, :1].expand(-1, 2, -1).contiguous()


def timestep_routes(
    actions: Tensor, blocks: Sequence[BlockFlops], ratios: Sequence[float], share: float
) -> Tensor:
    """Routes (S,2,I) that depend on the timestep, branch and block alone, from recorded ones (S,2,B,I).

    The cells that most samples kept are kept, at the mean width of those that did, until `share` is executed.
    """
    actions = actions.long()
    ran = (actions != NOT_RUN).all(dim=2)
    kept = actions > SKIPPED
    count = kept.sum(dim=2)
    mean = (actions * kept).sum(dim=2) / count.clamp_min(1)
    width = torch.where(count > 0, mean.round().long(), len(ratios))
    # of cells that as many samples kept, the widest come first
    return _fill(count + mean / (2 * len(ratios)), width, ran, blocks, ratios, share)


def _fill(
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


def greedy_static(
    error: Callable[[Tensor], float],
    blocks: Sequence[BlockFlops],
    ratios: Sequence[float],
    lowest: float,
    on_change: Callable[[float], None] = lambda share: None,
) -> list[tuple[float, Tensor]]:
    """A path of fixed routes (I,) from the dense model down to a `lowest` executed share: [(share, routes), ...].

    From each to the next, one block is skipped or narrowed by one width: the change that adds the least to `error` for
    each FLOP it saves. `error` takes routes (I,); `on_change` is called with each new share. Lazy greedy (Minoux 1978):
    costs are measured again from the lowest on until one stays the lowest, since skipping more makes them rise.
    """
    table = action_flops(blocks, ratios)
    routes = torch.full((len(blocks),), len(ratios))
    now, share = error(routes), 1.0
    path = [(share, routes)]
    # (error added for each FLOP saved, error after the change, changes made when it was measured, block, action)
    heap = [
        (-math.inf, now, -1, i, action) for i in range(len(blocks)) for action in (SKIPPED, len(ratios) - 1)
    ]
    heap = list(dict.fromkeys(heap))
    heapq.heapify(heap)
    while share > lowest and heap:
        _, after, measured, block, action = heapq.heappop(heap)
        if action >= routes[block]:
            continue  # of a block that is narrower by now
        changed = routes.clone()
        changed[block] = action
        if measured < len(path):
            after = error(changed)
            threshold = (after - now) / float(table[block, routes[block]] - table[block, action])
            heapq.heappush(heap, (threshold, after, len(path), block, action))
            continue
        now, routes = after, changed
        share = float(table[torch.arange(len(blocks)), routes].sum() / table[:, -1].sum())
        path.append((share, routes))
        on_change(share)
        if action > SKIPPED + 1:
            heapq.heappush(heap, (-math.inf, now, -1, block, action - 1))
    return path


def nearest_share(path: Sequence[tuple[float, Tensor]], share: float) -> Tensor:
    """Of a path of routes, those whose executed share is nearest to `share`."""
    return min(path, key=lambda entry: abs(entry[0] - share))[1]
