"""What the readers of mesh files share: surfaces of polygons, checked numbers, and the error of a broken file."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST = 50_000_000
"""Vertices and faces that one mesh may have; more is taken for a broken file before memory is asked for."""


class FormatError(ValueError):
    """What is wrong with a mesh file, as the end of a sentence that begins with its name."""


class Polygons(NamedTuple):
    """A surface of polygons."""

    vertices: NDArray[np.float64]
    """(V, 3)"""
    sizes: NDArray[np.int64]
    """(P,) number of corners of each polygon."""
    corners: NDArray[np.int64]
    """(sum of sizes,) vertices of the polygons, one after the other."""


def polygons(vertices: NDArray, sizes: list[int] | NDArray, corners: list[int] | NDArray) -> Polygons:
    return Polygons(vertices, np.asarray(sizes, np.int64), np.asarray(corners, np.int64))


def numbers(tokens: list[bytes], columns: int, what: str) -> NDArray[np.float64]:
    """Numbers (R, columns) from text; FormatError where a token is none."""
    try:
        return np.array(tokens, np.bytes_).astype(np.float64).reshape(-1, columns)
    except ValueError as error:
        raise FormatError(f"{what} is no number: {error}") from error


def integer(token: bytes, what: str) -> int:
    """An integer of at most 18 digits from text."""
    try:
        if len(token) < 20:
            return int(token)
    except ValueError:
        pass
    raise FormatError(f"{what} is {shown(token)}, expected an integer")


def shown(token: bytes) -> str:
    return repr(token[:30].decode("ascii", "backslashreplace"))


def check_count(count: int, what: str) -> int:
    if not 0 <= count <= MOST:
        raise FormatError(f"it announces {count:,} {what}, expected at most {MOST:,}")
    return count
