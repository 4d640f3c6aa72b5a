"""The summary on rows made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from elastic3d.benchmark.summary import beaten, best_point, holds_fidelity, summarise_rows


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
    return row("elastic_no_cache", 50, ms, distance, budget=budget, **changes)


def test_targets_that_are_met():
    rows = [*FEWER, elastic(0.5, 45, 0.03), elastic(0.3, 8, 0.1, efficiency=0.86)]
    found = summarise_rows(rows, reference_steps=100, baseline_steps=50)
    assert found["best_operating_point"]["budget"] == 0.3
    targets = found["targets"]
    assert targets["speed"]["met"] is True and targets["speed"]["found"] == pytest.approx(100 / 8)
    assert targets["efficiency"] == {**targets["efficiency"], "found": {"1": 0.86}, "met": True}
    assert targets["budgets"]["met"] is True
    knee = targets["knee, chamfer_l1_paired, batch 1"]
    assert knee["met"] is True and knee["found"] == pytest.approx(24 / 8)
    assert targets["frontier, chamfer_l1_paired, batch 1"]["met"] is True
    front = found["frontiers"]["1"]["chamfer_l1_paired"]
    assert front["other"][-1] == (100, 0.02)  # the reference has no distance to itself
    assert found["frontiers"]["1"]["f_score@0.02"]["other"] == [(16, 0.5)]


def test_targets_that_are_missed_or_not_measured():
    rows = [*FEWER, elastic(0.5, 60, 0.15, executed_flops_ratio=0.55), elastic(0.3, 20, 0.3)]
    targets = summarise_rows(rows, 100, 50)["targets"]
    assert targets["speed"]["met"] is False and targets["budgets"]["met"] is False
    assert targets["frontier, chamfer_l1_paired, batch 1"]["met"] is False
    assert targets["knee, chamfer_l1_paired, batch 1"]["met"] is False
    unknown = [elastic(0.3, 20, 0.1, **{"f_score@0.02": None, "f_score@0.02_drop": None})]
    assert summarise_rows(unknown, 100, 50)["targets"]["speed"]["met"] is None  # fast, but is it good?
    nothing = summarise_rows(FEWER, 100, 50)
    assert nothing["best_operating_point"] is None
    assert all(target["met"] is None for target in nothing["targets"].values())
    untimed = summarise_rows([row("elastic", 50, None, 0.1)], 100, 50)["targets"]
    assert untimed["speed"]["met"] is None and untimed["frontier, iou_paired, batch 1"]["met"] is None


def test_what_holds_fidelity():
    assert holds_fidelity(elastic(0.5, 45, 0.1)) is True
    assert holds_fidelity(elastic(0.5, 45, 0.3)) is False
    assert holds_fidelity(elastic(0.5, 45, 0.1, **{"f_score@0.05_drop": 0.011})) is False
    assert holds_fidelity(elastic(0.5, 45, 0.1, **{"f_score@0.05_drop": None})) is True
    assert holds_fidelity(elastic(0.5, 45, 0.1, chamfer_l1_seed_floor=None)) is None
    assert best_point([elastic(0.3, 10, 0.3), elastic(0.5, 45, 0.1)], 50)["budget"] == 0.5


def test_who_beats_whom():
    def compared(rival: str, low: float, high: float) -> dict[str, Any]:
        head = {
            "rival_method": rival,
            "metric": "chamfer_l1",
            "against": "reference",
            "budget": 0.5,
            "steps": 50,
        }
        return head | {"worse_by": {"low": low, "high": high}}

    found = beaten([compared("random", -2, -1), compared("static", -1, 1), compared("x", 1, 2)])
    at = [{"budget": 0.5, "steps": 50}]
    assert found == {
        "random, chamfer_l1, reference": {"better": at},
        "static, chamfer_l1, reference": {"not told apart": at},
        "x, chamfer_l1, reference": {"worse": at},
    }
