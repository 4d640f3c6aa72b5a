"""What EfficientNet-Lite0 sees in pictures."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elastic3d.models.image_encoder import EfficientNetLite
from elastic3d.models.options import ImageEncoderConfig

BATCH = 32


class PictureFeatures:
    """The frozen network at one size; smaller pictures are enlarged, all in the same way."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.network = EfficientNetLite(ImageEncoderConfig(image_size=size)).to(device)

    @torch.no_grad()
    def maps(self, pictures: NDArray[np.uint8]) -> tuple[list[Tensor], NDArray[np.float32]]:
        """Pictures (P,H,W,3) uint8 -> a map (P,C,h,w) f16 for each resolution, and pooled features (P,1280)."""
        parts: list[list[Tensor]] = []
        pooled = []
        for start in range(0, len(pictures), BATCH):
            maps, flat = self.network.pyramid(self._prepared(pictures[start : start + BATCH]))
            parts.append([each.half().cpu() for each in maps])
            pooled.append(flat.cpu().numpy())
        return [torch.cat(scale) for scale in zip(*parts, strict=True)], np.concatenate(pooled)

    @torch.no_grad()
    def pooled(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pictures (P,H,W,3) uint8 -> (P,1280)."""
        parts = [
            self.network.pooled(self._prepared(pictures[start : start + BATCH])).cpu().numpy()
            for start in range(0, len(pictures), BATCH)
        ]
        return np.concatenate(parts)

    def _prepared(self, pictures: NDArray[np.uint8]) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
        x = x.to(self.network.mean.device)
        if x.shape[-2:] == (self.size, self.size):
            return x
        size = (self.size, self.size)
        return torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)
