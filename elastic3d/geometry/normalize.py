"""Frames of meshes: the common one (centre at the origin, longest side of a given length), and other programs'."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import trimesh
from numpy.typing import NDArray

from elastic3d.errors import UserError

HALF_EXTENT = 0.95
"""Half of the longest side of a normalised shape; the decoding box ends at 1.01."""

METRES = {".glb": 1e-3, ".gltf": 1e-3}
"""Units of a millimetre by suffix: glTF is in metres; .stl, .obj and .ply have no unit, and printers read mm."""

_UP = {"y": np.eye(3), "z": np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])}


@dataclass(frozen=True)
class Placement:
    """The map x -> scale * (x - center)."""

    center_3: NDArray[np.float64]
    scale: float

    def apply(self, mesh: trimesh.Trimesh) -> trimesh.Trimesh:
        """A moved copy of the mesh; faces and their order stay."""
        vertices = (np.asarray(mesh.vertices) - self.center_3) * self.scale
        return trimesh.Trimesh(vertices, mesh.faces, process=False)

    def invert(self) -> Placement:
        """The placement that undoes this one."""
        return Placement(center_3=-self.center_3 * self.scale, scale=1 / self.scale)


def placement_of(mesh: trimesh.Trimesh, half_extent: float = HALF_EXTENT) -> Placement:
    """The placement that centres the mesh and scales its longest side to 2 `half_extent`.

    ValueError for a mesh without faces, of no extent, or with vertices that are not finite.
    """
    if len(mesh.faces) == 0:
        raise ValueError("the mesh has no faces, expected a surface")
    used = np.asarray(mesh.vertices)[np.unique(mesh.faces)]
    if not np.isfinite(used).all():
        raise ValueError("the mesh has vertices that are not finite")
    low, high = used.min(axis=0), used.max(axis=0)
    longest = float((high - low).max())
    if longest <= 0:
        raise ValueError("the mesh is a single point, expected a surface with an extent")
    return Placement(center_3=(low + high) / 2, scale=2 * half_extent / longest)


def normalize_mesh(
    mesh: trimesh.Trimesh, half_extent: float = HALF_EXTENT
) -> tuple[trimesh.Trimesh, Placement]:
    """The mesh in the common frame and how it came there. Raises as `placement_of`."""
    placement = placement_of(mesh, half_extent)
    return placement.apply(mesh), placement


def normalize_to(reference: trimesh.Trimesh, *meshes: trimesh.Trimesh) -> list[trimesh.Trimesh]:
    """`reference` and `meshes`, all moved by the placement that makes the longest side of `reference` 2."""
    placement = placement_of(reference, 1.0)
    return [placement.apply(mesh) for mesh in (reference, *meshes)]


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
