"""Put meshes into the common frame: bounding-box centre at the origin, longest side of a given length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import trimesh
from numpy.typing import NDArray

HALF_EXTENT = 0.95
"""Half of the longest side of a normalised shape; the decoding box ends at 1.01."""


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


def normalize_to(
    reference: trimesh.Trimesh, *meshes: trimesh.Trimesh, half_extent: float = 1.0
) -> list[trimesh.Trimesh]:
    """`reference` and `meshes`, all moved by the placement that normalises `reference` alone."""
    placement = placement_of(reference, half_extent)
    return [placement.apply(mesh) for mesh in (reference, *meshes)]
