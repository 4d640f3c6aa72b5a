"""What a mesh for other programs needs: real size, and the axis that points up there."""

from __future__ import annotations

import numpy as np
import trimesh

from elastic3d.errors import UserError

METRES = {".glb": 1e-3, ".gltf": 1e-3}
"""Units of a millimetre by suffix: glTF is in metres; .stl, .obj and .ply have no unit, and printers read mm."""

_UP = {"y": np.eye(3), "z": np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])}


def with_up(mesh: trimesh.Trimesh, up: str) -> trimesh.Trimesh:
    """A mesh that is Y up and faces +Z, turned so that `up` (y or z) is up; Z up it faces -Y.

    That is the turn of Blender's and every slicer's importer of Y-up files. Normals and texture coordinates turn
    with it. Raises UserError for another axis.
    """
    if up not in _UP:
        raise UserError(f"up={up}, expected y or z")
    return mesh if up == "y" else _mapped(mesh, _UP[up], 1.0)


def scale_to(mesh: trimesh.Trimesh, size_mm: float, suffix: str) -> trimesh.Trimesh:
    """The mesh with a longest side of `size_mm` millimetres in the unit of files that end in `suffix`.

    Raises UserError unless the size is between 1e-3 and 1e6 mm, and ValueError for a mesh of no extent.
    """
    if not 1e-3 <= size_mm <= 1e6:
        raise UserError(f"size_mm={size_mm}, expected 0.001 to 1000000 millimetres")
    longest = float(mesh.extents.max()) if len(mesh.faces) else 0.0
    if not longest > 0:
        raise ValueError("the mesh has no extent, so it has no size")
    return _mapped(mesh, np.eye(3), size_mm * METRES.get(suffix.lower(), 1.0) / longest)


def _mapped(mesh: trimesh.Trimesh, rotation: np.ndarray, scale: float) -> trimesh.Trimesh:
    """The mesh rotated and scaled, all else kept."""
    normals = np.asarray(mesh.vertex_normals) @ rotation.T
    vertices = np.asarray(mesh.vertices) @ rotation.T * scale
    result = trimesh.Trimesh(vertices, mesh.faces, vertex_normals=normals, process=False)
    if mesh.visual is not None:
        result.visual = mesh.visual.copy()
    return result
