"""Everything that a benchmark writes in the end: results.json, results.csv, table.md, the Pareto plots, the routes of
one item, and the contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elastic3d.benchmark.methods import FAMILY, FEWER, Case
from elastic3d.benchmark.rivals import missing
from elastic3d.benchmark.rows import Round, build_rows, compare_rivals, summarise_rows, timed_rows
from elastic3d.benchmark.task import SHEET_SIDE, Pixels, Scores, Task
from elastic3d.evaluation.frontier import INK, PAPER, Series, chart, legend
from elastic3d.evaluation.report import machine, markdown_table, write_csv
from elastic3d.evaluation.statistics import Row
from elastic3d.pipelines.preview import draw_routes, route_title
from elastic3d.training.journal import contact_sheet
from elastic3d.utils.files import atomic_path, save_json
from elastic3d.utils.options import to_dict

ANSWERS = {True: "met", False: "**not met**", None: "not measured"}


def write_report(
    task: Task, cases: Sequence[Case], scores: Scores, rounds: Sequence[Round], command: str
) -> dict[str, Any]:
    """Write all files; what results.json holds."""
    output, rows = task.config.output, build_rows(task, cases, scores, rounds)
    results = {
        "about": about(task, command),
        "rows": rows,
        "summary": summarise_rows(task, rows),
        "comparisons": compare_rivals(task, cases, scores, rows),
    }
    save_json(results, output / "results.json")
    write_csv(rows, output / "results.csv")
    with atomic_path(output / "table.md") as path:
        path.write_text(page(results, task.table), encoding="utf-8")
    if panels := route_panels(task, cases):
        draw_routes(panels, output / "blocks.png")
    first = task.config.batches[0]
    images = {
        "pareto.png" if batch == first else f"pareto-batch-{batch}.png": pareto_plot(
            rows, batch, task.plot, task.noun
        )
        for batch in task.config.batches
    }
    if columns := task.sheet(cases):
        images["sheet.png"] = titled_sheet(columns)
    for name, image in images.items():
        if image is not None:
            with atomic_path(output / name) as path:
                image.save(path, format="PNG")
    return results


def about(task: Task, command: str) -> dict[str, Any]:
    """What was run, on which models, where and when."""
    return {
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "models": {name: model.weights_sha256 for name, model in task.planner.models.items()},
        "baseline_steps": task.planner.baseline_steps,
        "left_out": missing(task.config),
        **task.about(),
        "config": to_dict(task.config),
    }


def route_panels(task: Task, cases: Sequence[Case]) -> list[tuple[str, dict[str, Any]]]:
    """Title and `routes` of what each run of the elastic family did for the first item."""
    panels = dict[str, tuple[str, dict[str, Any]]]()
    for case in cases:
        record = task.record(case.run, task.jobs[0]) if case.method in FAMILY else None
        if record and "routes" in record["metadata"]:
            title = route_title(f"{case.method}, {case.run.steps} steps", record["metadata"])
            panels[case.run.name] = title, record["metadata"]["routes"]
    return list(panels.values())


def page(results: Mapping[str, Any], scores: Mapping[str, str]) -> str:
    """Markdown: a line for every run with the DiT's speed-up at each batch size and the columns `scores` (name:
    title), then the targets."""
    rows = results["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    titles = ["method", "budget", "steps", "executed FLOPs / dense"]
    titles += [f"{name}, batch {batch}" for name in ("DiT speed-up", "efficiency") for batch in batches]
    lines, identity = [], itemgetter("method", "note", "budget", "steps", "run")
    for (method, note, budget, steps, _), same in groupby(rows, identity):
        group = {row["batch"]: row for row in same}
        first = next(iter(group.values()))
        cells = [", ".join(filter(None, [method, note])), budget, steps]
        cells.append(_number(first["flops_ratio_to_baseline"], ".2f"))
        for name in ("dit_speedup", "efficiency"):
            cells += [_number(group.get(batch, {}).get(name), ".2f") for batch in batches]
        lines.append([*cells, *(_number(first.get(name), ".4g") for name in scores)])
    targets = results["summary"]["targets"].items()
    answers = [f"- {name}: {_found(t['found'])}, {ANSWERS[t['met']]}" for name, t in targets]
    return "\n".join([markdown_table([*titles, *scores.values()], lines), "", *answers]) + "\n"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_found(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return " / ".join(map(_found, value))
    return "nothing" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------- Pareto plot


def pareto_plot(
    rows: Sequence[Row], batch: int, labels: Mapping[str, str], noun: str = "mesh"
) -> Image.Image | None:
    """Fidelity over the DiT's milliseconds, a panel each score, a colour each method; None without times.

    A label says in brackets whether lower is better.
    """

    def name_of(row: Row) -> str:
        return "dense, fewer steps" if row["method"] in FEWER else row["method"]

    panels, names = [], list(dict.fromkeys(map(name_of, rows)))
    for score, label in labels.items():
        series = {name: Series(name) for name in names}
        for row in timed_rows(rows, score, batch):
            series[name_of(row)].points.append((row["dit_ms_median"], row[score]))
        if any(each.points for each in series.values()):
            time_label, lower = f"DiT, ms a {noun}, batch {batch}", "(lower" in label
            panels.append(chart(list(series.values()), time_label, label, lower))
    if not panels:
        return None
    below = legend(names, panels[0].width * len(panels))
    above = np.hstack([np.asarray(panel) for panel in panels])
    return Image.fromarray(np.vstack([above, np.asarray(below)]))


# ----------------------------------------------------------------------------------------------- contact sheet


def titled_sheet(columns: Mapping[str, Sequence[Pixels]]) -> Image.Image:
    """Images of one size, a column for each title, which stands over it."""
    body = Image.fromarray(contact_sheet(list(zip(*columns.values(), strict=True))))
    sheet = Image.new("RGB", (body.width, body.height + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, title in enumerate(columns):
        at = ((number + 0.5) * SHEET_SIDE, 12)
        draw.text(at, title, fill=INK, font=ImageFont.load_default(13), anchor="mm")
    sheet.paste(body, (0, 24))
    return sheet
