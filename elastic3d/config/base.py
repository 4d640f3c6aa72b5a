"""What every configuration dataclass shares: documented fields, device and dtype choices, range checks."""

from __future__ import annotations

from dataclasses import field
from enum import Enum
from typing import Any


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


def option(default: Any, help: str) -> Any:
    """A dataclass field with its one-line meaning, shown by `--help`. Lists, dicts and dataclasses are copied."""
    if callable(default) and isinstance(default, type):
        return field(default_factory=default, metadata={"help": help})
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless `low <= value <= high` (NaN fails too)."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}, expected a value from {low} to {high}")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, choices))}")
