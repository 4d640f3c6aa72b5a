"""`scripts/summarize.py`: folders or named files in, two files out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import summarize
from _cli import execute

from elastic3d.evaluation.options import ProtocolConfig, SummarizeConfig
from elastic3d.evaluation.report import build_report
from elastic3d.utils.files import save_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for method, chamfer in (("seed-0", 0.1), ("seed-1", 0.2), ("nearest", 0.3)):
        rows = [{"name": "a", "status": "ok", "error": None, "chamfer_l1": chamfer, "watertight": True}]
        save_json(build_report(rows, ProtocolConfig(), 10), tmp_path / "held (out)" / f"{method}.json")
    return tmp_path / "held (out)"


def run(*options: str) -> int:
    return execute(summarize.main, SummarizeConfig, "summarize", options)


def test_a_folder_of_reports_becomes_markdown_and_csv(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"folders={folder}", f"output={folder}/tables") == 0
    text = (folder / "tables" / "summary.md").read_text()
    assert text == capsys.readouterr().out
    assert "**held (out), 1 shapes**" in text and "| generated, seed-1 | 0.200 |" in text
    with (folder / "tables" / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert (lines[0]["set"], lines[0]["difference_mean"], lines[0]["better"]) == (
        "held (out)",
        "-0.15",
        "1.0",
    )


def test_named_reports_need_no_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = (
        f"{{two seeds: ['{folder}/seed-0.json', '{folder}/seed-1.json'], one: ['{folder}/nearest.json']}}"
    )
    assert run(f"reports={reports}", "baseline=one") == 0
    assert "| two seeds, mean of 2 seeds | 0.150 (0.150 to 0.150)" in capsys.readouterr().out
    assert not list(folder.glob("summary*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "either folders= or reports="),
        (["folders={0}", "reports={{a: [b.json]}}"], "either folders= or reports="),
        (["folders=[{0}, {0}]"], "a name of its own"),
        (["folders={0}", "baseline=random"], "expected one of nearest, generated, or null"),
        (["reports={{a: [gone.json]}}", "baseline=null"], "there is no report gone.json"),
        (["reports=a.json"], "reports=a.json: expected a mapping such as"),
        (["reports={{a: b.json}}"], "{{name: value}}, each value a list"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*(option.format(folder) for option in options)) == 2
    assert message.format(folder) in capsys.readouterr().err
