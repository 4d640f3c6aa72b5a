"""What a calibration of the plan does to a dial that was measured with the one before."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
from tiny_dial import load, row, save_dialled, values
from tiny_pipeline import image

from elastic3d.diffusion.options import Quality
from elastic3d.elastic.training_free import CALIBRATION_NAME
from elastic3d.errors import UserError
from elastic3d.pipelines.calibration import calibrate_policy
from elastic3d.pipelines.options import CalibratePolicyConfig
from elastic3d.utils.devices import DeviceChoice, DTypeChoice
from elastic3d.utils.files import load_json, save_json

PLANNED = row(5 / 6, 3, 2 / 3, False, 1.2, 0.85, 0.5) | {"planned": True}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder with a calibration, and a dial with a row of the plan beside others."""
    image().save(tmp_path / "a.png")
    folder, dial = save_dialled(tmp_path / "model"), values()
    (folder / "dial.json").unlink()
    calibrate(folder)
    dial["rows"].insert(2, PLANNED)
    save_json(dial, folder / "dial.json")
    return folder


def calibrate(model: Path, output: str = "") -> None:
    options = {"device": DeviceChoice.cpu, "dtype": DTypeChoice.float32, "samples": 1}
    calibrate_policy(
        CalibratePolicyConfig(image=str(model.parent / "a.png"), model=str(model), output=output, **options)
    )


def test_rows_of_the_plan_go_with_the_calibration_that_they_were_measured_with(model: Path) -> None:
    assert len(load(model).dial.rows) == 4
    with pytest.warns(UserWarning, match=r"gone from .*dial\.json, as they .*make_dial\.py make new ones"):
        calibrate(model)
    assert load_json(model / "dial.json") == values()
    found = load(model).dial
    assert found is not None and [found.named(each).cost for each in Quality] == [1 / 6, 2 / 3, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calibrate(model)  # nothing of the plan is left
    assert load_json(model / "dial.json") == values()


def test_a_dial_that_nothing_is_left_of_goes(model: Path) -> None:
    dial = values()
    dial["rows"] = [PLANNED]
    dial["names"] = dict.fromkeys(dial["names"], PLANNED["cost"])
    save_json(dial, model / "dial.json")
    with pytest.warns(UserWarning, match="gone from"):
        calibrate(model)
    assert not (model / "dial.json").exists() and load(model).dial is None


def test_a_calibration_elsewhere_is_of_the_dial_that_lies_there(model: Path) -> None:
    whole = load_json(model / "dial.json")
    other = model.parent / "other"
    shutil.copytree(model, other)
    calibrate(model, str(model / "mine.json"))  # none that the model finds by itself
    with pytest.warns(UserWarning, match=r"gone from .*other/dial\.json"):
        calibrate(model, str(other))
    assert load_json(model / "dial.json") == whole and load_json(other / "dial.json") == values()


def test_a_broken_dial_is_named_before_anything_is_generated(model: Path) -> None:
    save_json({"rows": []}, model / "dial.json")
    before = (model / CALIBRATION_NAME).read_bytes()
    with pytest.raises(UserError, match=r"dial\.json"):
        calibrate(model)
    assert (model / CALIBRATION_NAME).read_bytes() == before
