"""What a source of shapes has to offer, and the `folder` source: a user's own meshes."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic3d.errors import UserError
from elastic3d.geometry.gltf_data import with_buffers
from elastic3d.geometry.mesh_io import READ_SUFFIXES, load_mesh
from elastic3d.preparation.shape import RawShape
from elastic3d.utils.files import read_text, visible_files
from elastic3d.utils.options import shown


@dataclass(frozen=True, kw_only=True)
class Item:
    """One shape of a source; `id` is unique within it and has no slash."""

    id: str
    source: str
    category: str
    caption: str
    licence: str
    creator: str
    source_id: str  # what the source itself calls it: a seed, a catalogue id, a relative path
    version: str = ""  # another one where its file has changed; empty where none can

    def row(self) -> dict[str, Any]:
        """As the manifest shows it."""
        row = asdict(self)
        del row["version"]
        return row


def read_list(path: Path) -> list[str]:
    """The lines `source/id` of a list of shapes, in order; blank lines and # comments do not count.

    UserError if the file is missing, no text, or has another line.
    """
    if path.is_file() and not path.stat().st_size:  # of a split that has none
        return []
    lines = [line.strip() for line in read_text(path, "a list of shapes").splitlines()]
    named = [line for line in lines if line and not line.startswith("#")]
    if wrong := next((line for line in named if "/" not in line), None):
        raise UserError(
            f"{path} has the line {shown(wrong)}, expected lines such as folder/chair (source/id)"
        )
    return named


def with_article(name: str) -> str:
    """A caption: `chair` -> `a chair`, `armchair` -> `an armchair`."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


class Source(ABC):
    """A fixed, ordered list of items and a way to load each. Pickled into worker processes."""

    name: str

    @abstractmethod
    def items(self) -> list[Item]:
        """Every item, in the order in which shards take them."""

    @abstractmethod
    def load(self, item: Item) -> RawShape:
        """The raw mesh, Y up and front +Z. UserError if there is none."""

    def ready(self, item: Item) -> bool:
        """Whether `load` can be called, or is known to fail."""
        return True

    @contextmanager
    def producing(self) -> Iterator[Callable[[], bool]]:
        """Items become ready while this context is open; call what it gives to ask whether more will come.

        The call raises UserError if what makes them broke down.
        """
        yield lambda: False


class FolderSource(Source):
    """Every glb, gltf, obj, ply, stl and off file below a directory, taken as Y up with the front at +Z."""

    def __init__(self, path: Path, name: str = "folder") -> None:
        if not path.is_dir():
            raise UserError(f"path={path} is no directory, expected one with mesh files")
        self.name, self._path = name, path
        files = visible_files(path, suffixes=READ_SUFFIXES)
        if not files:
            raise UserError(
                f"{path} holds no mesh, expected files ending in {', '.join(READ_SUFFIXES)}: name the folder that"
                " has them with path=, or convert yours"
            )
        relative = [file.relative_to(path) for file in files]
        stems = ["--".join(file.with_suffix("").parts) for file in relative]
        shared = {stem for stem, count in Counter(stems).items() if count > 1}
        names = [
            f"{stem}-{file.suffix[1:]}" if stem in shared else stem
            for stem, file in zip(stems, relative, strict=True)
        ]
        self._files: dict[str, Path] = {}
        for name, file in zip(names, relative, strict=True):
            if (other := self._files.setdefault(name, file)) is not file:
                raise UserError(
                    f"{path} has {other} and {file}, both of which would be {name}: rename one of them"
                )

    def items(self) -> list[Item]:
        """One item a file; the category is the folder it is in."""
        return [
            Item(
                id=name,
                source=self.name,
                category=file.parent.name,
                caption=file.stem.replace("_", " ").replace("-", " "),
                licence="unknown",
                creator="unknown",
                source_id=file.as_posix(),
                version=_version(self._path / file),
            )
            for name, file in self._files.items()
        ]

    def load(self, item: Item) -> RawShape:
        """The file's geometry, as one part."""
        mesh = load_mesh(self._path / self._files[item.id])
        return RawShape(mesh, np.zeros(len(mesh.faces), np.int64))


def _version(file: Path) -> str:
    """Its size and the time of its last change, and those of a glTF's buffers; empty if it can't be read."""
    if not os.access(file, os.R_OK):
        return ""
    states = [part.stat() for part in with_buffers(file)]
    return "; ".join(f"{state.st_size} bytes, {state.st_mtime_ns} ns" for state in states)
