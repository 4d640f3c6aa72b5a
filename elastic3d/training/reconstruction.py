"""The mesh reconstruction term of a training: what latents decode to, by the frozen autoencoder, against what is known
of the true mesh and of the dense model's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from elastic3d.errors import UserError
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.training.datasets import Batch, PreparedShapes, pick
from elastic3d.training.latents import LatentInfo
from elastic3d.training.mesh_loss import silhouette_loss, surface_loss
from elastic3d.training.record import read_record
from elastic3d.training.vae import FieldLoss, FieldLossConfig, VAETrainConfig, field_loss, inside_logits
from elastic3d.training.view_rays import VIEWS_STORED, view_rays
from elastic3d.utils.options import Options, option
from elastic3d.utils.structured import load_json

MESH_STORED = ("surface", "near", "volume")
MESH_TERMS = ("field", "chamfer", "normals", "silhouette")


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
    silhouette: float = option(
        0.0, "weight of the shape's silhouette in one of its rendered views; 0 leaves it out", ge=0, le=1e6
    )
    near_queries: int = option(
        256, "points near the surface with a known distance", ge=1, le=1 << 16, advanced=True
    )
    volume_queries: int = option(128, "such points anywhere in the box", ge=1, le=1 << 16, advanced=True)
    surface_points: int = option(
        128, "surface points in Chamfer distance and normals", ge=1, le=1 << 16, advanced=True
    )
    jitter: float = option(
        0.02,
        "standard deviation of the offset at which their search starts",
        ge=0,
        le=0.1,
        advanced=True,
    )
    rays: int = option(64, "rays of the silhouette", ge=1, le=1 << 16, advanced=True)
    ray_points: int = option(
        64, "points of a ray, of which the one deepest inside counts", ge=1, le=1 << 16, advanced=True
    )

    @property
    def stored(self) -> tuple[str, ...]:
        """Tensors of a prepared shape that the loss needs."""
        return (*MESH_STORED, *(VIEWS_STORED if self.silhouette else ()))

    def sample_bytes(self) -> int:
        """Of a sample's points."""
        return 16 * (self.near_queries + self.volume_queries + 2 * self.surface_points)

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of terms of any shape, by their names `mesh_...`."""
        weighted = [getattr(self, name.removeprefix("mesh_")) * value for name, value in losses.items()]
        return torch.stack(weighted).sum(0)


def mesh_item(meshes: PreparedShapes, id: str, config: MeshTermsConfig, rng: np.random.Generator) -> Batch:
    """`points` (Q,3) with their `distance` (Q,); `surface` (S,6) and `jitter` (S,3); the rays of a silhouette."""
    near = pick(meshes.read(id, "near"), config.near_queries, rng)
    volume = pick(meshes.read(id, "volume"), config.volume_queries, rng)
    queries = torch.cat([near, volume])
    offsets = rng.standard_normal((config.surface_points, 3), dtype=np.float32)
    rays: Batch = {}
    if config.silhouette:
        rays = view_rays(meshes, id, config.rays, rng)
        rays["ray_offsets"] = torch.from_numpy(rng.random(config.rays, dtype=np.float32))
    return rays | {
        "points": queries[:, :3].contiguous(),
        "distance": queries[:, 3].contiguous(),
        "surface": pick(meshes.read(id, "surface"), config.surface_points, rng),
        "jitter": config.jitter * torch.from_numpy(offsets),
    }


class MeshReconstruction:
    """Losses of decoded latents, sample by sample. Gradients reach the latents; the autoencoder is frozen."""

    def __init__(self, vae: ShapeVAE, config: MeshTermsConfig, trained: FieldLossConfig) -> None:
        """`trained`: the loss that the autoencoder was trained with."""
        self._vae = vae.eval().requires_grad_(False)
        self.config, self.trained = config, trained

    def vae(self, device: torch.device) -> ShapeVAE:
        """The autoencoder, where the latents are."""
        return self._vae.to(device)

    def losses(self, latents: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Terms (B,) of latents (B,N,C), of items as `mesh_item` makes them; those of rows beyond B are not used."""
        vae = self.vae(latents.device)
        tokens = vae.decode(latents)
        field = vae.query(batch["points"][: len(latents)], tokens)
        by_sample = zip(field, batch["distance"], strict=False)
        losses = {
            "mesh_field": torch.stack([field_loss(f[None], d[None], self.trained) for f, d in by_sample])
        }
        pairs = [self._surface(vae, tokens[i : i + 1], batch, i) for i in range(len(latents))]
        losses["mesh_chamfer"], losses["mesh_normals"] = (
            torch.stack(list(x)) for x in zip(*pairs, strict=True)
        )
        if self.config.silhouette:
            outlines = [self._silhouette(vae, tokens[i : i + 1], batch, i) for i in range(len(latents))]
            losses["mesh_silhouette"] = torch.stack(outlines)
        return losses

    def distance(self, latents: Tensor, other: Tensor, points: Tensor) -> Tensor:
        """Distance (B,) of the fields of two sets of latents (B,N,C) at points (B,Q,3); the other's has no gradient."""
        vae = self.vae(latents.device)
        with torch.no_grad():
            wanted = vae.query(points, vae.decode(other))
        return field_distance(vae.query(points, vae.decode(latents)), wanted, self.trained)

    def _surface(self, vae: ShapeVAE, tokens: Tensor, batch: Batch, row: int) -> tuple[Tensor, Tensor]:
        """Chamfer distance and normal disagreement of one decoded sample (1,N,D)."""
        surface, jitter = (batch[name][row : row + 1] for name in ("surface", "jitter"))
        return surface_loss(lambda points: vae.query(points, tokens), surface, jitter)

    def _silhouette(self, vae: ShapeVAE, tokens: Tensor, batch: Batch, row: int) -> Tensor:
        """Cross-entropy of one decoded sample's (1,N,D) silhouette."""
        names = ("ray_starts", "ray_ends", "covered", "ray_offsets")
        starts, ends, covered, offsets = (batch[name][row : row + 1] for name in names)

        def logits(points: Tensor) -> Tensor:
            return inside_logits(vae.query(points, tokens), self.trained)

        return silhouette_loss(logits, starts, ends, covered, offsets, self.config.ray_points)


def field_distance(found: Tensor, wanted: Tensor, trained: FieldLossConfig) -> Tensor:
    """Distance (B,) of two fields (B,Q), of what the autoencoder was trained for: of occupancies the Kullback-Leibler
    divergence, of truncated distances L1."""
    if trained.loss is FieldLoss.tsdf:
        return (found.clamp(-1, 1) - wanted.clamp(-1, 1)).abs().mean(1)
    target = wanted.sigmoid()
    divergence = F.binary_cross_entropy_with_logits(found, target, reduction="none")
    return (divergence - F.binary_cross_entropy_with_logits(wanted, target, reduction="none")).mean(1)


def load_vae(cache: Path, trained: FieldLossConfig | None) -> ShapeVAE:
    """The autoencoder of the latents in a folder; UserError unless it was trained with the field loss `trained` (None:
    no mesh loss is wanted)."""
    info = LatentInfo.load(cache)
    vae = ShapeVAE.from_pretrained(info.vae)
    vae.set_latent_statistics(info.mean, info.std)
    record = info.vae / "training.json"
    if record.is_file() and trained is not None:
        own = read_record(load_json(record).get("config"), VAETrainConfig, record).vae
        for name in ("loss", "softness", "truncation"):
            wanted, found = getattr(own, name), getattr(trained, name)
            if wanted != found:
                raise UserError(f"vae.{name} is {found}, but the VAE in {info.vae} was trained with {wanted}")
    return vae
