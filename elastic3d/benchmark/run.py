"""A whole benchmark, as `scripts/benchmark.py` runs it: results are made and scored, timed, and written up.

The quick phase stands for all of that: minutes where the others take hours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from elastic3d.benchmark.config import ImageBenchmarkConfig, MeshBenchmarkConfig, Phase
from elastic3d.benchmark.methods import Case, Run, needed_runs, plan
from elastic3d.benchmark.report import write_report
from elastic3d.benchmark.rivals import missing, rival_cases
from elastic3d.benchmark.task import Task
from elastic3d.benchmark.timing import load_rounds, measure, timed, timing_key
from elastic3d.errors import UserError
from elastic3d.evaluation.report import machine, markdown_table
from elastic3d.utils.files import atomic_path
from elastic3d.utils.options import to_dict
from elastic3d.utils.structured import save_json

HEAD = ("method", "note", "budget", "steps", "executed", "seconds", "speedup")  # of a row of the quick phase


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
    to_time = [run for run in runs if run != planner.reference() or run in [case.run for case in cases]]
    if Phase.timing in config.phases:
        rounds = measure(task, to_time)
    else:
        rounds = load_rounds(config.output / "timing.json", timing_key(task, to_time))
    return write_report(task, cases, scores, rounds, command)


def _task(config: MeshBenchmarkConfig | ImageBenchmarkConfig, repository: Path) -> Task:
    if isinstance(config, ImageBenchmarkConfig):
        from elastic3d.benchmark.images import ImageTask  # diffusers

        return ImageTask(config, repository)
    from elastic3d.benchmark.meshes import MeshTask

    return MeshTask(config, repository)


def make_all(task: Task, runs: Sequence[Run]) -> None:
    """Every result that is still missing, with a progress bar over all of them."""
    seeds, size = task.config.seeds, task.config.batch_size
    todo = {(run, seed): task.missing(run, seed) for run in runs for seed in seeds}
    total, left = len(runs) * len(task.jobs), sum(map(len, todo.values()))
    with tqdm(total=total, initial=total - left, desc=task.plural, unit=task.noun, dynamic_ncols=True) as bar:
        for (run, seed), jobs in todo.items():
            bar.set_postfix_str(f"{run.name}, seed {seed}")
            for start in range(0, len(jobs), size):
                task.make(run, jobs[start : start + size])
                bar.update(len(jobs[start : start + size]))


def quick_comparison(task: Task, cases: Sequence[Case], command: str) -> dict[str, Any]:
    """Every run, the dense one first, makes the first seed's items once, as one timed batch; its latents against the
    dense ones. Nothing is meshed, kept or repeated. Writes quick.json and quick.md -> what quick.json holds."""
    planner, config = task.planner, task.config
    jobs = [job for job in task.jobs if job.seed == config.seeds[0]]
    baseline = planner.dense(planner.baseline_steps)
    conditions, rows, dense = dict[str, Any](), list[dict[str, Any]](), torch.zeros(0)
    about = {
        "command": command, "machine": machine(), "items": len(jobs), "config": to_dict(config),
        "left_out": missing(config),
    }  # fmt: skip
    found = {"about": about, "rows": rows}
    others = [case for case in cases if case.run != baseline]
    for case in tqdm([Case("dense", baseline, 1.0), *others], desc="quick", unit="row", dynamic_ncols=True):
        run = case.run
        if run.model not in conditions:
            conditions[run.model] = task.condition_of(run, jobs)
        latents, measured = timed(task, run, jobs, conditions[run.model])
        dense = latents if run == baseline else dense
        seconds = measured["ms"] / 1000
        share = measured["executed"] / measured["dense"] if "executed" in measured else None
        faster = rows[0]["seconds"] / seconds if rows else 1.0
        values = (case.method, case.note, case.budget, run.steps, share, seconds, faster)
        rows.append(dict(zip(HEAD, values, strict=True)) | task.latent_scores(run, latents, dense))
        save_json(found, config.output / "quick.json")
    with atomic_path(config.output / "quick.md") as path:
        path.write_text(quick_table(rows))
    return found


def quick_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    scores = [name for name in rows[0] if name not in HEAD]
    lines = []
    for row in rows:
        shown = [", ".join(filter(None, [row["method"], row["note"]]))]
        shown.append(f"{row['budget']:g}" if row["budget"] else "")
        shown.append("" if row["executed"] is None else f"{row['executed']:.2f}")
        shown += [f"{row[name]:.2f}" for name in ("seconds", "speedup")]
        lines.append(shown + [f"{row[name]:.4g}" for name in scores])
    return markdown_table(["method", "budget", "executed", "s an item", "speed-up", *scores], lines) + "\n"
