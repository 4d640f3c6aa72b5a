"""What the rows of a benchmark of pictures say: frontiers beside every family of rivals, and the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastic3d.benchmark.images.rows import FEWER, within_floor
from elastic3d.benchmark.images.scores import ANCHORS, METRICS, SAME_STEPS
from elastic3d.benchmark.methods import CONTROLS, FAMILY
from elastic3d.benchmark.summary import SPEED, TOLERANCE, budget_target
from elastic3d.evaluation.frontier import compare_fronts
from elastic3d.evaluation.items import Row

LOSSES = (*(f"{metric}_{anchor}" for anchor in ANCHORS for metric in METRICS), "frechet")


def summarise_rows(rows: Sequence[Row], reference_steps: int, baseline_steps: int) -> dict[str, Any]:
    """`frontiers` by batch size, rival and loss; the best operating point; `targets`, met: None where not measured."""
    frontiers = {
        str(batch): {
            rival: {loss: front(rows, rival, loss, batch, reference_steps, baseline_steps) for loss in LOSSES}
            for rival in rivals(rows)
        }
        for batch in dict.fromkeys(row["batch"] for row in rows)
    }
    best = best_point(rows)
    return {
        "frontiers": frontiers,
        "best_operating_point": best,
        "targets": targets(rows, frontiers, best),
    }


def rivals(rows: Sequence[Row]) -> list[str]:
    """Families that the elastic one is put beside; fewer steps first."""
    names = dict.fromkeys("fewer_steps" if row["method"] in FEWER else row["method"] for row in rows)
    return sorted((n for n in names if n not in (*FAMILY, *CONTROLS)), key=lambda name: name != "fewer_steps")


def loss_of(row: Row, loss: str) -> float | None:
    """A score as a loss, the lower the better: 1 - SSIM, the negative of PSNR, others as they are."""
    value = row.get(loss)
    if value is None:
        return None
    return -value if loss.startswith("psnr") else 1 - value if loss.startswith("ssim") else value


def front(
    rows: Sequence[Row], rival: str, loss: str, batch: int, reference_steps: int, baseline_steps: int
) -> dict[str, Any]:
    """The elastic family beside one rival, over the DiT's milliseconds a picture.

    The pictures that a loss is paired with are no point of its frontier: they have no distance to themselves.
    """
    itself = {
        f"{m}_{a}": s
        for m in METRICS
        for a, s in zip(ANCHORS, (baseline_steps, reference_steps), strict=True)
    }
    points: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for row in rows:
        is_elastic, is_fewer = row["method"] in FAMILY, row["method"] in FEWER
        is_rival = is_fewer if rival == "fewer_steps" else row["method"] == rival
        value, time = loss_of(row, loss), row["dit_ms_median"]
        if row["batch"] != batch or value is None or time is None or not (is_elastic or is_rival):
            continue
        if is_fewer and row["steps"] == itself.get(loss):
            continue
        points[is_elastic].append((time, value))
    return compare_fronts(points[True], points[False], TOLERANCE).as_dict()


def best_point(rows: Sequence[Row]) -> Row | None:
    """The fastest elastic row at the smallest batch that is within the seed floor by every score."""
    smallest = min((row["batch"] for row in rows), default=None)
    found = [
        row
        for row in rows
        if row["method"] in FAMILY and row["batch"] == smallest
        if row["dit_speedup"] is not None and within_floor(row)
    ]
    return max(found, key=lambda row: row["dit_speedup"], default=None)


def targets(rows: Sequence[Row], frontiers: dict[str, Any], best: Row | None) -> dict[str, Any]:
    """Every target with what was wanted, what was found, and whether it is met."""
    family = [row for row in rows if row["method"] in FAMILY]
    known = any(row["dit_speedup"] is not None and within_floor(row) is not None for row in family)
    found: dict[str, Any] = {
        "speed": {
            "wanted": f"DiT at least {SPEED}x the dense model's speed, PSNR, SSIM and feature distance to its pictures "
            "within the seed floor",
            "found": best["dit_speedup"] if best else None,
            "met": (best is not None and best["dit_speedup"] >= SPEED) if known else None,
        },
        "budgets": budget_target(rows),
    }
    for batch, families in frontiers.items():
        for rival, losses in families.items():
            for loss in (f"feature_{SAME_STEPS}", f"ssim_{SAME_STEPS}", "feature_reference"):
                entry = losses[loss]
                found[f"ahead of {rival}, {loss}, batch {batch}"] = {
                    "wanted": "at no time budget worse",
                    "found": {"worst_time": entry["worst_time"], "losses": entry["worst_losses"]},
                    "met": entry["never_worse"],
                }
    return found
