"""What the benchmark needs to know of what is made: meshes from images, or images from prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic3d.benchmark.config import BenchmarkOptions
from elastic3d.benchmark.controls import Controls
from elastic3d.benchmark.flop_meter import metered
from elastic3d.benchmark.methods import Case, Job, Model, Planner, Routes, Run
from elastic3d.benchmark.rivals import by_batch, running
from elastic3d.elastic import detach
from elastic3d.elastic.context import RouteSource
from elastic3d.elastic.training_free import put_policy
from elastic3d.evaluation.items import spread
from elastic3d.evaluation.statistics import Row


@dataclass
class Scores:
    """Rows by (run, what it is compared with), named `seed-<s>/<item>`; the seed floors by what is compared; further
    columns by run."""

    rows: dict[tuple[str, str], list[Row]] = field(default_factory=dict)
    floors: dict[str, list[Row]] = field(default_factory=dict)
    further: dict[str, dict[str, Any]] = field(default_factory=dict)


class Task(ABC):
    """Makes results, and knows what has to be made and how it is scored.

    Class attributes: `noun`, `plural` of a result; `table`: columns and titles of table.md; `plot`: scores and axis
    labels of the plots; `losses`: scores that have frontiers, with what they are paired with,
    "" for none; `compared`: (what with, metric) of the paired comparisons.
    """

    noun: str
    plural: str
    table: Mapping[str, str]
    plot: Mapping[str, str]
    losses: Mapping[str, str]
    compared: Sequence[tuple[str, str]]

    def __init__(self, planner: Planner, items: Sequence[Any], timed: int, size: dict[str, Any]) -> None:
        """Times are taken with `timed` of the items, spread evenly; `size` is how a pipeline is asked for one."""
        self.planner, self.items, self.size = planner, list(items), size
        self.config: BenchmarkOptions = planner.config
        self.timing_jobs = [Job(item, self.config.seeds[0]) for item in spread(self.items, timed)]
        self.jobs = [Job(item, seed) for seed in self.config.seeds for item in self.items]
        self.controls = Controls(self)
        self._shares: dict[str, float] = {}
        self._outside: dict[
            int, tuple[float, float]
        ] = {}  # by steps: dense FLOPs outside the blocks, in them

    # ------------------------------------------------------------------------------------- of each task

    @abstractmethod
    def find_items(self, path: Path) -> list[Any]:
        """Items in a folder or a file."""

    @abstractmethod
    def record(self, run: Run, job: Job) -> dict[str, Any] | None:
        """`status`, `error` and `metadata` of a result; None where it is still to be made."""

    @abstractmethod
    def make(self, run: Run, jobs: Sequence[Job]) -> None:
        """Make and keep the results of jobs of one seed."""

    @abstractmethod
    def condition_of(self, run: Run, jobs: Sequence[Job]) -> Any:
        """What the DiT is told of the jobs' items."""

    @abstractmethod
    def latents(self, run: Run, condition: Any, seeds: list[int]) -> Tensor:
        """Latents (B,N,C) of the DiT."""

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
    def about(self) -> dict[str, Any]:
        """Facts for the report."""

    @abstractmethod
    def sheet(self, cases: Sequence[Case]) -> tuple[list[str], list[list[NDArray[np.uint8]]]] | None:
        """Titles of the columns and rows of images (H,W,3) of the contact sheet; None where nothing is made."""

    def warm_up(self, run: Run) -> None:  # noqa: B027  # most need none
        """What is done once for a model that goes on with the same settings, before a clock starts."""

    def ratios(self, run: Run) -> Sequence[float]:
        """MagCache's calibration; of models of diffusers alone."""
        return ()

    def pipe(self, run: Run) -> Any:
        """The diffusers pipeline of a run, where it has one."""
        return None

    # ------------------------------------------------------------------------------------- of all

    def model(self, run: Run) -> Model:
        """The pipeline of a run, its DiT and routing session."""
        return self.planner.models[run.model]

    @contextmanager
    def ready(self, run: Run, source: RouteSource | None = None) -> Iterator[None]:
        """While it lasts, the model is set up for one generation of a run, in which `source` decides instead of the
        routers; None leaves them, or a policy, to it."""
        with ExitStack() as stack:
            model, pipe = self.model(run), self.pipe(run)
            if run.unbiased and model.session is not None:  # the gates have no bias over time
                stack.callback(setattr, model.session, "router_config", model.session.router_config)
                model.session.router_config = replace(model.session.router_config, times=[], gate_bias=[])
            if run.policy is not None:  # it decides in the plain model
                plain, policy = pipe or model.dit, self.planner.policy(run.policy)
                put_policy(plain, policy.calibration, policy.schedule)
                stack.callback(detach, plain)
            if run.rival is not None:
                stack.enter_context(running(model.dit, run.rival, run.steps, self.ratios(run), pipe))
            self.warm_up(run)
            if source is not None and model.session is not None:
                model.session.source = source
                stack.callback(setattr, model.session, "source", None)
            yield

    def produce(self, run: Run, jobs: Sequence[Job]) -> list[Any]:
        """All that a user waits for, as one batch; each result has a `metadata`. The run must be `ready`."""
        pipeline, settings = self.model(run).pipeline, run.settings
        options: dict[str, Any] = {}
        if run.routes is Routes.policy:
            options = {"budget": settings.budget}
        elif pipeline.session is not None:
            names = ("budget", "width", "cache", "shared", "few_step") if settings.elastic else ()
            options = {"elastic": settings.elastic} | {name: getattr(settings, name) for name in names}
        items, seeds = [job.item for job in jobs], [job.seed for job in jobs]
        return pipeline(items, seeds, steps=run.steps, guidance=self.config.guidance, **self.size, **options)

    def sample(self, run: Run, condition: Any, jobs: Sequence[Job]) -> Tensor:
        """The DiT alone: latents (B,N,C); returns when a GPU is done. The run must be `ready`."""
        found = self.latents(run, condition, [job.seed for job in jobs])
        if found.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    def produced(self, run: Run, jobs: Sequence[Job]) -> list[Any]:
        """Results of a batch; the metadata of a rival say what it really executed."""
        source, dit = self.controls.source(run, jobs), self.model(run).dit
        counted = run.rival is not None and by_batch(run.rival)
        with self.ready(run, source), metered(dit) if counted else nullcontext() as meter:
            results = self.produce(run, jobs)
        if run.rival is not None:
            share = self._share(run, meter.total / len(jobs)) if meter else self._scheduled_share(run)
            for result in results:
                if "flops_dense" in result.metadata:
                    result.metadata["flops_executed"] = round(share * result.metadata["flops_dense"])
        return results

    def _scheduled_share(self, run: Run) -> float:
        """Executed share of the blocks' FLOPs of a rival that does the same for all samples, measured once."""
        if run.name not in self._shares:
            jobs = self.jobs[:1]
            condition = self.condition_of(run, jobs)
            with self.ready(run), metered(self.model(run).dit) as meter:
                self.sample(run, condition, jobs)
            self._shares[run.name] = self._share(run, meter.total)
        return self._shares[run.name]

    def _share(self, run: Run, total: float) -> float:
        """Of the dense blocks' FLOPs; what a dense generation spends outside the blocks is taken off."""
        if run.steps not in self._outside:
            dense = self.planner.dense(run.steps)
            with self.ready(dense), metered(self.model(dense).dit) as meter:
                blocks = self.produce(dense, self.jobs[:1])[0].metadata["flops_dense"]
            self._outside[run.steps] = meter.total - blocks, blocks
        outside, blocks = self._outside[run.steps]
        return (total - outside) / blocks

    def missing(self, run: Run, seed: int | None = None) -> list[Job]:
        """Jobs, of one seed or of all, of which a run has no record."""
        jobs = [job for job in self.jobs if seed in (None, job.seed)]
        return [job for job in jobs if self.record(run, job) is None]

    def shown(self, cases: Sequence[Case]) -> dict[str, Run]:
        """What a contact sheet shows beside the rest: the dense model, and the routers at each budget."""
        steps = self.planner.baseline_steps
        runs = {f"dense, {steps} steps": self.planner.dense(steps)}
        for case in cases:
            if case.method == "elastic" and case.run.steps == steps and case.budget is not None:
                runs[f"elastic {case.budget:g}"] = case.run
        return runs
