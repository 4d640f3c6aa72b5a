"""Controls, which know less than routers do at the same FLOPs: routes of calibration items, of other items, of chance.

Axis letters: S steps, 2 guidance branches, B samples, I blocks. A `table` (I,1+K) is the FLOPs of each action of each
block: skipped, then the K widths.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from elastic3d.benchmark.methods import CALIBRATED, MAIN, NO_CACHE, Job, Planner, Routes, Run
from elastic3d.elastic.config import Branches, ElasticConfig, RouterConfig, Scope
from elastic3d.elastic.context import RouteSource, StepContext
from elastic3d.elastic.families import BlockFlops
from elastic3d.elastic.router import RouteDecision
from elastic3d.elastic.trace import NOT_RUN, SKIPPED, parse_actions
from elastic3d.training.calibration import relative_error
from elastic3d.training.routes import action_flops, fill
from elastic3d.utils.files import load_json, save_json


class Trials(Protocol):
    """What controls need of a task (see `task`): items, and what runs make of them."""

    planner: Planner
    items: list[Any]

    def find_items(self, path: Path) -> list[Any]: ...
    def condition_of(self, run: Run, jobs: Sequence[Job]) -> Any: ...
    def ready(self, run: Run, source: RouteSource | None = None) -> AbstractContextManager[None]: ...
    def sample(self, run: Run, condition: Any, jobs: Sequence[Job]) -> Tensor: ...
    def make(self, run: Run, jobs: Sequence[Job]) -> None: ...
    def record(self, run: Run, job: Job) -> dict[str, Any] | None: ...


class Controls:
    """Route tables for the runs that have one. What is computed is kept in `<output>/tables`."""

    def __init__(self, task: Trials) -> None:
        self.task, self.planner, self.config = task, task.planner, task.planner.config
        self.session = self.planner.models[MAIN].session
        self.router = self.session.router_config if self.session is not None else RouterConfig()
        path, seeds = self.config.calibration, self.config.seeds
        chosen = (task.find_items(path) if path else task.items)[: self.config.calibration_samples]
        self.calibration = [Job(item, seeds[i % len(seeds)]) for i, item in enumerate(chosen)]
        self.folder = self.config.output / "tables"
        self._table = cache(self._table_of)

    def source(self, run: Run, jobs: Sequence[Job]) -> RouteSource | None:
        """What decides for a batch of jobs; None: the routers, or nobody."""
        if run.routes in (Routes.dense, Routes.routers) or self.session is None:
            return None
        if run.routes is Routes.open:
            actions = torch.full((1, 1, 1, len(self.session.blocks)), self.router.widths)
        elif run.routes in CALIBRATED:
            actions = self._table(run)
        else:
            own = self._of_another if run.routes is Routes.shuffled else self._random
            actions = torch.stack([own(run, job) for job in jobs], dim=2)
        return TableRoutes(actions, self.router.widths)

    def _random(self, run: Run, job: Job) -> Tensor:
        actions, table = self._calibrated(run)
        branches = ran = int((actions[:, :, 0, 0] != NOT_RUN).any(dim=0).sum())
        generator = torch.Generator().manual_seed(zlib.crc32(f"{run.name}/{job.seed}/{job.name}".encode()))
        if run.routes is Routes.random_blocks:  # whatever the routers decide together
            decided, share = table, run.settings.budget
        else:
            decided, share = self._decided(table), executed_share(actions, table)
            branches = 1 if self.router.branches is Branches.shared else ran
        routes = random_routes(decided, run.steps, branches, share, generator)
        routes[:, branches:ran] = routes[:, :1]
        return routes.expand(-1, -1, len(table))

    def _of_another(self, run: Run, job: Job) -> Tensor:
        """What the routers did for the next item, at the same seed; that is made where need be."""
        task, donor, items = self.task, run.donor, self.task.items
        other = Job(items[(items.index(job.item) + 1) % len(items)], job.seed)
        assert donor is not None
        if task.record(donor, other) is None:
            task.make(donor, [other])
        record = task.record(donor, other)
        assert record is not None
        routes = record["metadata"]["routes"]
        return parse_actions(routes["actions"], len(routes["blocks"])).clamp_min(0)

    def _table_of(self, run: Run) -> Tensor:
        """Routes (S,2,1,I) by timestep, or fixed ones (1,1,1,I)."""
        actions, table = self._calibrated(run)
        share = executed_share(actions, table)
        if run.routes is Routes.static:
            path = self._static_path(table, share)
            nearest = min(path, key=lambda entry: abs(entry[0] - share))
            return torch.tensor(nearest[1])[None, None, None]
        decided = self._decided(table)
        routes = timestep_routes(actions[..., : len(decided)], decided, share)
        return routes.expand(-1, -1, len(table))[:, :, None]

    def _decided(self, table: Tensor) -> Tensor:
        """What controls choose among: blocks, or all of them as one where the routers decide for all."""
        return table.sum(dim=0, keepdim=True) if self.router.scope is Scope.step else table

    def _calibrated(self, run: Run) -> tuple[Tensor, Tensor]:
        """Actions (S,2,C,I) of a control's donor on the calibration items, and what each action of a block costs."""
        donor = run.donor
        assert donor is not None and self.session is not None
        path = self.folder / f"{donor.name}-{self._key():08x}.json"
        if not path.is_file():
            samples, flops = list[Any](), list[list[int]]()
            for start in range(0, len(self.calibration), self.config.batch_size):
                jobs = self.calibration[start : start + self.config.batch_size]
                with self.task.ready(donor, self.source(donor, jobs)):
                    self.task.sample(donor, self.task.condition_of(donor, jobs), jobs)
                trace = self.session.trace
                assert trace is not None
                samples += [trace.sample(row) for row in range(len(jobs))]
                flops = [[trace.flops[i].fixed, trace.flops[i].mlp] for i in range(len(trace.blocks))]
            save_json({"samples": samples, "flops": flops}, path)
        stored = load_json(path, {"flops": [[int]], "samples": [[[str]]]})
        table = action_flops([BlockFlops(*each) for each in stored["flops"]], self.router.ratios)
        return torch.stack([parse_actions(each, len(table)) for each in stored["samples"]], dim=2), table

    def _key(self) -> int:
        """Of the model, guidance, resolution, steps and items."""
        items = [(job.name, job.seed) for job in self.calibration]
        return zlib.crc32(repr((self.planner.reference.name, self.planner.control_steps, items)).encode())

    def _searched(self) -> Run:
        """How static routes are searched: with the few-step LoRA where the controls run with it at every budget."""
        planner, steps = self.planner, self.planner.control_steps
        budget = max(each for each in planner.control_budgets if each < 1)
        settings = ElasticConfig(cache=NO_CACHE, budget=budget, few_step=planner.has_lora(steps, budget))
        return planner.run(MAIN, steps, Routes.open, settings)

    def _static_path(self, table: Tensor, share: float) -> list[tuple[float, list[int]]]:
        """The greedy path of fixed routes, down to `share` at least; one for every budget."""
        file = self.folder / f"static-{self._searched().name}-{self._key():08x}.json"
        path = load_json(file, {"path": [list]})["path"] if file.is_file() else []
        if not path or path[-1][0] > share:
            lowest = min(share, 0.9 * min(self.planner.control_budgets))
            found = greedy_static(self._error(), table, lowest)
            path = [(executed, routes.tolist()) for executed, routes in found]
            save_json({"path": path}, file)
        return path

    def _error(self) -> Callable[[Tensor], float]:
        """Fixed routes (I,) -> relative squared error of the last latents of the calibration items.

        The truth is the dense model's in as many steps; with the few-step LoRA, which learned from many, the reference.
        Blocks that are left out add nothing: with the cache of routers that reuse, a first step would run all of them.
        """
        task, fixed, jobs = self.task, self._searched(), self.calibration
        steps = self.config.reference_steps if fixed.settings.few_step else fixed.steps
        dense = self.planner.run(MAIN, steps, Routes.dense)
        condition = task.condition_of(dense, jobs)
        true = task.sample(dense, condition, jobs)

        def error(routes: Tensor) -> float:
            with task.ready(fixed, TableRoutes(routes[None, None, None], self.router.widths)):
                found = task.sample(fixed, condition, jobs)
            return relative_error(found, true)

        return error


def random_routes(
    table: Tensor, steps: int, branches: int, share: float, generator: torch.Generator
) -> Tensor:
    """Actions (S,2,I) of one sample: blocks at full width, drawn without replacement until `share` is executed."""
    ran = torch.zeros(steps, 2, len(table), dtype=torch.bool)
    ran[:, :branches] = True
    order = torch.rand(ran.shape, generator=generator)
    return fill(order, torch.full(ran.shape, _widths(table)), ran, table, share)


def timestep_routes(actions: Tensor, table: Tensor, share: float) -> Tensor:
    """Routes (S,2,I) that depend on the timestep, branch and block alone, from recorded ones (S,2,B,I).

    The cells that most samples kept are kept, at the mean width of those that did, until `share` is executed.
    """
    actions = actions.long()
    ran = (actions != NOT_RUN).all(dim=2)
    kept = actions > SKIPPED
    count = kept.sum(dim=2)
    mean = (actions * kept).sum(dim=2) / count.clamp_min(1)
    width = torch.where(count > 0, mean.round().long(), _widths(table))
    # of cells that as many samples kept, the widest come first
    return fill(count + mean / (2 * _widths(table)), width, ran, table, share)


def greedy_static(
    error: Callable[[Tensor], float], table: Tensor, lowest: float
) -> list[tuple[float, Tensor]]:
    """A path of fixed routes (I,) from the dense model down to a `lowest` executed share: [(share, routes), ...].

    From each to the next, one block is skipped or narrowed by one width: the change that adds the least to `error` for
    each FLOP it saves. `error` takes routes (I,). Lazy greedy (Minoux 1978): costs are measured
    again from the lowest on until one stays the lowest, since skipping more makes them rise.
    """
    routes = torch.full((len(table),), _widths(table))
    now, share = error(routes), 1.0
    path = [(share, routes)]
    smaller = {SKIPPED, _widths(table) - 1}
    # (error added for each FLOP saved, error after the change, changes made when it was measured, block, action)
    heap = [(-math.inf, now, -1, block, action) for block in range(len(table)) for action in smaller]
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
                threshold = (after - now) / float(table[block, routes[block]] - table[block, action])
                heapq.heappush(heap, (threshold, after, len(path), block, action))
                continue
            now, routes, share = after, changed, executed_share(changed, table)
            path.append((share, routes))
            bar.update()
            if action > SKIPPED + 1:
                heapq.heappush(heap, (-math.inf, now, -1, block, action - 1))
    return path


def executed_share(actions: Tensor, table: Tensor) -> float:
    """Share of the dense blocks' FLOPs that actions (..., I) execute; passes that did not run count nowhere."""
    actions = actions.long()
    executed = table[torch.arange(len(table)), actions.clamp_min(SKIPPED)].sum()
    dense = ((actions != NOT_RUN).double() * table[:, -1]).sum()
    return float(executed / dense)


def _widths(table: Tensor) -> int:
    """The action of full width."""
    return table.shape[1] - 1


class TableRoutes(RouteSource):
    """Plays back actions (S,2,B,I): steps, branches, samples, blocks; an axis of length 1 holds for all.

    0 skips, k in 1..K runs at width number k - 1. A route shuffled between samples, a static mask and a
    timestep-only schedule are all tables.
    """

    def __init__(self, actions: Tensor, widths: int) -> None:
        if actions.min() < 0 or actions.max() > widths:
            raise ValueError(
                f"actions from {int(actions.min())} to {int(actions.max())}, expected 0 to {widths}"
            )
        self.actions, self.widths = actions.long(), widths
        self.alike = bool((actions == actions[..., :1]).all())

    def decide(self, context: StepContext, block: int, routed: RouteDecision | None) -> RouteDecision:
        """The route of every row of a pass through one block."""
        rows = [(step, *row) for step, row in zip(context.steps, context.rows, strict=True)]
        on_axes = torch.tensor(self.actions.shape[:3]) > 1
        index = (torch.tensor(rows) * on_axes).T  # 0 on an axis of length 1
        actions = self.actions[(*index, block)].to(context.t.device)
        return RouteDecision.fixed(actions > 0, (actions - 1).clamp_min(0), self.widths)
