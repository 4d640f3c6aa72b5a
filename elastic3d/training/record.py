"""The configuration that a checkpoint or `training.json` holds, as today's dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from elastic3d.errors import UserError
from elastic3d.utils.options import from_dict, hints

Config = TypeVar("Config")

_OLD_GROUPS = {"updates": "few_step"}
_OLD_NAMES = {"min_calls": "min_nfe", "max_calls": "max_nfe"}
_OLD_VALUES = {("stage", "updates"): "few_step", ("gate", "damage"): "predicted_error"}


def read_record(values: Any, config_class: type[Config], source: Path | str) -> Config:
    """A saved configuration; UserError where it is none, or has a value that is not allowed.

    Records of earlier versions hold the options of all stages, and some that are gone since: both are left out.
    """
    return from_dict(config_class, _known(config_class, upgraded(values, source)), str(source))


def upgraded(values: Any, source: Path | str) -> dict[str, Any]:
    """A saved configuration with the keys that its stage has today."""
    if not isinstance(values, Mapping):
        raise UserError(f"{source} has no configuration of a training")
    found = _renamed(values)
    image = found.get("image")
    if found.get("stage") == "router" and isinstance(image, Mapping) and image.get("backbone"):
        found["stage"] = "image_router"  # was told from the routers of shapes by its backbone alone
    return found


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found[_OLD_GROUPS.get(name, name)] = _renamed(value)
        else:
            found[_OLD_NAMES.get(name, name)] = _OLD_VALUES.get((name, str(value)), value)
    return found


def _known(config_class: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    kinds = hints(config_class)
    values = getattr(config_class, "upgraded", dict)(values)
    return {
        name: _known(kinds[name], value) if _is_nested(kinds[name], value) else value
        for name, value in values.items()
        if name in kinds
    }


def _is_nested(kind: Any, value: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping)
