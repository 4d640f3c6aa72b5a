"""How far an image is from those that a model was trained on, told before anything is computed for it.

The mean of an image's condition tokens is compared with a Gaussian of those of the training images: the first principal
components each by its own variance, all that is left by one (probabilistic PCA, Tipping and Bishop 1999). The result is
the Mahalanobis distance a channel, about 1 for a training image. `familiarity.safetensors` lies beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elastic3d.errors import UserError
from elastic3d.utils.files import printable
from elastic3d.utils.tensors import read_weights, save_weights

FAMILIARITY_NAME = "familiarity.safetensors"
_PARTS = ("mean", "components", "scale", "threshold")


@dataclass(frozen=True)
class Familiarity:
    """Statistics of training images, of encoders with Cc channels.

    mean (Cc,), components (K,Cc) orthonormal, scale (K+1,): standard deviations along the components, then of the rest;
    threshold (1,): the distance from which an image is called unfamiliar.
    """

    mean: Tensor
    components: Tensor
    scale: Tensor
    threshold: Tensor

    @classmethod
    def fit(cls, features: Tensor, components: int) -> Familiarity:
        """Of features (T,Cc) of training images; no image is unfamiliar yet.

        Raises:
            ValueError: fewer images than components need, or as many components as channels.
        """
        count, channels = features.shape
        if not 0 < components < min(count - 1, channels):
            raise ValueError(
                f"components is {components}, expected 1 to {min(count - 1, channels) - 1} of {count} images of"
                f" {channels} channels"
            )
        features = features.double()
        mean = features.mean(dim=0)
        _, sizes, directions = torch.linalg.svd(features - mean, full_matrices=False)
        variances = sizes.square() / (count - 1)
        rest = variances[components:].sum() / (channels - components)
        scale = torch.cat([variances[:components], rest[None]]).sqrt()
        if not scale.min() > 0:
            raise ValueError(f"the features of {count} images lie in fewer than {components} dimensions")
        parts = (mean, directions[:components], scale, torch.tensor([torch.inf]))
        return cls(*(part.float() for part in parts))

    def distance(self, tokens: Tensor) -> Tensor:
        """Condition tokens (B,M,Cc) -> distances (B,)."""
        offset = image_feature(tokens).to(self.mean) - self.mean
        along = offset @ self.components.T
        rest = (offset.square().sum(dim=1) - along.square().sum(dim=1)).clamp_min(0)
        squared = (along / self.scale[:-1]).square().sum(dim=1) + rest / self.scale[-1] ** 2
        return (squared / len(self.mean)).sqrt()

    def warning(self, distance: float) -> str | None:
        """One sentence for an image at or beyond the threshold; None for a familiar one."""
        if distance < float(self.threshold):
            return None
        return (
            f"the image is unlike those that the model was trained on (distance {distance:.2f}, usually below"
            f" {float(self.threshold):.2f}): its mesh may be of something else"
        )

    def save(self, folder: Path) -> None:
        """Write the file that `load_familiarity` reads."""
        save_weights({name: getattr(self, name) for name in _PARTS}, folder / FAMILIARITY_NAME)


def image_feature(tokens: Tensor) -> Tensor:
    """Condition tokens (B,M,Cc) -> what images are compared by (B,Cc)."""
    return tokens.float().mean(dim=1)


def load_familiarity(folder: Path, channels: int) -> Familiarity | None:
    """The statistics in a model's folder; None where there are none.

    Raises:
        UserError: naming the file: it is broken, or of an encoder with other than `channels`.
    """
    path = folder / FAMILIARITY_NAME
    if not path.exists():
        return None
    found = Familiarity(*(read_weights(path, _PARTS)[name].float() for name in _PARTS))
    count = len(found.components)
    for name, wanted in (
        ("mean", (channels,)), ("components", (count, channels)), ("scale", (count + 1,)), ("threshold", (1,)),
    ):  # fmt: skip
        shape = tuple(getattr(found, name).shape)
        if shape != wanted:
            raise UserError(f"{printable(path)}: {name} has shape {shape}, expected {wanted}")
    for name in _PARTS[:-1]:
        if not getattr(found, name).isfinite().all():
            raise UserError(f"{printable(path)}: {name} has values that are not finite")
    if not found.scale.min() > 0 or not float(found.threshold) > 0:
        raise UserError(f"{printable(path)}: scale and threshold have values of 0 or less, expected above 0")
    return found
