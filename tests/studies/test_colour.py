"""Colours on generated meshes, measured: the oracle's mesh does well, and a grey image says nothing."""

from __future__ import annotations

import numpy as np
import pytest
from painted import painted

from elastic3d.preparation.shape import RawShape
from elastic3d.studies.colour import measure_shape, summary


def test_a_mesh_of_the_shape_itself_keeps_its_colours() -> None:
    """Two shapes whose meshes are as good as a model could make them, and one whose mesh is another shape's."""
    rows = []
    for name in ("chair", "sofa"):
        shape = painted(name)
        colours, part = np.unique(shape.colours, axis=0, return_inverse=True)
        row = measure_shape(RawShape(shape.mesh, part, colours), lambda _, made=shape.made: made, seed=0)
        assert row["psnr"] >= 22 and row["overlap"] > 0.9
        assert row["rmse"] < 0.8 * row["rmse_mean"]
        rows.append({"name": name, **row})
    figures = summary(rows)
    assert figures["shapes"] == figures["nearer_rmse"] == 2
    assert figures["psnr"] == pytest.approx(np.mean([row["psnr"] for row in rows]), abs=1e-3)
    other = measure_shape(RawShape(shape.mesh, part, colours), lambda _: painted("lamp").made, seed=0)
    assert other["overlap"] < 0.8 < rows[1]["overlap"]
