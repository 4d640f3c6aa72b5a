"""Training-free policies as rows, from a calibration of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import benchmark as script
import pytest

from elastic3d.benchmark.config import CacheName, Method, Phase, PolicyName
from elastic3d.benchmark.images import load_models
from elastic3d.benchmark.meshes import MeshTask
from elastic3d.benchmark.methods import DENSE, Planner
from elastic3d.benchmark.run import benchmark
from elastic3d.elastic import find_session
from elastic3d.errors import UserError
from elastic3d.pipelines.calibration import calibrate_policy
from elastic3d.pipelines.options import CalibratePolicyConfig
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.files import load_json
from tests.benchmark.conftest import config_of, image_config_of

CPU = {"device": DeviceChoice.cpu, "dtype": DTypeChoice.float32}
ROWS = [Method.dense, Method.training_free]


def test_meshes_with_a_calibration(world: Path, tmp_path: Path) -> None:
    options = CalibratePolicyConfig(
        image=str(world / "images"),
        model=str(world / "model"),
        output=str(tmp_path),
        samples=2,
        steps=8,
        **CPU,
    )
    path, _ = calibrate_policy(options)
    config = config_of(
        world, tmp_path / "out", methods=ROWS, caches=[], seeds=[0], baseline_steps=8, reference_steps=8, limit=1,
        policy_calibration=path, cpu_time=True,
    )  # fmt: skip
    rows = {row["note"]: row for row in benchmark(config)["rows"] if row["method"] == "training_free"}
    assert set(rows) == {name.value for name in PolicyName}
    for name, row in rows.items():
        slack = 0.3 if name == "online" else 0.03
        assert row["executed_flops_ratio"] == pytest.approx(0.5, abs=slack) and row["budget"] == 0.5
        assert row["dit_speedup"] > 0 and row["iou_paired"] is not None
    task = MeshTask(config)
    assert find_session(task.planner.models[DENSE].dit) is None


def test_images_without_one_have_early_steps_alone(gallery: Path, tmp_path: Path) -> None:
    config = image_config_of(gallery, tmp_path, methods=ROWS, caches=[], seeds=[0], reference_steps=4)
    rows = [row for row in benchmark(config)["rows"] if row["method"] == "training_free"]
    assert [(row["note"], row["executed_flops_ratio"]) for row in rows] == [("early", 0.5)]
    assert rows[0]["psnr_dense"] is not None
    config.policy_calibration = tmp_path / "gone"
    with pytest.raises(UserError, match="there is no calibration"):
        _ = Planner(config, load_models(config)).calibration


@pytest.mark.parametrize("task", ["meshes", "images"])
def test_a_quick_comparison(
    world: Path,
    gallery: Path,
    tmp_path: Path,
    task: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = {
        "methods": ROWS,
        "seeds": [0],
        "phases": [Phase.quick],
        "baseline_steps": 6,
        "reference_steps": 6,
    }
    config: Any = config_of(world, tmp_path, **changes)
    if task == "images":
        config = image_config_of(gallery, tmp_path, **changes, limit=2, caches=[CacheName.forecast])
    score = {"meshes": "iou_dense", "images": "psnr_dense"}[task]
    monkeypatch.setattr("elastic3d.benchmark.meshes.QUICK_CELLS", 12)
    assert script.main(config) == 0 and "| training_free | early |" in capsys.readouterr().out
    rows = load_json(tmp_path / "quick.json")["rows"]
    assert [row["method"] for row in rows] == ["dense", "training_free", "forecast"]
    assert rows[0][score] == {"meshes": 1.0, "images": 100.0}[task] > rows[1][score]
    assert rows[1]["executed"] == 0.5 and all(row["seconds"] > 0 for row in rows)
    assert (tmp_path / "quick.md").read_text().count("\n") == 5
    with pytest.raises(ValueError, match="phases has quick and others"):
        config_of(world, tmp_path, phases=[Phase.quick, Phase.timing])
