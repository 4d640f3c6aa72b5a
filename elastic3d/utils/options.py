"""Configuration dataclasses: fields with a meaning and a range, checked in one place wherever values come from.

    @dataclass(kw_only=True)
    class Config(Options):
        width: int = option(256, "transformer width (D)", ge=1, le=65536)

A value is typed and checked when the object is made: types (a name stands for the member of an Enum, text for a path),
ranges (NaN and infinity are in none), choices, lengths of lists, and then `check`, the rules between fields. The
command line, a YAML file and a saved `config.json` all come through `from_dict`, which puts the field's full name
(`dit.model.width`) and the file into the error.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from elastic3d.errors import UserError
from elastic3d.utils.old_names import GROUPED, KEPT, OPTIONS, VALUES

Config = TypeVar("Config")
MAX_VALUES = 100_000  # of a list
MAX_TEXT = 4096  # characters of a text or path, which is also the longest path of Linux
_ACCEPTED: dict[Any, Any] = {int: Integral, float: Real, list: (list, tuple)}
_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "a path"}


@dataclass(frozen=True)
class Bounds:
    """What a value may be.

    ge, gt, le, lt, multiple_of, choices: of a number, or of every number in a list; zero: 0 is fine besides;
    lengths: fewest and most elements of a list, or characters of a text; unique, ascending: of a list.
    """

    ge: float = -math.inf
    gt: float = -math.inf
    le: float = math.inf
    lt: float = math.inf
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
        is_number = isinstance(value, Real)
        if not is_number or (self.zero and value == 0):
            return True
        within = self.ge <= value <= self.le and self.gt < value < self.lt
        return within and (self.multiple_of is None or value % self.multiple_of == 0)

    def __str__(self) -> str:
        """`1 to 1000`, `above 0 and at most 1`, `one of 0, 4`; empty where everything finite is allowed."""
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        low = [f"at least {_number(self.ge)}"] if self.ge > -math.inf else []
        low += [f"above {_number(self.gt)}"] if self.gt > -math.inf else []
        high = [f"at most {_number(self.le)}"] if self.le < math.inf else []
        high += [f"below {_number(self.lt)}"] if self.lt < math.inf else []
        text = " and ".join([*low, *high])
        if self.ge > -math.inf and self.le < math.inf:
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
    if isinstance(default, (type, list, dict)):
        make: Any = default if isinstance(default, type) else default.copy
        return field(default_factory=make, metadata=metadata)
    return field(default=default, metadata=metadata)


_ABOUT = option(..., "").metadata  # of a field that says nothing about itself


class Options:
    """Base of configuration dataclasses: an object that exists has values that are allowed, or there is a UserError."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            kind, bounds = hints(type(self))[item.name], item.metadata.get("bounds", Bounds())
            setattr(self, item.name, checked(item.name, getattr(self, item.name), kind, bounds))
        try:
            self.check()
        except ValueError as error:
            raise UserError(str(error)) from error

    def check(self) -> None:
        """Raise ValueError for values that are allowed each, but not together."""


def checked(name: str, value: Any, kind: Any, bounds: Bounds = Bounds()) -> Any:  # noqa: B008 (frozen)
    """`value` as one of type `kind` (see `typed`). UserError naming it if it is none, or not within bounds."""
    found = typed(name, value, kind)
    several, is_text = isinstance(found, list), isinstance(found, (str, Path))
    for item in value if several else [value]:
        if item is not None and not bounds.allows(item):
            raise UserError(f"{name} {'has' if several else 'is'} {shown(item)}, expected {_wanted(bounds)}")
    if several or is_text:
        size, most = (len(found), MAX_VALUES) if several else (len(str(found)), MAX_TEXT)
        low, high = bounds.lengths or (0, most)
        if not low <= size <= high:
            what = "values" if several else "characters"
            raise UserError(f"{name} has {size} {what}, expected {low} to {high}")
    if bounds.unique and len(set(found)) != len(found):
        raise UserError(f"{name} is {shown(value)}, expected no value twice")
    if bounds.ascending and sorted(found) != found:
        raise UserError(f"{name} is {shown(value)}, expected values in ascending order")
    return found


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as one of type `kind`: a member of an Enum by its name, a path from text, a float from an integer.
    UserError naming it if it is none."""
    for each in alternatives(kind):
        origin, inside = get_origin(each) or each, get_args(each)
        if isinstance(value, str) and (origin is Path or value in getattr(origin, "__members__", ())):
            return Path(value) if origin is Path else origin[value]
        if origin is Any:
            return value
        if isinstance(value, _ACCEPTED.get(origin, origin)) and isinstance(value, bool) is (origin is bool):
            if origin is list:
                return [typed(name, item, inside[0]) for item in value]
            if origin is dict:
                return {key: typed(name, item, inside[1]) for key, item in value.items()}
            if origin is float:
                return float(value) if abs(value) < 1 << 1000 else math.inf
            return value
    raise UserError(f"{name} is {shown(value)}, expected {expected(kind)}")


def _wanted(bounds: Bounds) -> str:
    text = str(bounds)
    if not text:
        return "a finite number"
    if bounds.choices or bounds.zero or text.startswith("a multiple"):
        return text
    between = bounds.ge > -math.inf and bounds.le < math.inf
    return f"a value {'from ' if between else ''}{text}"


def expected(kind: Any) -> str:
    """A type in words: `an integer`, `one of adamw, muon`, `a list such as [a, b], each element a number`."""
    kinds = alternatives(kind)
    parts = [_expected(each) for each in kinds if each is not type(None)]
    return " or ".join([*parts, *(["null"] if type(None) in kinds else [])])


def _expected(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(kind.__members__)
    if origin is list:
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


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) and abs(value) < 1 << 31 else f"{value:g}"


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The parts of a union; anything else alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


hints: Callable[[Any], dict[str, Any]] = functools.cache(get_type_hints)
"""Types of a dataclass's fields, by name; worked out once a class."""


# --------------------------------------------------------------------------------------- to and from plain values


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass instance as JSON values: Enums become their names, paths become strings."""
    return json.loads(json.dumps(asdict(config), default=_plain))


def _plain(value: Enum | Path) -> str:
    return value.name if isinstance(value, Enum) else os.fspath(value)


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
    for item in fields(config_class):  # type: ignore[arg-type]
        nested, value = nested_in(kinds[item.name]), values.get(item.name)
        required = item.name not in values and item.default is MISSING and item.default_factory is MISSING
        if nested is not None and (required or isinstance(value, dict)):  # names what is required inside
            values[item.name] = from_dict(nested, value or {}, source, f"{inside}{item.name}.")
        if required:
            raise UserError(f"{where}{inside}{item.name} is required: {item.metadata.get('help', '')}")
    try:
        return config_class(**values)
    except (OSError, ValueError, TypeError, OverflowError) as error:  # OSError: a path that a rule looks at
        fault = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        raise UserError(f"{where}{inside}{fault}") from error


def nested_in(kind: Any) -> Any:
    """The configuration in the place of a field, which may be null; None for a plain value."""
    return next((each for each in alternatives(kind) if is_dataclass(each)), None)


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
        name, kind = inside + item.name, hints(config_class)[item.name]
        about = {**_ABOUT, **item.metadata}
        about["internal"] |= internal
        if nested := nested_in(kind):
            yield from walk(nested, f"{name}.", null or item.default is None, about["internal"])
        else:
            made = item.default if item.default_factory is MISSING else item.default_factory()
            yield Leaf(name, kind, None if null else made, **about)


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise UserError unless `low <= value <= high` (NaN fails too); for values that are no fields."""
    checked(name, value, float, Bounds(ge=low, le=high))
