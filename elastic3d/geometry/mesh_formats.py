"""The geometry of .obj, .off, .ply and .stl files: positions and polygons, exactly as the file says.

Readers of general libraries fan every polygon, which puts faces outside of concave ones, and read cut-off files as
whole ones. These read positions and faces alone, keep polygons whole (`polygons.triangulate` divides them), and
refuse what is missing or not understood. Numbers stay in double precision. PLY (Turk 1994) may be text or binary of
either byte order.
"""

from __future__ import annotations

import codecs
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
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip
_STRUCT = {"i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "f4": "f", "f8": "d"}


def read_polygons(data: bytes, suffix: str) -> Polygons:
    """The surface in a file's content; `suffix` is .obj, .off, .ply or .stl.

    Raises FormatError if the content is cut off, broken or of a kind that is not supported.
    """
    reader = {".obj": _read_obj, ".off": _read_off, ".ply": _read_ply, ".stl": _read_stl}[suffix]
    surface = reader(data.removeprefix(codecs.BOM_UTF8))  # as editors of Windows put before text
    corners, count = surface.corners, len(surface.vertices)
    if len(surface.sizes) and surface.sizes.min() < 0:
        raise FormatError(f"a face has {surface.sizes.min()} corners, expected 0 or more")
    if len(corners) and not 0 <= corners.min() <= corners.max() < count:
        bad = corners[(corners < 0) | (corners >= count)][0]
        raise FormatError(f"a face refers to vertex {bad} of {count}, a vertex that does not exist")
    return surface


def _read_obj(data: bytes) -> Polygons:
    positions: list[bytes] = []
    sizes: list[int] = []
    corners: list[int] = []
    for line in re.sub(rb"\\\r?\n", b" ", data).splitlines():
        words = (line.partition(b"#")[0] if b"#" in line else line).split()
        if not words:
            continue
        if words[0] == b"v":
            if len(words) < 4:
                raise FormatError(
                    f"vertex {len(positions) // 3 + 1} has {len(words) - 1} coordinates, expected 3"
                )
            positions += words[1:4]
        elif words[0] == b"f":
            count = len(positions) // 3
            for word in words[1:]:
                index = integer(word.partition(b"/")[0], "a face's vertex")
                if index == 0 or index < -count:
                    raise FormatError(f"a face refers to vertex {index}, a vertex that does not exist")
                corners.append(index - 1 if index > 0 else count + index)
            sizes.append(len(words) - 1)
    return polygons(numbers(positions, 3, "a coordinate"), sizes, corners)


def _read_off(data: bytes) -> Polygons:
    lines = [line for raw in data.splitlines() if (line := raw.partition(b"#")[0].split())]
    header = re.match(rb"(?:ST)?C?N?(4?n?)OFF(.*)", lines[0][0]) if lines else None
    if header:
        if header[1]:
            raise FormatError(f"it is {shown(lines[0][0])}, only points in three dimensions are supported")
        if b"BINARY" in lines[0]:
            raise FormatError("it is a binary OFF file, only the text form is supported")
        rest = [word for word in (header[2], *lines[0][1:]) if word]  # the counts may follow on the same line
        lines = [rest, *lines[1:]] if rest else lines[1:]
    if not lines or len(lines[0]) < 2:
        raise FormatError("it is no OFF file: the numbers of vertices and faces are missing")
    vertex_count, face_count = (
        check_count(integer(word, f"the number of {what}"), what)
        for word, what in zip(lines[0][:2], ("vertices", "faces"), strict=True)
    )
    rows, faces = lines[1 : vertex_count + 1], lines[vertex_count + 1 : vertex_count + face_count + 1]
    if len(rows) < vertex_count or len(faces) < face_count:
        raise FormatError(
            f"it is cut off: {vertex_count:,} vertices and {face_count:,} faces are announced,"
            f" {len(rows):,} and {len(faces):,} are there"
        )
    if any(len(row) < 3 for row in rows):
        raise FormatError("a vertex has fewer than 3 coordinates")
    sizes: list[int] = []
    corners: list[int] = []
    for words in faces:
        size = integer(words[0], "a face's number of corners")
        if not 0 <= size < len(words):
            raise FormatError(f"a face announces {size} corners, its line has {len(words) - 1}")
        sizes.append(size)
        corners += [integer(word, "a face's vertex") for word in words[1 : size + 1]]
    return polygons(numbers([w for row in rows for w in row[:3]], 3, "a coordinate"), sizes, corners)


def _read_stl(data: bytes) -> Polygons:
    if len(data) >= 84:
        count = int.from_bytes(data[80:84], "little")
        whole = len(data) == 84 + 50 * count
        if whole or data.lstrip()[:5].lower() != b"solid" or b"\0" in data[:1000]:
            there = (len(data) - 84) // 50
            if there < count:
                raise FormatError(f"it is cut off: {count:,} faces are announced, {there:,} are there")
            record = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
            corners = np.frombuffer(data, record, count, 84)["corners"].reshape(-1, 3).astype(np.float64)
            return polygons(corners, np.full(count, 3), np.arange(3 * count))
    if data.lstrip()[:5].lower() != b"solid":
        raise FormatError("it is no STL file: it neither begins with solid nor has a binary header")
    positions: list[bytes] = []
    facets = ended = 0
    for line in data.lower().splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == b"vertex":
            if len(words) != 4:
                raise FormatError(f"a vertex has {len(words) - 1} coordinates, expected 3")
            positions += words[1:]
        facets += words[0] == b"facet"
        ended = len(positions) if words[0] == b"endsolid" or words[:2] == [b"end", b"solid"] else ended
    if ended < len(positions) or len(positions) != 9 * facets:
        raise FormatError(
            f"it is cut off or broken: it has {facets:,} facets, {len(positions) // 3:,} vertices"
            f" and {'no ' if ended < len(positions) else 'an '}endsolid after them"
        )
    vertices = numbers(positions, 3, "a coordinate")
    return polygons(vertices, np.full(facets, 3), np.arange(3 * facets))


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


def _read_ply(data: bytes) -> Polygons:
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
