"""How differently a network sees two images: LPIPS without weights that were fitted to people's judgements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def feature_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Distances (P,) of images by their feature maps, each (P,C,h,w), a map for each scale.

    At every position the features become a vector of length one; the squared distance of the two vectors is averaged
    over positions, then over scales (Zhang et al. 2018, equation 1, all weights 1). 0 for equal images.

    Raises:
        ValueError: not the same maps on both sides, or none.
    """
    shapes = [[tuple(each.shape) for each in maps] for maps in (first, second)]
    if shapes[0] != shapes[1] or not first:
        raise ValueError(f"maps have shapes {shapes[0]} and {shapes[1]}, expected the same, and at least one")
    scales = []
    for a, b in zip(first, second, strict=True):
        a, b = (torch.nn.functional.normalize(each.float(), dim=1) for each in (a, b))
        scales.append((a - b).square().sum(dim=1).mean(dim=(1, 2)))
    return torch.stack(scales).mean(dim=0)
