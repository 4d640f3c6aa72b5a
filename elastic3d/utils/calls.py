"""How calls run: one thread after the other, or left as they are by torch.compile."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


class Turn:
    """A lock that one thread may take several times: whoever generates with a model holds the model's. A copy of the
    model has a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    @classmethod
    def of(cls, model: nn.Module) -> Turn:
        """The lock of a model."""
        return model.__dict__.setdefault("_turn", cls())

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


def stays_eager(function: Function) -> Function:
    """As `torch.compiler.disable(recursive=False)`, which imports the compiler (half a second) at decoration."""
    kept: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # so nobody compiles
            return function(*args, **kwargs)
        if not kept:
            kept.append(torch.compiler.disable(function, recursive=False))
        return kept[0](*args, **kwargs)

    return call  # type: ignore[return-value]
