"""Routes that are drawn: for a base model that learns to do without some of itself, and around a measured table; and
rollouts, whole generations that routers learn from.

Routers pay only on a base whose blocks have met missing neighbours and narrow MLPs (E-DiT, 2602.13993, trains the base
along). The sandwich rule of slimmable networks (1903.05134) keeps the full model whole: in every batch, of every four
groups of samples one takes the full route, one the smallest, two something between. Blocks that are left out are not
computed, so an elastic batch is also cheaper than a full one.

The routes of a rollout are hard, as in every generation. What the routers would have decided and what was executed are
recorded with gradients, so that a loss at the end of the generation reaches every decision of every step.

Axis letters: B samples, S steps, 2 branches of guidance, I blocks, K widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from elastic3d.elastic import attach
from elastic3d.elastic.config import ElasticConfig, RouterConfig, Scope
from elastic3d.elastic.context import Branch, RouteSource, StepContext
from elastic3d.elastic.families import BlockFlops
from elastic3d.elastic.router import RouteDecision
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.trace import SKIPPED, Trace
from elastic3d.errors import UserError
from elastic3d.utils.files import Number, load_json, printable, save_json
from elastic3d.utils.options import Options, option

WIDTHS = 4
KINDS = 4  # of groups: full, smallest, two between
BANDS = 4  # of times: a group's samples lie in one, so that the blocks it leaves out can suit them
FIRST_BLOCKS = (0.15, 0.4)  # how readily the first blocks are left out, against 1 in the middle
LAST_BLOCK = (0.6, 0.1)  # the last block at the earliest and at the latest times
LATE_BLOCKS = 0.8  # how much more readily late blocks are left out than early ones, at early times
_TABLE = {
    "blocks": [str],
    "times": [Number(0, 1)],
    "full": Number(0, 1e9),
    "errors": [[Number(0, 1e9)]],
    "measured": dict,
}
FREE = -1  # in place of an action: the router decides
LEAST_EXCESS = 0.02  # of the full route's error: what is smaller is noise


@dataclass(kw_only=True)
class RandomRoutesConfig(Options):
    """Routes that are drawn while the base model trains."""

    smallest: float = option(
        1.0,
        "share of the blocks' width and number that the smallest route keeps; 1: all samples run all",
        gt=0,
        le=1,
    )
    group: int = option(
        8,
        "consecutive samples, at most a quarter of the batch, that share a route and a quarter of the times, which"
        " shifts what blocks are left out and not how many; 1: each has its own",
        ge=1,
        le=1 << 16,
    )

    @property
    def active(self) -> bool:
        """Whether anything is left out."""
        return self.smallest < 1


def draw(
    config: RandomRoutesConfig, blocks: int, batch: int, position: int, seed: int, rng: np.random.Generator
) -> tuple[float, NDArray[np.int64]]:
    """What sample `position` of a stream is trained at: the quantile of its time, in [0,1), and its route (I,).

    A route has 0 where a block is skipped, else 1 + the number of its MLP's width. `rng` is the sample's own, the
    group's follows from the seed.
    batch: samples of an optimizer step, `KINDS` at least. Each begins with a group of the full route.
    """
    size = min(config.group, batch // KINDS)
    group, place = divmod(position % batch, size)
    shared = np.random.default_rng([seed, position - place, 7])
    band = int(shared.integers(BANDS))
    route = draw_route(group % KINDS, (band + 0.5) / BANDS, blocks, config.smallest, shared)
    return (band + rng.random()) / BANDS, route


def draw_route(
    kind: int, time: float, blocks: int, smallest: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """A route (I,) of a kind: 0 full, 1 smallest, else between; about its share of the blocks' FLOPs.

    time: in [0,1], which shifts what blocks are left out, and not how many.
    What is saved is divided at random between blocks that are skipped and MLPs that are narrowed. The first two blocks,
    and the last one at late times, are dear (measured on the bundled model, as E-DiT reports) and mostly stay.
    """
    full = np.full(blocks, WIDTHS)
    if kind == 0:
        return full
    share = smallest if kind == 1 else float(rng.uniform(smallest, 1.0))
    # narrow MLPs save a quarter of a block on average, so that much has to be saved by skipping at least
    least = max(0.3 * (1 - share), (0.75 - share) / 0.75)
    skipped = float(rng.uniform(least, 1 - share))
    weight = 1 + LATE_BLOCKS * (1 - time) * np.linspace(-0.5, 0.5, blocks)
    weight[: len(FIRST_BLOCKS)] *= FIRST_BLOCKS[:blocks]
    weight[-1] *= LAST_BLOCK[0] + time * (LAST_BLOCK[1] - LAST_BLOCK[0])
    count = round(skipped * blocks)
    order = np.argsort(-np.log(rng.random(blocks)) / weight)  # drawn without replacement, by weight
    route = full.copy()
    route[order[:count]] = 0
    # an MLP has about half of a block's FLOPs; what is left to save is saved by narrowing as many as it takes
    left, kept = (1 - share) * blocks - count, order[count:]
    for index in rng.permutation(kept):
        if left <= 0:
            break
        width = int(rng.integers(1, WIDTHS))
        route[index] = width
        left -= 0.5 * (1 - width / WIDTHS)
    return route


class RandomRoutes(RouteSource):
    """Runs a model along given routes, with gradients to all of it; at all other times it is the dense model."""

    def __init__(self, model: nn.Module) -> None:
        self.session = attach(model, RouterConfig(scope=Scope.block, widths=WIDTHS, longest=0), self)
        self.session.settings = ElasticConfig(elastic=False)
        self._routes = torch.zeros(0, 0)

    def announce(self, routes: Tensor) -> None:
        """The next forward pass takes routes (B,I)."""
        self._routes = routes
        self.session.settings = ElasticConfig()
        self.session.begin(len(routes), 1)
        self.session.step(0, 1.0, (Branch.conditional,))

    def leave(self) -> None:
        """From now on the model is the dense one."""
        self.session.settings = ElasticConfig(elastic=False)

    def decide(self, context: StepContext, block: int, routed: RouteDecision | None) -> RouteDecision:
        """The route of every row through one block."""
        actions = self._routes[:, block].to(context.t.device)
        return RouteDecision.fixed(actions > 0, (actions - 1).clamp_min(0), WIDTHS)


@dataclass(frozen=True)
class Sensitivity:
    """blocks: I names; times: S, where steps begin; full: relative squared error of the last latents with every block;
    errors (S,I): with one block left out at one step; measured: on what."""

    blocks: Sequence[str]
    times: Sequence[float]
    full: float
    errors: Sequence[Sequence[float]]
    measured: dict[str, Any]

    def at(self, times: Sequence[float]) -> Tensor:
        """(S,I) for steps at other times: logarithms of what leaving out adds to the error, linear between times."""
        excess = np.maximum(np.asarray(self.errors) - self.full, LEAST_EXCESS * self.full)
        table = np.log(np.maximum(excess, 1e-12))
        columns = [np.interp(times, self.times, column) for column in table.T]
        return torch.from_numpy(np.stack(columns, axis=1)).float()

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all."""
        save_json({name: getattr(self, name) for name in _TABLE}, path)


def load_sensitivity(path: Path | None, blocks: Sequence[str]) -> Sensitivity | None:
    """The table in a file, None for none; UserError unless it is of a model with these blocks."""
    if path is None:
        return None
    values = load_json(path, _TABLE)
    found = Sensitivity(**{name: values[name] for name in _TABLE})
    if list(found.blocks) != list(blocks):
        raise UserError(
            f"{printable(path)} is of a model with {len(found.blocks)} blocks, {', '.join(found.blocks[:2])}, ...,"
            f" expected the {len(blocks)} of this one, {', '.join(blocks[:2])}, ..."
        )
    shape = (len(found.errors), {len(row) for row in found.errors})
    if list(found.times) != sorted(set(found.times)) or shape != (len(found.times), {len(found.blocks)}):
        raise UserError(
            f"{printable(path)}: errors and times do not belong together, expected ascending times, a row of errors for"
            f" each, and {len(found.blocks)} errors in a row"
        )
    return found


def fill(priority: Tensor, action: Tensor, costs: Tensor, share: float) -> Tensor:
    """Give cells (S,K,I) their `action`, highest priority first, while this brings the executed share nearer. `costs`
    (S,K,I,A): FLOPs of each action of a cell as `action_flops` orders them, or a multiple; 0 where it does not run."""
    cost, dense = costs.gather(-1, action[..., None]).flatten(), costs[..., -1]
    target, ran = share * float(dense.sum()), dense > 0
    order = priority.masked_fill(~ran, -1).flatten().argsort(descending=True, stable=True)
    # a cell is taken where more than half of it still fits
    taken = (cost[order].cumsum(0) - cost[order] / 2 < target) & ran.flatten()[order]
    routes = torch.zeros(action.numel(), dtype=torch.long)
    routes[order[taken]] = action.flatten()[order[taken]]
    return routes.view(action.shape)


def action_flops(blocks: Sequence[BlockFlops], ratios: Sequence[float]) -> Tensor:
    """FLOPs (I, 1 + K) fp64 of each action of each block, skipping first."""
    return torch.tensor([[0.0, *(b.at(ratio) for ratio in ratios)] for b in blocks], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------- rollouts


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
        proposed, actions, ran = self._table(self.routed), self.actions(), self.ran()[:, :, None]
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
