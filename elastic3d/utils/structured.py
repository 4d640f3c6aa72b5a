"""JSON and YAML files read by one function each that knows what it expects, and says what is wrong in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from elastic3d.errors import UserError
from elastic3d.utils.files import atomic_path, printable, read_text

MAX_JSON_BYTES = 1 << 28
MAX_YAML_BYTES = 1 << 20

Shape = Any
"""What a value has to look like: a type (`float` takes integers too, `object` anything), `Number(low, high)`,
`Maybe(shape)` (null or that), `[shape]` (a list of such), `{str: shape}` (an object of such under any names), or
`{"name": shape}` (an object with these names, and others)."""


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`, whole where `whole` says so."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False


@dataclass(frozen=True)
class Maybe:
    """null, or what `shape` says."""

    shape: Shape


def load_json(path: Path, shape: Shape = dict, finite: bool = True) -> Any:
    """The value in a JSON file.

    Args:
        finite: refuse NaN and infinite numbers.

    Raises:
        UserError: naming the file and the place in it: it is missing, broken, nested too deeply, holds a number that
            is not finite, or is not of that shape.
    """
    return parse_json(read_text(path, "a JSON file", MAX_JSON_BYTES), shape, printable(path), finite)


def parse_json(text: str, shape: Shape, source: str, finite: bool = True) -> Any:
    """The JSON value in a text; `source` names it in errors, which are those of `load_json`."""
    try:
        value = json.loads(text, **(_FINITE if finite else {}))
    except RecursionError as error:
        raise UserError(f"{source} is broken: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{source} is broken: {error}") from error
    check_shape(value, shape, source)
    return value


def load_json_lines(
    path: Path, shape: Shape = dict, torn: bool = False, finite: bool = True
) -> Iterator[Any]:
    """The value of each line of a JSON Lines file that has text; errors as in `load_json`, naming the line.

    Args:
        torn: a last line without its end, as a kill leaves it, is left out.
    """
    lines = read_text(path, "a JSON Lines file", MAX_JSON_BYTES).split("\n")
    for number, line in enumerate(lines[:-1] if torn else lines, 1):
        if line.strip():
            yield parse_json(line, shape, f"{printable(path)}, line {number},", finite)


def save_json(values: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object, whole or not at all. ValueError for a number that is not finite."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. UserError if it is missing, broken or something else."""
    value = parse_yaml(read_text(path, "a YAML file", MAX_YAML_BYTES), printable(path))
    if not isinstance(value, dict):
        raise UserError(f"{printable(path)} holds {_kind(value)}, expected a mapping")
    return value


def parse_yaml(text: str, source: str = "the value") -> Any:
    """The value of a YAML text. UserError naming `source` if it is broken, or an alias would multiply its size."""
    try:
        return yaml.load(text, Loader=_BoundedLoader)  # noqa: S506 (a safe loader)
    except RecursionError as error:
        raise UserError(f"{source} is broken: it is nested too deeply") from error
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
    ) as error:  # ValueError: a date that is none; TypeError: its key
        raise UserError(f"{source} is broken: {' '.join(str(error).split())}") from error


class _BoundedLoader(yaml.SafeLoader):
    """Aliases stand for scalars only: of lists of lists, a few lines would become millions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(
                None, None, "an alias of a list or mapping is not supported", mark
            )
        return node


def check_shape(value: Any, shape: Shape, where: str) -> None:
    """UserError naming `where` and the place in it unless a JSON value looks as `shape` says."""
    if isinstance(shape, Maybe):
        if value is not None:
            check_shape(value, shape.shape, where)
    elif isinstance(shape, Number):
        is_number = isinstance(value, int if shape.whole else (int, float)) and not isinstance(value, bool)
        if not is_number or not shape.low <= value <= shape.high:
            raise UserError(f"{where} is {_shown(value)}, expected {_expected_number(shape)}")
    elif isinstance(shape, Mapping) and str in shape:
        _expect(value, dict, where)
        for name, item in value.items():
            check_shape(item, shape[str], f"{where}: {name}")
    elif isinstance(shape, Mapping):
        _expect(value, dict, where)
        for name, inner in shape.items():
            if name not in value:
                raise UserError(f"{where} has no {name!r}, expected {', '.join(shape)}")
            check_shape(value[name], inner, f"{where}: {name}")
    elif isinstance(shape, Sequence):
        _expect(value, list, where)
        for number, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{number}]")
    else:
        _expect(value, shape, where)


def _expect(value: Any, kind: type, where: str) -> None:
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind in (int, float)):
        raise UserError(f"{where} is {_shown(value)}, expected {_NAMES.get(kind, kind.__name__)}")


_NAMES = {
    dict: "a JSON object",
    list: "a list",
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


def _kind(value: Any) -> str:
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def _shown(value: Any) -> str:
    """A value in an error message: itself where it is short, else its kind."""
    if isinstance(value, (dict, list)):
        return _kind(value)
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _expected_number(shape: Number) -> str:
    kind = "an integer" if shape.whole else "a number"
    if shape.low == -math.inf and shape.high == math.inf:
        return kind
    if shape.high == math.inf:
        return f"{kind} of at least {shape.low:g}"
    return f"{kind} from {shape.low:g} to {shape.high:g}"


def _not_finite(text: str) -> float:
    raise ValueError(f"it holds {text}, expected finite numbers")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_finite(text)


_FINITE: dict[str, Any] = {"parse_constant": _not_finite, "parse_float": _finite}
