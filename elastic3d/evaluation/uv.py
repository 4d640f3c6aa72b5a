"""Does a mesh file carry texture coordinates? Read from the file, as loading for evaluation drops them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

_GLB_HEADER = 20  # file header and the first chunk's header
_PLY_NAMES = {"s", "t", "u", "v", "texture_u", "texture_v", "texcoord"}


def has_uv(path: Path) -> bool:
    """Whether any part of the mesh has texture coordinates. STL and OFF files (as read here) never do.

    ValueError for a glb or gltf file that is broken.
    """
    suffix = path.suffix.lower()
    if suffix == ".glb":
        with path.open("rb") as file:
            header = file.read(_GLB_HEADER)
            length = struct.unpack("<I", header[12:16])[0] if len(header) == _GLB_HEADER else 0
            return _gltf_has_uv(json.loads(file.read(length)))
    if suffix == ".gltf":
        return _gltf_has_uv(json.loads(path.read_text()))
    if suffix == ".obj":
        with path.open("rb") as file:
            return any(line.startswith(b"vt ") for line in file)
    return suffix == ".ply" and _ply_has_uv(path)


def _gltf_has_uv(tree: dict[str, Any]) -> bool:
    primitives = (part for mesh in tree.get("meshes", []) for part in mesh.get("primitives", []))
    return any("TEXCOORD_0" in part.get("attributes", {}) for part in primitives)


def _ply_has_uv(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            words = line.split()
            if words[:1] == [b"end_header"]:
                return False
            if words[:1] == [b"property"] and words[-1].decode("latin-1") in _PLY_NAMES:
                return True
    return False
