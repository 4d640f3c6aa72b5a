"""Building a model whose every weight will be read from a file: no time for random ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLS = {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, nn.init.trunc_normal_, nn.init.normal_}
_FILLS |= {nn.init.uniform_, nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_}


class _Skip(TorchFunctionMode):
    """Random fills leave their tensor as it was allocated."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            return torch.empty(
                *args, **{name: value for name, value in kwargs.items() if name != "generator"}
            )
        return func(*args, **kwargs)


@contextmanager
def without_random_weights() -> Iterator[None]:
    """While it lasts, random initialisation is skipped: weights hold anything. Constants and buffers are set."""
    with _Skip():
        yield
