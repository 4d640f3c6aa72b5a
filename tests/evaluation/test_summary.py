"""Reports side by side: means over seeds, paired differences, and what can't be compared."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic3d.errors import UserError
from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.evaluation.report import build_report
from elastic3d.evaluation.statistics import bootstrap_mean
from elastic3d.evaluation.summary import Line, Summary, csv_rows, find_reports, markdown, summarize
from elastic3d.utils.files import save_json

SHAPES = ["chair", "lamp", "sofa", "table"]
SCORES = {
    "seed-0": [0.10, 0.20, 0.30, 0.40],
    "seed-1": [0.20, 0.20, 0.10, 0.60],
    "nearest": [0.10, 0.30, 0.40, 0.45],
}
SHARES = [1.0, 0.95, 0.6, 0.4]


def row(name: str, chamfer: float, share: float, **more: Any) -> dict[str, Any]:
    found = {"name": name, "status": "ok", "error": None, "chamfer_l1": chamfer, "f_score@0.05": 1 - chamfer}
    found |= {"volume_iou": 0.5, "watertight": True, "dominant_component_share": share}
    return found | more


def write(path: Path, rows: list[dict[str, Any]], protocol: ProtocolConfig | None = None) -> Path:
    save_json(build_report(rows, protocol or ProtocolConfig(), 10), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for method, scores in SCORES.items():
        rows = [row(*item) for item in zip(SHAPES, scores, SHARES, strict=True)]
        write(tmp_path / f"{method}.json", rows)
    return tmp_path


def line(summary: Summary, method: str, key: str, seed: str | None = None) -> Line:
    (found,) = [x for x in summary.lines if (x.method, x.metric, x.seed) == (method, key, seed)]
    return found


def test_seeds_are_averaged_by_shape_before_the_bootstrap(folder: Path) -> None:
    summary = summarize("x", find_reports(folder), "nearest")
    seeds, nearest = np.array([SCORES["seed-0"], SCORES["seed-1"]]), np.array(SCORES["nearest"])
    found = line(summary, "generated", "chamfer_l1")
    assert found.mean == bootstrap_mean(seeds.mean(axis=0))
    assert found.mean.count == 4
    assert found.difference is not None
    assert found.difference == bootstrap_mean(seeds.mean(axis=0) - nearest)
    assert found.better == 0.5  # lamp and sofa; chair and table are worse
    assert line(summary, "generated", "chamfer_l1", "seed-1").mean == bootstrap_mean(seeds[1])
    assert line(summary, "nearest", "chamfer_l1").difference is None


def test_better_follows_the_direction_of_the_score(folder: Path) -> None:
    summary = summarize("x", find_reports(folder), "nearest")
    lower, higher = (line(summary, "generated", k, "seed-0") for k in ("chamfer_l1", "f_score@0.05"))
    assert lower.difference is not None and higher.difference is not None
    assert lower.better == higher.better == 0.75  # the chair is a tie
    assert lower.difference.mean == pytest.approx(-higher.difference.mean)


def test_shares_of_the_largest_component_count_a_failure_as_none(tmp_path: Path) -> None:
    rows = [row(name, 0.1, share) for name, share in zip(SHAPES, SHARES, strict=True)]
    failed = {"name": "wreck", "status": "failed", "error": "gone", "chamfer_l1": 2.0, "watertight": False}
    failed["dominant_component_share"] = None  # as another program may write what it has not
    unscored = {"name": "zero", "status": "failed", "error": "no ground truth"}
    summary = summarize("x", {"mine": [write(tmp_path / "mine.json", [*rows, failed, unscored])]})
    for key, share in (
        ("watertight", 4 / 5),
        ("largest_component>0.5", 3 / 5),
        ("largest_component>0.9", 2 / 5),
    ):
        assert line(summary, "mine", key).mean.mean == pytest.approx(share)
    assert "Shapes with a Chamfer-L1: 5 of mine." in markdown([summary])


def test_a_shape_without_a_value_is_left_out_of_the_pairs(tmp_path: Path) -> None:
    mine = [row("a", 0.1, 1, volume_iou=0.9), row("b", 0.1, 1, volume_iou=0.3)]
    theirs = [row("a", 0.1, 1, volume_iou=0.7), row("b", 0.1, 1, volume_iou=None)]
    files = {"theirs": [write(tmp_path / "t.json", theirs)], "mine": [write(tmp_path / "m.json", mine)]}
    summary = summarize("x", files, "theirs")
    found = line(summary, "mine", "volume_iou")
    assert (found.mean.mean, found.mean.count) == (pytest.approx(0.6), 2)
    assert found.difference is not None
    assert (found.difference.mean, found.difference.count) == (pytest.approx(0.2), 1)
    assert list(summary.methods) == ["mine", "theirs"], "the baseline comes last"
    assert "Shapes with a volume IoU: 1 of theirs." in markdown([summary])


def test_markdown_and_csv_have_a_line_a_method_and_seed(folder: Path) -> None:
    summary = summarize("held out", find_reports(folder), "nearest")
    text = markdown([summary])
    assert "**held out, 4 shapes**" in text
    assert "| generated, seed-1 | 0.275 | 0.725 | 0.500 | 100.0 % | 75.0 % | 50.0 % |" in text
    assert "F@0.02" not in text  # no report has it
    assert "| nearest | 0.312 (" in text
    assert "Minus nearest, paired by shape" in text and "better on 50 %" in text
    rows = csv_rows(summary)
    assert len(rows) == 4 * 6
    assert rows[0]["set"] == "held out" and rows[0]["method"] == "generated, mean of 2 seeds"
    assert rows[0]["difference_mean"] == pytest.approx(np.mean(SCORES["seed-0"] + SCORES["seed-1"]) - 0.3125)
    assert "better" not in rows[-1]
    assert "Minus" not in markdown([summarize("x", find_reports(folder))])


def test_reports_of_one_name_are_told_apart_by_their_folder(folder: Path) -> None:
    for seed in ("seed-0", "seed-1"):
        (folder / seed).mkdir()
        (folder / f"{seed}.json").rename(folder / seed / "report.json")
    files = {"mine": [folder / "seed-0" / "report.json", folder / "seed-1" / "report.json"]}
    assert len({x.seed for x in summarize("x", files).lines}) == 3


def test_files_of_a_folder_are_grouped_by_their_seeds(tmp_path: Path) -> None:
    for name in ("seed-10", "seed-2", "big-seed-0", "big-seed-1", "flux-2", "nearest"):
        (tmp_path / f"{name}.json").touch()
    (tmp_path / "nearest.csv").touch()
    found = {method: [path.stem for path in paths] for method, paths in find_reports(tmp_path).items()}
    assert found == {
        "big": ["big-seed-0", "big-seed-1"],
        "flux-2": ["flux-2"],
        "generated": ["seed-2", "seed-10"],
        "nearest": ["nearest"],
    }


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_tables_can_be_written_whatever_the_reports_are_named(folder: Path) -> None:
    for seed in (0, 1):
        (folder / f"seed-{seed}.json").rename(
            os.fsdecode(os.fsencode(folder) + b"/st\xfchl-seed-%d.json" % seed)
        )
    summary = summarize("x", find_reports(folder), "nearest")
    assert set(summary.methods) == {r"st\xfchl", "nearest"}
    assert r"st\xfchl-seed-1" in markdown([summary]).encode().decode()


def test_views_may_differ_as_no_number_depends_on_them(folder: Path) -> None:
    rows = [row(name, 0.1, 1) for name in SHAPES]
    write(folder / "other.json", rows, ProtocolConfig(views=0, surface_health=False))
    assert "other" in summarize("x", find_reports(folder), "nearest").methods


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: write(d / "z.json", [row(n, 0, 1) for n in SHAPES], ProtocolConfig(points=7)),
            "protocol.points",
        ),
        (
            lambda d: write(d / "z.json", [row(n, 0, 1) for n in SHAPES[1:]]),
            "1 are in one only, such as chair",
        ),
        (lambda d: (d / "z.json").write_text("{"), "z.json is no report"),
        (lambda d: (d / "z.json").write_text(json.dumps([1])), "z.json is no report"),
        (lambda d: (d / "z.json").symlink_to(d / "gone"), "there is no report .*z.json"),
        (lambda d: (d / "nearest.json").unlink(), "baseline=nearest: expected one of generated"),
        (lambda d: (d / "generated.json").touch(), "both seed 0 of generated"),
    ],
)
def test_what_can_not_be_compared_is_told(folder: Path, change: Any, message: str) -> None:
    change(folder)
    with pytest.raises(UserError, match=message):
        summarize("x", find_reports(folder), "nearest")


def test_a_folder_or_method_without_reports_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no report"):
        find_reports(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        find_reports(tmp_path / "gone")
    with pytest.raises(UserError, match="mine has no report"):
        summarize("x", {"mine": []})
