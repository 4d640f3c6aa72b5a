"""Configuration dataclasses to and from plain JSON values, with Enums by name; strict in both directions."""

from __future__ import annotations

import difflib
import types
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from elastic3d.errors import UserError

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass instance as JSON values: Enums become their names, paths become strings."""
    return {item.name: _plain(getattr(config, item.name)) for item in fields(config)}


def from_dict(config_class: type[Config], values: dict[str, Any], source: str) -> Config:
    """The dataclass that `to_dict` described; fields that are left out take their defaults.

    Args:
        source: where the values come from, for error messages.

    Raises:
        UserError: an unknown field, a value of the wrong type or out of range.
    """
    hints = get_type_hints(config_class)
    known = [item.name for item in fields(config_class)]  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"{source}: unknown field {name!r} of {config_class.__name__}{hint}")
    typed = {name: _typed(value, hints[name], f"{source}: {name}") for name, value in values.items()}
    try:
        return config_class(**typed)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _typed(value: Any, hint: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        parts = get_args(hint)
        if value is None and type(None) in parts:
            return None
        hint = next(part for part in parts if part is not type(None))
        origin = get_origin(hint)
    if origin in (list, tuple) and isinstance(value, list):
        return [_typed(item, get_args(hint)[0], where) for item in value]
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        if isinstance(value, str) and value in hint.__members__:
            return hint[value]
        raise UserError(f"{where} is {value!r}, expected one of {', '.join(hint.__members__)}")
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int and abs(value) < 1 << 1000:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise UserError(f"{where} is {value!r}, expected {getattr(hint, '__name__', hint)}")
