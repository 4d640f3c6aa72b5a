"""The data of a .gltf or .glb file (glTF 2.0): its JSON, every access checked, and its accessors.

Source: the glTF 2.0 specification, Khronos Group 2021.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from numpy.typing import NDArray

from elastic3d.geometry.mesh_parsing import MOST, FormatError

MAGIC = b"glTF"

_APPEARANCE = re.compile(
    r"(KHR|EXT|MSFT|ADOBE|AGI|FB)_(materials?|textures?|lights?|environments?|xmp|animation)_?"
)
"""Extensions that change how a surface looks, or say something about the file, and never where it is."""

_TYPES = {5120: np.int8, 5121: np.uint8, 5122: np.int16, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}

Floats = NDArray[np.float64]


class GltfFile:
    """One file; the folder is where its buffers are.

    Raises FormatError if it is cut off or broken, or needs what is not supported; so do the methods.
    """

    def __init__(self, data: bytes, folder: Path) -> None:
        self.tree, self._binary = _parse(data)
        self._folder = folder
        self._buffers: dict[int, bytes] = {}

    def check_version_and_extensions(self) -> None:
        """Raise FormatError unless this is glTF 2 without required extensions that move or hide the surface."""
        asset = as_object(self.tree.get("asset", {}), "asset")
        version = asset.get("minVersion", asset.get("version"))
        if not isinstance(version, str) or version.split(".")[0] != "2":
            raise FormatError(f"it is glTF of version {shown(version)}, only version 2 is supported")
        required = self.tree.get("extensionsRequired", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise FormatError(f"extensionsRequired is {shown(required)}, expected a list of names")
        missing = [n for n in required if n != "KHR_mesh_quantization" and not _APPEARANCE.match(n)]
        if missing:
            raise FormatError(f"it requires the extension {', '.join(missing)[:200]}, which is not supported")

    def array(self, name: str) -> list[Any]:
        return as_list(self.tree.get(name, []), name)

    def item(self, name: str, number: Any) -> dict[str, Any]:
        """The object with a number in one of the file's arrays."""
        array = self.array(name)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(array):
            raise FormatError(f"it refers to number {shown(number)} of {len(array)} {name}")
        return as_object(array[number], f"an entry of {name}")

    def indices(self, owner: dict[str, Any], name: str, of: str) -> list[int]:
        numbers = as_list(owner.get(name, []), name)
        for number in numbers:
            self.item(of, number)
        return numbers

    def accessor(self, number: Any, kind: str, what: str, owner: dict[str, Any]) -> NDArray:
        """Values (count, width) of an accessor: indices and joints as they are stored, all others in float64."""
        accessor = self.item("accessors", number)
        count = as_whole(accessor.get("count"), "the count of an accessor")
        dtype = self._dtype(accessor)
        if accessor.get("type") != kind:
            raise FormatError(f"the {what} are {shown(accessor.get('type'))}, expected {kind}")
        if count > MOST:
            raise FormatError(f"an accessor announces {count:,} elements, expected at most {MOST:,}")
        sparse = accessor.get("sparse")
        if "bufferView" not in accessor and sparse is None:
            names = ", ".join(as_object(owner.get("extensions", {}), "extensions"))
            reason = f": they are in the extension {names[:100]}, which is not supported" if names else ""
            raise FormatError(f"the {what} are missing, their accessor has no bufferView{reason}")
        if "bufferView" in accessor:
            values = self._view(accessor, dtype, _WIDTHS[kind], count)
        else:
            if count > MOST // 10:  # nothing in the file is as large, so nothing bounds it
                raise FormatError(f"a sparse accessor of {count:,} elements has no bufferView")
            values = np.zeros((count, _WIDTHS[kind]), dtype)
        if sparse is not None:
            values = self._replace(values.copy(), as_object(sparse, "sparse"), dtype)
        if kind == "SCALAR" or what == "joints":
            return values
        result = values.astype(np.float64)
        if accessor.get("normalized") is True and dtype.kind in "iu":
            result = np.maximum(result / np.iinfo(dtype).max, -1)
        return result

    def _replace(self, values: NDArray, sparse: dict[str, Any], dtype: np.dtype) -> NDArray:
        """The values with those that a sparse accessor gives itself."""
        count = as_whole(sparse.get("count"), "the count of a sparse accessor")
        places, given = (as_object(sparse.get(name), name) for name in ("indices", "values"))
        index = self._view(places, self._dtype(places), 1, count)[:, 0].astype(np.int64)
        if count and not 0 <= index.min() <= index.max() < len(values):
            raise FormatError(f"a sparse accessor replaces element {index.max()} of {len(values)}")
        values[index] = self._view(given, dtype, values.shape[1], count)
        return values

    def _dtype(self, accessor: dict[str, Any]) -> np.dtype:
        number = accessor.get("componentType")
        if not isinstance(number, int) or number not in _TYPES:
            raise FormatError(f"a componentType is {shown(number)}, expected one of {list(_TYPES)}")
        return np.dtype(_TYPES[number]).newbyteorder("<")

    def _view(self, accessor: dict[str, Any], dtype: np.dtype, width: int, count: int) -> NDArray:
        """The values (count, width) that an accessor, or one part of a sparse one, has in its buffer view."""
        view = self.item("bufferViews", accessor.get("bufferView"))
        for name in as_object(view.get("extensions", {}), "extensions"):
            raise FormatError(f"its data is compressed by the extension {name[:100]}, which is not supported")
        buffer = self._buffer(view.get("buffer"))
        length = as_whole(view.get("byteLength"), "the byteLength of a view")
        start, offset = (as_whole(x.get("byteOffset", 0), "a byteOffset") for x in (view, accessor))
        size = dtype.itemsize * width
        stride = as_whole(view.get("byteStride", size), "a byteStride")
        if stride < size:
            raise FormatError(f"a byteStride is {stride}, expected at least {size}")
        needed = offset + stride * (count - 1) + size if count else 0
        if needed > length or start + length > len(buffer):
            raise FormatError(
                f"it is cut off: an accessor needs {needed:,} bytes of a view of {length:,} from byte {start:,}"
                f" of a buffer of {len(buffer):,}"
            )
        if count == 0:
            return np.zeros((0, width), dtype)
        return np.ndarray((count, width), dtype, buffer, start + offset, (stride, dtype.itemsize))

    def _buffer(self, number: Any) -> bytes:
        buffer = self.item("buffers", number)
        if number not in self._buffers:
            length = as_whole(buffer.get("byteLength"), "the byteLength of a buffer")
            content = self._content(buffer, number)
            if len(content) < length:
                raise FormatError(
                    f"buffer {number} is cut off: {length:,} bytes are announced, {len(content):,} there"
                )
            self._buffers[number] = content
        return self._buffers[number]

    def _content(self, buffer: dict[str, Any], number: int) -> bytes:
        uri = buffer.get("uri")
        if uri is None:
            if number or self._binary is None:
                names = ", ".join(as_object(buffer.get("extensions", {}), "extensions"))
                hint = f", only for the extension {names[:100]}" if names else ""
                raise FormatError(f"buffer {number} has no content{hint}")
            return self._binary
        if not isinstance(uri, str):
            raise FormatError(f"the uri of buffer {number} is {shown(uri)}, expected text")
        if uri.startswith("data:"):
            head, _, text = uri.partition(",")
            try:
                return (
                    base64.b64decode(text, validate=True)
                    if head.endswith(";base64")
                    else unquote_to_bytes(text)
                )
            except (binascii.Error, ValueError) as error:
                raise FormatError(f"the data of buffer {number} is no base64: {error}") from error
        return self._beside(uri)

    def _beside(self, uri: str) -> bytes:
        """The content of a file in the folder of this one; no other place is read."""
        name = unquote(uri)
        path = self._folder / name
        if (
            re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", name)
            or Path(name).is_absolute()
            or ".." in Path(name).parts
        ):
            raise FormatError(
                f"its buffer {name[:200]!r} is not in the file's own folder, the only place that is read"
            )
        try:
            if not path.is_file():
                raise FormatError(f"its buffer {name[:200]!r} is missing beside it")
            return path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise FormatError(f"its buffer {name[:200]!r} can't be read: {reason}") from error


def read_tree(path: Path) -> dict[str, Any]:
    """The JSON of a file without the binary chunk of a glb, nearly all of it. FormatError if it is broken."""
    with path.open("rb") as file:
        head = file.read(20)
        if head[:4] != MAGIC:
            return _tree(head + file.read())
        if head[16:] != b"JSON":
            raise FormatError("its first chunk is not JSON")
        length = int.from_bytes(head[12:16], "little")
        return _tree(file.read(min(length, path.stat().st_size)))


def with_buffers(path: Path) -> list[Path]:
    """A mesh file and, of a .gltf or .glb that can be read, the files beside it that its buffers are in."""
    if path.suffix.lower() not in (".gltf", ".glb"):
        return [path]
    try:
        uris = [
            buffer.get("uri", "data:") for buffer in as_list(read_tree(path).get("buffers", []), "buffers")
        ]
        beside = [path.parent / unquote(uri) for uri in uris if not uri.startswith("data:")]
        return [path, *(file for file in beside if file.is_file())]
    except (OSError, ValueError, AttributeError):  # broken: reading it tells how
        return [path]


def _parse(data: bytes) -> tuple[dict[str, Any], bytes | None]:
    """The JSON of a file and, of a glb, its binary chunk."""
    text, binary = data, None
    if data[:4] == MAGIC:
        version, length = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8))
        if version != 2:
            raise FormatError(f"it is glTF of version {version}, only version 2 is supported")
        if length > len(data):
            raise FormatError(f"it is cut off: {length:,} bytes are announced, {len(data):,} are there")
        chunks = list(_chunks(data[:length]))
        if not chunks or chunks[0][0] != b"JSON":
            raise FormatError("its first chunk is not JSON")
        text = chunks[0][1]
        binary = next((content for kind, content in chunks[1:2] if kind == b"BIN\0"), None)
    return _tree(text), binary


def _tree(text: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its JSON is broken: {error or 'nested too deeply'}") from error
    if not isinstance(tree, dict):
        raise FormatError(f"its JSON is a {type(tree).__name__}, expected an object")
    return tree


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        if at + 8 + length > len(data):
            raise FormatError(
                f"it is cut off: a chunk announces {length:,} bytes, {len(data) - at - 8:,} are there"
            )
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        at += 8 + length


def shown(value: Any) -> str:
    return ascii(value)[:60]


def as_object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{what} is {shown(value)}, expected an object")
    return value


def as_list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{what} is {shown(value)}, expected a list")
    return value


def as_whole(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise FormatError(f"{what} is {shown(value)}, expected a whole number of 0 or more")
    return value


def as_vector(value: Any, count: int, what: str) -> Floats:
    if isinstance(value, list) and len(value) == count and all(type(x) in (int, float) for x in value):
        return np.array(value, np.float64)
    raise FormatError(f"{what} is {shown(value)}, expected {count} numbers")
