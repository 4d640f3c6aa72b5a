"""Frontiers against numbers worked out by hand."""

import json

import pytest

from elastic3d.evaluation.frontier import compare_fronts, knee, loss_at, pareto_front, time_at

STEPS = [(10.0, 0.9), (20.0, 0.3), (40.0, 0.2), (80.0, 0.15), (30.0, 0.35), (90.0, 0.15)]


def test_a_frontier_has_no_dominated_point():
    assert pareto_front(STEPS) == STEPS[:4]
    assert pareto_front([]) == []
    for bad in ((0.0, 1.0), (1.0, float("nan")), (float("inf"), 1.0)):
        with pytest.raises(ValueError, match="expected a positive time"):
            pareto_front([bad])


def test_between_points_the_loss_is_linear_in_log_time():
    front = pareto_front(STEPS)
    assert loss_at(front, 9.9) is None and loss_at(front, 10) == 0.9 and loss_at(front, 1000) == 0.15
    assert loss_at(front, (20 * 40) ** 0.5) == pytest.approx(0.25)
    assert time_at(front, 0.25) == pytest.approx((20 * 40) ** 0.5)
    assert time_at(front, 0.95) == pytest.approx(10) and time_at(front, 0.15) == pytest.approx(80)
    assert time_at(front, 0.1) is None and time_at([], 1.0) is None and loss_at([], 1.0) is None


def test_the_knee_is_where_more_time_stops_to_help():
    assert knee(pareto_front(STEPS)) == (20.0, 0.3)
    assert knee(STEPS[:2]) is None


def test_a_model_twice_as_fast_is_twice_as_fast_at_every_fidelity():
    found = compare_fronts([(time / 2, loss) for time, loss in STEPS], STEPS)
    assert found["never_worse"] and found["knee_ratio"] == pytest.approx(2)
    assert [ratio for _, ratio in found["ratios"]] == pytest.approx([2] * 4) and found[
        "best_ratio"
    ] == pytest.approx(2)
    json.dumps(found)


def test_where_the_challenger_loses():
    found = compare_fronts([(12.0, 0.25), (60.0, 0.24)], STEPS)
    assert found["never_worse"] is False and found["worst_time"] == pytest.approx(60)
    assert found["worst_losses"] == pytest.approx((0.24, loss_at(pareto_front(STEPS), 60)))
    assert found["knee_ratio"] == pytest.approx(20 / 12)
    assert compare_fronts([(12.0, 0.25), (60.0, 0.24)], STEPS, tolerance=1.0)["never_worse"]
    # the largest gap is within the tolerance of its loss, a smaller one beyond that of its own
    found = compare_fronts([(1, 2.015), (2, 1.0), (4, 0.110)], [(1, 2.0), (2, 1.0), (4, 0.10)], 0.01)
    assert found["never_worse"] is False and found["worst_time"] == 4
    assert found["worst_losses"] == (0.110, 0.10)
    nothing = compare_fronts([], STEPS)
    assert nothing["never_worse"] is None and nothing["best_ratio"] is None and nothing["knee_ratio"] is None
    apart = compare_fronts([(1.0, 5.0)], STEPS)
    assert apart["never_worse"] is None and apart["ratios"] == [] and apart["knee_ratio"] is None
