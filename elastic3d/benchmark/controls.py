"""Routes of controls, which know less than routers do at the same FLOPs: drawn, fixed, or of the timestep alone.

Axis letters: S steps, 2 guidance branches, B samples, I blocks, A actions: skipped, then the widths, of which the last
is full. `costs` (..., I,A) are the FLOPs of each action of each block, 0 where it does not run.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from elastic3d.elastic.context import RouteSource, StepContext
from elastic3d.elastic.router import RouteDecision
from elastic3d.elastic.trace import NOT_RUN, SKIPPED
from elastic3d.training.routes import fill

Error = Callable[[Tensor], float]  # of fixed routes (I,)


def random_routes(costs: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Actions (S,K,I) of one sample: blocks at full width, drawn without replacement until `share` of the `costs`
    (S,K,I,A) is executed."""
    order = torch.rand(costs.shape[:-1], generator=rng)
    return fill(order, torch.full(order.shape, costs.shape[-1] - 1), costs, share)


def timestep_routes(actions: Tensor, costs: Tensor, share: float) -> Tensor:
    """Routes (S,2,I) that depend on the timestep, branch and block alone, from recorded ones (S,2,B,I).

    The cells that most samples kept are kept, at the mean width of those that did, until `share` of the `costs`
    (S,2,I,A) is executed.
    """
    actions = actions.long()
    kept = actions > SKIPPED
    count = kept.sum(dim=2)
    mean, full = (actions * kept).sum(dim=2) / count.clamp_min(1), costs.shape[-1] - 1
    width = torch.where(count > 0, mean.round().long(), full)
    # of cells that as many samples kept, the widest come first
    return fill(count + mean / (2 * full), width, costs, share)


def greedy_static(error: Error, costs: Tensor, lowest: float) -> list[tuple[float, Tensor]]:
    """A path of fixed routes (I,) from the dense model down to a `lowest` executed share: [(share, routes), ...].

    From each to the next, one block is skipped or narrowed by one width: the change that adds the least to `error` for
    each FLOP it saves. `error` takes routes (I,). Lazy greedy (Minoux 1978): costs are measured
    again from the lowest on until one stays the lowest, since skipping more makes them rise.
    """
    routes = torch.full((len(costs),), costs.shape[1] - 1)
    now, share = error(routes), 1.0
    path = [(share, routes)]
    smaller = {SKIPPED, costs.shape[1] - 2}
    # (error added for each FLOP saved, error after the change, changes made when it was measured, block, action)
    heap = [(-math.inf, now, -1, block, action) for block in range(len(costs)) for action in smaller]
    heapq.heapify(heap)
    with tqdm(desc=f"static routes down to {lowest:.2f}", unit="change", dynamic_ncols=True) as bar:
        while share > lowest and heap:
            _, after, measured, block, action = heapq.heappop(heap)
            if action >= routes[block]:
                continue  # of a block that is narrower by now
            changed = routes.clone()
            changed[block] = action
            if measured < len(path):
                after = error(changed)
                threshold = (after - now) / float(costs[block, routes[block]] - costs[block, action])
                heapq.heappush(heap, (threshold, after, len(path), block, action))
                continue
            now, routes, share = after, changed, executed_share(changed, costs)
            path.append((share, routes))
            bar.update()
            if action > SKIPPED + 1:
                heapq.heappush(heap, (-math.inf, now, -1, block, action - 1))
    return path


def executed_share(actions: Tensor, costs: Tensor) -> float:
    """Share of the dense blocks' FLOPs that actions (..., I) execute; passes that did not run count nowhere."""
    costs = costs.expand(*actions.shape, -1)
    executed = costs.gather(-1, actions.long().clamp_min(SKIPPED)[..., None]).sum()
    return float(executed / costs[..., -1][actions != NOT_RUN].sum())


class TableRoutes(RouteSource):
    """Plays back actions (S,2,B,I): steps, branches, samples, blocks; an axis of length 1 holds for all.

    0 skips, k in 1..K runs at width number k - 1. A route shuffled between samples, a static mask and a
    timestep-only schedule are all tables.
    """

    def __init__(self, actions: Tensor, widths: int) -> None:
        low, high = int(actions.min()), int(actions.max())
        if low < 0 or high > widths:
            raise ValueError(f"actions from {low} to {high}, expected 0 to {widths}")
        self.actions, self.widths = actions.long(), widths
        self.alike = bool((actions == actions[..., :1]).all())

    def decide(self, context: StepContext, block: int, routed: RouteDecision | None) -> RouteDecision:
        """The route of every row of a pass through one block."""
        rows = [(step, *row) for step, row in zip(context.steps, context.rows, strict=True)]
        on_axes = torch.tensor(self.actions.shape[:3]) > 1
        index = (torch.tensor(rows) * on_axes).T  # 0 on an axis of length 1
        actions = self.actions[(*index, block)].to(context.t.device)
        return RouteDecision.fixed(actions > 0, (actions - 1).clamp_min(0), self.widths)
