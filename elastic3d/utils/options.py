"""Configuration dataclasses: fields with a meaning and a range, checked in one place wherever values come from.

    @dataclass(kw_only=True)
    class Config(Options):
        width: int = option(256, "transformer width (D)", ge=1, le=65536)

A value is checked when the object is made: types, ranges (NaN and infinity are in none), choices, lengths of lists, and
then `check`, the rules between fields. The command line, a YAML file and a saved `config.json` all come through
`from_dict`, which puts the field's full name (`dit.model.width`) and the file into the error.
"""

from __future__ import annotations

import difflib
import functools
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from elastic3d.errors import UserError
from elastic3d.utils.old_names import GROUPED, KEPT, OPTIONS, VALUES

Config = TypeVar("Config")
MAX_TEXT = 4096  # characters of a text or path, which is also the longest path of Linux
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


@dataclass(frozen=True)
class Bounds:
    """What a value may be.

    ge, gt, le, lt, multiple_of, choices: of a number, or of every number in a list; zero: 0 is fine besides;
    lengths: fewest and most elements of a list, or characters of a text; unique, ascending: of a list.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    multiple_of: int | None = None
    choices: tuple[object, ...] = ()
    zero: bool = False
    lengths: tuple[int, int] | None = None
    unique: bool = False
    ascending: bool = False

    def allows(self, value: Any) -> bool:
        """Whether a number is finite and in range; anything else, whether it is one of the choices."""
        if self.choices:
            return value in self.choices
        if not _is(value, float) or (self.zero and value == 0):
            return True
        return (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def __str__(self) -> str:
        """`1 to 1000`, `above 0 and at most 1`, `one of 0, 4`; empty where everything finite is allowed."""
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        low = [f"at least {_number(self.ge)}"] if self.ge is not None else []
        low += [f"above {_number(self.gt)}"] if self.gt is not None else []
        high = [f"at most {_number(self.le)}"] if self.le is not None else []
        high += [f"below {_number(self.lt)}"] if self.lt is not None else []
        text = " and ".join([*low, *high])
        if self.ge is not None and self.le is not None:
            text = f"{_number(self.ge)} to {_number(self.le)}"
        if self.multiple_of is not None:
            text += f"{', ' if text else ''}a multiple of {self.multiple_of}"
        return f"0 or {text}" if self.zero else text


def option(default: Any, help: str, *, advanced: bool = False, internal: bool = False, **bounds: Any) -> Any:
    """A dataclass field with its one-line meaning and what it may be. Lists, dicts and dataclasses are copied.

    Args:
        default: a value, or a dataclass to make one of; `...` for an option that has to be given.
        advanced: seldom changed; shown by `--help all` alone.
        internal: saved and loaded, but no option of a command line.
        bounds: those of `Bounds`.
    """
    metadata = {"help": help, "bounds": Bounds(**bounds), "advanced": advanced, "internal": internal}
    if default is ...:
        return field(metadata=metadata)
    if isinstance(default, type) and is_dataclass(default):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Options:
    """Base of configuration dataclasses: an object that exists has values that are allowed, or there is a UserError."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            kind, bounds = hints(type(self))[item.name], item.metadata.get("bounds", Bounds())
            check_value(item.name, getattr(self, item.name), kind, bounds)
        try:
            self.check()
        except ValueError as error:
            raise UserError(str(error)) from error

    def check(self) -> None:
        """Raise ValueError for values that are allowed each, but not together."""


def check_value(name: str, value: Any, kind: Any, bounds: Bounds = Bounds()) -> None:  # noqa: B008 (frozen)
    """Raise UserError unless `value` is of the type `kind` and within bounds."""
    check_type(name, value, kind)
    if isinstance(value, (list, tuple)):
        _check_list(name, value, bounds)
    elif isinstance(value, (str, Path)) and not bounds.choices:
        low, high = bounds.lengths or (0, MAX_TEXT)
        if not low <= len(str(value)) <= high:
            raise UserError(f"{name} has {len(str(value))} characters, expected {low} to {high}")
    elif value is not None and not bounds.allows(value):
        raise UserError(f"{name} is {shown(value)}, expected {_wanted(bounds)}")


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raise UserError unless `value` is of the type `kind`, and what it holds of the types that `kind` names."""
    fitting = next((each for each in alternatives(kind) if _is(value, each)), None)
    if fitting is None:
        raise UserError(f"{name} is {shown(value)}, expected {expected(kind)}")
    if arguments := get_args(fitting):
        for item in value.values() if isinstance(value, dict) else value:
            check_type(name, item, arguments[-1])


def _check_list(name: str, value: Any, bounds: Bounds) -> None:
    for item in value:
        if not bounds.allows(item):
            raise UserError(f"{name} has {shown(item)}, expected {_wanted(bounds)}")
    low, high = bounds.lengths or (0, 100_000)
    if not low <= len(value) <= high:
        raise UserError(f"{name} has {len(value)} values, expected {low} to {high}")
    if bounds.unique and len(set(value)) != len(value):
        raise UserError(f"{name} is {shown(value)}, expected no value twice")
    if bounds.ascending and sorted(value) != list(value):
        raise UserError(f"{name} is {shown(value)}, expected values in ascending order")


def _is(value: Any, kind: Any) -> bool:
    kind = get_origin(kind) or kind
    if kind is Any:
        return True
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind)


def _wanted(bounds: Bounds) -> str:
    text = str(bounds)
    if not text:
        return "a finite number"
    if bounds.choices or bounds.zero or text.startswith("a multiple"):
        return text
    between = bounds.ge is not None and bounds.le is not None
    return f"a value {'from ' if between else ''}{text}"


def expected(kind: Any) -> str:
    """A type in words: `an integer`, `one of adamw, muon`, `a list such as [a, b], each element a number`."""
    kinds = alternatives(kind)
    parts = [_expected(each) for each in kinds if each is not type(None)]
    return " or ".join([*dict.fromkeys(parts), *(["null"] if type(None) in kinds else [])])


def _expected(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(kind.__members__)
    if origin in (list, tuple):
        return f"a list such as [a, b], each element {expected(arguments[0])}"
    if origin is dict:
        return f"a mapping such as {{name: value}}, each value {expected(arguments[1])}"
    if is_dataclass(kind):
        return "a mapping"
    return _KINDS.get(kind, f"a {getattr(kind, '__name__', kind)}")


def shown(value: Any, most: int = 80) -> str:
    """A value as an error shows it, cut where it is long."""
    text = value.name if isinstance(value, Enum) else repr(value)
    return text if len(text) <= most else text[:most] + " ..."


def _number(value: float | None) -> str:
    return str(value) if isinstance(value, int) and abs(value) < 1 << 31 else f"{value:g}"


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The parts of a union; anything else alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)
"""Types of a dataclass's fields, by name; worked out once a class."""


# --------------------------------------------------------------------------------------- to and from plain values


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass instance as JSON values: Enums become their names, paths become strings."""
    return {item.name: _plain(getattr(config, item.name)) for item in fields(config)}


def from_dict(
    config_class: type[Config], values: Mapping[str, Any], source: str = "", inside: str = ""
) -> Config:
    """The dataclass that `to_dict` described; fields that are left out take their defaults.

    Args:
        source: the file that values come from, for error messages; empty for a command line.
        inside: dotted name of the field that holds this dataclass, ending in a point.

    Raises:
        UserError: an unknown field, a value of the wrong type or out of range.
    """
    kinds, where = hints(config_class), f"{source}: " if source else ""
    values = renamed(config_class, values, where + inside)
    if unknown := [str(name) for name in values if name not in kinds]:
        close = difflib.get_close_matches(unknown[0], kinds, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"{where}unknown field {inside + unknown[0]!r} of {config_class.__name__}{hint}")
    typed = {name: as_typed(value, kinds[name], source, inside + name) for name, value in values.items()}
    for item in fields(config_class):  # type: ignore[arg-type]
        if item.name not in typed and item.default is MISSING and item.default_factory is MISSING:
            raise UserError(f"{where}{inside}{item.name} is missing: {item.metadata.get('help', '')}")
    try:
        return config_class(**typed)
    except OSError as error:  # a path that a rule looks at
        raise UserError(f"{where}{inside}{error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}{inside}{error}") from error


def renamed(config_class: type[Any], saved: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Values by the names that options have today (see `old_names`). UserError for a value whose meaning is gone."""
    names = {old: new for each in config_class.__mro__ for old, new in OPTIONS.get(each.__name__, {}).items()}
    if gone := [old for old in KEPT.keys() & names.keys() & saved.keys() if saved[old] != KEPT[old]]:
        raise UserError(f"{where}{gone[0]} is {shown(saved[gone[0]])}, expected {KEPT[gone[0]]}")
    found = {new: value for old, value in saved.items() if (new := names.get(old, old)) is not None}
    if group := GROUPED.get(config_class.__name__):
        inner = {name: found.pop(name) for name in hints(hints(config_class)[group]) if name in found}
        found |= {group: inner} if inner else {}
    return {name: VALUES.get((name, v), v) if isinstance(v, str) else v for name, v in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def as_typed(value: Any, kind: Any, source: str = "", name: str = "") -> Any:
    """A plain value as one of type `kind`; what fits no type stays, for `check_value` to name."""
    kind = next((each for each in alternatives(kind) if each is not type(None)), kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return [as_typed(item, arguments[0]) for item in value]
    if origin is dict and isinstance(value, dict):
        return {key: as_typed(item, arguments[1]) for key, item in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        return from_dict(kind, value, source, f"{name}.")  # type: ignore[arg-type]
    if isinstance(value, str) and isinstance(kind, type) and issubclass(kind, Enum):
        return kind.__members__.get(value, value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 1 << 1000 else math.inf
    return value


@dataclass(frozen=True)
class Leaf:
    """One value of a configuration, nested ones by dotted names.

    default: MISSING where it has to be given, None in a nested configuration that is null.
    """

    name: str
    kind: Any
    default: Any
    help: str
    bounds: Bounds
    advanced: bool
    internal: bool


def walk(
    config_class: type[Any], inside: str = "", null: bool = False, internal: bool = False
) -> Iterator[Leaf]:
    """Every leaf of a configuration; `null`, `internal`: it lies in a nested one that is."""
    for item in fields(config_class):
        kind, about = hints(config_class)[item.name], item.metadata
        nested = next((each for each in alternatives(kind) if is_dataclass(each)), None)
        hidden = internal or about.get("internal", False)
        if nested is not None:
            yield from walk(nested, f"{inside}{item.name}.", null or item.default is None, hidden)  # type: ignore[arg-type]
            continue
        default = None if null else item.default
        if item.default_factory is not MISSING and not null:
            default = item.default_factory()
        help, advanced = about.get("help", ""), about.get("advanced", False)
        bounds = about.get("bounds", Bounds())
        yield Leaf(f"{inside}{item.name}", kind, default, help, bounds, advanced, hidden)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise UserError unless `low <= value <= high` (NaN fails too); for values that are no fields."""
    check_value(name, value, float, Bounds(ge=low, le=high))
