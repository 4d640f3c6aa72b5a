"""The shape VAE: its training items, objective and stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from elastic3d.errors import UserError
from elastic3d.models.options import VAEConfig
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.training.datasets import (
    Batch,
    PreparedShapes,
    Shuffle,
    field_queries,
    item_generator,
    open_split,
    pick,
    record_of_shapes,
)
from elastic3d.training.journal import contact_sheet, mesh_row
from elastic3d.training.loop import Stage
from elastic3d.training.options import DataConfig, StageName, TrainConfig
from elastic3d.utils.options import Options, option

STORED = ("surface", "sharp", "near", "volume")
HALF_EXTENT = 0.95  # of the longest side of a prepared shape
MAX_POINTS = 1 << 20  # of one kind, a shape
SOFTNESS = 0.01  # distance over which soft occupancy goes from 1/2 to 0.73: about a cell of the finest grid
TRUNCATION = 0.1  # distance at which a signed distance is cut, as published models cut it


class FieldLoss(Enum):
    """What the field decoder learns."""

    occupancy = "occupancy"
    tsdf = "tsdf"


@dataclass(kw_only=True)
class AugmentConfig(Options):
    """Changes to a training shape. Mirror, rotation and uniform scale keep distances exact."""

    mirror: bool = option(True, "mirror half of the shapes left to right (x)")
    scale_min: float = option(0.8, "smallest uniform scale; 1 does not scale", ge=0.1, le=1)
    stretch_min: float = option(
        1.0, "smallest further scale of a single axis; distances become lower bounds", ge=0.1, le=1
    )
    rotate_degrees: float = option(0.0, "largest rotation about the vertical axis", ge=0, le=180)


@dataclass(kw_only=True)
class FieldLossConfig(Options):
    """How a decoded field is compared with distances."""

    loss: FieldLoss = option(FieldLoss.occupancy, "soft occupancy or truncated signed distance")


class TrainedPart(Enum):
    """What of a VAE learns. With a frozen encoder, latents that were cached and a DiT that knows them stay valid."""

    all = "all"
    decoder = "decoder"


@dataclass(kw_only=True)
class SurfaceConfig(Options):
    """What the encoder reads of a shape."""

    surface_points: int = option(2048, "surface points the encoder reads", ge=1, le=MAX_POINTS)
    sharp_points: int = option(
        0, "points on sharp edges the encoder reads besides", ge=0, le=MAX_POINTS, advanced=True
    )
    anchor_spread: float = option(
        0.0,
        "anchored: standard deviation of an anchor's offset from the surface, before it is read",
        ge=0,
        le=1,
    )


@dataclass(kw_only=True)
class VAEStageConfig(SurfaceConfig, FieldLossConfig):
    """The shape VAE's training."""

    model: VAEConfig = option(VAEConfig, "architecture")
    augment: AugmentConfig = option(AugmentConfig, "changes to training shapes")
    near_queries: int = option(768, "field queries near the surface", ge=0, le=MAX_POINTS)
    volume_queries: int = option(256, "field queries anywhere in the box", ge=0, le=MAX_POINTS)
    kl_weight: float = option(1e-5, "weight of the KL term", ge=0, le=1e6)
    trained: TrainedPart = option(
        TrainedPart.all, "what learns: all, or the decoder alone, so that a DiT of these latents stays valid"
    )
    val_shapes: int = option(64, "shapes to validate on", ge=1, le=1 << 20)
    val_queries: int = option(
        4096, "field queries of each kind for a validation shape", ge=1, le=MAX_POINTS, internal=True
    )
    sample_resolution: int = option(64, "grid cells a side of the sample images", ge=8, le=512, advanced=True)

    def check(self) -> None:
        """There is a query."""
        super().check()
        if self.near_queries + self.volume_queries < 1:
            raise ValueError("near_queries and volume_queries are both 0, expected at least one query")

    def require_sharp(self) -> None:
        """UserError where the VAE reads points on sharp edges, and there are none. Its architecture may be that of a
        model, which is known later than the options; and records of older runs stay readable."""
        if self.model.encoder_layers and self.model.sharp_latents and not self.sharp_points:
            raise UserError(
                f"vae.sharp_points is 0, expected some, such as 16384: the VAE reads {self.model.sharp_latents} of its"
                f" {self.model.num_latents} latents from points on sharp edges"
            )


@dataclass(kw_only=True)
class VAETrainConfig(TrainConfig):
    """Everything `scripts/train.py stage=vae` takes."""

    stage: StageName = option(StageName.vae, "what to do")
    data: DataConfig = option(DataConfig, "prepared shapes")
    gradient_checkpointing: bool = option(False, "activations of a VAE are small", internal=True)
    vae: VAEStageConfig = option(VAEStageConfig, "shape VAE")

    def network(self) -> nn.Module:
        return ShapeVAE(self.vae.model)

    def sample_bytes(self) -> int:
        """Points; the latents' tokens in every layer; a token a query."""
        vae, model = self.vae, self.vae.model
        points = 28 * (vae.surface_points + vae.sharp_points)
        tokens = model.num_latents * (model.encoder_layers + model.decoder_layers)
        queries = vae.near_queries + vae.volume_queries
        return points + 2 * model.width * tokens + (16 + 2 * model.width // model.geo_downsample) * queries


# ------------------------------------------------------------------------------------------------- items


def augment(item: Batch, config: AugmentConfig, rng: np.random.Generator) -> Batch:
    """Mirror, stretch, rotate and scale an item: `surface` and `sharp` (P,6), `points` (Q,3), `distance`
    (Q,).

    Mirror (x), rotation (Y) and uniform scale transform distances exactly. A stretch by factors s per axis
    keeps the sign; the distance becomes d * min(s), the largest value that is never too long. A shape that a
    rotation carries out of its box is scaled back into it.
    """
    stretch = torch.from_numpy(rng.uniform(config.stretch_min, 1.0, 3)).float()
    scale = rng.uniform(config.scale_min, 1.0)
    angle = math.radians(rng.uniform(-config.rotate_degrees, config.rotate_degrees))
    side = -1.0 if config.mirror and rng.random() < 0.5 else 1.0
    turn = torch.tensor(
        [[math.cos(angle), 0.0, math.sin(angle)], [0.0, 1.0, 0.0], [-math.sin(angle), 0.0, math.cos(angle)]]
    )
    matrix = turn @ torch.diag(stretch) @ torch.diag(torch.tensor([side, 1.0, 1.0]))
    reach = (item["surface"][:, :3] @ matrix.T).abs().max().item()
    scale *= min(1.0, HALF_EXTENT / max(reach, 1e-6)) if angle else 1.0
    cofactor = turn @ torch.diag(1 / stretch) @ torch.diag(torch.tensor([side, 1.0, 1.0]))

    def moved(points: Tensor) -> Tensor:
        normals = torch.nn.functional.normalize(points[:, 3:] @ cofactor.T, dim=-1)
        return torch.cat([points[:, :3] @ (scale * matrix).T, normals], dim=-1)

    changed: Batch = {name: moved(item[name]) for name in ("surface", "sharp") if name in item}
    changed["points"] = item["points"] @ (scale * matrix).T
    changed["distance"] = item["distance"] * (scale * stretch.min().item())
    return {**item, **changed}


def mirrored(points: Tensor) -> Tensor:
    """Points, or points and normals (...,3 or more), in the mirror x -> -x; distances behind xyz stay."""
    flipped = points.clone()
    if points.shape[-1] in (3, 6):
        flipped[..., ::3] *= -1
    return flipped


@dataclass
class VAEItems:
    """Items: `surface` (P,6), `points` (Q,3), `distance` (Q,), `noise` (N,C), also `sharp` (S,6), `offsets` (N,3)."""

    shapes: PreparedShapes
    config: VAEStageConfig

    def __post_init__(self) -> None:
        self._shuffle = Shuffle(len(self.shapes))

    def item(self, position: int, seed: int) -> Batch:
        rng = item_generator(seed, position)
        item = self.draw(self.shapes.ids[self._shuffle(position, seed)], rng)
        item = augment(item, self.config.augment, rng)
        model = self.config.model
        noise = rng.standard_normal((model.num_latents, model.channels), dtype=np.float32)
        return {**item, **self.offsets(rng), "noise": torch.from_numpy(noise)}

    def offsets(self, rng: np.random.Generator) -> Batch:
        """`offsets` (N,3) of the anchors from the surface, where there are any."""
        spread, count = self.config.anchor_spread, self.config.model.num_latents
        if not (self.config.model.anchored and spread):
            return {}
        return {"offsets": torch.from_numpy(spread * rng.standard_normal((count, 3), dtype=np.float32))}

    def draw(self, id: str, rng: np.random.Generator) -> Batch:
        """A random subset of a shape's stored points."""
        config = self.config
        item = field_queries(self.shapes, id, config.near_queries, config.volume_queries, rng)
        surface = self.shapes.read(id, "surface")
        item["surface"] = pick(surface, config.surface_points, rng)
        if config.sharp_points:
            sharp = self.shapes.read(id, "sharp")
            item["sharp"] = pick(sharp if len(sharp) else surface, config.sharp_points, rng)
        return item


# --------------------------------------------------------------------------------------- objective and stage


class VAEObjective(nn.Module):
    """Field loss + KL of a batch of shapes."""

    def __init__(self, vae: ShapeVAE, config: VAEStageConfig) -> None:
        super().__init__()
        self.vae, self.config = vae, config
        if config.trained is TrainedPart.decoder:
            vae.encoder.requires_grad_(False)
            vae.pre_kl.requires_grad_(False)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch of `VAEItems` -> loss and what it is made of. `noise` (B,N,C) draws the latents."""
        posterior = self.vae.encode(batch["surface"], batch.get("sharp"), batch.get("offsets"))
        raw = posterior.mean + batch["noise"] * (0.5 * posterior.logvar).exp()
        field = self.vae.query(batch["points"], self.vae.decode(self.vae.to_latents(raw)))
        loss = field_loss(field, batch["distance"], self.config)
        kl = posterior.kl().mean()
        inside = batch["distance"] > 0
        accuracy = ((field > 0) == inside).float().mean()
        values = {"field": loss.detach(), "kl": kl.detach(), "accuracy": accuracy}
        return loss + self.config.kl_weight * kl, values


def field_loss(field: Tensor, distance: Tensor, config: FieldLossConfig) -> Tensor:
    """Mean loss of the field (B,Q) at points of signed distance (B,Q), both positive inside.

    Occupancy: binary cross-entropy against sigmoid(distance / SOFTNESS), the soft margin of the sign;
    less the target's own entropy, so that a perfect field has loss 0. Or L1 to the distance, truncated
    and divided by the truncation.
    """
    if config.loss is FieldLoss.tsdf:
        return nn.functional.l1_loss(field, (distance / TRUNCATION).clamp(-1.0, 1.0))
    logits = distance / SOFTNESS
    target = torch.sigmoid(logits)
    loss = nn.functional.binary_cross_entropy_with_logits  # of probabilities CUDA's autocast forbids it
    return loss(field, target) - loss(logits, target)


class VAEStage(Stage):
    """What the loop needs to train a `ShapeVAE` on prepared shapes."""

    def __init__(self, config: VAETrainConfig) -> None:
        self.config = config.vae
        self.config.require_sharp()
        self.vae = ShapeVAE(config.vae.model)
        self.objective = VAEObjective(self.vae, config.vae)
        train = open_split(config.data, config.data.train, STORED, config.data.limit)
        self._val = open_split(config.data, config.data.val, STORED, config.vae.val_shapes)
        self.items, self.record = VAEItems(train, config.vae), record_of_shapes(train, self._val)

    def validate(self, batch: int = 8) -> dict[str, float]:
        """Volume IoU and near-surface accuracy of validation shapes at fixed points, from mean latents."""
        rows: list[list[float]] = []
        for first in range(0, len(self._val), batch):
            items = self._fixed(range(first, min(first + batch, len(self._val))))
            field = self.vae.query(items["points"], self.vae.decode(self._latents(items)))
            loss = field_loss(field, items["distance"], self.config)
            said, true = field > 0, items["distance"] > 0
            near, volume = slice(None, self.config.val_queries), slice(self.config.val_queries, None)
            both = (said & true)[:, volume].sum(1).float()
            either = (said | true)[:, volume].sum(1).clamp(min=1)
            accuracy = (said == true)[:, near].float().mean(1)
            rows += [
                [i, a, loss.item()] for i, a in zip((both / either).tolist(), accuracy.tolist(), strict=True)
            ]
        iou, accuracy, loss = np.mean(rows, axis=0)
        return {"val/volume_iou": float(iou), "val/near_accuracy": float(accuracy), "val/field": float(loss)}

    def samples(self, count: int = 6) -> dict[str, np.ndarray]:
        """Views of reconstructed validation shapes."""
        latents = self._latents(self._fixed(range(min(count, len(self._val)))))
        return {"reconstruction": contact_sheet([mesh_row(self.vae, latents, self.config.sample_resolution)])}

    def _latents(self, items: Batch) -> Tensor:
        """Mean latents (B,N,C) of shapes."""
        return self.vae.to_latents(self.vae.encode(items["surface"], items.get("sharp")).mean)

    def _fixed(self, indices: Sequence[int]) -> Batch:
        """Validation shapes with the same points every time: near queries, then volume queries."""
        shapes, config, items = self._val, self.config, []
        for index in indices:
            id, rng = shapes.ids[index], item_generator(0, index)
            fixed = field_queries(shapes, id, config.val_queries, config.val_queries, rng)
            items.append(VAEItems(shapes, config).draw(id, rng) | fixed)
        device = next(self.vae.parameters()).device
        return {name: tensor.to(device) for name, tensor in default_collate(items).items()}
