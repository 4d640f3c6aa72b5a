"""The geometry of .obj, .off, .ply and .stl files: positions and polygons, exactly as the file says.

Readers of general libraries fan every polygon, which puts faces outside of concave ones, and read cut-off files as
whole ones. These read positions and faces alone, keep polygons whole (`polygons.triangulate` divides them), and
refuse what is missing or not understood. Numbers stay in double precision.
"""

from __future__ import annotations

import re

import numpy as np

from elastic3d.geometry.mesh_parsing import (
    FormatError,
    Polygons,
    check_count,
    integer,
    numbers,
    polygons,
    shown,
)
from elastic3d.geometry.ply import read_ply


def read_polygons(data: bytes, suffix: str) -> Polygons:
    """The surface in a file's content; `suffix` is .obj, .off, .ply or .stl.

    Raises FormatError if the content is cut off, broken or of a kind that is not supported.
    """
    reader = {".obj": _read_obj, ".off": _read_off, ".ply": read_ply, ".stl": _read_stl}[suffix]
    surface = reader(data)
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
