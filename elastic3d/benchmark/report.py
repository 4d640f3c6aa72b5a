"""Everything that a benchmark writes in the end: results.json, results.csv, table.md and the plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np

from elastic3d.benchmark.methods import Case
from elastic3d.benchmark.plots import heat_map, pareto_plot, save, titled_sheet
from elastic3d.benchmark.rivals import missing
from elastic3d.benchmark.rows import beaten, build_rows, compare_rivals, route_shares, summarise_rows
from elastic3d.benchmark.task import Scores, Task
from elastic3d.benchmark.timing import Round
from elastic3d.evaluation.items import Row
from elastic3d.evaluation.machine import machine
from elastic3d.evaluation.report import write_csv
from elastic3d.utils.files import atomic_path
from elastic3d.utils.options import to_dict
from elastic3d.utils.structured import save_json

ANSWERS = {True: "met", False: "**not met**", None: "not measured"}


def write_report(
    task: Task, cases: Sequence[Case], scores: Scores, rounds: Sequence[Round], command: str
) -> dict[str, Any]:
    """Write all files; what results.json holds."""
    output, rows, shares = (
        task.config.output,
        build_rows(task, cases, scores, rounds),
        route_shares(task, cases),
    )
    comparisons = compare_rivals(task, cases, scores, rows)
    results = {
        "about": {
            "command": command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "models": {name: model.weights_sha256 for name, model in task.planner.models.items()},
            "baseline_steps": task.planner.baseline_steps,
            "left_out": missing(task.config),
            **task.about(),
            "config": to_dict(task.config),
        },
        "rows": rows,
        "summary": {
            **summarise_rows(task, rows),
            "routers_beside_rivals": beaten(comparisons),
            "blocks": {run: block_means(entry) for run, entry in shares.items()},
        },
        "comparisons": comparisons,
    }
    save_json(results, output / "results.json")
    write_csv(rows, output / "results.csv")
    with atomic_path(output / "table.md") as path:
        path.write_text(page(results, task.table))
    for batch in task.config.batches:
        if (plot := pareto_plot(rows, batch, task.plot, task.noun)) is not None:
            first = batch == task.config.batches[0]
            save(plot, output / ("pareto.png" if first else f"pareto-batch-{batch}.png"))
    if (blocks := heat_map(shares)) is not None:
        save(blocks, output / "blocks.png")
    if (sheet := task.sheet(cases)) is not None:
        save(titled_sheet(*sheet), output / "sheet.png")
    return results


def block_means(entry: dict[str, Any]) -> dict[str, Any]:
    """How wide each block ran on average over steps and results, by branch, and how much results differ."""
    found: dict[str, Any] = {name: entry[name] for name in ("method", "budget", "steps", "blocks")}
    for branch, name in enumerate(("conditional", "unconditional")):
        mean = entry["mean"][:, branch].mean(axis=0)
        if np.isfinite(mean).all():
            found[name] = mean.round(4).tolist()
            found[f"{name}_std"] = entry["std"][:, branch].mean(axis=0).round(4).tolist()
    return found


def page(results: Mapping[str, Any], scores: Mapping[str, str]) -> str:
    """Markdown: a line for every run with the DiT's speed-up at each batch size and the columns `scores` (name:
    title), then the targets."""
    rows = results["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    titles = ["method", "budget", "steps", "executed FLOPs / dense"]
    titles += [f"{name}, batch {batch}" for name in ("DiT speed-up", "efficiency") for batch in batches]
    lines = [_line([*titles, *scores.values()]), _line(["---"] * (len(titles) + len(scores)))]
    groups: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        identity = tuple(row.get(name) for name in ("method", "note", "budget", "steps", "run"))
        groups.setdefault(identity, {})[row["batch"]] = row
    for (method, note, budget, steps, _), group in groups.items():
        first = next(iter(group.values()))
        cells = [", ".join(filter(None, [method, note])), budget, steps]
        cells.append(_number(first["flops_ratio_to_baseline"], ".2f"))
        for name in ("dit_speedup", "efficiency"):
            cells += [_number(group[batch].get(name), ".2f") if batch in group else "" for batch in batches]
        lines.append(_line([*cells, *(_number(first.get(name), ".4g") for name in scores)]))
    targets = results["summary"]["targets"].items()
    lines += ["", *(f"- {name}: {_found(t['found'])}, {ANSWERS[t['met']]}" for name, t in targets)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_found(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return " / ".join(map(_found, value))
    return "nothing" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
