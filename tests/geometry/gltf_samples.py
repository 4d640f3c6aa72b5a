"""glTF files for the tests, written byte by byte from the specification."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import trimesh

Tree = dict[str, Any]
CODES = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
KINDS = {1: "SCALAR", 3: "VEC3", 4: "VEC4", 16: "MAT4"}


def solid() -> trimesh.Trimesh:
    """A closed shape without symmetry, float32 positions."""
    mesh = trimesh.creation.capsule(1.0, 0.3, count=[8, 8])
    mesh.vertices = np.asarray(mesh.vertices * [1, 2, 0.5] + [0.1, 0.2, -0.3], np.float32)
    return mesh


class Gltf:
    """A file with one mesh; `tree` is its JSON, to be changed before it is written."""

    def __init__(self, mesh: trimesh.Trimesh | None = None) -> None:
        self.binary = b""
        self.tree: Tree = {
            "asset": {"version": "2.0"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": []}],
            "accessors": [],
            "bufferViews": [],
        }
        mesh = mesh or solid()
        primitive = self.add_primitive(POSITION=self.add(mesh.vertices, "f4"))
        primitive["indices"] = self.add(mesh.faces.ravel(), "u2")

    def add(self, values: Any, code: str, **more: Any) -> int:
        """An accessor with values of a type; its number."""
        array = np.asarray(values).astype(f"<{code}")
        array = array.reshape(len(array), -1)
        view = self.add_view(array.tobytes())
        accessor = {"bufferView": view, "componentType": CODES[code], "count": len(array)}
        self.tree["accessors"].append(accessor | {"type": KINDS[array.shape[1]]} | more)
        return len(self.tree["accessors"]) - 1

    def add_view(self, data: bytes, **more: Any) -> int:
        self.binary += bytes(-len(self.binary) % 4)
        view = {"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data)}
        self.tree["bufferViews"].append(view | more)
        self.binary += data
        return len(self.tree["bufferViews"]) - 1

    def add_primitive(self, **attributes: int) -> Tree:
        primitive: Tree = {"attributes": attributes}
        self.tree["meshes"][0]["primitives"].append(primitive)
        return primitive

    @property
    def primitive(self) -> Tree:
        """The first primitive."""
        first: Tree = self.tree["meshes"][0]["primitives"][0]
        return first

    def glb(self) -> bytes:
        self.tree.setdefault("buffers", [{"byteLength": len(self.binary)}])
        text = json.dumps(self.tree).encode()
        text += b" " * (-len(text) % 4)
        binary = self.binary + bytes(-len(self.binary) % 4)
        length = 28 + len(text) + len(binary)
        head = struct.pack("<4sIIII", b"glTF", 2, length, len(text), 0x4E4F534A)
        return head + text + struct.pack("<II", len(binary), 0x004E4942) + binary

    def write(self, path: Path, change: Callable[[Tree], object] | None = None) -> Path:
        if change:
            change(self.tree)
        path.write_bytes(self.glb())
        return path
