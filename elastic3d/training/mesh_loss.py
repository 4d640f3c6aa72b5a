"""Mesh reconstruction loss: how far the shape that latents decode to is from the ground truth's surface.

Gradients flow through the frozen decoder into the latents. Everything is a query of the field: the surface points
move with the field by implicit differentiation (as in IDR, 2003.09852), and derivatives in space are central
differences, so that no second derivative of the decoder is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Field = Callable[[Tensor], Tensor]  # points (B,P,3) -> (B,P), positive inside

SPACING = 0.01  # of the central differences; the finest grid cell of a 256 grid is 0.008
LARGEST_MOVE = 0.1  # a point that finds no surface nearby stays about where it was


def field_gradient(field: Field, points: Tensor) -> Tensor:
    """Gradient (B,P,3) of the field at points (B,P,3), by central differences."""
    offsets = SPACING * torch.eye(3, device=points.device)
    stencil = torch.cat([points[:, :, None] + offsets, points[:, :, None] - offsets], dim=2)
    values = field(stencil.flatten(1, 2)).unflatten(1, (-1, 6))
    return (values[..., :3] - values[..., 3:]) / (2 * SPACING)


def surface_points(field: Field, start: Tensor, iterations: int = 2) -> Tensor:
    """Points (B,P,3) on the surface nearest to `start` along the field's gradient, differentiable in the field.

    Newton steps x - f grad f / |grad f|^2 find them without a gradient; one more step, in which only f is
    differentiated, is the implicit derivative of a point that is held on the surface.
    """
    with torch.no_grad():
        points = start
        for _ in range(iterations):
            points = _towards(points, field(points), field_gradient(field, points), start)
        gradient = field_gradient(field, points)
    return _towards(points, field(points), gradient, start)


def _towards(points: Tensor, value: Tensor, gradient: Tensor, start: Tensor) -> Tensor:
    step = value[..., None] * gradient / gradient.square().sum(-1, keepdim=True).clamp_min(1e-4)
    return start + (points - step - start).clamp(-LARGEST_MOVE, LARGEST_MOVE)


def chamfer_distance(x: Tensor, y: Tensor, x_normals: Tensor, y_normals: Tensor) -> tuple[Tensor, Tensor]:
    """Squared Chamfer distance and normal disagreement of point sets x (B,P,3), y (B,Q,3) -> two scalars.

    What pytorch3d's `chamfer_distance` returns by default (means over points, both directions added, mean over
    the batch; 1 - |cosine| of the normals of nearest neighbours), by pytorch3d where it is installed.
    """
    try:
        from pytorch3d.loss import chamfer_distance as reference
    except ImportError:
        return _chamfer_distance(x, y, x_normals, y_normals)
    return reference(x, y, x_normals=x_normals, y_normals=y_normals)


def _chamfer_distance(x: Tensor, y: Tensor, x_normals: Tensor, y_normals: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        distances = torch.cdist(x, y)
        to_y, to_x = distances.argmin(dim=2), distances.argmin(dim=1)
    distance = x.new_zeros(())
    disagreement = x.new_zeros(())
    for a, b, a_normals, b_normals, nearest in (
        (x, y, x_normals, y_normals, to_y),
        (y, x, y_normals, x_normals, to_x),
    ):
        index = nearest[..., None].expand(-1, -1, 3)
        distance = distance + (a - b.gather(1, index)).square().sum(-1).mean()
        cosine = F.cosine_similarity(a_normals, b_normals.gather(1, index), dim=-1, eps=1e-6)
        disagreement = disagreement + (1 - cosine.abs()).mean()
    return distance, disagreement


def surface_loss(field: Field, surface: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
    """Chamfer distance and normal disagreement between the field's surface and samples of the true one.

    Args:
        surface: true surface samples (B,S,6), xyz and outward unit normal.
        jitter: offsets (B,S,3) from them at which the search for the field's surface starts.
    """
    true, normals = surface[..., :3], surface[..., 3:]
    points = surface_points(field, true + jitter)
    found = -F.normalize(field_gradient(field, points.detach()), dim=-1, eps=1e-6)
    return chamfer_distance(points, true, found, normals)


def silhouette_loss(
    field: Field, starts: Tensor, ends: Tensor, covered: Tensor, offsets: Tensor, count: int
) -> Tensor:
    """Whether rays meet the field's shape, against whether they meet the true one: binary cross-entropy of the field's
    largest value on each (the mask loss of IDR, 2003.09852). Only the field at the point that has it is
    differentiated.

    Args:
        field: its values are logits of being inside.
        starts, ends: of the rays' segments (B,R,3).
        covered: (B,R), 1 where the true silhouette is.
        offsets: (B,R) from 0 to 1, where in its interval each of a ray's `count` points lies.
    """
    places = (torch.arange(count, device=starts.device) + offsets[..., None]) / count
    points = torch.lerp(starts[:, :, None], ends[:, :, None], places[..., None])
    with torch.no_grad():
        largest = field(points.flatten(1, 2)).unflatten(1, (-1, count)).argmax(-1)
    found = points.gather(2, largest[..., None, None].expand(-1, -1, 1, 3)).squeeze(2)
    return F.binary_cross_entropy_with_logits(field(found), covered)
