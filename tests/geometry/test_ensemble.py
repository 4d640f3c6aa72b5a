"""The mean shape: between what all shapes hold and what any holds, with the mean of their volumes; the best one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from elastic3d.geometry.decode import decode_field
from elastic3d.geometry.ensemble import best_field, mean_field
from elastic3d.geometry.options import DecodeConfig
from elastic3d.geometry.surface import extract_surface

CONFIG = DecodeConfig(resolution=48, max_points=5000)
Field = Callable[[Tensor], Tensor]


def ball(radius: float, x: float = 0.0) -> Field:
    """The logit of being in a ball whose centre is at (x,0,0)."""
    return lambda points: 60 * (radius - (points - points.new_tensor([x, 0, 0])).norm(dim=1))


def volume(field: Field) -> float:
    return float(extract_surface(decode_field(field, CONFIG)[0], CONFIG.box).volume)


def test_the_mean_of_equal_shapes_is_that_shape() -> None:
    field = ball(0.5)
    assert volume(mean_field([field] * 3, CONFIG)) == pytest.approx(volume(field), rel=0.03)


@pytest.mark.parametrize(
    "fields",
    [
        [ball(r) for r in (0.3, 0.5, 0.6)],
        [ball(0.4, x) for x in (-0.2, 0.0, 0.1, 0.15)],
        [ball(0.4), ball(0.2, 0.5)],
    ],
    ids=["sizes", "places", "apart"],
)
def test_volume_and_order(fields: list[Field]) -> None:
    told: list[tuple[int, int]] = []
    found = mean_field(fields, CONFIG, on_field=lambda *at: told.append(at))
    assert told == [(n, len(fields)) for n in range(1, len(fields) + 1)]
    assert volume(found) == pytest.approx(np.mean([volume(field) for field in fields]), rel=0.06)
    points = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(mean_field(fields[::-1], CONFIG)(points), found(points), atol=1e-4, rtol=1e-4)
    inside = torch.stack([field(points) > 1 for field in fields])
    outside = torch.stack([field(points) < -3 for field in fields])
    assert (found(points)[inside.all(0)] > 0).all() and (found(points)[outside.all(0)] < 0).all()


def test_what_differs_a_little_is_kept() -> None:
    """A rod that stands a little elsewhere in each of four shapes, beside a body that does not."""

    def shape(x: float) -> Field:
        def field(points: Tensor) -> Tensor:
            rod = 0.08 - (points[:, :2] - points.new_tensor([x, 0.6])).norm(dim=1)
            rod = torch.minimum(rod, 0.5 - points[:, 2].abs())
            return 60 * torch.maximum(rod, 0.4 - points.norm(dim=1))

        return field

    found = mean_field([shape(x) for x in (-0.06, -0.02, 0.02, 0.06)], CONFIG)
    along = torch.stack([torch.zeros(9), torch.full((9,), 0.6), torch.linspace(-0.4, 0.4, 9)], dim=1)
    assert (found(along) > 0).all()


def test_nothing_inside_and_not_finite() -> None:
    points = torch.rand(100, 3)
    nothing = mean_field([lambda points: points[:, 0] * 0 - 4.0] * 2, CONFIG)
    assert (nothing(points) < 0).all()
    with pytest.raises(ValueError, match="not finite"):
        decode_field(mean_field([ball(0.5), lambda points: points[:, 0] * torch.nan], CONFIG), CONFIG)


def test_the_best_shape_is_the_one_whose_mesh_fits() -> None:
    """A field that has no surface is never chosen, unless none has."""
    nothing: Field = lambda points: points[:, 0] * 0 - 4.0  # noqa: E731
    fields = [ball(0.3), nothing, ball(0.5), ball(0.4), ball(0.5)]
    chosen, fits = best_field(fields, lambda mesh: -abs(float(mesh.extents[0]) - 0.96), CONFIG)
    assert chosen == 2 and fits[1] == -np.inf
    assert np.round([fits[0], *fits[2:]], 2).tolist() == [-0.36, -0.04, -0.16, -0.04]
    assert best_field([nothing] * 2, lambda mesh: 0.0, CONFIG) == (0, [-np.inf] * 2)
