"""Colours on generated meshes, measured: the oracle's mesh does well, and a grey image says nothing."""

from __future__ import annotations

import numpy as np
import pytest
from painted import painted

from elastic3d.preparation.shape import RawShape
from elastic3d.studies.colour import measure_shape, summary


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
