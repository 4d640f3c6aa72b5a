"""What the user types after `key=`, as a value of the option's type."""

from __future__ import annotations

import os
import re
import types
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml

from elastic3d.utils.structured import parse_yaml

_EXPECTED = {int: "an integer", float: "a number", bool: "true or false"}


def parse_value(text: str, kind: Any) -> Any:
    """`text` as typed by the user, as a value of the type `kind`; strings and paths stay literal.

    Lists: `[a, b]`, or one bare element, or `1,2,3` where the elements are not strings. `null` gives None
    where the option allows it.

    Raises:
        ValueError: the text does not fit the type.
    """
    kind, optional = optional_type(kind)
    if optional and text == "null":
        return None
    if kind in (str, Path):
        return literal(os.path.expanduser(text))  # noqa: PTH111 (Path would drop a trailing slash)
    if isinstance(kind, type) and issubclass(kind, Enum):
        matches = [member for member in kind if text in (member.name, str(member.value))]
        if not matches:
            raise ValueError(text)
        return matches[0]
    if get_origin(kind) in (list, tuple):
        element = (get_args(kind) or (str,))[0]
        return [parse_value(item, element) for item in _split(text, element)]
    if kind in (int, float):
        return kind(text)
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    return _literals(parse_yaml(text))


def _split(text: str, element: Any) -> list[str]:
    if text.startswith("[") and text.endswith("]"):
        try:
            items = yaml.load(text, Loader=yaml.BaseLoader)  # every scalar stays text  # noqa: S506
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(text) from error
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return items
        raise ValueError(text)
    return [text] if element in (str, Path) else text.split(",")


def literal(text: str) -> str:
    """Protect `${` from being taken for an OmegaConf interpolation."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def _literals(value: Any) -> Any:
    """`literal` paths in a mapping or list that came from YAML."""
    if isinstance(value, dict):
        return {key: _literals(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literals(item) for item in value]
    return literal(os.path.expanduser(value)) if isinstance(value, str) else value  # noqa: PTH111


def shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def optional_type(kind: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); anything else -> (itself, False)."""
    if get_origin(kind) in (Union, types.UnionType):
        rest = [part for part in get_args(kind) if part is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return kind, False


def expected(kind: Any) -> str:
    kind, optional = optional_type(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        text = "one of " + ", ".join(member.name for member in kind)
    elif get_origin(kind) in (list, tuple):
        text = "a list such as [a, b], each element " + expected((get_args(kind) or (str,))[0])
    elif get_origin(kind) is dict:
        text = "a mapping such as {name: value}, each value " + expected(get_args(kind)[1])
    else:
        text = _EXPECTED.get(kind, "text" if kind in (str, Path) else "a value of another type")
    return f"{text} or null" if optional else text
