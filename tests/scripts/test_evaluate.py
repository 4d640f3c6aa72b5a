"""`scripts/evaluate.py`: exit codes, files, and what it says about mistakes."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import trimesh
from _cli import execute

from elastic3d.evaluation.options import EvaluateConfig
from elastic3d.geometry.cleanup import mesh_health
from elastic3d.geometry.mesh_io import load_mesh
from elastic3d.pipelines.generation import plan
from elastic3d.pipelines.options import GenerateConfig

SAMPLES = Path(__file__).resolve().parents[2] / "data" / "samples"
QUICK = [
    "protocol.points=500",
    "protocol.volume_points=200",
    "protocol.near_points=200",
    "protocol.views=0",
    "workers=1",
    "bootstrap=100",
]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for side, radius in (("my preds (v=1, a)", 0.98), ("gt", 1.0)):
        (tmp_path / side).mkdir()
        for name in ("one", "two"):
            trimesh.creation.icosphere(2, radius=radius).export(tmp_path / side / f"{name}.glb")
    return tmp_path


def run(folder: Path, *extra: str) -> int:
    options = [
        f"pred={folder}/my preds (v=1, a)",
        f"gt={folder}/gt",
        f"output={folder}/out/report.json",
        *QUICK,
        *extra,
    ]
    return execute(evaluate.main, EvaluateConfig, "evaluate", options)


def test_a_good_run_writes_json_csv_and_a_table(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folders) == 0
    report = json.loads((folders / "out" / "report.json").read_text())
    assert [row["name"] for row in report["items"]] == ["one", "two"]
    assert {row["status"] for row in report["items"]} == {"ok"}
    for key in ("chamfer_l1", "chamfer_l2", "f_score@0.02", "f_score@0.01", "f_score@0.005", "f_score@0.05"):
        assert report["mean"][key] == pytest.approx(sum(row[key] for row in report["items"]) / 2)
    assert report["protocol"]["points"] == 500
    with (folders / "out" / "report.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    assert "normal_consistency" in capsys.readouterr().out


def test_a_failed_item_gives_1_and_stays_in_the_report(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders / "my preds (v=1, a)" / "one.glb").unlink()
    assert run(folders) == 1
    report = json.loads((folders / "out" / "report.json").read_text())
    assert report["count"] == {"items": 2, "ok": 1, "failed": 1}
    assert report["mean"]["f_score@0.05"] == pytest.approx(report["items"][1]["f_score@0.05"] / 2)
    assert "failed: one: there is no prediction named one" in capsys.readouterr().out


@pytest.mark.parametrize(("bound", "code"), [("0.9", 1), ("0.0", 0)])
def test_the_gate_decides_the_exit_code(
    folders: Path, capsys: pytest.CaptureFixture[str], bound: str, code: int
) -> None:
    (folders / "gate.yaml").write_text(f"f_score@0.005: {{min: {bound}}}\n")
    assert run(folders, f"gate={folders}/gate.yaml") == code
    assert ("is below min 0.9" in capsys.readouterr().out) is (code == 1)


def test_html_and_sets_with_the_image_encoder(folders: Path) -> None:
    assert run(folders, f"html={folders}/page.html", "html_items=0", "sets=true") == 0
    assert (folders / "page.html").read_text().startswith("<!doctype html>")
    found = json.loads((folders / "out" / "report.json").read_text())["sets"]
    assert found["frechet_distance"] >= 0
    assert found["shapes"] == 2


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("gt=nowhere", "nowhere is not a folder"),
        ("output=report.txt", "ends in .json"),
        ("html=page.txt", "ends in .html"),
        ("gate=none.yaml", "none.yaml"),
        ("protocol=unknown", "expected one of"),
        ("protocol.points=0", "points is 0"),
        ("protocol.views=5", "views is 5"),
        ("align=sideways", "none, bbox, icp"),
        ("workers=-1", "workers is -1"),
        ("benchmark=none.json", "none.json"),
        ("pont=3", "unknown option"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    folders: Path, capsys: pytest.CaptureFixture[str], option: str, said: str
) -> None:
    assert run(folders, option) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (folders / "out" / "report.json").exists()


def test_the_bundled_samples_pair_with_their_ground_truth(tmp_path: Path) -> None:
    """What the README says: a mesh of every sample, and each has a true shape to be scored against."""
    made = plan(GenerateConfig(image=str(SAMPLES), output=str(tmp_path / "samples"))).jobs
    truth = sorted((SAMPLES / "ground_truth").iterdir())
    assert [job.output.name for job in made] == [path.name for path in truth]
    for path in truth:
        mesh = load_mesh(path)
        assert mesh_health(mesh).watertight and len(mesh.faces) <= 8000, path.name
        assert 0.95 < abs(mesh.bounds).max() < 0.98, path.name  # 0.95 and the wall, 0.75 voxels


def test_the_ground_truth_of_two_samples_scores_perfectly_against_itself(tmp_path: Path) -> None:
    truth, output = tmp_path / "truth", tmp_path / "report.json"
    truth.mkdir()
    for name in ("chair.glb", "lamp.glb"):
        shutil.copy(SAMPLES / "ground_truth" / name, truth)
    options = [f"pred={truth}", f"gt={truth}", f"output={output}", *QUICK, "protocol.surface_health=false"]
    assert execute(evaluate.main, EvaluateConfig, "evaluate", options) == 0
    report = json.loads(output.read_text())
    assert report["count"] == {"items": 2, "ok": 2, "failed": 0}
    assert report["mean"]["chamfer_l1"] == 0 and report["mean"]["volume_iou"] == 1


@pytest.mark.parametrize("kind", ["floor", "baseline"])
def test_a_rival_without_a_shared_name_is_told_before_anything_is_scored(
    folders: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders / "other").mkdir()
    trimesh.creation.icosphere(1).export(folders / "other" / "three.glb")
    assert run(folders, f"{kind}=[{folders}/gt,{folders}/other]") == 2
    assert f"{folders}/other and {folders}/gt have no name in common" in capsys.readouterr().err
    assert not (folders / "out").exists()


def test_as_a_command(folders: Path) -> None:
    script = Path(evaluate.__file__)
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "Exit code: 0" in done.stdout
    for option in (
        "pred",
        "gt",
        "output",
        "align",
        "gate",
        "html",
        "floor",
        "runner",
        "resume",
        "protocol.points",
    ):
        assert f"  {option}=" in done.stdout
