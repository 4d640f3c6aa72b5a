"""What the rows say: joint frontiers, and plain yes or no to every target. Reads rows alone, whoever measured them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastic3d.benchmark.methods import FAMILY
from elastic3d.evaluation.fidelity import direction
from elastic3d.evaluation.frontier import compare_fronts
from elastic3d.evaluation.items import Row

SPEED, F_DROP, EFFICIENCY, OFF_BUDGET, SOONER = 2.0, 0.01, 0.85, 0.03, 1.5
TOLERANCE = 0.01  # of a frontier that is on the other
FEWER, EULER = ("dense", "fewer_steps"), ("euler_steps",)
# better the lower, or (all but Chamfer) the higher: these become 1 - value
LOSSES = ("chamfer_l1_paired", "iou_paired", "f_score@0.02", "f_score@0.05", "chamfer_l1_truth")


def summarise_rows(rows: Sequence[Row], reference_steps: int, baseline_steps: int) -> dict[str, Any]:
    """Frontiers by batch size and loss, beside the model's own sampler and (`euler_frontiers`) plain Euler steps; the
    best operating point, and the targets (`met`: None where not measured)."""

    def fronts(rivals: tuple[str, ...]) -> dict[str, Any]:
        return {
            str(batch): {loss: frontier(rows, loss, batch, reference_steps, rivals) for loss in LOSSES}
            for batch in dict.fromkeys(row["batch"] for row in rows)
        }

    frontiers, best = fronts(FEWER), best_point(rows, baseline_steps)
    return {
        "frontiers": frontiers,
        "euler_frontiers": fronts(EULER) if any(row["method"] in EULER for row in rows) else None,
        "best_operating_point": best,
        "targets": targets(rows, frontiers, best, baseline_steps),
    }


def frontier(
    rows: Sequence[Row], loss: str, batch: int, reference_steps: int, rivals: tuple[str, ...] = FEWER
) -> dict[str, Any]:
    """The elastic family (steps x budget x cache) beside fewer steps, over the DiT's milliseconds a mesh.

    The reference itself, which has no distance to itself, is no point of a paired frontier.
    """
    points: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for row in rows:
        is_elastic, is_fewer = row["method"] in FAMILY, row["method"] in rivals
        value, time = row.get(loss), row["dit_ms_median"]
        if row["batch"] != batch or value is None or time is None or not (is_elastic or is_fewer):
            continue
        if row["method"] in FEWER and row["steps"] == reference_steps and loss.endswith("_paired"):
            continue
        points[is_elastic].append((time, value if loss.startswith("chamfer") else 1 - value))
    return compare_fronts(points[True], points[False], TOLERANCE).as_dict()


def holds_fidelity(row: Row) -> bool | None:
    """Within the seed floor, and F-scores to ground truth not down by more than 1 %; None where neither is known."""
    distance, floor = row["chamfer_l1_same_steps"], row["chamfer_l1_seed_floor"]
    drops = [row.get(f"f_score@{threshold}_drop") for threshold in ("0.02", "0.05")]
    if distance is None or floor is None:
        return None
    return distance < floor and all(drop is None or drop <= F_DROP for drop in drops)


def best_point(rows: Sequence[Row], baseline_steps: int) -> Row | None:
    """The fastest row of the elastic family, at the baseline's steps and the smallest batch, that holds fidelity."""
    smallest = min((row["batch"] for row in rows), default=None)
    found = [
        row
        for row in rows
        if row["method"] in FAMILY and row["steps"] == baseline_steps and row["batch"] == smallest
        if row["dit_speedup"] is not None and holds_fidelity(row)
    ]
    return max(found, key=lambda row: row["dit_speedup"], default=None)


def targets(
    rows: Sequence[Row], frontiers: dict[str, Any], best: Row | None, baseline_steps: int
) -> dict[str, Any]:
    """Every target with what was wanted, what was found, and whether it is met."""
    family = [row for row in rows if row["method"] in FAMILY]
    judged = [row for row in family if row["steps"] == baseline_steps and holds_fidelity(row) is not None]
    known = any(row["dit_speedup"] is not None for row in judged)
    efficiency = {row["batch"]: row["efficiency"] for row in family if best and row["run"] == best["run"]}
    found: dict[str, Any] = {
        "speed": {
            "wanted": f"DiT at least {SPEED}x the dense model's speed in as many steps, paired Chamfer-L1 below the "
            f"seed floor, F@0.02 and F@0.05 down by at most {F_DROP:.0%}",
            "found": best["dit_speedup"] if best else None,
            "met": _speed_met(best) if known else None,
        },
        "efficiency": {
            "wanted": f"measured / FLOP speed-up at least {EFFICIENCY} at every batch size, at the best point",
            "found": {str(batch): value for batch, value in efficiency.items()},
            "met": _all(value >= EFFICIENCY for value in efficiency.values() if value is not None),
        },
        "budgets": budget_target(rows),
    }
    for batch, losses in frontiers.items():
        for loss, front in losses.items():
            found[f"frontier, {loss}, batch {batch}"] = {
                "wanted": "at no time budget worse than fewer steps",
                "found": {"worst_time": front["worst_time"], "losses": front["worst_losses"]},
                "met": front["never_worse"],
            }
            ratio, is_known = front["knee_ratio"], front["knee"] is not None and bool(front["front"])
            found[f"knee, {loss}, batch {batch}"] = {
                "wanted": f"the fidelity of fewer steps at their knee at least {SOONER}x sooner",
                "found": ratio,
                "met": (ratio is not None and ratio >= SOONER) if is_known else None,
            }
    return found


def budget_target(rows: Sequence[Row]) -> dict[str, Any]:
    """Whether routers, with the cache of their training, execute what is asked for."""
    off = [
        abs(row["executed_flops_ratio"] - row["budget"])
        for row in rows
        if row["as_trained"] and row["executed_flops_ratio"] is not None
    ]
    return {
        "wanted": f"executed FLOPs within {OFF_BUDGET} of every budget, with the cache of the training",
        "found": max(off, default=None),
        "met": _all(value <= OFF_BUDGET for value in off),
    }


def beaten(comparisons: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """By rival and score, at which budgets our routers are better, worse, or not told apart (95 % intervals)."""
    found: dict[str, dict[str, list[Any]]] = {}
    for c in comparisons:
        assert direction(c["metric"]) is not None
        entry = found.setdefault(f"{c['rival_method']}, {c['metric']}, {c['against']}", {})
        worse = c["worse_by"]
        verdict = "better" if worse["high"] < 0 else "worse" if worse["low"] > 0 else "not told apart"
        entry.setdefault(verdict, []).append({"budget": c["budget"], "steps": c["steps"]})
    return found


def _speed_met(best: Row | None) -> bool | None:
    """Without F-scores nobody knows whether a fast enough row is good enough."""
    if best is None or best["dit_speedup"] < SPEED:
        return False
    return True if best.get("f_score@0.02") is not None else None


def _all(values: Any) -> bool | None:
    found = list(values)
    return all(found) if found else None
