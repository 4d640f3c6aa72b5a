"""Files: written whole or not at all, read only where they are ordinary files, found below a folder, and none that a
command reads replaced by one that it writes. JSON and YAML are read by one function each that knows what it expects,
and says what is wrong in one sentence."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import secrets
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from elastic3d.errors import UserError

Paths = str | os.PathLike[str] | None | Iterable[str | os.PathLike[str]]
"""A path, several, or none (also as an empty text)."""
Named = Mapping[str, Paths]  # by what the user calls them
MAX_JSON_BYTES = 1 << 28
MAX_YAML_BYTES = 1 << 20
_NAME_BYTES = 100  # of a file's stem in its temporary name; file systems take names of 255 bytes


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` with the same suffix, renamed to `path` when the block ends well.

    If the block raises or is interrupted, the temporary file goes and `path` stays as it was. Missing parent folders
    are made. UserError: the place can't be written, or writing ended in an operating system error."""
    path = Path(path)
    if os.path.isdir(path):  # noqa: PTH112 (unlike Path.is_dir it never raises, for example for a long name)
        raise UserError(f"can't write {printable(path)}: it is a folder, expected a file name")
    stem = os.fsencode(path.stem)[:_NAME_BYTES].decode("utf-8", "ignore")
    temporary = path.with_name(f".{stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"can't write {printable(path)}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # renamed, or never made
            temporary.unlink()


def check_file(path: str | os.PathLike[str], what: str = "a file", limit: int | None = None) -> Path:
    """`path`, an ordinary file that can be read and is not empty, of at most `limit` bytes. UserError says what it is
    instead of `what` is expected, such as "an image". Pipes and devices are refused: reading one may wait for ever."""
    path, name = Path(path), printable(path)
    try:
        found = path.stat()
        wrong = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        if stat.S_ISREG(found.st_mode):
            with path.open("rb") as file:
                wrong = "" if file.read(1) else "empty"
    except FileNotFoundError as error:
        raise UserError(f"there is no file {name}") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise UserError(f"can't read {name}: {getattr(error, 'strerror', None) or error}") from error
    if wrong:
        raise UserError(f"{name} is {wrong}, expected {what}")
    if limit is not None and found.st_size > limit:
        raise UserError(f"{name} has {found.st_size:,} bytes, expected {what} of at most {limit:,}")
    return path


def read_text(path: str | os.PathLike[str], what: str = "a text file", limit: int = 1 << 28) -> str:
    """The UTF-8 text of an ordinary file, without a byte-order mark. UserError as `check_file`, or if it is no text."""
    path = check_file(path, what, limit)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{printable(path)} is broken or no text, expected {what}: {error}") from error
    except OSError as error:
        raise UserError(f"can't read {printable(path)}: {error.strerror or error}") from error


def file_sha256(*paths: Path) -> str:
    """SHA-256 (hex) of one file's bytes; of several, that of their digests one after the other."""
    whole = hashlib.sha256()
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        whole.update(digest.digest())
    return (digest if len(paths) == 1 else whole).hexdigest()


def printable(name: str | os.PathLike[str]) -> str:
    r"""A name as text that any file and terminal takes: a byte that is no UTF-8 becomes `\xf6`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def name_key(name: str) -> str:
    """Equal for names that some file system takes for one: upper and lower case, composed and decomposed accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def visible_files(folder: Path, recursive: bool = True, suffixes: Sequence[str] = ()) -> list[Path]:
    """The files of a folder, or those with one of the suffixes, sorted by path, those below links to folders included.

    Hidden files and folders are left out, `._chair.png` among them, which macOS writes beside `chair.png` on other
    disks. A link back to a folder it lies in is not followed. UserError if the folder can't be read.
    """

    def walk(place: Path, above: frozenset[str]) -> Iterator[Path]:
        try:
            entries = sorted(entry for entry in place.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            raise UserError(f"can't read {printable(place)}: {error.strerror or error}") from error
        for entry in entries:
            if entry.is_file():
                yield entry
            elif recursive and entry.is_dir() and (real := os.path.realpath(entry)) not in above:
                yield from walk(entry, above | {real})

    found = sorted(walk(folder, frozenset([os.path.realpath(folder)])))
    return [path for path in found if not suffixes or path.suffix.lower() in suffixes]


def matching_files(pattern: str) -> list[Path]:
    """The files that a glob pattern matches, sorted; `**` matches folders of any depth.

    A part that is the name of a folder is that folder: brackets in it are no pattern.
    """
    folder, *rest = (Path(pattern).anchor or ".", *Path(pattern).relative_to(Path(pattern).anchor).parts)
    place = Path(folder)
    while rest and (place / rest[0]).is_dir():
        place /= rest.pop(0)
    found = glob.glob(str(Path(*rest)), root_dir=place, recursive=True)  # noqa: PTH207 (hidden files are left out)
    return [path for path in (place / name for name in sorted(found)) if path.is_file()]


def check_paths(reads: Named, writes: Named, folders: Named = MappingProxyType({})) -> None:
    """Refuse a command, before it does anything, of which one file would replace another or can't be written.

    Links are followed. Names that differ in upper and lower case, or in how an accent is written, count as one: on
    many file systems they are. A folder is the same as itself only: a file may be written into a folder that is read.
    Inputs, outputs, and outputs that are folders go by what the user calls them, such as "image"; UserError names them.
    """
    taken = {key: (f"{name}, which is read", path) for name, path in _each(reads) for key in _keys(path)}
    for name, path in (*_each(writes), *_each(folders)):
        keys = _keys(path)
        for key in keys & taken.keys():
            other, place = taken[key]
            raise UserError(
                f"{name} would be written to {printable(path)}, which is the same file as {printable(place)}"
                f" ({other}): choose another name"
            )
        taken |= dict.fromkeys(keys, (f"{name}, written too", path))
        _check_writable(path, name in folders)


def check_there(inputs: Named) -> None:
    """UserError for an input, by what the user calls it, that is not there; a pattern has to match a file."""
    for name, path in _each(inputs):
        if not (path.exists() or matching_files(str(path))):
            raise UserError(f"there is no file {printable(path)} for {name}=")


def _check_writable(path: Path, folder: bool) -> None:
    """UserError if no file, or no folder, can be written at a path."""
    place = path if folder else path.parent
    there = next(each for each in (place, *place.absolute().parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"can't write {printable(path)}: {printable(there)} is no folder to write to")
    if path.is_dir() and not folder:
        raise UserError(f"can't write {printable(path)}: it is a folder, expected a file")


def _each(named: Named) -> Iterator[tuple[str, Path]]:
    for name, given in named.items():
        for path in [given] if isinstance(given, (str, os.PathLike)) else given or ():
            if path is not None and str(path):
                yield name, Path(path)


def _keys(path: Path) -> set[object]:
    """What a path has in common with every other name of the same file."""
    try:
        keys: set[object] = {name_key(os.path.realpath(path))}
        keys.add(name_key(os.path.join(os.path.realpath(path.parent), path.name)))  # noqa: PTH118 (of text)
        found = os.stat(path)  # noqa: PTH116
    except OSError:  # not there; whether it can be written is told by who writes it
        return keys
    except ValueError as error:  # a zero byte
        raise UserError(f"can't use {printable(path)}: {error}") from error
    return keys | {(found.st_dev, found.st_ino)}


# ------------------------------------------------------------------------------------------------- JSON and YAML

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


def load_json(path: Path, shape: Shape = dict) -> Any:
    """The value in a JSON file. UserError, naming the file and the place in it: it is missing, broken, nested too
    deeply, holds a number that is not finite, or is not of that shape."""
    return parse_json(read_text(path, "a JSON file", MAX_JSON_BYTES), shape, printable(path))


def parse_json(text: str, shape: Shape, source: str, finite: bool = True) -> Any:
    """The JSON value in a text; `source` names it in errors, which are those of `load_json`. `finite`: refuse NaN and
    infinite numbers."""
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
    # ValueError: a date that is none; TypeError: its key
    except (yaml.YAMLError, ValueError, TypeError) as error:
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
    elif isinstance(shape, Mapping):
        _expect(value, dict, where)
        for name, inner in (dict.fromkeys(value, shape[str]) if str in shape else shape).items():
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
