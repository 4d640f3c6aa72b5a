"""Mesh reconstruction loss: what latents decode to, by the frozen autoencoder, against the ground truth's surface, and
against what the dense model makes.

Gradients flow through the frozen decoder into the latents. Everything is a query of the field: the surface points
move with the field by implicit differentiation (as in IDR, 2003.09852), and derivatives in space are central
differences, so that no second derivative of the decoder is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.training.datasets import Batch, PreparedShapes, field_queries, pick
from elastic3d.training.vae import FieldLoss, FieldLossConfig, field_loss
from elastic3d.utils.options import Options, option

Field = Callable[[Tensor], Tensor]  # points (B,P,3) -> (B,P), positive inside

MESH_STORED = ("surface", "near", "volume")  # tensors of a prepared shape that the loss needs
MESH_TERMS = ("field", "chamfer", "normals")
SPACING = 0.01  # of the central differences; the finest grid cell of a 256 grid is 0.008
JITTER = 0.02  # standard deviation of the offset at which the search for a surface point starts
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
    differentiated, is the implicit derivative of a point that stays on the surface.
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


@dataclass(kw_only=True)
class MeshTermsConfig(Options):
    """Mesh reconstruction loss: the shape that latents decode to, against the true surface."""

    weight: float = option(0.1, "of the whole mesh loss; 0 leaves it out", ge=0, le=1e6)
    field: float = option(
        1.0, "weight of the field at points with a known signed distance", ge=0, le=1e6, advanced=True
    )
    chamfer: float = option(
        10.0, "weight of the squared Chamfer distance of surface points", ge=0, le=1e6, advanced=True
    )
    normals: float = option(0.1, "weight of the disagreement of their normals", ge=0, le=1e6, advanced=True)
    # A batch has the points of all its samples: how many each has was never worth a choice.
    near_queries: int = option(
        256, "points near the surface with a known distance", ge=1, le=1 << 16, internal=True
    )
    volume_queries: int = option(128, "such points anywhere in the box", ge=1, le=1 << 16, internal=True)
    surface_points: int = option(
        128, "surface points in Chamfer distance and normals", ge=1, le=1 << 16, internal=True
    )

    def sample_bytes(self) -> int:
        """Of a sample's points."""
        return 16 * (self.near_queries + self.volume_queries + 2 * self.surface_points)

    @property
    def true_mesh(self) -> bool:
        """Whether the true surface counts at all."""
        return any(getattr(self, name) for name in MESH_TERMS)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of terms of any shape, by their names `mesh_...`."""
        weighted = [getattr(self, name.removeprefix("mesh_")) * value for name, value in losses.items()]
        return torch.stack(weighted).sum(0)


@dataclass(kw_only=True)
class EndMeshLossConfig(MeshTermsConfig):
    """The mesh reconstruction loss at the end of a generation."""

    dense: float = option(
        1.0, "weight of the distance to the field that the dense model's latents decode to", ge=0, le=1e6
    )

    def check(self) -> None:
        """A loss with a weight has terms."""
        super().check()
        if self.weight and not (self.dense or self.true_mesh):
            raise ValueError(
                f"weight is {self.weight:g}, expected 0: field, chamfer, normals and dense have no weight"
            )


@dataclass(kw_only=True)
class FewStepMeshLossConfig(EndMeshLossConfig):
    """The same where the latents' distance is enough as a rule."""

    weight: float = option(0.0, "of the whole mesh loss; 0 leaves it out", ge=0, le=1e6)


def mesh_item(meshes: PreparedShapes, id: str, config: MeshTermsConfig, rng: np.random.Generator) -> Batch:
    """`points` (Q,3) with their `distance` (Q,); `surface` (S,6) and `jitter` (S,3)."""
    queries = field_queries(meshes, id, config.near_queries, config.volume_queries, rng)
    offsets = rng.standard_normal((config.surface_points, 3), dtype=np.float32)
    return {
        **queries,
        "surface": pick(meshes.read(id, "surface"), config.surface_points, rng),
        "jitter": JITTER * torch.from_numpy(offsets),
    }


class MeshReconstruction:
    """Losses of decoded latents, sample by sample. Gradients reach the latents; the autoencoder is frozen."""

    def __init__(self, vae: ShapeVAE, trained: FieldLossConfig) -> None:
        """`trained`: the loss that the autoencoder was trained with."""
        self._vae = vae.eval().requires_grad_(False)
        self.trained = trained

    def losses(self, latents: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Terms (B,) of latents (B,N,C), of items as `mesh_item` makes them; those of rows beyond B are not used."""
        vae = self._vae.to(latents.device)
        tokens = vae.decode(latents)
        field = vae.query(batch["points"][: len(latents)], tokens)
        rows = [slice(row, row + 1) for row in range(len(latents))]
        terms = torch.stack([self._terms(field[row], tokens[row], batch, row) for row in rows], dim=1)
        return {f"mesh_{name}": values for name, values in zip(MESH_TERMS, terms, strict=True)}

    def _terms(self, field: Tensor, tokens: Tensor, batch: Batch, row: slice) -> Tensor:
        """The terms (3,) of one decoded sample, by its field (1,Q) and its tokens (1,N,D)."""
        near = field_loss(field, batch["distance"][row], self.trained)
        surface, jitter = batch["surface"][row], batch["jitter"][row]
        return torch.stack([near, *surface_loss(lambda x: self._vae.query(x, tokens), surface, jitter)])

    def distance(self, latents: Tensor, other: Tensor, points: Tensor) -> Tensor:
        """Distance (B,) of the fields of two sets of latents (B,N,C) at points (B,Q,3); the other's has no gradient."""
        vae = self._vae.to(latents.device)
        with torch.no_grad():
            wanted = vae.query(points, vae.decode(other))
        return field_distance(vae.query(points, vae.decode(latents)), wanted, self.trained)


def field_distance(found: Tensor, wanted: Tensor, trained: FieldLossConfig) -> Tensor:
    """Distance (B,) of two fields (B,Q), of what the autoencoder was trained for: of occupancies the Kullback-Leibler
    divergence, of truncated distances L1."""
    if trained.loss is FieldLoss.tsdf:
        return (found.clamp(-1, 1) - wanted.clamp(-1, 1)).abs().mean(1)
    target = wanted.sigmoid()
    divergence = F.binary_cross_entropy_with_logits(found, target, reduction="none")
    return (divergence - F.binary_cross_entropy_with_logits(wanted, target, reduction="none")).mean(1)
