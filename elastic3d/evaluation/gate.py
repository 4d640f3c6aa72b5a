"""Bounds on a report's means, for regression checks in continuous integration."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic3d.errors import UserError
from elastic3d.utils.structured import load_yaml

Gate = dict[str, dict[str, float]]


def load_gate(path: Path) -> Gate:
    """Read bounds such as `f_score@0.02: {min: 0.95}` from a YAML file.

    Raises:
        UserError: the file can't be read, or does not map metrics to `min` and `max` numbers.
    """
    try:
        data = load_yaml(path)
    except UserError as error:
        raise UserError(f"can't read the gate {path} ({error})") from error
    if not data:
        raise UserError(
            f"the gate {path} has no bounds, expected lines such as 'f_score@0.02: {{min: 0.95}}'"
        )
    for metric, bounds in data.items():
        known = isinstance(bounds, dict) and bounds and set(bounds) <= {"min", "max"}
        if not known or not all(_is_number(bound) for bound in bounds.values()):
            raise UserError(
                f"the gate {path} has {metric}: {bounds}, expected {{min: number}} or {{max: number}}"
            )
    return data


def violations(gate: Gate, means: Mapping[str, float]) -> list[str]:
    """One line for each bound that a mean breaks; a metric without a mean breaks its bounds too."""
    lines = []
    for metric, bounds in gate.items():
        if metric not in means:
            close = difflib.get_close_matches(str(metric), means, n=3)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            lines.append(f"{metric}: not measured{hint}")
            continue
        mean = means[metric]
        if "min" in bounds and mean < bounds["min"]:
            lines.append(f"{metric}: {mean:.6g} is below min {bounds['min']:g}")
        if "max" in bounds and mean > bounds["max"]:
            lines.append(f"{metric}: {mean:.6g} is above max {bounds['max']:g}")
    return lines


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
