"""From meshes, scores and times to the rows of the table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from elastic3d.benchmark.methods import FAMILY, Case, Run
from elastic3d.benchmark.options import Method
from elastic3d.benchmark.place import Place
from elastic3d.benchmark.quality import FLOOR, REFERENCE, SAME_STEPS, TRUTH, Scores, Workplace
from elastic3d.benchmark.timing import DIT, END_TO_END, Round, summarise
from elastic3d.evaluation.fidelity import Rival, compare_metric
from elastic3d.evaluation.items import Row
from elastic3d.evaluation.statistics import bootstrap_mean
from elastic3d.routing.trace import NOT_RUN, parse_actions

NO_RIVALS = tuple(
    m.value
    for m in (Method.dense, Method.fewer_steps, Method.euler_steps, Method.dense_cache, Method.elastic)
)


def build_rows(place: Workplace, cases: Sequence[Case], scores: Scores, rounds: Sequence[Round]) -> list[Row]:
    """A row for each case and batch size. What was not measured is None."""
    floor = _floor(place, scores)
    rows = []
    for case in cases:
        fidelity = _fidelity(place, case.run, scores) | floor
        compute = compute_of(place, case.run)
        for batch in batches_of(case, place.config.batches):
            head = {
                "method": case.method,
                "note": case.note,
                "budget": case.budget,
                "steps": case.run.steps,
                "batch": batch,
                "as_trained": as_trained(place, case),
            }
            rows.append(head | compute | times_of(place, case.run, rounds, batch, compute) | fidelity)
            rows[-1]["run"] = case.run.name
    return rows


def batches_of(case: Case, batches: Sequence[int]) -> list[int]:
    """The batch sizes that have a row: alone, a sample has nobody to share its routes with."""
    return [batch for batch in batches if batch > 1 or not case.run.settings.shared]


def as_trained(place: Place, case: Case) -> bool:
    """Whether these are the model's routers, each sample for itself, with the cache they were trained with: for that,
    budgets are calibrated."""
    settings, planner = case.run.settings, place.planner
    return (
        case.method in FAMILY
        and settings.width == planner.default.width
        and settings.cache == planner.trained_cache
        and not settings.shared
    )


def compute_of(place: Place, run: Run) -> dict[str, Any]:
    """Executed FLOPs of the meshes of a run, over the dense model's in as many steps; mean and spread over meshes."""
    records = [place.store.record(run, job) for job in place.jobs]
    receipts = [r["receipt"] for r in records if r is not None and "flops_executed" in r["receipt"]]
    shares = np.array([r["flops_executed"] / r["flops_dense"] for r in receipts])
    routers = np.array([r.get("flops_routers", 0) / r["flops_dense"] for r in receipts])
    statistics: dict[str, tuple[Callable[..., Any], np.ndarray]] = {
        "executed_flops_ratio": (np.mean, shares),
        "share_std": (np.std, shares),
        "share_min": (np.min, shares),
        "share_max": (np.max, shares),
        "router_flops_ratio": (np.mean, routers),
    }
    found = {name: float(of(values)) if receipts else None for name, (of, values) in statistics.items()}
    return found | {
        "meshes": sum(record is not None for record in records),
        "failed": sum(record is not None and record["status"] == "failed" for record in records),
    }


def times_of(
    place: Place, run: Run, rounds: Sequence[Round], batch: int, compute: dict[str, Any]
) -> dict[str, Any]:
    """Times a mesh and speed-ups; `executed_flops_ratio` of the timed meshes where no others were made."""
    baseline_steps = place.planner.baseline_steps
    baseline, same = place.planner.dense(baseline_steps), place.planner.dense(run.steps)
    dit = summarise(rounds, run, baseline, DIT, batch)
    within = summarise(rounds, run, same, DIT, batch)
    whole = summarise(rounds, run, baseline, END_TO_END, batch)
    share = compute["executed_flops_ratio"]
    if share is None and dit is not None:
        share = dit["share"]
    total = None if share is None else share * run.steps / baseline_steps
    found: dict[str, Any] = {
        "executed_flops_ratio": share,
        "flops_ratio_to_baseline": total,
        "flop_speedup": 1 / total if total else None,
    }
    for name, index in (("q25", 0), ("median", 1), ("q75", 2)):
        found[f"dit_ms_{name}"] = dit["ms"][index] if dit else None
    for name, index in (("dit_speedup", 1), ("dit_speedup_q25", 0), ("dit_speedup_q75", 2)):
        found[name] = dit["speedup"][index] if dit else None
    found["dit_speedup_same_steps"] = within["speedup"][1] if within else None
    found["efficiency"] = within["speedup"][1] * within["share"] if within else None
    found["end_to_end_ms_median"] = whole["ms"][1] if whole else None
    found["end_to_end_speedup"] = whole["speedup"][1] if whole else None
    found["rounds"] = dit["rounds"] if dit else 0
    return found


def _fidelity(place: Workplace, run: Run, scores: Scores) -> dict[str, Any]:
    """Scores against the reference, the dense model in as many steps, and ground truth."""
    bootstrap = place.config.bootstrap
    found: dict[str, Any] = {}
    for kind, suffix in ((REFERENCE, "paired"), (SAME_STEPS, "same_steps")):
        rows = scores.get((run.name, kind), [])
        distance = sample_means(rows, "chamfer_l1")
        found[f"chamfer_l1_{suffix}"] = _mean(distance)
        found[f"iou_{suffix}"] = _mean(sample_means(rows, "volume_iou"))
        if kind == REFERENCE:
            interval = bootstrap_mean(distance, bootstrap) if distance else None
            found["chamfer_l1_paired_low"] = interval.low if interval else None
            found["chamfer_l1_paired_high"] = interval.high if interval else None
    truth = scores.get((run.name, TRUTH), [])
    for threshold in place.config.protocol.thresholds:
        name = f"f_score@{threshold:g}"
        found[name] = _mean(sample_means(truth, name))
        baseline = scores.get((place.planner.dense(place.planner.baseline_steps).name, TRUTH), [])
        dense = _mean(sample_means(baseline, name))
        kept = None if found[name] is None or not dense else found[name] / dense
        found[f"{name}_drop"] = None if kept is None else 1 - kept
    found["chamfer_l1_truth"] = _mean(sample_means(truth, "chamfer_l1"))
    found["iou_truth"] = _mean(sample_means(truth, "volume_iou"))
    return found


def _floor(place: Workplace, scores: Scores) -> dict[str, Any]:
    """The dense model against itself with another seed; a mesh that failed is no measure of noise."""
    rows = [r for r in scores.get((place.planner.reference().name, FLOOR), []) if r["status"] == "ok"]
    return {
        "chamfer_l1_seed_floor": _mean(sample_means(rows, "chamfer_l1")),
        "iou_seed_floor": _mean(sample_means(rows, "volume_iou")),
    }


def sample_means(rows: Sequence[Row], metric: str) -> list[float]:
    """The metric averaged over the seeds of each picture; pictures without it are left out."""
    by_sample: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row.get(metric) is not None:
            by_sample[row["name"].rpartition("/")[2]].append(row[metric])
    return [float(np.mean(values)) for values in by_sample.values()]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def compare_rivals(place: Workplace, cases: Sequence[Case], scores: Scores) -> list[dict[str, Any]]:
    """The routers beside each control and variant of the same budget and steps, picture by picture.

    Controls meet their donor, to which their FLOPs are matched; everything else meets `elastic`. A rival without a
    budget meets every one.
    """
    found = []
    for rival in cases:
        if rival.method in NO_RIVALS:
            continue
        for case in opponents(rival, cases):
            for kind, metric in ((REFERENCE, "chamfer_l1"), (TRUTH, "f_score@0.02")):
                rows = [scores.get((run.name, kind), []) for run in (case.run, rival.run)]
                compared = compare_metric(metric, rows[0], [rows[1]], Rival.baseline, place.config.bootstrap)
                if compared is not None:
                    head = {"routers": case.method, "rival_method": rival.method, "against": kind}
                    asked = {"budget": case.budget, "steps": case.run.steps}
                    found.append(head | asked | compared.as_dict())
    return found


def opponents(rival: Case, cases: Sequence[Case]) -> Sequence[Case]:
    """The elastic cases that a rival is compared with."""
    donor = rival.run.donor
    if donor is not None:
        own = [case for case in cases if case.run == donor]
        return own[:1] or [Case(Method.elastic.value, donor, rival.budget)]
    return [
        case
        for case in cases
        if case.method == Method.elastic.value
        and case.run.steps == rival.run.steps
        and case.run != rival.run
        and rival.budget in (None, case.budget)
    ]


def route_shares(place: Place, cases: Sequence[Case]) -> dict[str, Any]:
    """By run of the elastic family: executed width (S,2,I) averaged over meshes, 0 where skipped or reused or where
    the other branch alone ran; NaN for a branch that never runs."""
    found: dict[str, Any] = {}
    for case in cases:
        if case.method not in FAMILY or case.run.name in found:
            continue
        shares, blocks = [], []
        for job in place.jobs:
            record = place.store.record(case.run, job)
            routes = record["receipt"].get("routes") if record else None
            if routes:
                blocks = routes["blocks"]
                widths = np.array([np.nan, 0, 0, *routes["widths"]])  # not run, reused, skipped, each width
                shares.append(widths[parse_actions(routes["actions"], len(blocks)).numpy() - NOT_RUN])
        if shares:
            executed = np.array(shares)  # (J,S,2,I)
            runs = np.isfinite(executed).any((0, 1, 3))
            executed[:, :, runs] = np.nan_to_num(executed[:, :, runs])
            found[case.run.name] = {
                "method": case.method,
                "budget": case.budget,
                "steps": case.run.steps,
                "blocks": blocks,
                "mean": np.mean(executed, axis=0),
                "std": np.std(executed, axis=0),
            }
    return found
