"""The paths of one command: none that it writes may be one that it reads, or writes for something else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from elastic3d.utils.errors import UserError
from elastic3d.utils.files import name_key, printable

Paths = str | os.PathLike[str] | None | Iterable[str | os.PathLike[str]]
"""A path, several, or none (also as an empty text)."""


def check_distinct(reads: Mapping[str, Paths], writes: Mapping[str, Paths]) -> None:
    """Refuse a command, before it does anything, of which one file would replace another.

    Links are followed. Names that differ in upper and lower case, or in how an accent is written, count as one: on
    many file systems they are. A folder is the same as itself only: a file may be written into a folder that is read.

    Args:
        reads: inputs by what the user calls them, such as "image".
        writes: outputs, files and folders, likewise.

    Raises:
        UserError: naming both paths.
    """
    taken: dict[object, tuple[str, Path]] = {}
    for name, path in _each(reads):
        for key in _keys(path):
            taken.setdefault(key, (f"{name}, which is read", path))
    for name, path in _each(writes):
        keys = _keys(path)
        for key in keys & taken.keys():
            other, place = taken[key]
            raise UserError(
                f"{name} would be written to {printable(path)}, which is the same file as {printable(place)}"
                f" ({other}): choose another name"
            )
        taken |= dict.fromkeys(keys, (f"{name}, written too", path))


def _each(named: Mapping[str, Paths]) -> Iterator[tuple[str, Path]]:
    for name, given in named.items():
        several = [given] if given is None or isinstance(given, (str, os.PathLike)) else given
        for path in several:
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
