"""LPIPS (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features"), where its weights are
installed.

The `lpips` package would download the weights of its backbone on first use; this module never lets it, so
that a run without network either has the metric or says what is missing.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elastic3d.errors import UserError
from elastic3d.evaluation.views import Perceptual

BACKBONE_FILE = "alexnet-owt-7be5be79.pth"


@functools.cache
def load_lpips() -> Perceptual:
    """The AlexNet variant of LPIPS, version 0.1, as a distance of two images (H, W, 3) in [0, 1].

    Raises:
        UserError: the `lpips` package or the backbone's weights are not installed.
    """
    import torch

    try:
        import lpips
    except ImportError as error:
        raise UserError("lpips=true needs the lpips package: pip install lpips torchvision") from error
    weights = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE_FILE
    if not weights.is_file():
        raise UserError(f"lpips=true needs torchvision's AlexNet weights at {weights}, which is no file")
    network = lpips.LPIPS(net="alex", verbose=False).eval()

    def distance(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
        images = [
            torch.from_numpy(np.moveaxis(i, -1, 0).copy()).float()[None] * 2 - 1 for i in (first, second)
        ]
        with torch.inference_mode():
            return float(network(*images))

    return distance
