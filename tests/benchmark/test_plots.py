"""The Pareto plot."""

from __future__ import annotations

from elastic3d.benchmark.report import pareto_plot

LABELS = {"iou_paired": "IoU (higher is better)"}


def test_without_times_there_is_no_plot():
    row = {"method": "dense", "batch": 1, "dit_ms_median": None, "iou_paired": 0.5}
    assert pareto_plot([row], 1, LABELS) is None
    assert pareto_plot([row | {"dit_ms_median": 5.0}], 2, LABELS) is None
    assert pareto_plot([row | {"dit_ms_median": 5.0}], 1, LABELS) is not None
