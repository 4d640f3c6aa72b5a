"""What rows made by hand say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic3d.benchmark.meshes import MeshTask
from elastic3d.benchmark.report import as_loss, best_point, rivals_in, summarise_rows

# what a summary asks of a task, of 100 steps of reference and 50 of baseline
TASK: Any = SimpleNamespace(
    losses=MeshTask.losses,
    plot=MeshTask.plot,
    config=SimpleNamespace(reference_steps=100),
    planner=SimpleNamespace(baseline_steps=50),
)
TASK.holds = lambda row: MeshTask.holds(TASK, row)


def answers(found: dict[str, Any]) -> dict[str, Any]:
    """Targets by what comes before the colon of their names."""
    return {name.split(":")[0]: target for name, target in found["targets"].items()}


def row(method: str, steps: int, ms: float | None, distance: float, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = dict(
        method=method, budget=1.0, steps=steps, batch=1, run=f"{method}-{steps}", executed_flops_ratio=1.0,
        dit_ms_median=ms, dit_speedup=None if ms is None else 100 / ms, efficiency=0.9,
        as_trained=False, chamfer_l1_paired=distance, chamfer_l1_same_steps=distance, chamfer_l1_seed_floor=0.2,
        iou_paired=1 - distance, chamfer_l1_truth=0.1,
    )  # fmt: skip
    fields |= {"f_score@0.02": 0.5, "f_score@0.02_drop": 0.0, "f_score@0.05": 0.8, "f_score@0.05_drop": 0.0}
    return fields | changes


FEWER = [
    row("fewer_steps", steps, 2.0 * steps, distance) for steps, distance in ((8, 0.3), (12, 0.1), (25, 0.05))
]
FEWER += [row("dense", 50, 100, 0.02), row("fewer_steps", 100, 200, 0.0)]


def elastic(budget: float, ms: float, distance: float, **changes: Any) -> dict[str, Any]:
    changes = {"run": f"elastic-{budget}", "executed_flops_ratio": budget, "as_trained": True} | changes
    return row("elastic", 50, ms, distance, budget=budget, **changes)


def test_targets_that_are_met():
    rows = [*FEWER, elastic(0.5, 45, 0.03), elastic(0.3, 8, 0.1, efficiency=0.86)]
    found = summarise_rows(TASK, rows)
    assert found["best_operating_point"]["budget"] == 0.3
    targets = answers(found)
    assert targets["speed"] == {"found": pytest.approx(100 / 8), "met": True}
    assert targets["efficiency"] == {"found": {"1": 0.86}, "met": True}
    assert targets["budgets"]["met"] is True
    knee = targets["knee at least 1.5x sooner than fewer_steps, chamfer_l1_paired, batch 1"]
    assert knee["met"] is True and knee["found"] == pytest.approx(24 / 8)
    assert targets["never worse in the same time than fewer_steps, chamfer_l1_paired, batch 1"]["met"] is True
    fronts = found["frontiers"]["1"]["fewer_steps"]
    assert fronts["chamfer_l1_paired"]["other"][-1] == (100, 0.02)  # the reference has no distance to itself
    assert fronts["f_score@0.02"]["other"] == [(16, 0.5)]


def test_targets_that_are_missed_or_not_measured():
    rows = [*FEWER, elastic(0.5, 60, 0.15, executed_flops_ratio=0.55), elastic(0.3, 20, 0.3)]
    targets = answers(summarise_rows(TASK, rows))
    assert targets["speed"]["met"] is False and targets["budgets"]["met"] is False
    assert (
        targets["never worse in the same time than fewer_steps, chamfer_l1_paired, batch 1"]["met"] is False
    )
    assert targets["knee at least 1.5x sooner than fewer_steps, chamfer_l1_paired, batch 1"]["met"] is False
    nothing = summarise_rows(TASK, FEWER)
    assert nothing["best_operating_point"] is None
    assert all(target["met"] is None for target in nothing["targets"].values())
    untimed = answers(summarise_rows(TASK, [row("elastic", 50, None, 0.1)]))
    assert untimed["speed"]["met"] is None


def test_plans_without_training_keep_their_budgets_too():
    plan = row("training_free", 50, 50, 0.1, budget=0.5, executed_flops_ratio=0.48)
    assert answers(summarise_rows(TASK, [plan]))["budgets"] == {"found": pytest.approx(0.02), "met": True}
    both = [plan | {"executed_flops_ratio": 0.45}, elastic(0.5, 45, 0.03)]
    assert answers(summarise_rows(TASK, both))["budgets"] == {"found": pytest.approx(0.05), "met": False}


def test_every_family_of_rivals_has_a_frontier_and_controls_have_none():
    rows = [*FEWER, elastic(0.5, 45, 0.03), row("forecast", 50, 30, 0.2), row("random", 50, 45, 0.3)]
    assert rivals_in(rows) == ["fewer_steps", "forecast"]
    front = summarise_rows(TASK, rows)["frontiers"]["1"]["forecast"]["chamfer_l1_paired"]
    assert front["other"] == [(30, 0.2)] and front["front"] == [(45, 0.03)]
    assert as_loss("psnr_dense", 30) == -30 and as_loss("frechet", 5) == 5
    assert as_loss("ssim_dense", 0.75) == as_loss("iou_paired", 0.75) == 0.25


def test_what_holds_fidelity():
    assert TASK.holds(elastic(0.5, 45, 0.1)) is True
    assert TASK.holds(elastic(0.5, 45, 0.3)) is False
    assert TASK.holds(elastic(0.5, 45, 0.1, **{"f_score@0.05_drop": 0.011})) is False
    assert TASK.holds(elastic(0.5, 45, 0.1, **{"f_score@0.05_drop": None})) is True
    assert TASK.holds(elastic(0.5, 45, 0.1, chamfer_l1_seed_floor=None)) is None
    assert best_point(TASK, [elastic(0.3, 10, 0.3), elastic(0.5, 45, 0.1)])["budget"] == 0.5
