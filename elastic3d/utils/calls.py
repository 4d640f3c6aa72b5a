"""How calls run: one thread after the other, or left as they are by torch.compile."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


_LOCKS: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()


def turn(model: nn.Module) -> AbstractContextManager[Any]:
    """The lock of a model, which one thread may take several times: whoever generates with the model holds it."""
    return _LOCKS.setdefault(model, threading.RLock())


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
