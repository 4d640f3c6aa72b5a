"""The page of results and the Pareto plot on rows made by hand."""

from elastic3d.benchmark.report import page, pareto_plot


def test_a_line_for_every_run_and_every_target():
    dense = dict(
        method="dense", note=None, budget=1.0, steps=25, run="d", batch=1, flops_ratio_to_baseline=1.0,
        dit_speedup=1.0, efficiency=None, psnr=31.257,
    )  # fmt: skip
    rows = [dense, {**dense, "batch": 4}, {**dense, "method": "cache", "note": "every 2", "run": "c"}]
    rows[-1] |= {"dit_speedup": None, "psnr": None, "budget": None}
    target = {"found": {"1": [0.5, 2]}, "met": False}
    text = page({"rows": rows, "summary": {"targets": {"speed: much": target}}}, {"psnr": "PSNR"})
    lines = text.splitlines()
    assert lines[0].startswith("| method |") and lines[0].endswith("| efficiency, batch 4 | PSNR |")
    assert lines[2] == "| dense | 1.0 | 25 | 1.00 | 1.00 | 1.00 |  |  | 31.26 |"
    assert lines[3] == "| cache, every 2 |  | 25 | 1.00 |  |  |  |  |  |"
    assert lines[4:] == ["", "- speed: much: 1 0.5 / 2, **not met**"]


def test_without_times_there_is_no_plot():
    labels = {"iou_paired": "IoU (higher is better)"}
    row = {"method": "dense", "batch": 1, "dit_ms_median": None, "iou_paired": 0.5}
    assert pareto_plot([row], 1, labels) is None
    assert pareto_plot([row | {"dit_ms_median": 5.0}], 2, labels) is None
    assert pareto_plot([row | {"dit_ms_median": 5.0}], 1, labels) is not None
