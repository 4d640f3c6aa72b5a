"""A whole evaluation: comparisons, set metrics, gate, resuming."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh

from elastic3d.errors import UserError
from elastic3d.evaluation.folders import evaluate_folders
from elastic3d.evaluation.options import Align, EvaluateConfig, ProtocolConfig, UpAxis
from elastic3d.evaluation.report import text_report
from elastic3d.evaluation.views import load_lpips

QUICK = ProtocolConfig(points=800, volume_points=200, near_points=0, views=0, surface_health=False)
NAMES = [f"item{i}" for i in range(6)]


def write(folder: Path, noise: float, seed: int, scale: float = 1.0) -> Path:
    """Six tori, each with a bulge whose size follows `noise`."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index, name in enumerate(NAMES):
        mesh = trimesh.creation.torus(0.7, 0.2 + 0.02 * index, 24, 12)
        mesh.vertices += (
            noise * (1 + 0.1 * rng.standard_normal()) * np.sin(3 * mesh.vertices[:, [1, 2, 0]] + index)
        )
        mesh.apply_scale(scale).export(folder / f"{name}.ply")
    return folder


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    return EvaluateConfig(
        pred=write(tmp_path / "pred", 0.02, 1),
        gt=write(tmp_path / "gt", 0.0, 0),
        output=tmp_path / "out" / "report.json",
        protocol=QUICK,
        workers=1,
        bootstrap=200,
    )


def test_inside_and_outside_of_the_noise_floor(config: EvaluateConfig, tmp_path: Path) -> None:
    config.floor = [write(tmp_path / "seed1", 0.1, 2), write(tmp_path / "seed2", 0.1, 3)]
    report = evaluate_folders(config)
    by_metric = {comparison["metric"]: comparison for comparison in report["floor"]}
    assert by_metric["chamfer_l1"]["verdict"] == "inside the noise floor"
    assert by_metric["chamfer_l1"]["worse_by"]["count"] == 6
    config.pred, config.floor = config.floor[0], [config.pred]
    worse = {comparison["metric"]: comparison for comparison in evaluate_folders(config)["floor"]}
    assert worse["chamfer_l1"]["verdict"].startswith("worse by ")
    assert "noise floor" in text_report(report)


def test_failures_count_against_a_baseline_but_do_not_raise_the_floor(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    other = write(tmp_path / "other", 0.05, 4)
    (other / "item0.ply").unlink()
    (other / "item1.ply").write_text("broken")
    trimesh.creation.box().export(other / "extra.ply")
    config.baseline = config.floor = [other]
    report = evaluate_folders(config)
    floor, baseline = (report[kind][0] for kind in ("floor", "baseline"))
    assert floor["metric"] == baseline["metric"] == "chamfer_l1"
    assert (floor["worse_by"]["count"], baseline["worse_by"]["count"]) == (4, 6)
    assert baseline["verdict"].startswith("better by ")
    assert baseline["rival"] > 4 * floor["rival"]


def test_a_floor_that_can_not_be_read_leaves_the_rest_of_the_report(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "item1.ply").write_text("broken")
    config.floor = config.baseline = [other]
    report = evaluate_folders(config)
    assert report["count"]["ok"] == 6 and report["floor"] == [] and report["baseline"] != []
    assert "noise floor: none of its meshes could be scored" in text_report(report)


def test_set_metrics_with_and_without_features(config: EvaluateConfig) -> None:
    config.sets = True
    (config.pred / "item5.ply").write_text("broken")

    def features(views: np.ndarray) -> np.ndarray:
        assert views.shape[1:] == (224, 224, 3)
        return views[:, ::56, ::56].reshape(len(views), -1)

    found = evaluate_folders(config, features)["sets"]
    assert (found["shapes"], found["coverage"]) == (5, 1)
    assert {"mmd", "one_nna", "frechet_distance", "kernel_distance"} <= found.keys()
    config.resume = True
    plain = evaluate_folders(config)["sets"]
    assert "frechet_distance" not in plain
    assert plain["mmd"] == found["mmd"]


def test_set_metrics_turn_predictions_up(config: EvaluateConfig, tmp_path: Path) -> None:
    (tmp_path / "z_up").mkdir()
    for name in NAMES:
        mesh = trimesh.load_mesh(config.pred / f"{name}.ply")
        mesh.vertices = mesh.vertices[:, [0, 2, 1]] * [1, -1, 1]
        mesh.export(tmp_path / "z_up" / f"{name}.ply")
    config.sets = True
    y_up = evaluate_folders(config)["sets"]
    config.pred, config.pred_up = tmp_path / "z_up", UpAxis.z
    assert evaluate_folders(config)["sets"] == pytest.approx(y_up, rel=1e-3)


def test_the_gate_is_in_the_report(config: EvaluateConfig, tmp_path: Path) -> None:
    config.gate = tmp_path / "gate.yaml"
    config.gate.write_text("chamfer_l1: {max: 0.001}\nf_score@0.05: {min: 0.1}\n")
    report = evaluate_folders(config)
    (line,) = report["gate"]["violations"]
    assert line.startswith("chamfer_l1: ")
    assert f"gate: {line}" in text_report(report)


def test_align_overrides_the_protocol_and_is_reported(config: EvaluateConfig, tmp_path: Path) -> None:
    config.pred = write(tmp_path / "millimetres", 0.0, 0, scale=1000)
    assert evaluate_folders(config)["mean"]["f_score@0.05"] == 0
    config.align = Align.bbox
    report = evaluate_folders(config)
    assert report["protocol"]["align"] == "bbox"
    assert report["mean"]["chamfer_l1"] < 1e-4


def test_progress_counts_every_row_of_every_folder(config: EvaluateConfig, tmp_path: Path) -> None:
    config.floor = [write(tmp_path / "seed1", 0.1, 2)]
    seen: list[tuple[int, int]] = []
    evaluate_folders(config, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 12) for i in range(12)]


def test_a_missing_lpips_is_told_before_anything_is_scored(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    load_lpips.cache_clear()
    config.protocol = replace(QUICK, lpips=True, views=4)
    with pytest.raises(UserError, match="pip install lpips"):
        evaluate_folders(config)
    assert not config.output.parent.exists()


def test_bad_options(config: EvaluateConfig, tmp_path: Path) -> None:
    config.gate = tmp_path / "none.yaml"
    with pytest.raises(UserError, match=r"none\.yaml"):
        evaluate_folders(config)
    config.gate = None
    (tmp_path / "file").write_text("")
    config.output = tmp_path / "file" / "report.json"
    with pytest.raises(UserError, match="can't write"):
        evaluate_folders(config)
    for options in ({"output": Path("report.txt")}, {"html": Path("page.pdf")}):
        with pytest.raises(ValueError, match="ends in"):
            EvaluateConfig(**({"pred": tmp_path, "gt": tmp_path, "output": Path("a.json")} | options))
