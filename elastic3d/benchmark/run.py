"""A whole benchmark, as `scripts/benchmark.py` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from elastic3d.benchmark.config import ImageBenchmarkConfig, MeshBenchmarkConfig, Phase
from elastic3d.benchmark.methods import needed_runs, plan
from elastic3d.benchmark.quick import quick_comparison
from elastic3d.benchmark.report import write_report
from elastic3d.benchmark.rivals import rival_cases
from elastic3d.benchmark.task import Task, make_all
from elastic3d.benchmark.timing import load_rounds, measure, timing_key
from elastic3d.errors import UserError


def benchmark(
    config: MeshBenchmarkConfig | ImageBenchmarkConfig, repository: Path, command: str = ""
) -> dict[str, Any]:
    """Do the phases, or what is left of them, and write the report. -> what results.json holds.

    Raises:
        UserError: an option, an item or a model that can't be used, found before anything is run.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    task = _task(config, repository)
    planner = task.planner
    cases = [*plan(planner, len(task.items)), *rival_cases(planner)]
    if not cases:
        raise UserError("there is nothing to run: choose other methods, budgets, caches or variants")
    config.output.mkdir(parents=True, exist_ok=True)
    if Phase.quick in config.phases:
        return quick_comparison(task, cases, command)
    runs = needed_runs(planner, cases)
    if Phase.quality in config.phases:
        make_all(task, runs)
    scores = task.score(runs)
    timed = [run for run in runs if run != planner.reference() or run in [case.run for case in cases]]
    if Phase.timing in config.phases:
        rounds = measure(task, timed)
    else:
        rounds = load_rounds(config.output / "timing.json", timing_key(task, timed))
    return write_report(task, cases, scores, rounds, command)


def _task(config: MeshBenchmarkConfig | ImageBenchmarkConfig, repository: Path) -> Task:
    if isinstance(config, ImageBenchmarkConfig):
        from elastic3d.benchmark.images import ImageTask  # diffusers

        return ImageTask(config, repository)
    from elastic3d.benchmark.meshes import MeshTask

    return MeshTask(config, repository)
