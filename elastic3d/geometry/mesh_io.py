"""Meshes to and from files: any common format in, atomic writes out, and the metadata kept in the glb."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from trimesh.visual import TextureVisuals
from trimesh.visual.color import srgb_to_linear
from trimesh.visual.material import PBRMaterial

from elastic3d import __version__
from elastic3d.errors import UserError
from elastic3d.geometry.gltf import read_gltf
from elastic3d.geometry.gltf_data import as_object, read_tree
from elastic3d.geometry.mesh_formats import read_polygons
from elastic3d.geometry.mesh_parsing import FormatError
from elastic3d.geometry.polygons import triangulate
from elastic3d.utils.files import atomic_path, check_file, printable

READ_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off")
WRITE_SUFFIXES = (".glb", ".ply", ".obj", ".stl")


def load_mesh(path: str | os.PathLike[str]) -> trimesh.Trimesh:
    """The geometry of a mesh file as one triangle mesh: scene transforms applied, equal vertices merged.

    Polygons are divided into triangles without leaving them (`polygons.triangulate`). Materials, textures and
    colours are not read, so an image in the file can't exhaust the memory.

    Raises:
        UserError: the file is missing, empty, broken, cut off, of an unknown kind, needs a feature that is not
            supported, has no face, or a vertex that is not finite.
    """
    path = check_file(path, "a mesh file")
    check_suffix(path, READ_SUFFIXES)
    name = printable(path)
    try:
        vertices, faces = _read(path)
    except FormatError as error:
        raise UserError(f"can't read {name} as a mesh: {error}") from error
    except OSError as error:
        raise UserError(f"can't read {name}: {error.strerror or error}") from error
    except Exception as error:  # what the readers' own checks do not name
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"can't read {name} as a mesh: {reason}") from error
    if len(faces) == 0:
        raise UserError(f"{name} has no faces, expected a triangle mesh")
    bad = int((~np.isfinite(vertices)).any(axis=1).sum())
    if bad:
        raise UserError(f"{name} has {bad} of {len(vertices)} vertices that are not finite")
    return merge_equal_vertices(trimesh.Trimesh(vertices, faces, process=False))


def _read(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Vertices (V, 3) and faces (F, 3) of a file."""
    data, suffix = path.read_bytes(), path.suffix.lower()
    if suffix in (".glb", ".gltf"):
        return read_gltf(path, data)
    surface = read_polygons(data, suffix)
    return surface.vertices, triangulate(*surface)


def merge_equal_vertices(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """A mesh whose vertices at the same float32 position are one, at any scale; faces keep their order.

    Files split vertices where normals or texture coordinates differ, which looks like holes in the surface. Of a
    mesh far from the origin, as in map coordinates, the positions relative to its centre are compared: rounded
    where they stand, different ones would become equal.
    """
    position = np.ascontiguousarray(mesh.vertices - far_centre(mesh), dtype=np.float32)
    position += np.float32(0)  # -0 becomes 0
    unique, inverse = trimesh.grouping.unique_rows(position.view(np.int32))
    return trimesh.Trimesh(mesh.vertices[unique], inverse[mesh.faces], process=False)


def weld(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """`merge_equal_vertices`, without faces that it leaves with fewer than three corners: their edges look open."""
    merged = merge_equal_vertices(mesh)
    whole = (np.diff(np.sort(merged.faces, axis=1), axis=1) > 0).all(axis=1)
    return trimesh.Trimesh(merged.vertices, merged.faces[whole], process=False)


def far_centre(mesh: trimesh.Trimesh) -> NDArray[np.float64]:
    """The centre (3,) of the bounding box if it is further from the origin than the longest side; otherwise zero.

    What rounds positions to float32 has to take it off before, in double precision, and add it afterwards.
    Nearer meshes lose nothing that matters, and keep their exact values.
    """
    bounds = mesh.bounds
    if bounds is None or not np.isfinite(bounds).all():
        return np.zeros(3)
    centre = bounds.mean(axis=0)
    return centre if np.abs(centre).max() > np.ptp(bounds, axis=0).max() else np.zeros(3)


def save_mesh(
    mesh: trimesh.Trimesh,
    path: str | os.PathLike[str],
    extras: dict[str, Any] | None = None,
    name: str = "mesh",
) -> None:
    """Write a mesh as .glb, .ply, .obj or .stl, whole or not at all.

    A glb has vertex normals, texture coordinates, a texture or sRGB vertex colours where the mesh has them (else a
    neutral material), one mesh called `name`, and `extras` under `asset.extras.elastic3d`. Other formats can't hold
    extras or a texture; .stl no colours either.

    Raises:
        UserError: the suffix is none of those, or the file can't be written.
        ValueError: the mesh has no face or a value that is not finite, or `extras` is no JSON.
    """
    path = Path(path)
    check_suffix(path, WRITE_SUFFIXES)
    if len(mesh.faces) == 0:
        raise ValueError(f"the mesh for {printable(path)} has no faces, expected at least one")
    if not np.isfinite(mesh.vertices).all():
        raise ValueError(f"the mesh for {printable(path)} has vertices that are not finite")
    suffix = path.suffix.lower()
    data = _glb_bytes(mesh, extras, name) if suffix == ".glb" else _plain_bytes(mesh, suffix)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_extras(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `asset.extras.elastic3d` dictionary of a .glb file; empty if it has none.

    Raises:
        UserError: the file is missing, empty or no glb.
    """
    path = check_file(path, "a glb file")
    try:
        found = read_tree(path)
        for name in ("asset", "extras", "elastic3d"):
            found = as_object(found.get(name, {}), name)
    except FormatError as error:
        raise UserError(f"{printable(path)} is not a glb file: {error}") from error
    return found


def check_suffix(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise UserError unless the file name ends in one of `suffixes`, in any case."""
    if path.suffix.lower() not in suffixes:
        ending = path.suffix or "no suffix"
        raise UserError(f"{printable(path)} has {ending}, expected one of {', '.join(suffixes)}")


def _plain_bytes(mesh: trimesh.Trimesh, suffix: str) -> bytes:
    """The file of a mesh in a format that holds no extras."""
    if suffix == ".obj":
        text = str(trimesh.exchange.obj.export_obj(mesh, include_normals=True, header=None))
        # there is no file of materials
        return re.sub(r"^(mtllib|usemtl) .*\n", "", text, flags=re.MULTILINE).encode()
    if suffix == ".ply":
        return trimesh.exchange.ply.export_ply(mesh, vertex_normal=True)
    return trimesh.exchange.stl.export_stl(mesh)


def _glb_bytes(mesh: trimesh.Trimesh, extras: dict[str, Any] | None, name: str) -> bytes:
    """The glb file of a mesh with a neutral material; see `save_mesh`."""
    try:
        metadata = json.loads(json.dumps(extras or {}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"extras can't be written as JSON: {error}") from error
    plain = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=unit_normals(mesh), process=False)
    painted = mesh.visual is not None and mesh.visual.defined
    plain.visual = _gltf_visual(mesh) if painted else TextureVisuals(material=_material("neutral", 0.75))

    def finish(tree: dict[str, Any]) -> None:
        tree["asset"]["generator"] = f"elastic3d {__version__}"
        if metadata:
            tree["asset"]["extras"] = {"elastic3d": metadata}
        for exported in tree["meshes"]:
            exported.pop("extras", None)

    scene = trimesh.Scene()
    scene.add_geometry(plain, node_name=name, geom_name=name)
    return bytes(trimesh.exchange.gltf.export_glb(scene, include_normals=True, tree_postprocessor=finish))


def _material(name: str, shade: float, texture: Any = None) -> PBRMaterial:
    colour = [shade, shade, shade, 1.0]
    more = {"baseColorTexture": texture, "metallicFactor": 0.0, "roughnessFactor": 0.7}
    return PBRMaterial(name=name, baseColorFactor=colour, **more)


def _gltf_visual(mesh: trimesh.Trimesh) -> TextureVisuals:
    """Texture coordinates, texture and colours as glTF has them: COLOR_0 is linear where the mesh's are sRGB."""
    own: Any = mesh.visual
    texture = getattr(getattr(own, "material", None), "baseColorTexture", None)
    coloured = own.kind == "vertex"
    material = (
        _material("image", 1.0, texture) if coloured or texture is not None else _material("neutral", 0.75)
    )
    visual = TextureVisuals(uv=getattr(own, "uv", None), material=material)
    if coloured:
        colours = np.array(own.vertex_colors, np.uint8)
        colours[:, :3] = np.round(255 * srgb_to_linear(colours[:, :3]))
        visual.vertex_attributes["color"] = colours
    return visual


def unit_normals(mesh: trimesh.Trimesh) -> np.ndarray:
    """Vertex normals (V, 3) of unit length; a vertex that has none, as on a degenerate face, gets +Y."""
    normals = np.array(mesh.vertex_normals, dtype=np.float64)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    usable = np.isfinite(length) & (length > 1e-6)
    normals = np.where(usable, normals, [0.0, 1.0, 0.0])
    return normals / np.where(usable, length, 1.0)
