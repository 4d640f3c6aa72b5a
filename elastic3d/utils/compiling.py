"""What `torch.compile` leaves alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


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
