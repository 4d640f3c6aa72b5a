"""The quick phase: every run makes the first seed's items once, as one timed batch; its latents against the dense ones.

Minutes where the other phases take hours: nothing is meshed, kept or repeated. One measurement a row, so that times are
rough; CPU time (`cpu_time=true`) is the steadier one on a busy machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from elastic3d.benchmark.methods import Case
from elastic3d.benchmark.task import Task
from elastic3d.elastic.cost import trace_share
from elastic3d.evaluation.machine import machine
from elastic3d.utils.files import atomic_path
from elastic3d.utils.options import to_dict
from elastic3d.utils.structured import save_json

QUICK = "quick.json"
TITLES = ("method", "budget", "executed", "s an item", "speed-up")


def quick_comparison(task: Task, cases: Sequence[Case], command: str) -> dict[str, Any]:
    """Run all rows, the dense one first, and write quick.json and quick.md -> what quick.json holds."""
    planner, config = task.planner, task.config
    jobs = [job for job in task.jobs if job.seed == config.seeds[0]]
    clock = time.process_time if config.cpu_time else time.perf_counter
    baseline = planner.dense(planner.baseline_steps)
    conditions: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    dense, found = torch.zeros(0), dict[str, Any]()
    others = [case for case in cases if case.run != baseline]
    for case in tqdm([Case("dense", baseline, 1.0), *others], desc="quick", unit="row", dynamic_ncols=True):
        run = case.run
        if run.model not in conditions:
            conditions[run.model] = task.condition_of(run, jobs)
        source = task.controls.source(run, jobs)
        with task.ready(run):
            start = clock()
            latents = task.sample(run, conditions[run.model], jobs, source)
            seconds = (clock() - start) / len(jobs)
            session = planner.models[run.model].session
            traced = run.settings.elastic and session is not None and session.trace is not None
            share = float(trace_share(session.trace).mean()) if traced and session and session.trace else None
        dense = latents if run == baseline else dense
        rows.append({
            "method": case.method, "note": case.note, "budget": case.budget, "steps": run.steps, "executed": share,
            "seconds": seconds, "speedup": rows[0]["seconds"] / seconds if rows else 1.0,
            **task.latent_scores(run, latents, dense),
        })  # fmt: skip
        about = {"command": command, "machine": machine(), "items": len(jobs), "config": to_dict(config)}
        found = {"about": about, "rows": rows}
        save_json(found, config.output / QUICK)
    with atomic_path(config.output / "quick.md") as path:
        path.write_text(table(rows))
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    scores = [
        name
        for name in rows[0]
        if name not in ("method", "note", "budget", "steps", "executed", "seconds", "speedup")
    ]
    lines = ["| " + " | ".join([*TITLES, *scores]) + " |", "| --- " * (len(TITLES) + len(scores)) + "|"]
    for row in rows:
        cells = [
            ", ".join(filter(None, [row["method"], row["note"]])),
            f"{row['budget'] or '':g}" if row["budget"] else "",
        ]
        cells += ["" if row["executed"] is None else f"{row['executed']:.2f}"]
        cells += [f"{row[name]:.2f}" for name in ("seconds", "speedup")] + [
            f"{row[name]:.4g}" for name in scores
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
