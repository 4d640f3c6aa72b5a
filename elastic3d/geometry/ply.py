"""The geometry of .ply files (Turk 1994): text or binary of either byte order, faces of any number of corners."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic3d.geometry.mesh_parsing import (
    FormatError,
    Polygons,
    check_count,
    integer,
    numbers,
    polygons,
    shown,
)

_PLY_TYPES = {
    name: code
    for names, code in {
        ("char", "int8"): "i1", ("uchar", "uint8"): "u1", ("short", "int16"): "i2", ("ushort", "uint16"): "u2",
        ("int", "int32"): "i4", ("uint", "uint32"): "u4", ("float", "float32"): "f4", ("double", "float64"): "f8",
    }.items()
    for name in names
}  # fmt: skip
_STRUCT = {"i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "f4": "f", "f8": "d"}


@dataclass
class _Element:
    """An element of a PLY header; a property is (name, type) or, of a list, (name, type, type of the length)."""

    name: str
    count: int
    properties: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def lists(self) -> bool:
        return any(len(item) == 3 for item in self.properties)

    def column(self, *names: str) -> int:
        """Which property has one of these names."""
        for index, item in enumerate(self.properties):
            if item[0] in names:
                return index
        raise FormatError(f"its {self.name} has no property {names[0]}")


def _ply_header(data: bytes) -> tuple[str, list[_Element], int]:
    """The format, the elements, and where the content begins."""
    end = re.search(rb"(?:\r\n|\r|\n)end_header[ \t]*(?:\r\n|\r|\n)", data[: 1 << 20])
    if not data.startswith(b"ply") or end is None:
        raise FormatError("it is no PLY file: the header is missing or has no end")
    kind, elements = "", list[_Element]()
    for line in data[: end.start()].splitlines()[1:]:
        words = line.decode("ascii", "replace").split()
        if not words or words[0] in ("comment", "obj_info"):
            continue
        try:
            if words[0] == "format":
                kind = words[1]
            elif words[0] == "element":
                count = check_count(integer(words[2].encode(), f"the number of {words[1]}"), words[1])
                elements.append(_Element(words[1], count))
            elif words[0] == "property" and words[1] == "list":
                elements[-1].properties.append((words[4], _PLY_TYPES[words[3]], _PLY_TYPES[words[2]]))
            elif words[0] == "property":
                elements[-1].properties.append((words[2], _PLY_TYPES[words[1]]))
            else:
                raise KeyError
        except (KeyError, IndexError):
            raise FormatError(f"its header has the line {shown(line)}, which is no PLY") from None
    if kind not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise FormatError(
            f"its format is {kind[:30]!r}, expected ascii, binary_little_endian or binary_big_endian"
        )
    return kind, elements, end.end()


class _PlyText:
    """Rows of elements, read from words."""

    def __init__(self, data: bytes) -> None:
        self._words, self._at = data.split(), 0

    def take(self, count: int) -> list[bytes]:
        self._at += count
        if self._at > len(self._words):
            raise FormatError("it is cut off: the header announces more than the file holds")
        return self._words[self._at - count : self._at]

    def table(self, element: _Element) -> NDArray:
        """All rows (count, properties) of an element without lists."""
        columns = len(element.properties)
        return numbers(self.take(element.count * columns), columns, f"a property of {element.name}")

    def list_column(self, element: _Element, column: int) -> tuple[list[int] | NDArray, list[int] | NDArray]:
        """Lengths and values, one after the other, of the lists in a column."""
        sizes, values = list[int](), list[int]()
        for _ in range(element.count):
            for index, item in enumerate(element.properties):
                if len(item) == 2:
                    self.take(1)
                    continue
                size = integer(self.take(1)[0], "the length of a list")
                if size < 0:
                    raise FormatError(f"the length of a list is {size}, expected 0 or more")
                words = self.take(size)
                if index == column:
                    sizes.append(size)
                    values += [integer(word, "a face's vertex") for word in words]
        return sizes, values


class _PlyBinary:
    """Rows of elements, read from bytes."""

    def __init__(self, data: bytes, at: int, order: str) -> None:
        self._data, self._at, self._order = data, at, order

    def _rows(self, kinds: list[str], count: int) -> NDArray:
        record = np.dtype([(str(i), self._order + kind) for i, kind in enumerate(kinds)])
        if self._at + count * record.itemsize > len(self._data):
            raise FormatError("it is cut off: the header announces more than the file holds")
        rows = np.frombuffer(self._data, record, count, self._at)
        self._at += count * record.itemsize
        return rows

    def table(self, element: _Element) -> NDArray:
        """All rows (count, properties) of an element without lists."""
        rows = self._rows([kind for _, kind in element.properties], element.count)
        return np.stack([rows[str(i)].astype(np.float64) for i in range(len(element.properties))], axis=1)

    def list_column(self, element: _Element, column: int) -> tuple[list[int] | NDArray, list[int] | NDArray]:
        """Lengths and values, one after the other, of the lists in a column."""
        if element.count and (rows := self._even_rows(element)) is not None:
            return rows[f"size {column}"], rows[str(column)].reshape(-1)
        sizes, values = list[int](), list[int]()
        try:
            for _ in range(element.count):
                for index, item in enumerate(element.properties):
                    size = 1 if len(item) == 2 else self._unpack(item[2], 1)[0]
                    content = self._unpack(item[1], size)
                    if index == column:
                        sizes.append(size)
                        values += content
        except struct.error:
            raise FormatError("it is cut off: the header announces more than the file holds") from None
        return sizes, values

    def _even_rows(self, element: _Element) -> NDArray | None:
        """All rows at once, where the lists of a column are of one length, as in most files; otherwise None."""
        start, fields = self._at, list[tuple[Any, ...]]()
        for index, item in enumerate(element.properties):
            size: tuple[int, ...] = ()
            if len(item) == 3:
                fields.append((f"size {index}", self._order + item[2]))
                size = (max(int(self._rows([item[2]], 1)["0"][0]), 0),)
            fields.append((str(index), self._order + item[1], size))
            self._at += np.dtype([fields[-1]]).itemsize
        record, self._at = np.dtype(fields), start
        if start + element.count * record.itemsize > len(self._data):
            return None
        rows = np.frombuffer(self._data, record, element.count, start)
        lengths = [name for name in record.names or () if name.startswith("size ")]
        if any((rows[name] != rows[name][0]).any() for name in lengths):
            return None
        self._at = start + element.count * record.itemsize
        return rows

    def _unpack(self, kind: str, count: int) -> tuple:
        layout = f"{self._order}{count}{_STRUCT[kind]}"
        self._at += struct.calcsize(layout)
        return struct.unpack_from(layout, self._data, self._at - struct.calcsize(layout))


def read_ply(data: bytes) -> Polygons:
    """The surface in a PLY file's content. Raises FormatError if it is cut off or broken."""
    kind, elements, start = _ply_header(data)
    order = "<" if kind == "binary_little_endian" else ">"
    rows = _PlyText(data[start:]) if kind == "ascii" else _PlyBinary(data, start, order)
    vertices, faces = np.zeros((0, 3)), (np.zeros(0, np.int64), np.zeros(0, np.int64))
    for element in elements:
        if element.name == "tristrips":
            raise FormatError("it holds triangle strips (tristrips), which are not supported")
        if element.name == "vertex":
            if element.lists:
                raise FormatError("its vertices have lists as properties, which is not supported")
            columns = [element.column(axis) for axis in "xyz"]
            vertices = np.ascontiguousarray(rows.table(element)[:, columns])
        elif element.name == "face":
            column = element.column("vertex_indices", "vertex_index")
            if len(element.properties[column]) != 3 or element.properties[column][1][0] == "f":
                raise FormatError("its faces are no lists of integers")
            sizes, corners = rows.list_column(element, column)
            faces = np.asarray(sizes, np.int64), np.asarray(corners, np.int64)
        elif element.lists:
            rows.list_column(element, -1)
        elif element.properties:
            rows.table(element)
    return polygons(vertices, *faces)
