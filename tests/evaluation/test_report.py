"""Rows to a report, and the report's files."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic3d.evaluation.options import Align, ProtocolConfig
from elastic3d.evaluation.report import build_report, summarise, text_table, write_csv
from elastic3d.utils.files import save_json

ROWS = [
    {
        "name": "a",
        "status": "ok",
        "error": None,
        "chamfer_l1": 0.1,
        "watertight": True,
        "volume_iou": 0.5,
        "seconds": 1.0,
    },
    {
        "name": "b",
        "status": "ok",
        "error": None,
        "chamfer_l1": 0.3,
        "watertight": True,
        "volume_iou": None,
        "seconds": 9.0,
    },
    {
        "name": "c",
        "status": "failed",
        "error": "there is no prediction named c",
        "chamfer_l1": 2.0,
        "watertight": False,
    },
    {"name": "d", "status": "failed", "error": "there is no ground truth named d"},
]


def test_means_count_failures_and_leave_out_what_was_not_measured() -> None:
    report = build_report(ROWS, ProtocolConfig(align=Align.bbox), command="python evaluate.py")
    assert report["count"] == {"items": 4, "ok": 2, "failed": 2}
    assert report["mean"] == pytest.approx({"chamfer_l1": 0.8, "watertight": 2 / 3, "volume_iou": 0.5})
    assert report["values"] == {"chamfer_l1": 3, "watertight": 3, "volume_iou": 1}
    low, high = report["interval"]["chamfer_l1"]
    assert 0.1 <= low < 0.8 < high <= 2.0
    assert report["items"] == ROWS


def test_the_protocol_is_in_the_report() -> None:
    protocol = build_report(ROWS, ProtocolConfig(align=Align.bbox))["protocol"]
    assert (protocol["name"], protocol["points"], protocol["align"]) == ("default", 100_000, "bbox")
    assert protocol["chamfer"] == "sum of both directions"
    assert "failed_items" in protocol


def test_a_report_without_any_value_can_be_written(tmp_path: Path) -> None:
    report = build_report([ROWS[3]], ProtocolConfig())
    assert report["mean"] == {}
    save_json(report, tmp_path / "new folder" / "r.json")
    assert json.loads((tmp_path / "new folder" / "r.json").read_text()) == report


def test_json_refuses_nan_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save_json({"mean": float("nan")}, tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == []


def test_csv_has_a_line_for_every_row(tmp_path: Path) -> None:
    write_csv(ROWS, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == ["a", "b", "c", "d"]
    assert (lines[1]["volume_iou"], lines[0]["volume_iou"]) == ("", "0.5")


def test_csv_is_utf8_whatever_the_locale_says(tmp_path: Path) -> None:
    script = "from pathlib import Path; from elastic3d.evaluation.report import write_csv\n"
    script += f"write_csv([{{'name': 'möbel/椅子'}}], Path({str(tmp_path / 'rows.csv')!r}))"
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, tmp_path / "script.py"], env=ascii_only, check=True)
    assert "möbel/椅子" in (tmp_path / "rows.csv").read_text(encoding="utf-8")


def test_the_table_names_means_and_failures() -> None:
    text = text_table(build_report(ROWS, ProtocolConfig()))
    assert "4 items, 2 ok, 2 failed" in text
    assert "failed: c: there is no prediction named c" in text
    assert "sum of both directions" in text
    assert "chamfer_l1" in text


def test_summary_is_deterministic() -> None:
    assert summarise(ROWS, 300) == summarise(ROWS, 300)
