"""The distance between a raw mesh and its solid."""

import numpy as np
import pytest
import trimesh

from elastic3d.preparation.shape import RawShape, measure_ceiling


def test_closed_sphere_grows_by_the_wall() -> None:
    ball = trimesh.creation.icosphere(4, radius=3)
    ceiling = measure_ceiling(RawShape(ball, np.zeros(len(ball.faces), int)), resolution=64)
    grown = 1 + 0.75 * 2.02 / 64 / 0.95  # radius, in units of the raw one
    assert ceiling.volume_ratio == pytest.approx(grown**3, rel=0.01)
    assert ceiling.chamfer_l1 == pytest.approx(2 * (grown - 1), rel=0.1)
    assert ceiling.f_score_02 < 0.05 < 0.95 < ceiling.f_score_05
