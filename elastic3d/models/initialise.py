"""Building a model whose every weight will be read from a file: no time for random ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLS = {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, nn.init.normal_, nn.init.uniform_}
_FILLS |= {nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_}


class _Zeros(TorchFunctionMode):
    """Random fills give zeros. Not whatever was in memory: `trunc_normal_` draws again until all is in range."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FILLS:
            return (args[0] if args else kwargs["tensor"]).detach().zero_()
        if func is torch.randn:
            kwargs.pop("generator", None)
            return torch.zeros(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def without_random_weights() -> Iterator[None]:
    """While it lasts, random weights are zeros, for a few microseconds each. Constants and buffers are set."""
    with _Zeros():
        yield
