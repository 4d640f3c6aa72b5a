"""FLOPs that a transformer really executes, whatever wraps its blocks: every matrix product is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from elastic3d.benchmark.forecasting import Forward, replaced

# not in PyTorch's registry: attention as a CPU runs it
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass
class FlopMeter:
    """FLOPs so far."""

    total: int = 0


def _attention_flops(query: Any, key: Any, value: Any, *more: Any, **options: Any) -> int:
    """Of three shapes."""
    return sdpa_flop_count(query, key, value)


@contextmanager
def metered(transformer: nn.Module) -> Iterator[FlopMeter]:
    """While it lasts, every forward pass of `transformer` is counted; nothing else is."""
    meter = FlopMeter()

    def inside(forward: Forward) -> Forward:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            own = {_CPU_ATTENTION: _attention_flops}
            with FlopCounterMode(display=False, custom_mapping=own) as counter:
                out = forward(*args, **kwargs)
            meter.total += counter.get_total_flops()
            return out

        return wrapped

    with replaced(transformer, inside):
        yield meter
