"""Which device and number format a model runs in."""

from __future__ import annotations

from enum import Enum


class DeviceChoice(Enum):
    """Where the model runs; `auto` takes CUDA, then MPS, then the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class DTypeChoice(Enum):
    """Number format of weights and activations; `auto` takes bf16 where it is fast and fp32 elsewhere."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
