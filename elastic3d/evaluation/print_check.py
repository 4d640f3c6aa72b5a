"""What a 3D print asks of a mesh: a closed surface in one piece, and walls that a nozzle can lay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import trimesh

from elastic3d.evaluation.health import thinnest_wall
from elastic3d.geometry.cleanup import mesh_health
from elastic3d.geometry.mesh_io import merge_equal_vertices

MANY_HANDLES = 20  # chairs with many bars have fewer; a vase with holes in its wall has more


@dataclass(frozen=True, kw_only=True)
class PrintCheck:
    """What was found.

    Attributes:
        pieces: parts that do not touch each other.
        genus: handles of all pieces together, which a solid object shows as see-through holes; None if not watertight.
        thinnest_wall: its share of the longest side (`evaluation.health.thinnest_wall`); None if not watertight, or
            if no wall was met.
        size_mm: the longest side, where it is known.
        min_wall_mm: the thinnest wall that prints.
    """

    faces: int
    watertight: bool
    open_edges: int
    pieces: int
    genus: int | None
    thinnest_wall: float | None
    size_mm: float | None
    min_wall_mm: float

    @property
    def thinnest_mm(self) -> float | None:
        """The thinnest wall in millimetres, where the size is known."""
        if self.thinnest_wall is None or self.size_mm is None:
            return None
        return self.thinnest_wall * self.size_mm

    @property
    def smallest_mm(self) -> float | None:
        """The longest side at which the thinnest wall is as thick as it has to be."""
        return self.min_wall_mm / self.thinnest_wall if self.thinnest_wall else None

    def warnings(self) -> list[str]:
        """What stands in the way of a print, a sentence each."""
        found = []
        if not self.watertight:
            found.append(
                f"not watertight: {self.open_edges:,} edges have no two faces, a slicer has to guess what is solid"
            )
        if self.pieces > 1:
            found.append(f"{self.pieces} pieces that do not touch: they print as separate objects")
        if self.genus is not None and self.genus > MANY_HANDLES:
            found.append(
                f"genus {self.genus}: walls have see-through holes, more than an object has by design"
            )
        thin = self.thinnest_mm
        if thin is not None and self.smallest_mm is not None and thin < self.min_wall_mm:
            found.append(
                f"walls of {thin:.2g} mm, thinner than min_wall_mm={self.min_wall_mm:g}: they print from"
                f" size_mm={self.smallest_mm:.0f} on"
            )
        return found

    def summary(self) -> str:
        """`watertight, 1 piece, genus 2, thinnest wall 1.3 % of the longest side`; in mm where the size is known."""
        parts = [
            "watertight" if self.watertight else "not watertight",
            "1 piece" if self.pieces == 1 else f"{self.pieces} pieces",
        ]
        if self.genus is not None:
            parts.append(f"genus {self.genus}")
        if self.thinnest_mm is not None:
            parts.append(f"thinnest wall {self.thinnest_mm:.2g} mm")
        elif self.thinnest_wall is not None:
            parts.append(f"thinnest wall {100 * self.thinnest_wall:.2g} % of the longest side")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The `print` object of a mesh's metadata: lengths as shares of the longest side, and in mm if it is known."""

        def rounded(value: float | None) -> float | None:
            return None if value is None else float(f"{value:.4g}")

        return {
            "watertight": self.watertight,
            "pieces": self.pieces,
            "genus": self.genus,
            "thinnest_wall": rounded(self.thinnest_wall),
            "thinnest_wall_mm": rounded(self.thinnest_mm),
            "size_mm": self.size_mm,
            "printable_from_mm": rounded(self.smallest_mm),
            "warnings": self.warnings(),
        }


def print_check(mesh: trimesh.Trimesh, size_mm: float | None = None, min_wall_mm: float = 0.8) -> PrintCheck:
    """Examine a mesh, however its vertices are split for normals or texture coordinates.

    Args:
        size_mm: length that its longest side will have.
        min_wall_mm: two lines of a usual 0.4 mm nozzle.

    Raises ValueError for a mesh without faces.
    """
    health = mesh_health(mesh)
    wall = None
    if health.watertight:
        thin = thinnest_wall(merge_equal_vertices(mesh))
        wall = None if thin is None else thin / float(mesh.extents.max())
    return PrintCheck(
        faces=health.faces,
        watertight=health.watertight,
        open_edges=health.boundary_edges + health.non_manifold_edges,
        pieces=health.components,
        genus=health.genus,
        thinnest_wall=wall,
        size_mm=size_mm,
        min_wall_mm=min_wall_mm,
    )
