"""Training of the shape VAE."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.config.train import FieldLoss, TrainConfig, VAEStageConfig
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.training.datasets import (
    Batch,
    VAEItems,
    item_generator,
    open_split,
    pick,
    record_of_shapes,
    stack,
)
from elastic3d.training.samples import contact_sheet, field_meshes, mesh_picture

STORED = ("surface", "sharp", "near", "volume")


class VAEObjective(nn.Module):
    """Field loss + KL of a batch of shapes."""

    def __init__(self, vae: ShapeVAE, config: VAEStageConfig) -> None:
        super().__init__()
        self.vae, self.config = vae, config

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch of `VAEItems` -> loss and what it is made of. `noise` (B,N,C) draws the latents."""
        posterior = self.vae.encode(batch["surface"], batch.get("sharp"), batch.get("offsets"))
        raw = posterior.mean + batch["noise"] * (0.5 * posterior.logvar).exp()
        field = self.vae.query(batch["points"], self.vae.decode(self.vae.to_latents(raw)))
        field_loss = self.field_loss(field, batch["distance"])
        kl = posterior.kl().mean()
        inside = batch["distance"] > 0
        accuracy = ((field > 0) == inside).float().mean()
        values = {"field": field_loss.detach(), "kl": kl.detach(), "accuracy": accuracy}
        return field_loss + self.config.kl_weight * kl, values

    def field_loss(self, field: Tensor, distance: Tensor) -> Tensor:
        """Mean loss of the field (B,Q) at points of signed distance (B,Q), both positive inside.

        Occupancy: binary cross-entropy against sigmoid(distance / softness), the soft margin of the sign;
        less the target's own entropy, so that a perfect field has loss 0. Or L1 to the distance, truncated
        and divided by the truncation.
        """
        config = self.config
        if config.loss is FieldLoss.tsdf:
            return nn.functional.l1_loss(field, (distance / config.truncation).clamp(-1.0, 1.0))
        target = torch.sigmoid(distance / config.softness)
        entropy = nn.functional.binary_cross_entropy(target, target)
        return nn.functional.binary_cross_entropy_with_logits(field, target) - entropy

    def logits(self, field: Tensor) -> Tensor:
        """The field as logits of being inside, as soft as occupancy: it is so already, or the distance is."""
        config = self.config
        return field if config.loss is FieldLoss.occupancy else field * (config.truncation / config.softness)


class VAEStage:
    """What the loop needs to train a `ShapeVAE` on prepared shapes."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config.vae
        self.vae = ShapeVAE(config.vae.model)
        self.objective: nn.Module = VAEObjective(self.vae, config.vae)
        self._train = open_split(config.data, config.data.train, STORED, config.data.limit)
        self._val = open_split(config.data, config.data.val, STORED, config.vae.val_shapes)
        self._items = VAEItems(self._train, config.vae)

    def items(self) -> VAEItems:
        """Training shapes, shuffled and augmented."""
        return self._items

    def rate_factor(self, name: str) -> float:
        """Every parameter learns at the run's rate."""
        return 1.0

    def record(self) -> dict[str, int]:
        """What the run trains on."""
        return record_of_shapes(self._train, self._val)

    def validate(self, batch: int = 8) -> dict[str, float]:
        """Volume IoU and near-surface accuracy of validation shapes at fixed points, from mean latents."""
        device = next(self.vae.parameters()).device
        rows: list[list[float]] = []
        for first in range(0, len(self._val), batch):
            items = [self._fixed(i) for i in range(first, min(first + batch, len(self._val)))]
            on_device = {name: tensor.to(device) for name, tensor in stack(items).items()}
            field = self._field(on_device)
            loss = VAEObjective(self.vae, self.config).field_loss(field, on_device["distance"])
            said, true = field > 0, on_device["distance"] > 0
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
        device = next(self.vae.parameters()).device
        items = stack([self._fixed(i) for i in range(min(count, len(self._val)))])
        posterior = self.vae.encode(items["surface"].to(device), _to(items.get("sharp"), device))
        latents = self.vae.to_latents(posterior.mean)
        meshes = field_meshes(self.vae, latents, self.config.sample_resolution)
        return {"reconstruction": contact_sheet([[mesh_picture(mesh) for mesh in meshes]])}

    def _field(self, batch: Batch) -> Tensor:
        posterior = self.vae.encode(batch["surface"], batch.get("sharp"))
        tokens = self.vae.decode(self.vae.to_latents(posterior.mean))
        return self.vae.query(batch["points"], tokens)

    def _fixed(self, index: int) -> Batch:
        """A validation shape with the same points every time: near queries, then volume queries."""
        shapes, config = self._val, self.config
        id, rng = shapes.ids[index], item_generator(0, index)
        queries = torch.cat(
            [pick(shapes.read(id, kind), config.val_queries, rng) for kind in ("near", "volume")]
        )
        item = VAEItems(shapes, config).draw(id, rng)
        return {**item, "points": queries[:, :3], "distance": queries[:, 3]}


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
