"""FLOPs that a transformer really executes, whatever wraps its blocks: every matrix product is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from elastic3d.benchmark.forecasting import Forward, replaced

# not in PyTorch's registry: attention as a CPU runs it
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class FlopMeter(TorchDispatchMode):
    """Counts the matrix products that are called while it is entered, in `total`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and add its FLOPs if it is a matrix product."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet is _CPU_ATTENTION:
            self.total += sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


@contextmanager
def metered(transformer: nn.Module) -> Iterator[FlopMeter]:
    """While it lasts, every forward pass of `transformer` is counted; nothing else is. A batch of one takes half as
    long again."""
    meter = FlopMeter()

    def inside(forward: Forward) -> Forward:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with meter:
                return forward(*args, **kwargs)

        return wrapped

    with replaced(transformer, inside):
        yield meter
