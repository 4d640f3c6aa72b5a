"""What the benchmark needs to know of what is made, meshes or images; how runs make it, and the routes of controls."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic3d import __version__
from elastic3d.benchmark import controls
from elastic3d.benchmark.config import BY_BATCH, BenchmarkOptions
from elastic3d.benchmark.methods import CALIBRATED, MAIN, NO_CACHE, Case, Job, Model, Planner, Routes, Run
from elastic3d.benchmark.rivals import magnitude_ratios, metered, policy_named, running
from elastic3d.elastic import detach
from elastic3d.elastic.config import Branches, ElasticConfig, RouterConfig, Scope
from elastic3d.elastic.context import RouteSource
from elastic3d.elastic.families import BlockFlops
from elastic3d.elastic.trace import NOT_RUN, parse_actions
from elastic3d.elastic.training_free import put_policy
from elastic3d.evaluation.items import spread
from elastic3d.evaluation.statistics import Row
from elastic3d.training.calibration import relative_error
from elastic3d.training.routes import action_flops
from elastic3d.utils.files import Maybe, load_json, save_json

SHEET_ITEMS, SHEET_SIDE = 8, 160
Pixels = NDArray[np.uint8]
_RECORD = {"status": str, "error": Maybe(str), "item_sha256": str, "metadata": dict}


@dataclass
class Scores:
    """Rows by (run, what it is compared with), named `seed-<s>/<item>`; further columns by run."""

    rows: defaultdict[tuple[str, str], list[Row]] = field(default_factory=lambda: defaultdict(list))
    further: dict[str, dict[str, Any]] = field(default_factory=dict)


class Task(ABC):
    """Makes results, and knows what has to be made and how it is scored. They are kept as
    `<output>/runs/<run>/seed-<s>/<item><suffix>`, each beside its record.

    Class attributes: `noun`, `plural`, `suffix` of a result, `inputs`: what items are; `table`: columns and titles of
    table.md; `plot`: scores and axis labels of the plots; `losses`: scores that have frontiers, with what they are
    paired with, "" for none; `compared`: (what with, metric) of the paired comparisons.
    """

    noun: str
    plural: str
    inputs: str
    suffix: str
    table: Mapping[str, str]
    plot: Mapping[str, str]
    losses: Mapping[str, str]
    compared: Sequence[tuple[str, str]]

    def __init__(self, planner: Planner, items: Sequence[Any], size: dict[str, Any]) -> None:
        """`size` is how a pipeline is asked for one."""
        self.planner, self.items, self.size = planner, list(items), size
        self.config: BenchmarkOptions = planner.config
        first, *_ = self.config.seeds
        self.timing_jobs = [Job(item, first) for item in spread(self.items, self.config.timing_items)]
        self.jobs = [Job(item, seed) for seed in self.config.seeds for item in self.items]
        self.controls = Controls(self)
        self._magnitude_ratios = cache(self._mag_cache_calibration)
        self._dense_flops = cache(self._metered_dense_flops)

    @abstractmethod
    def find_items(self, path: Path) -> list[Any]:
        """Items in a folder or a file."""

    @abstractmethod
    def save(self, result: Any, path: Path) -> None:
        """Write a result; what there is to keep of one that failed."""

    @abstractmethod
    def condition_of(self, run: Run, jobs: Sequence[Job]) -> Any:
        """What the DiT is told of the jobs' items."""

    @abstractmethod
    def sample(self, run: Run, condition: Any, jobs: Sequence[Job]) -> Tensor:
        """Latents (B,N,C) of the DiT alone. The run must be `ready`."""

    @abstractmethod
    def latent_scores(self, run: Run, found: Tensor, dense: Tensor) -> dict[str, float]:
        """Scores of last latents (B,N,C) against the dense ones, without making results of them."""

    @abstractmethod
    def score(self, runs: Sequence[Run]) -> Scores:
        """All scores of the runs that are made; what was scored before is read."""

    @abstractmethod
    def columns(self, run: Run, scores: Scores) -> dict[str, Any]:
        """The fidelity columns of a row; None for what was not measured."""

    @abstractmethod
    def holds(self, row: Row) -> bool | None:
        """Whether a row is as good as the dense model, as the speed target has it; None where that is not known."""

    @abstractmethod
    def image(self, path: Path) -> Pixels:
        """A kept result (H,W,3), `SHEET_SIDE` pixels a side, for the contact sheet."""

    def about(self) -> dict[str, Any]:
        """Facts for the report: how many items."""
        return {self.inputs: len(self.items)}

    def given(self, jobs: Sequence[Job]) -> dict[str, list[Pixels]]:
        """Columns of the contact sheet beside those of results, by title."""
        return {}

    def warm_up(self, run: Run) -> None:  # noqa: B027  # most need none
        """What is done once for a model that goes on with the same settings, before a clock starts."""

    def model(self, run: Run) -> Model:
        """The pipeline of a run, its DiT and routing session."""
        return self.planner.models[run.model]

    @contextmanager
    def ready(self, run: Run, source: RouteSource | None = None) -> Iterator[None]:
        """While it lasts, the model is set up for one generation of a run, in which `source` decides instead of the
        routers; None leaves them, or a policy, to it."""
        with ExitStack() as stack:
            model, session = self.model(run), self.model(run).session
            if run.unbiased and session is not None:  # the gates have no bias over time
                config = session.router_config
                stack.callback(setattr, session, "router_config", config)
                session.router_config = replace(config, curves=replace(config.curves, times=[], gate_bias=[]))
            if run.policy is not None:  # it decides in the plain model
                plain = model.pipe or model.dit
                put_policy(plain).source = policy_named(run.policy, self.planner.calibration)
                stack.callback(detach, plain)
            if run.rival is not None:
                stack.enter_context(running(model, run.rival, run.steps, self._magnitude_ratios))
            self.warm_up(run)
            if source is not None and session is not None:
                session.source = source
                stack.callback(setattr, session, "source", None)
            yield

    def _mag_cache_calibration(self, steps: int) -> list[float]:
        """What MagCache goes by in as many steps, found on the calibration items."""
        dense, jobs = self.planner.dense(steps), self.controls.calibration
        return magnitude_ratios(self.model(dense).dit, lambda: self.produce(dense, jobs), steps)

    def produce(self, run: Run, jobs: Sequence[Job]) -> list[Any]:
        """All that a user waits for, as one batch; each result has a `metadata`. The run must be `ready`."""
        pipeline, settings = self.model(run).pipeline, run.settings
        options: dict[str, Any] = {}
        if run.policy is not None:
            options = {"budget": settings.budget}
        elif pipeline.session is not None:
            names = ("budget", "width", "cache", "shared", "few_step") if settings.elastic else ()
            options = {"elastic": settings.elastic} | {name: getattr(settings, name) for name in names}
        items, seeds = [job.item for job in jobs], [job.seed for job in jobs]
        return pipeline(items, seeds, steps=run.steps, guidance=self.config.guidance, **self.size, **options)

    def produced(self, run: Run, jobs: Sequence[Job]) -> list[Any]:
        """Results of a batch; the metadata of a rival say what it really executed."""
        source, dit = self.controls.source(run, jobs), self.model(run).dit
        with self.ready(run, source), metered(dit) if run.rival else nullcontext() as passes:
            results = self.produce(run, jobs)
        if passes is not None:
            outside, blocks = self._dense_flops(run.steps)
            share = (sum(passes) / len(jobs) - outside) / blocks
            for result in results:
                if "flops_dense" in result.metadata:
                    result.metadata["flops_executed"] = round(share * result.metadata["flops_dense"])
        return results

    def _metered_dense_flops(self, steps: int) -> tuple[float, float]:
        """What a dense generation spends outside the blocks, and in them."""
        dense = self.planner.dense(steps)
        with self.ready(dense), metered(self.model(dense).dit) as passes:
            blocks = self.produce(dense, self.jobs[:1])[0].metadata["flops_dense"]
        return sum(passes) - blocks, blocks

    def path(self, run: Run, job: Job) -> Path:
        """Where a result is, or would be."""
        stem = job.name if isinstance(job.item, Path) else job.sha256[:16]
        return self.config.output / "runs" / run.name / f"seed-{job.seed}" / f"{stem}{self.suffix}"

    def make(self, run: Run, jobs: Sequence[Job]) -> None:
        """Make and keep results, or the reasons why there are none; a record is written last. Rivals whose results
        depend on their batch make each by itself."""
        alone = run.rival and run.rival.kind in BY_BATCH and not self.config.batched_decisions
        for batch in [[job] for job in jobs] if alone else [list(jobs)]:
            for job, result in zip(batch, self.produced(run, batch), strict=True):
                path, error = self.path(run, job), getattr(result, "error", None)
                self.save(result, path)
                record = {"status": "failed" if error else "ok", "error": error and str(error)}
                record |= {"item_sha256": job.sha256, "metadata": result.metadata}
                save_json(record, path.with_suffix(".json"))

    def record(self, run: Run, job: Job) -> dict[str, Any] | None:
        """What was noted of a result; None where it is still to be made, from this very item by this version."""
        path = self.path(run, job)
        if not path.with_suffix(".json").is_file():
            return None
        record: dict[str, Any] = load_json(path.with_suffix(".json"), _RECORD)
        is_whole = record["status"] == "failed" or path.is_file()
        is_current = record["metadata"].get("version", __version__) == __version__  # older records had none
        return record if is_whole and is_current and record["item_sha256"] == job.sha256 else None

    def missing(self, run: Run) -> list[Job]:
        """Jobs of which a run has no record."""
        return [job for job in self.jobs if self.record(run, job) is None]

    def sheet(self, cases: Sequence[Case]) -> dict[str, list[Pixels]]:
        """Columns of the contact sheet by title: the reference, dense, the routers at each budget, and some of the
        fewer steps, where they are made; empty where none is."""
        steps = self.planner.baseline_steps
        elastic = [case for case in cases if case.method == "elastic" and case.run.steps == steps]
        fewer = [case.run for case in cases if case.method == "fewer_steps" and case.run.steps < steps]
        runs = {f"{self.config.reference_steps} steps": self.planner.reference}
        runs |= {f"dense, {steps} steps": self.planner.baseline}
        runs |= {f"elastic {case.budget:g}": case.run for case in elastic}
        runs |= {f"{run.steps} steps": run for run in spread(fewer, 4)}
        jobs = [Job(item, self.config.seeds[0]) for item in spread(self.items, SHEET_ITEMS)]
        made = {title: run for title, run in runs.items() if all(self.record(run, job) for job in jobs)}
        columns = {title: [self.image(self.path(run, job)) for job in jobs] for title, run in made.items()}
        return self.given(jobs) | columns if made else {}


class Controls:
    """Routes of the controls, for the runs of a task. What is computed is kept in `<output>/tables`."""

    def __init__(self, task: Task) -> None:
        self.task, self.planner, self.config = task, task.planner, task.planner.config
        self.session = self.planner.models[MAIN].session
        self.router = self.session.router_config if self.session is not None else RouterConfig()
        path, seeds = self.config.calibration, self.config.seeds
        chosen = (task.find_items(path) if path else task.items)[: self.config.calibration_samples]
        self.calibration = [Job(item, seeds[i % len(seeds)]) for i, item in enumerate(chosen)]
        self.planner.calibrated_on = [(job.sha256, job.seed) for job in self.calibration]
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
        return controls.TableRoutes(actions, self.router.widths)

    def _random(self, run: Run, job: Job) -> Tensor:
        actions, costs, decided = self._calibrated(run)
        share = controls.executed_share(actions, costs[:, :, None])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{run.name}/{job.seed}/{job.name}".encode()))
        if run.routes is Routes.random_blocks:  # whatever the routers decide together
            decided, share = costs, run.settings.budget
        elif self.router.branches is Branches.shared:
            decided = decided.sum(1, keepdim=True)
        return controls.random_routes(decided, share, generator).expand(-1, 2, costs.shape[2])

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
        actions, costs, decided = self._calibrated(run)
        share = controls.executed_share(actions, costs[:, :, None])
        if run.routes is Routes.static:
            path = self._static_path(costs.sum((0, 1)), share)
            nearest = min(path, key=lambda entry: abs(entry[0] - share))
            return torch.tensor(nearest[1])[None, None, None]
        routes = controls.timestep_routes(actions[..., : decided.shape[2]], decided, share)
        return routes.expand(-1, -1, costs.shape[2])[:, :, None]

    def _calibrated(self, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (S,2,C,I) of a control's donor on the calibration items; what each action of a block costs there
        (S,2,I,A); and of what controls choose among: the blocks, or all as one where the routers decide for all."""
        donor = run.donor
        assert donor is not None and self.session is not None
        path = self._file(donor.name)
        if not path.is_file():
            samples, flops = list[Any](), list[Any]()
            for start in range(0, len(self.calibration), self.config.batch_size):
                jobs = self.calibration[start : start + self.config.batch_size]
                with self.task.ready(donor, self.source(donor, jobs)):
                    self.task.sample(donor, self.task.condition_of(donor, jobs), jobs)
                trace = self.session.trace
                assert trace is not None
                samples += [trace.sample(row) for row in range(len(jobs))]
                both = trace.flops[0], trace.flops[0] | trace.flops[1]
                flops = [[[each[i].fixed, each[i].mlp] for i in range(len(trace.blocks))] for each in both]
            save_json({"samples": samples, "flops": flops}, path)
        stored = load_json(path, {"flops": [[[int]]], "samples": [[[str]]]})
        blocks = [BlockFlops(*block) for branch in stored["flops"] for block in branch]
        table = action_flops(blocks, self.router.ratios).unflatten(0, (2, -1))
        actions = torch.stack([parse_actions(each, table.shape[1]) for each in stored["samples"]], dim=2)
        costs = (actions[:, :, 0, :, None] != NOT_RUN) * table
        return actions, costs, costs.sum(2, keepdim=True) if self.router.scope is Scope.step else costs

    def _file(self, name: str) -> Path:
        """Another for another version, model, guidance, resolution, steps or items."""
        facts = self.planner.reference.name, self.planner.control_steps, self.planner.calibrated_on
        key = zlib.crc32(repr((__version__, "FLOPs by branch", facts)).encode())
        return self.config.output / "tables" / f"{name}-{key:08x}.json"

    def _searched(self) -> Run:
        """How static routes are searched: with the few-step LoRA where the controls run with it at every budget."""
        planner, steps = self.planner, self.planner.control_steps
        budget = max(each for each in planner.control_budgets if each < 1)
        settings = ElasticConfig(cache=NO_CACHE, budget=budget, few_step=planner.has_lora(steps, budget))
        return planner.run(MAIN, steps, Routes.open, settings)

    def _static_path(self, costs: Tensor, share: float) -> list[tuple[float, list[int]]]:
        """The greedy path of fixed routes, down to `share` at least; one for every budget."""
        file = self._file(f"static-{self._searched().name}")
        path = load_json(file, {"path": [list]})["path"] if file.is_file() else []
        if not path or path[-1][0] > share:
            lowest = min(share, 0.9 * min(self.planner.control_budgets))
            found = controls.greedy_static(self._error(), costs, lowest)
            path = [(executed, routes.tolist()) for executed, routes in found]
            save_json({"path": path}, file)
        return path

    def _error(self) -> controls.Error:
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
            with task.ready(fixed, controls.TableRoutes(routes[None, None, None], self.router.widths)):
                return relative_error(task.sample(fixed, condition, jobs), true)

        return error
