"""FLOPs that a transformer really executes, whatever wraps its blocks.

`metered` counts every matrix product: exact for anything, but a batch of one takes half as long again. `counted` counts
calls of whole blocks at no cost: for caches that either run a block or do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from elastic3d.elastic.cost import dense_flops
from elastic3d.elastic.family import ModelAdapter

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
    """While it lasts, every forward pass of `transformer` is counted; nothing else is."""
    meter = FlopMeter()

    def inside(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with meter:
                return forward(*args, **kwargs)

        return wrapped

    with _wrapped(transformer, inside):
        yield meter


@contextmanager
def counted(transformer: nn.Module, adapter: ModelAdapter, lengths: Sequence[int]) -> Iterator[FlopCount]:
    """While it lasts, calls of the blocks are counted; a cache must be put around them after that.

    Args:
        lengths: tokens of the streams; the count's FLOPs are those of one sample with so many.
    """
    count = FlopCount(dense_flops(transformer, adapter, lengths))

    def adding(flops: int, is_first: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def inside(forward: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                count.total += flops
                count.passes += is_first
                return forward(*args, **kwargs)

            return functools.update_wrapper(wrapped, forward)  # caches look at a block's signature

        return inside

    with ExitStack() as stack:
        for number, (name, block_adapter) in enumerate(adapter.block_lists(transformer)):
            own = lengths if len(block_adapter.stream_names) == len(lengths) else [sum(lengths)]
            for index, block in enumerate(transformer.get_submodule(name).children()):
                flops, is_first = block_adapter.flops(block, own).dense, number == index == 0
                stack.enter_context(_wrapped(block, adding(flops, is_first)))
        yield count


@dataclass
class FlopCount:
    """FLOPs of one sample so far, and passes of the model, which all run its first block."""

    dense_pass: int
    total: int = 0
    passes: int = 0

    @property
    def share(self) -> float:
        """Of what the dense passes would have spent."""
        return self.total / (self.passes * self.dense_pass)


@contextmanager
def _wrapped(module: nn.Module, inside: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While it lasts, the module's forward is another one."""
    own = module.__dict__
    before = own.get("forward")
    own["forward"] = inside(module.forward)
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before
