"""The `sweethome3d` source: 820 real models of furniture and household things, CC0 and CC-BY.

They come in Debian's package sweethome3d-furniture as five libraries, each a zip with a catalogue and OBJ
files. Flat things (sockets, carpets, road signs), which no solid at this grid can show, and products named
after a brand are left out.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray

from elastic3d.errors import UserError
from elastic3d.geometry.mesh_io import merge_equal_vertices
from elastic3d.preparation.shape import RawShape
from elastic3d.preparation.sources import Item, Source, with_article

PACKAGE = "sweethome3d-furniture"
LICENCES = {
    "BlendSwap-CC-0": "CC0-1.0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "KatorLegaz": "CC-BY-3.0-US",
    "Reallusion": "CC-BY-3.0-US",
    "Scopia": "CC-BY-3.0",
}
FLATTEST = 0.05  # shortest over longest side
BRANDS = re.compile(
    r"apple i|\bvw\b|ford|seat leon|peugeot|renault|yamaha|chevrolet|smart car|playstation|rubik",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Model:
    """One entry of a catalogue."""

    item: Item
    obj: Path
    rotation: tuple[float, ...]  # 9 numbers, row by row


def find_package(cache: Path, path: str = "") -> Path:
    """The folder with the .sh3f libraries: below `path` if given, else downloaded into `cache` with apt
    (120 MB).

    UserError if neither gives them.
    """
    if path:
        return _library_folder(Path(path), f"path={path}")
    if not any(cache.rglob("*.sh3f")):
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise UserError(
                f"no apt-get here to download {PACKAGE}: unpack that Debian package yourself and give path="
            )
        cache.mkdir(parents=True, exist_ok=True)
        _run(["apt-get", "download", PACKAGE], cache)
        for package in cache.glob(f"{PACKAGE}*.deb"):
            _run(["dpkg", "-x", str(package), str(cache)], cache)
    return _library_folder(cache, str(cache))


def _library_folder(folder: Path, named: str) -> Path:
    found = sorted(folder.rglob("*.sh3f")) if folder.is_dir() else []
    if not found:
        raise UserError(f"{named} holds no .sh3f library, expected the unpacked package {PACKAGE}")
    return found[0].parent


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"`{' '.join(command)}` failed: {done.stderr.strip()[-300:]}")


class SweetHome3DSource(Source):
    """The models of every `.sh3f` library in a folder, unpacked into `cache` once."""

    name = "sweethome3d"

    def __init__(self, libraries: Path, cache: Path) -> None:
        self._models = {model.item.id: model for model in read_catalogues(libraries, cache)}

    def items(self) -> list[Item]:
        """In an order that mixes libraries and kinds; flat and branded models are not among them."""
        return [model.item for model in self._models.values()]

    def load(self, item: Item) -> RawShape:
        """The model with its catalogue's rotation, one part a material. UserError if it is flat."""
        model = self._models[item.id]
        shape = load_obj(model.obj)
        shape.mesh.vertices = np.asarray(shape.mesh.vertices) @ np.reshape(model.rotation, (3, 3)).T
        extents = shape.mesh.extents
        if extents.min() < FLATTEST * extents.max():
            raise UserError(f"flat: its shortest side is {extents.min() / extents.max():.3f} of its longest")
        return shape


def read_catalogues(libraries: Path, cache: Path) -> list[Model]:
    """The models of all `.sh3f` files in a folder, mixed, brands left out."""
    models = []
    for library in sorted(libraries.glob("*.sh3f")):
        models += _read_catalogue(_unpack(library, cache / library.stem), library.stem)
    order = np.random.default_rng(0).permutation(len(models))
    return [models[index] for index in order]


def _unpack(library: Path, folder: Path) -> Path:
    if not folder.exists():
        draft = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(draft, ignore_errors=True)
        with zipfile.ZipFile(library) as archive:
            archive.extractall(draft)
        draft.rename(folder)
    return folder


def _read_catalogue(folder: Path, library: str) -> list[Model]:
    text = (folder / "PluginFurnitureCatalog.properties").read_text("latin-1")
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    entries: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.MULTILINE):
        entries.setdefault(int(number), {})[key] = value.strip()
    return [_model(entry, folder, library) for entry in entries.values() if not BRANDS.search(entry["name"])]


def _model(entry: dict[str, str], folder: Path, library: str) -> Model:
    name = entry["name"]
    item = Item(
        id=re.sub(r"[^a-z0-9]+", "-", entry["id"].lower()).strip("-"),
        source=SweetHome3DSource.name,
        category=entry["category"].lower(),
        caption=with_article(f"{name[0].lower()}{name[1:]}"),
        licence=LICENCES[library],
        creator=entry["creator"],
        source_id=entry["id"],
    )
    rotation = tuple(map(float, entry.get("modelRotation", "1 0 0 0 1 0 0 0 1").split()))
    return Model(item, folder / entry["model"].lstrip("/"), rotation)


def load_obj(path: Path) -> RawShape:
    """An OBJ file with the diffuse colour of each material, or the mean colour of its texture."""
    scene = trimesh.load_scene(path, process=False, group_material=True)
    meshes = [geometry for geometry in scene.geometry.values() if isinstance(geometry, trimesh.Trimesh)]
    meshes = [mesh for mesh in meshes if len(mesh.faces)]
    if not meshes:
        raise UserError(f"{path.name} has no faces, expected a triangle mesh")
    offsets = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    faces = np.concatenate([mesh.faces + start for mesh, start in zip(meshes, offsets, strict=False)])
    whole = trimesh.Trimesh(np.concatenate([mesh.vertices for mesh in meshes]), faces, process=False)
    part = np.repeat(np.arange(len(meshes)), [len(mesh.faces) for mesh in meshes])
    return RawShape(merge_equal_vertices(whole), part, np.stack([_colour(mesh.visual) for mesh in meshes]))


def _colour(visual: Any) -> NDArray[np.uint8]:
    material = getattr(visual, "material", None)
    if material is None:
        return np.full(3, 190, np.uint8)
    image = getattr(material, "image", None)
    if image is None:
        return np.asarray(material.main_color[:3], np.uint8)
    return (
        np.asarray(image.convert("RGB").reduce(max(1, min(image.size) // 16)))
        .reshape(-1, 3)
        .mean(0)
        .astype(np.uint8)
    )
