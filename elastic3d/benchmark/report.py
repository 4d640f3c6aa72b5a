"""From results, scores and times to the rows of the table, what they say (frontiers, targets, comparisons), and all
files that a benchmark writes in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import groupby, product
from operator import itemgetter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from elastic3d.benchmark.config import Method
from elastic3d.benchmark.methods import CONTROLS, FAMILY, FEWER, Case, Run
from elastic3d.benchmark.rivals import missing
from elastic3d.benchmark.task import SHEET_SIDE, Pixels, Scores, Task
from elastic3d.evaluation.frontier import INK, PAPER, Point, Series, chart, compare_fronts, legend
from elastic3d.evaluation.report import machine, markdown_table, write_csv
from elastic3d.evaluation.statistics import Rival as Opponent
from elastic3d.evaluation.statistics import Row, averages, bootstrap_mean, compare_metric, sample_of
from elastic3d.pipelines.preview import draw_routes, route_title
from elastic3d.training.journal import contact_sheet
from elastic3d.utils.files import atomic_path, save_json
from elastic3d.utils.options import to_dict

SPEED, EFFICIENCY, OFF_BUDGET, SOONER = 2.0, 0.85, 0.03, 1.5
TOLERANCE = 0.01  # of a frontier that is on the other
EQUAL_TIME = 1.02  # a rival is compared with the elastic row that takes at most this share of its time
LOWER_IS_BETTER = ("chamfer", "feature", "frechet")
DIT, END_TO_END = "dit", "end_to_end"
QUARTILES = ("ms_q25", "ms_median", "ms_q75", "speedup_q25", "speedup", "speedup_q75")
ANSWERS = {True: "met", False: "**not met**", None: "not measured"}
Round = dict[str, Any]  # what, batch, round, and by run: milliseconds a result, FLOPs


def average(rows: Sequence[Row], metric: str) -> float | None:
    """Mean over items of the mean over seeds; None where no item has the metric."""
    values = list(averages(rows, metric, sample_of).values())
    return float(np.mean(values)) if values else None


def bounds(rows: Sequence[Row], metric: str, column: str) -> dict[str, float | None]:
    """`<column>_low` and `<column>_high`, the 95 % bootstrap interval of `average`."""
    values = list(averages(rows, metric, sample_of).values())
    found = bootstrap_mean(values) if values else None
    return {f"{column}_low": found.low if found else None, f"{column}_high": found.high if found else None}


def build_rows(task: Task, cases: Sequence[Case], scores: Scores, rounds: Sequence[Round]) -> list[Row]:
    """A row for each case and batch size. What was not measured is None.

    `as_trained`: the model's routers, each sample for itself, with the cache they were trained with: for that, budgets
    are calibrated.
    """
    rows, planner = [], task.planner
    for case in cases:
        run, settings = case.run, case.run.settings
        compute, columns = _compute(task, run), task.columns(run, scores)
        own = settings.width == planner.default.width and settings.cache == planner.trained_cache
        # alone, a sample has nobody to share its routes with
        for batch in [b for b in task.config.batches if b > 1 or not settings.shared]:
            head = {
                "method": case.method, "note": case.note, "budget": case.budget, "steps": run.steps, "batch": batch,
                "as_trained": case.method == Method.elastic.value and own,
            }  # fmt: skip
            times = _times(task, run, rounds, batch, compute["executed_flops_ratio"])
            rows.append(head | compute | times | columns | {"run": run.name})
    return rows


def _compute(task: Task, run: Run) -> dict[str, Any]:
    """Executed FLOPs of the results of a run, over the dense model's in as many steps; mean and spread over results."""
    made = [record for job in task.jobs if (record := task.record(run, job)) is not None]
    counted = [record["metadata"] for record in made if "flops_executed" in record["metadata"]]
    shares = np.array([each["flops_executed"] / each["flops_dense"] for each in counted])
    routers = np.array([each.get("flops_routers", 0) / each["flops_dense"] for each in counted])
    found: dict[str, Callable[[], Any]] = {
        "executed_flops_ratio": shares.mean, "share_std": shares.std, "share_min": shares.min,
        "share_max": shares.max, "router_flops_ratio": routers.mean,
    }  # fmt: skip
    counts = {task.plural: len(made), "failed": sum(record["status"] == "failed" for record in made)}
    return {name: float(of()) if counted else None for name, of in found.items()} | counts


def _times(task: Task, run: Run, rounds: Sequence[Round], batch: int, made: float | None) -> dict[str, Any]:
    """Times a result and speed-ups; executed FLOPs of the timed results where no others were `made`."""
    baseline, same = task.planner.baseline, task.planner.dense(run.steps)
    dit = summarise(rounds, run, baseline, DIT, batch)
    within = summarise(rounds, run, same, DIT, batch)
    whole = summarise(rounds, run, baseline, END_TO_END, batch)
    timed = None if run.rival else dit["share"]  # a rival leaves no trace in the timed rounds
    share = timed if made is None else made
    total = share and share * task.model(run).moves(run.steps) / task.model(baseline).moves(baseline.steps)
    executed, sooner = made if run.rival else timed, within["speedup"]
    return {
        "executed_flops_ratio": share,
        "flops_ratio_to_baseline": total,
        "flop_speedup": 1 / total if total else None,
        **{f"dit_{name}": dit[name] for name in QUARTILES},
        "dit_speedup_same_steps": sooner,
        "efficiency": None if sooner is None or executed is None else sooner * executed,
        "end_to_end_ms_median": whole["ms_median"],
        "end_to_end_speedup": whole["speedup"],
        "rounds": dit["rounds"],
    }


def summarise(rounds: Sequence[Round], run: Run, baseline: Run, what: str, batch: int) -> dict[str, Any]:
    """Quartiles of a run's milliseconds and of its speed-up over another, its executed share; None without rounds."""
    chosen = [r["runs"] for r in rounds if r["what"] == what and r["batch"] == batch]
    if not chosen or run.name not in chosen[0]:
        return {**dict.fromkeys((*QUARTILES, "share")), "rounds": 0}
    ms, other = (np.array([each[r.name]["ms"] for each in chosen]) for r in (run, baseline))
    executed, dense = (sum(each[run.name].get(n, 1.0) for each in chosen) for n in ("executed", "dense"))
    quartiles = np.quantile([ms, other / ms], [0.25, 0.5, 0.75], axis=1).T.ravel().tolist()
    return {**dict(zip(QUARTILES, quartiles, strict=True)), "share": executed / dense, "rounds": len(chosen)}


def compare_rivals(task: Task, cases: Sequence[Case], scores: Scores, rows: Sequence[Row]) -> list[Row]:
    """The routers beside every rival, item by item: controls at equal FLOPs, variants and ablations at an equal
    budget, everything else at equal time, with the slowest elastic row that takes no longer."""
    found = []
    for rival in cases:
        matched, opponents = _opponents(task, rival, cases, rows)
        for case, (against, metric) in product(opponents, task.compared):
            own, theirs = (scores.rows[run.name, against] for run in (case.run, rival.run))
            compared = compare_metric(metric, own, [theirs], Opponent.baseline)
            if compared is not None:
                found.append({
                    "routers": case.method, "rival_method": rival.method, "rival_run": rival.run.name,
                    "rival_note": rival.note, "against": against, "budget": case.budget, "steps": case.run.steps,
                    "matched": matched, **asdict(compared),
                })  # fmt: skip
    return found


def _opponents(
    task: Task, rival: Case, cases: Sequence[Case], rows: Sequence[Row]
) -> tuple[str, Sequence[Case]]:
    if rival.method in (*FAMILY, Method.dense.value, Method.random_blocks.value):
        return "", []
    if rival.run.donor is not None:
        return "equal FLOPs", [Case(Method.elastic.value, rival.run.donor, rival.budget)]
    if rival.method.startswith("elastic") or (rival.method in task.config.variants and rival.budget):
        elastic = [case for case in cases if case.method == Method.elastic.value]
        same = [c for c in elastic if c.run.steps == rival.run.steps and c.budget == rival.budget]
        return "equal budget", [case for case in same if case.run != rival.run]
    smallest = min((row["batch"] for row in rows), default=None)
    times = {row["run"]: row["dit_ms_median"] for row in rows if row["batch"] == smallest}
    limit = times.get(rival.run.name)
    timed = [case for case in cases if case.method in FAMILY and times.get(case.run.name) is not None]
    fast = [case for case in timed if limit is not None and times[case.run.name] <= EQUAL_TIME * limit]
    return "equal time", [max(fast, key=lambda case: times[case.run.name])] if fast else []


def summarise_rows(task: Task, rows: Sequence[Row]) -> dict[str, Any]:
    """`frontiers` by batch size, rival and loss; the best operating point; `targets`, met: None where not measured."""
    frontiers: dict[str, dict[str, Row]] = {str(row["batch"]): {} for row in rows}
    for batch, rival in product(frontiers, rivals_in(rows)):
        frontiers[batch][rival] = {n: frontier(task, rows, rival, n, int(batch)) for n in task.losses}
    best = best_point(task, rows)
    return dict(frontiers=frontiers, best_operating_point=best, targets=targets(task, rows, frontiers, best))


def rivals_in(rows: Sequence[Row]) -> list[str]:
    """Families that the elastic one is put beside; fewer steps first."""
    names = dict.fromkeys("fewer_steps" if row["method"] in FEWER else row["method"] for row in rows)
    return sorted((n for n in names if n not in (*FAMILY, *CONTROLS)), key=lambda name: name != "fewer_steps")


def frontier(task: Task, rows: Sequence[Row], rival: str, loss: str, batch: int) -> dict[str, Any]:
    """The elastic family beside one rival, over the DiT's milliseconds a result.

    What a loss is paired with is no point of its frontier: it has no distance to itself.
    """
    steps = {"reference": task.config.reference_steps, "dense": task.planner.baseline_steps}
    itself = steps.get(task.losses[loss])
    timed = [r for r in timed_rows(rows, loss, batch) if r["method"] not in FEWER or r["steps"] != itself]

    def points(methods: Sequence[str]) -> list[tuple[float, float]]:
        own = [row for row in timed if row["method"] in methods]
        return [(row["dit_ms_median"], as_loss(loss, row[loss])) for row in own]

    others = FEWER if rival == "fewer_steps" else (rival,)
    return compare_fronts(points(FAMILY), points(others), TOLERANCE)


def timed_rows(rows: Sequence[Row], score: str, batch: int) -> list[Row]:
    """Rows of a batch size that have a score and the DiT's time."""
    own = [row for row in rows if row["batch"] == batch]
    return [row for row in own if row.get(score) is not None and row["dit_ms_median"] is not None]


def as_loss(name: str, value: float) -> float:
    """A score as a loss, the lower the better: -PSNR; 1 - IoU, F-score or SSIM; distances as they are."""
    if name.startswith(LOWER_IS_BETTER):
        return value
    return -value if name.startswith("psnr") else 1 - value


def best_point(task: Task, rows: Sequence[Row]) -> Row | None:
    """The fastest row of the elastic family at the smallest batch that holds the dense model's fidelity."""
    smallest = min((row["batch"] for row in rows), default=0)
    family = [row for row in timed_rows(rows, "dit_speedup", smallest) if row["method"] in FAMILY]
    return max(filter(task.holds, family), key=itemgetter("dit_speedup"), default=None)


def targets(task: Task, rows: Sequence[Row], frontiers: dict[str, Any], best: Row | None) -> dict[str, Any]:
    """Every target with what was wanted, what was found, and whether it is met."""
    family = [row for row in rows if row["method"] in FAMILY]
    known = any(row["dit_speedup"] is not None and task.holds(row) is not None for row in family)
    at_best = [row for row in family if best and row["run"] == best["run"]]
    efficiency = {str(row["batch"]): row["efficiency"] for row in at_best}
    reached = [value >= EFFICIENCY for value in efficiency.values() if value is not None]
    kept = [row for row in rows if row["as_trained"] or row["method"] == Method.training_free.value]
    executed = [(row["executed_flops_ratio"], row["budget"]) for row in kept]
    off = max((abs(share - budget) for share, budget in executed if share is not None), default=None)
    fast = best is not None and best["dit_speedup"] >= SPEED
    found = {
        f"speed: DiT at least {SPEED}x the dense model's, fidelity held": (
            best["dit_speedup"] if best else None, fast if known else None,
        ),
        f"efficiency: measured / FLOP speed-up at least {EFFICIENCY} at the best point, by batch size": (
            efficiency, all(reached) if reached else None,
        ),
        f"budgets: executed FLOPs within {OFF_BUDGET} of each": (
            off, None if off is None else off <= OFF_BUDGET,
        ),
    }  # fmt: skip
    for batch, families in frontiers.items():
        for rival, losses in families.items():
            for loss in task.plot:
                entry = losses[loss]
                name = f"{rival}, {loss}, batch {batch}"
                worst = {"worst_time": entry["worst_time"], "losses": entry["worst_losses"]}
                found[f"never worse in the same time than {name}"] = (worst, entry["never_worse"])
                ratio, is_known = entry["knee_ratio"], entry["knee"] is not None and bool(entry["front"])
                if rival == "fewer_steps" and task.losses[loss] == "reference":
                    met = (ratio is not None and ratio >= SOONER) if is_known else None
                    found[f"knee at least {SOONER}x sooner than {name}"] = (ratio, met)
    return {name: {"found": value, "met": met} for name, (value, met) in found.items()}


# ------------------------------------------------------------------------------------------------ files


def write_report(
    task: Task, cases: Sequence[Case], scores: Scores, rounds: Sequence[Round], command: str
) -> dict[str, Any]:
    """Write results.json, results.csv, table.md, the Pareto plots, the routes of one item and the contact sheet
    -> what results.json holds."""
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
    images = {"sheet.png": titled_sheet(task.sheet(cases))}
    for batch in task.config.batches:
        name = "pareto.png" if batch == task.config.batches[0] else f"pareto-batch-{batch}.png"
        images[name] = pareto_plot(rows, batch, task.plot, task.noun)
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
        points: dict[str, list[Point]] = {name: [] for name in names}
        for row in (timed := timed_rows(rows, score, batch)):
            points[name_of(row)].append((row["dit_ms_median"], row[score]))
        if timed:
            series = [Series(name, found) for name, found in points.items()]
            panels.append(chart(series, f"DiT, ms a {noun}, batch {batch}", label, "(lower" in label))
    if not panels:
        return None
    below = legend(names, panels[0].width * len(panels))
    above = np.hstack([np.asarray(panel) for panel in panels])
    return Image.fromarray(np.vstack([above, np.asarray(below)]))


def titled_sheet(columns: Mapping[str, Sequence[Pixels]]) -> Image.Image | None:
    """Images of one size, a column for each title, which stands over it; None without columns."""
    if not columns:
        return None
    body = Image.fromarray(contact_sheet(list(zip(*columns.values(), strict=True))))
    sheet = Image.new("RGB", (body.width, body.height + 24), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, title in enumerate(columns):
        at = ((number + 0.5) * SHEET_SIDE, 12)
        draw.text(at, title, fill=INK, font=ImageFont.load_default(13), anchor="mm")
    sheet.paste(body, (0, 24))
    return sheet
