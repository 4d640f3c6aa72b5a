"""A rollout: a whole generation that routers learn from.

Its routes are hard, as in every generation. What the routers would have decided and what was executed are recorded
with gradients, so that a loss at the end of the generation reaches every decision of every step.

Axis letters: B samples, S steps, 2 branches of guidance, I blocks, K widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elastic3d.elastic.config import Scope
from elastic3d.elastic.context import RouteSource, StepContext
from elastic3d.elastic.families import BlockFlops
from elastic3d.elastic.router import RouteDecision
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.trace import SKIPPED, Trace

FREE = -1  # in place of an action: the router decides


@dataclass(eq=False)
class Rollout(RouteSource):
    """One generation of B samples.

    budget (B,): requested share of the dense FLOPs. routes (B,S,2,I) long: the action of each block, 0 skips, k in 1..K
    runs at width number k - 1, FREE leaves it to the router. `straight`: gradients pass straight through hard
    decisions (1308.3432), for which every block has to run for every sample; otherwise only what is executed is
    computed, and a loss at the end reaches no router. `passes`: the forward passes, once they ran, and `routed`: what
    the routers of the blocks decided in each.
    """

    uses_routers = True

    budget: Tensor
    routes: Tensor
    straight: bool = False
    passes: list[StepContext] = field(default_factory=list)
    routed: list[dict[int, RouteDecision]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.learns, self.budgets = self.straight, self.budget.tolist()

    @contextmanager
    def leading(self, session: ElasticSession) -> Iterator[None]:
        """While it lasts, a generation is this rollout."""
        if session.router_config.scope is Scope.step:
            raise ValueError("scope is step, expected block: in a rollout each block decides for itself")
        before, session.source = session.source, self
        try:
            yield
        finally:
            session.source = before

    def decide(self, context: StepContext, block: int, routed: RouteDecision | None) -> RouteDecision:
        """The route of every row through a block: forced, or what its router decides."""
        assert routed is not None
        if not self.passes or self.passes[-1] is not context:
            self.passes.append(context)
            self.routed.append({})
        branch, sample = torch.tensor(context.rows, device=self.routes.device).T
        step = torch.tensor(context.steps, device=self.routes.device)
        self.routed[-1].setdefault(block, routed)
        action = self.routes[sample, step, branch, block].to(routed.keep.device)
        return forced(action != FREE, action > SKIPPED, (action - 1).clamp_min(0), routed)

    # --------------------------------------------------------------------------------- after the generation

    def ran(self) -> Tensor:
        """(S,2) bool: the branches that ran at each step."""
        found = torch.zeros(self.routes.shape[1:3], dtype=torch.bool)
        for context in self.passes:
            for step, (branch, _) in zip(context.steps, context.rows, strict=True):
                found[step, branch] = True
        return found.to(self.budget.device)

    def executed(self) -> RouteDecision:
        """What was executed, by (B,S,2,I); where a branch did not run, its blocks count as skipped."""
        return self._table([context.decisions for context in self.passes])

    def proposed(self) -> RouteDecision:
        """What the routers decided, also where another route was forced, by (B,S,2,I)."""
        return self._table(self.routed)

    def actions(self) -> Tensor:
        """(B,S,2,I) long: what was executed, FREE where a branch did not run."""
        done = self.executed()
        return torch.where(self.ran()[:, :, None], done.keep * (1 + done.width), FREE)

    def share(self, trace: Trace) -> Tensor:
        """Executed share (B,) of the dense blocks' FLOPs, with straight-through gradients to the routers; `trace` is
        that of this generation."""
        flops, done, ran = trace.flops[0], self.executed(), self.ran()
        blocks = [RouteDecision(*(part.select(3, i) for part in done)) for i in sorted(flops)]
        costs = [
            decision_flops(one, flops[i], trace.ratios) for one, i in zip(blocks, sorted(flops), strict=True)
        ]
        passes = 2 * len(ran) if trace.one_branch else int(ran.sum())
        return torch.stack(costs).sum((0, 2, 3)) / (passes * sum(block.dense for block in flops.values()))

    def log_likelihood(self) -> Tensor:
        """Mean over the cells that ran of the log-probability (B,) that the routers give to what was executed."""
        proposed, actions, ran = self.proposed(), self.actions(), self.ran()[:, :, None]
        gate = proposed.keep_prob.clamp(1e-6, 1 - 1e-6)
        width = (actions - 1).clamp_min(0)[..., None]
        chosen = proposed.width_prob.clamp_min(1e-6).gather(-1, width)[..., 0]
        each = torch.where(actions > SKIPPED, gate.log() + chosen.log(), (1 - gate).log())
        return (each * ran).sum((1, 2, 3)) / (ran.sum() * actions.shape[-1])

    def _table(self, by_pass: Sequence[dict[int, RouteDecision]]) -> RouteDecision:
        """Decisions of all passes by (B,S,2,I)."""
        B, S, _, I = self.routes.shape  # noqa: E741
        first = next(iter(by_pass[0].values()))
        none = first.width.new_zeros(B, I)
        nothing = RouteDecision.fixed(none.bool(), none, first.width_prob.shape[-1])
        cells = [[nothing, nothing] for _ in range(S)]
        for context, decisions in zip(self.passes, by_pass, strict=True):
            whole = _stacked([decisions[index] for index in range(I)], dim=1)  # (rows, I)
            for start in range(0, len(context.rows), B):
                branch, step = context.rows[start][0], context.steps[start]
                cells[step][branch] = RouteDecision(*(part[start : start + B] for part in whole))
        return _stacked([_stacked(pair, dim=1) for pair in cells], dim=1)


def forced(where: Tensor, keep: Tensor, width: Tensor, routed: RouteDecision) -> RouteDecision:
    """`routed`, but for the rows (B,) bool `where` another route, keep and width (B,), is certain."""
    certain = RouteDecision.fixed(keep, width, routed.width_prob.shape[-1])
    shapes = [(-1, *[1] * (part.ndim - 1)) for part in routed]
    parts = zip(shapes, certain, routed, strict=True)
    return RouteDecision(*(torch.where(where.view(shape), sure, free) for shape, sure, free in parts))


def _stacked(decisions: Sequence[RouteDecision], dim: int) -> RouteDecision:
    """Several as one, along a new axis that comes after that of the samples."""
    return RouteDecision(*(torch.stack(part, dim=dim) for part in zip(*decisions, strict=True)))


def decision_flops(decision: RouteDecision, block: BlockFlops, ratios: tuple[float, ...]) -> Tensor:
    """Executed FLOPs (B,) of one block: hard values, straight-through gradients to gates and widths."""
    # no matrix product, which autocast would round
    ratio = (decision.hard_width() * decision.width_prob.new_tensor(ratios)).sum(-1)
    return decision.hard_keep() * (block.fixed + block.mlp * ratio)
