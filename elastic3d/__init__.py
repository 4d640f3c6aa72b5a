"""elastic3d: latent 3D generation with elastic diffusion transformers.

from elastic3d import ImageTo3DPipeline

mesh = ImageTo3DPipeline.from_pretrained("shape-small")("chair.png").mesh
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["ImageTo3DPipeline", "TextToImagePipeline", "disable", "enable", "evaluate_pair"]

# Imported when they are first asked for, so that `import elastic3d` is fast.
_MODULES = {
    "ImageTo3DPipeline": "elastic3d.pipelines.image_to_3d",
    "TextToImagePipeline": "elastic3d.pipelines.text_to_image",
    "disable": "elastic3d.pipelines.training_free",
    "enable": "elastic3d.pipelines.training_free",
    "evaluate_pair": "elastic3d.evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


# Idle OpenMP threads spin for a moment, then sleep. Spinning on, as by default, they take the cores from each other
# where anything else runs. Asleep sooner, they are woken for every operation, and two threads are slower than one
# (reports/experiments/end-to-end.md). OpenMP reads this once, when PyTorch is imported.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    _torch = sys.modules.get("torch")
    if _torch is None:
        os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2500"}
    elif _torch.get_num_threads() > 1 and not _torch.cuda.is_available():
        import warnings

        warnings.warn(
            "torch was imported before elastic3d: its idle threads spin, which is slow where other programs run on this"
            " machine. Import elastic3d first, or set OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2500.",
            RuntimeWarning,
            stacklevel=2,
        )
