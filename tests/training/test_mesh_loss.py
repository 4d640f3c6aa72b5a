from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from elastic3d.training.mesh_loss import (
    _chamfer_distance,
    chamfer_distance,
    field_distance,
    field_gradient,
    surface_loss,
    surface_points,
)
from elastic3d.training.vae import SOFTNESS, FieldLoss, FieldLossConfig, field_loss


def directions(count: int, seed: int = 0) -> torch.Tensor:
    points = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(points, dim=-1)


def sphere(radius):
    """Occupancy logits of a sphere: not a distance, but zero on the surface and positive inside."""
    return lambda points: 20 * (radius - points.norm(dim=-1))


def naive_chamfer(x, y, x_normals, y_normals):
    distance, disagreement = 0.0, 0.0
    for b in range(len(x)):
        for p, q, n, m in (
            (x[b], y[b], x_normals[b], y_normals[b]),
            (y[b], x[b], y_normals[b], x_normals[b]),
        ):
            for point, normal in zip(p, n, strict=True):
                squared = (q - point).square().sum(-1)
                distance += squared.min() / len(p) / len(x)
                disagreement += (1 - (m[squared.argmin()] @ normal).abs()) / len(p) / len(x)
    return distance, disagreement


def test_the_gradient_is_the_fields():
    points = directions(50) * 0.5
    torch.testing.assert_close(
        field_gradient(sphere(0.6), points), -20 * directions(50), rtol=1e-3, atol=1e-3
    )


def test_surface_points_lie_on_the_surface_and_move_with_it():
    radius = torch.tensor(0.6, requires_grad=True)
    start = directions(40) * 0.57
    points = surface_points(sphere(radius), start)
    torch.testing.assert_close(points, directions(40) * 0.6, rtol=1e-4, atol=1e-4)
    (points * directions(40)).sum().backward()  # each point moves outwards as fast as the radius grows
    assert radius.grad.item() == pytest.approx(80, rel=1e-3)


def test_a_point_without_a_surface_stays_near():
    start = directions(40) * 0.5
    points = surface_points(lambda p: -1 - 1e-3 * p.norm(dim=-1), start)
    assert points.isfinite().all() and (points - start).abs().max() <= 0.1 + 1e-6


def test_chamfer_is_the_naive_double_loop():
    sets = [directions(30, 1) * 0.5, directions(20, 2) * 0.6, directions(30, 3), directions(20, 4)]
    torch.testing.assert_close(_chamfer_distance(*sets), naive_chamfer(*sets))
    torch.testing.assert_close(chamfer_distance(*sets), naive_chamfer(*sets))


def test_chamfer_is_pytorch3ds():
    loss = pytest.importorskip("pytorch3d.loss")
    x, y, n, m = directions(30, 1) * 0.5, directions(20, 2) * 0.6, directions(30, 3), directions(20, 4)
    torch.testing.assert_close(
        _chamfer_distance(x, y, n, m), loss.chamfer_distance(x, y, x_normals=n, y_normals=m)
    )


def test_the_surface_loss_vanishes_on_the_truth_and_leads_to_it():
    surface = torch.cat([directions(60) * 0.6, directions(60)], dim=-1)
    jitter = 0.02 * torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(5))
    distance, disagreement = surface_loss(sphere(0.6), surface, jitter)
    assert distance < 2e-3 and disagreement < 0.01  # no more than the jitter along the surface
    for wrong, sign in ((0.65, 1), (0.55, -1)):
        radius = torch.tensor(wrong, requires_grad=True)
        distance, _ = surface_loss(sphere(radius), surface, jitter)
        distance.backward()
        assert radius.grad.item() * sign > 0


def test_a_perfect_field_has_no_loss():
    """The target's own entropy is taken off, as binary cross-entropy of probabilities has it."""
    distance = torch.linspace(-0.5, 0.5, 201)[None]
    field, target = torch.randn_like(distance), torch.sigmoid(distance / SOFTNESS)
    bce = torch.nn.functional.binary_cross_entropy
    wanted = bce(field.sigmoid(), target) - bce(target, target)
    torch.testing.assert_close(field_loss(field, distance, FieldLossConfig()), wanted)
    assert field_loss(distance / SOFTNESS, distance, FieldLossConfig()) == 0


@contextmanager
def cuda_autocast() -> Iterator[None]:
    """That of a GPU, which forbids some operations that a CPU's allows: tensors made inside have shapes, no values."""
    with FakeTensorMode(), torch.no_grad():
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("loss", FieldLoss)
def test_losses_of_fields_are_allowed_by_the_autocast_of_gpus(loss):
    with cuda_autocast(), torch.device("cuda"):
        field, distance, config = torch.rand(2, 24), torch.rand(2, 24), FieldLossConfig(loss=loss)
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            torch.nn.functional.binary_cross_entropy(field, field)
        assert field_loss(field.bfloat16(), distance, config).dtype is torch.float32
        assert field_distance(field.bfloat16(), field, config).shape == (2,)
