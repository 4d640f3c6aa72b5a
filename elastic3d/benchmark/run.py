"""A whole benchmark, as `scripts/benchmark.py` runs it: results are made and scored, timed, and written up.

A round of the timing phase takes every run once, in an order of its own, on the same items; so what else the machine
does falls on all of them alike, and speed-ups are ratios within a round. The first round does not count. The quick
phase stands for all phases: minutes where they take hours.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from tqdm import tqdm

from elastic3d.benchmark.config import ImageBenchmarkConfig, MeshBenchmarkConfig, Phase
from elastic3d.benchmark.meshes import MeshTask
from elastic3d.benchmark.methods import Case, Job, Run, needed_runs, plan
from elastic3d.benchmark.report import DIT, END_TO_END, Round, about, write_report
from elastic3d.benchmark.rivals import rival_cases
from elastic3d.benchmark.task import Task
from elastic3d.elastic.trace import trace_dense_flops, trace_flops, trace_router_flops
from elastic3d.errors import UserError
from elastic3d.evaluation.report import machine, markdown_table
from elastic3d.utils.claims import sole_use
from elastic3d.utils.files import atomic_path, load_json, save_json


def benchmark(config: MeshBenchmarkConfig | ImageBenchmarkConfig, command: str = "") -> dict[str, Any]:
    """Do the phases, or what is left of them, and write the report. -> what results.json holds. UserError: an option,
    an item, a model or a folder that can't be used, found before anything is run."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if isinstance(config, MeshBenchmarkConfig):
        task: Task = MeshTask(config)
    else:
        from elastic3d.benchmark.images import ImageTask  # diffusers

        task = ImageTask(config)
    planner = task.planner
    cases = [*plan(planner, len(task.items)), *rival_cases(planner)]
    if not cases:
        raise UserError("there is nothing to run: choose other methods, budgets, caches or variants")
    with sole_use(config.output):
        if Phase.quick in config.phases:
            return quick_comparison(task, cases, command)
        to_time = needed_runs(planner, cases)
        runs = list(dict.fromkeys([planner.reference, *to_time]))
        if Phase.quality in config.phases:
            make_all(task, runs)
        scores = task.score(runs)
        rounds = timed_rounds(task, to_time, measure=Phase.timing in config.phases)
        return write_report(task, cases, scores, rounds, command)


def make_all(task: Task, runs: Sequence[Run]) -> None:
    """Every result that is still missing, with a progress bar over all of them."""
    size, todo = task.config.batch_size, {run: task.missing(run) for run in runs}
    total, left = len(runs) * len(task.jobs), sum(map(len, todo.values()))
    with tqdm(total=total, initial=total - left, desc=task.plural, unit=task.noun, dynamic_ncols=True) as bar:
        for run, jobs in todo.items():
            bar.set_postfix_str(run.name)
            for start in range(0, len(jobs), size):
                task.make(run, jobs[start : start + size])
                bar.update(len(jobs[start : start + size]))


def timed_rounds(task: Task, runs: Sequence[Run], measure: bool) -> list[Round]:
    """The rounds in timing.json, if they are of these runs on this machine; where they are to be measured, those that
    are missing too. They are kept after each."""
    config, host, path = task.config, machine(), task.config.output / "timing.json"
    names = ("system", "processor", "cores", "accelerator", "threads", "torch", "elastic3d")
    fixed = {name: host[name] for name in names} | {"cpu_time": config.cpu_time}
    facts = [sorted(run.name for run in runs), [job.name for job in task.timing_jobs], fixed]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    shape = {"key": str, "rounds": [{"what": str, "batch": int, "round": int}]}
    stored = load_json(path, shape) if path.is_file() else {}
    rounds: list[Round] = stored["rounds"] if stored.get("key") == key else []
    if not measure:
        return rounds
    counts = {DIT: config.repeats, END_TO_END: config.end_to_end_repeats}
    every = [(what, b, i) for b in config.batches for what, count in counts.items() for i in range(count)]
    known = {(done["what"], done["batch"], done["round"]) for done in rounds}
    todo = [entry for entry in every if entry not in known]
    with tqdm(total=len(todo) * len(runs), desc="timing", unit="run", dynamic_ncols=True) as bar:
        for (what, batch), same in groupby(todo, itemgetter(0, 1)):
            numbers = [number for *_, number in same]
            bar.set_postfix_str(f"{what}, batch {batch}")
            _round(task, runs, what, batch, numbers[0], None)  # warms up
            for number in numbers:
                rounds.append(_round(task, runs, what, batch, number, bar))
                save_json({"key": key, "rounds": rounds}, path)
    return rounds


def _round(task: Task, runs: Sequence[Run], what: str, batch: int, number: int, bar: tqdm | None) -> Round:
    every, order = task.timing_jobs, list(runs)
    jobs = [every[(number * batch + i) % len(every)] for i in range(batch)]
    measured = dict[str, dict[str, float]]()
    random.Random(f"{what}/{batch}/{number}").shuffle(order)
    for run in order:
        measured[run.name] = timed(task, run, jobs, alone=what == DIT)[1]
        if bar is not None:
            bar.update()
    return {"what": what, "batch": batch, "round": number, "runs": measured}


def timed(task: Task, run: Run, jobs: Sequence[Job], alone: bool) -> tuple[Any, dict[str, float]]:
    """Last latents of the DiT `alone`, or whole results; and what that took: `ms` a result, and the blocks' FLOPs of
    all passes, executed, dense and the routers', where routers or a policy decided."""
    source = task.controls.source(run, jobs)  # before the clock starts
    condition = task.condition_of(run, jobs) if alone else None

    def now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.process_time() if task.config.cpu_time else time.perf_counter()

    with task.ready(run, source):
        start = now()
        made = task.sample(run, condition, jobs) if alone else task.produce(run, jobs)
        found = {"ms": 1000 * (now() - start) / len(jobs)}
        session = task.model(run).session  # before a policy goes
    if run.settings.elastic and session is not None and session.trace is not None:
        flops = {"executed": trace_flops, "dense": trace_dense_flops, "routers": trace_router_flops}
        found |= {name: float(of(session.trace).sum()) for name, of in flops.items()}
    return made, found


def quick_comparison(task: Task, cases: Sequence[Case], command: str) -> dict[str, Any]:
    """Every run, the dense one first, makes the first seed's items once, as one timed batch; its latents against the
    dense ones. Nothing is meshed, kept or repeated. Writes quick.json and quick.md -> what quick.json holds."""
    config, baseline = task.config, task.planner.baseline
    jobs = [job for job in task.jobs if job.seed == config.seeds[0]]
    rows, dense = list[dict[str, Any]](), torch.zeros(0)
    found = {"about": about(task, command) | {"items": len(jobs), "as_one_batch": True}, "rows": rows}
    others = [case for case in cases if case.run != baseline]
    for case in tqdm([Case("dense", baseline, 1.0), *others], desc="quick", unit="row", dynamic_ncols=True):
        run = case.run
        latents, measured = timed(task, run, jobs, alone=True)
        dense = latents if run == baseline else dense
        seconds = measured["ms"] / 1000
        row = {
            "method": case.method, "note": case.note, "budget": case.budget, "steps": run.steps,
            "executed": measured["executed"] / measured["dense"] if "executed" in measured else None,
            "seconds": seconds, "speedup": rows[0]["seconds"] / seconds if rows else 1.0,
        }  # fmt: skip
        rows.append(row | task.latent_scores(run, latents, dense))
        save_json(found, config.output / "quick.json")
    cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    with atomic_path(config.output / "quick.md") as path:
        path.write_text(markdown_table(list(rows[0]), cells) + "\n", encoding="utf-8")
    return found
