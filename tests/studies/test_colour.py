"""Colours on generated meshes, measured: the oracle's mesh does well, and a grey image says nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure_colour
import numpy as np
import pytest
from painted import painted
from tiny_pipeline import tiny_pipeline

from elastic3d.diffusion.options import Quality
from elastic3d.errors import UserError
from elastic3d.preparation.options import PrepareConfig
from elastic3d.preparation.shape import RawShape
from elastic3d.preparation.splits import Split, write_splits
from elastic3d.studies import colour
from elastic3d.studies.colour import measure_shape, summary
from elastic3d.studies.config import ColourConfig


def test_a_mesh_of_the_shape_itself_keeps_its_colours() -> None:
    """A mesh as good as a model could make it, and one of another shape."""
    shape = painted("sofa")
    colours, part = np.unique(shape.colours, axis=0, return_inverse=True)
    raw = RawShape(shape.mesh, part, colours)
    own, other = (
        measure_shape(raw, lambda _, made=made: made, seed=0) for made in (shape.made, painted("lamp").made)
    )
    assert own["psnr"] >= 22 and own["overlap"] > 0.9 and own["rmse"] < 0.8 * own["rmse_mean"]
    assert other["overlap"] < 0.8
    worse = other | {"rmse": own["rmse_mean"] + 1, "rmse_mean": own["rmse_mean"]}
    figures = summary([{"name": "own", **own}, {"name": "other", **worse}])
    assert (figures["shapes"], figures["nearer_rmse"]) == (2, 1)
    assert figures["psnr"] == pytest.approx((own["psnr"] + other["psnr"]) / 2, abs=1e-3)


def test_the_command_keeps_each_shape_and_refuses_a_quality_without_a_dial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "meshes").mkdir()
    for name in ("a", "b"):
        painted("sofa").made.export(tmp_path / "meshes" / f"{name}.ply")
    write_splits(tmp_path / "splits", {f"folder/{name}": Split.test for name in ("a", "b")})
    data = PrepareConfig(path=str(tmp_path / "meshes"), splits=str(tmp_path / "splits"))
    config = ColourConfig(
        data=data, model=str(tmp_path / "model"), resolution=8, output=tmp_path / "colour.json"
    )
    with pytest.raises(UserError, match=r"quality is fast, but this model has no dial.json"):
        measure_colour.main(replace(config, quality=Quality.fast))
    row = dict.fromkeys(("psnr", "overlap", "rmse", "rmse_mean", "fixed", "fixed_mean"), 0.5)

    def killed_at_the_second(raw: RawShape, make: Any, seed: int) -> dict[str, float]:
        """In the place of seconds of rendering."""
        if seed > config.seed:
            raise KeyboardInterrupt
        return row

    monkeypatch.setattr(colour, "measure_shape", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        measure_colour.main(config)
    assert config.output is not None
    saved = json.loads(config.output.read_text())
    assert saved == {"summary": summary([row]), "shapes": [{"name": "folder/a", **row}]}
