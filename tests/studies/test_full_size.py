"""Full-size timing, at a width that fits a test."""

from dataclasses import replace
from pathlib import Path

import pytest

from elastic3d.errors import UserError
from elastic3d.studies.config import FullSizeConfig
from elastic3d.studies.full_size import measure_full_size, printed, published, sized
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.files import load_json


def test_a_model_that_is_not_published_is_refused() -> None:
    with pytest.raises(UserError, match="models has 'hunyuan3d9', expected one of hunyuan3d2, "):
        FullSizeConfig(models=["hunyuan3d9"])


def test_full_size_models_narrowed(tmp_path: Path) -> None:
    config = FullSizeConfig(
        output=tmp_path / "times.json", width=64, latents=16, steps=6, rounds=1, batches=[1], budgets=[0.5],
        models=["hunyuan3d2", "triposg", "step1x3d"], device=DeviceChoice.cpu, dtype=DTypeChoice.float32,
    )  # fmt: skip
    found = measure_full_size(config)
    assert [(row["model"], row["executed"]) for row in found["rows"]] == [
        (name, share) for name in config.models for share in (1.0, 0.5)
    ]
    assert all(row["speedup"] > 0 and row["peak_mb"] > 0 for row in found["rows"])
    assert printed(found).count("\n") == 1 + len(found["rows"]) and config.output.is_file()
    full, config = published("step1x3d").dit, replace(config, width=128)
    assert sized(full, FullSizeConfig()) == full
    assert sized(full, config).heads == 2 and sized(full, config).condition_tokens == round(16 / 2048 * 1370)


def test_embedded_guidance_on_a_system_that_does_not_tell_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One branch runs; there is no /proc."""
    monkeypatch.setattr("elastic3d.studies.full_size.STATUS", tmp_path / "status")
    found = measure_full_size(FullSizeConfig(
        output=tmp_path / "times.json", width=64, latents=4, steps=5, rounds=1, batches=[1], budgets=[0.6],
        models=["hunyuan3d2_mini_turbo"], device=DeviceChoice.cpu, dtype=DTypeChoice.float32,
    ))  # fmt: skip
    assert [row["executed"] for row in found["rows"]] == [1.0, pytest.approx(0.6)]
    assert [row["peak_mb"] for row in found["rows"]] == [None, None] and "nan" not in printed(found)
    assert load_json(tmp_path / "times.json")["rows"] == found["rows"]
