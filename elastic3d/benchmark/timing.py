"""The timing phase: all runs in turn, round after round, in one process, after a warm round that does not count.

A round takes every run once, in an order of its own, on the same images; so what else the machine does falls on all
of them alike, and speed-ups are ratios within a round.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elastic3d.benchmark.methods import Job, Run
from elastic3d.benchmark.rows import DIT, END_TO_END, Round
from elastic3d.benchmark.task import Task
from elastic3d.elastic.cost import trace_dense_flops, trace_flops, trace_router_flops
from elastic3d.evaluation.report import machine
from elastic3d.utils.structured import load_json, save_json


def measure(task: Task, runs: Sequence[Run]) -> list[Round]:
    """All rounds, those of an earlier, interrupted call included. They are kept after each in timing.json."""
    path = task.config.output / "timing.json"
    key = timing_key(task, runs)
    rounds = load_rounds(path, key)
    counts = {DIT: task.config.repeats, END_TO_END: task.config.end_to_end_repeats}
    every = [
        (what, b, i) for b in task.config.batches for what, count in counts.items() for i in range(count)
    ]
    known = {(done["what"], done["batch"], done["round"]) for done in rounds}
    todo = [entry for entry in every if entry not in known]
    with tqdm(total=len(todo) * len(runs), desc="timing", unit="run", dynamic_ncols=True) as bar:
        warm: set[tuple[str, int]] = set()
        for what, batch, number in todo:
            if (what, batch) not in warm:
                warm.add((what, batch))
                bar.set_postfix_str(f"{what}, batch {batch}, warm round")
                _round(task, runs, what, batch, number, None)
            bar.set_postfix_str(f"{what}, batch {batch}, round {number + 1}")
            rounds.append(_round(task, runs, what, batch, number, bar))
            save_json({"key": key, "rounds": rounds}, path)
    return rounds


def load_rounds(path: Path, key: str) -> list[Round]:
    """The rounds kept in a file, if they are of these runs on this machine."""
    if not path.is_file():
        return []
    stored = load_json(path, {"key": str, "rounds": [{"what": str, "batch": int, "round": int}]})
    return stored["rounds"] if stored["key"] == key else []


def timing_key(task: Task, runs: Sequence[Run]) -> str:
    """Changes with whatever makes times incomparable."""
    about = machine()
    fixed = {
        name: about[name] for name in ("system", "processor", "cores", "accelerator", "threads", "torch")
    }
    fixed["cpu_time"] = task.config.cpu_time
    facts = [sorted(run.name for run in runs), [job.name for job in task.timing_jobs], fixed]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _round(task: Task, runs: Sequence[Run], what: str, batch: int, number: int, bar: tqdm | None) -> Round:
    every = task.timing_jobs
    jobs = [every[(number * batch + i) % len(every)] for i in range(batch)]
    conditions: dict[str, Any] = {}
    measured: dict[str, dict[str, float]] = {}
    order = list(runs)
    random.Random(f"{what}/{batch}/{number}").shuffle(order)
    for run in order:
        if run.model not in conditions and what == DIT:
            conditions[run.model] = task.condition_of(run, jobs)
        measured[run.name] = timed(task, run, jobs, conditions.get(run.model))[1]
        if bar is not None:
            bar.update()
    return {"what": what, "batch": batch, "round": number, "runs": measured}


def timed(task: Task, run: Run, jobs: Sequence[Job], condition: Any) -> tuple[Any, dict[str, float]]:
    """Last latents of the DiT, given its condition, or everything without one; and what that took: `ms` a result, and
    the blocks' FLOPs of all passes, executed, dense and the routers', where routers or a policy decided."""
    source = task.controls.source(run, jobs)  # before the clock starts
    clock = time.process_time if task.config.cpu_time else time.perf_counter
    with task.ready(run):
        start = clock()
        made = (
            task.produce(run, jobs, source)
            if condition is None
            else task.sample(run, condition, jobs, source)
        )
        found = {"ms": 1000 * (clock() - start) / len(jobs)}
        session = task.model(run).session  # before a policy goes
    if run.settings.elastic and session is not None and session.trace is not None:
        flops = {"executed": trace_flops, "dense": trace_dense_flops, "routers": trace_router_flops}
        found |= {name: float(of(session.trace).sum()) for name, of in flops.items()}
    return made, found
