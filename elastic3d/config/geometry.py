"""Options of decoding a field to a mesh, and of cleaning the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elastic3d.config.base import check_range, option


class SurfaceMethod(Enum):
    """Library that extracts the iso-surface; all place it the same, `open3d` is faster and optional."""

    skimage = "skimage"
    open3d = "open3d"


@dataclass(kw_only=True)
class DecodeConfig:
    """How a field becomes a mesh."""

    resolution: int = option(256, "cells a side of the grid, 8 to 512")
    coarse_resolution: int = option(24, "cells a side at which the whole cube is evaluated, at least")
    tolerance: float = option(
        0.15,
        "how far, in cells, linear and cubic interpolation may disagree on a vertex before the last level is"
        " evaluated there; 0: evaluate it everywhere at the surface",
    )
    thin_slack: float = option(4.0, "how eagerly parts thinner than a cell are sought; 0: not at all")
    max_points: int = option(65536, "points in one call of the field")
    surface: SurfaceMethod = option(SurfaceMethod.skimage, "library that extracts the surface")
    box: float = option(1.01, "half side of the cube that is decoded")

    def __post_init__(self) -> None:
        check_range("resolution", self.resolution, 8, 512)
        check_range("coarse_resolution", self.coarse_resolution, 4, 512)
        check_range("tolerance", self.tolerance, 0, 1)
        check_range("thin_slack", self.thin_slack, 0, 100)
        check_range("max_points", self.max_points, 1, 1 << 30)
        check_range("box", self.box, 1e-3, 1e3)


@dataclass(kw_only=True)
class CleanupConfig:
    """What is done to an extracted mesh before it is saved."""

    min_component: float = option(0.01, "drop parts below this share of the largest part's area; 0: none")
    remove_degenerate: bool = option(True, "collapse faces without area")
    max_faces: int = option(40000, "decimate to at most this many faces; 0: never")
    require_closed: bool = option(False, "fail if the mesh has holes")
    smooth_normals: bool = option(True, "one smooth normal a vertex; false: flat faces")
    uv: bool = option(False, "unwrap texture coordinates (needs xatlas)")

    def __post_init__(self) -> None:
        check_range("min_component", self.min_component, 0, 1)
        if self.max_faces != 0:
            check_range("max_faces", self.max_faces, 4, 1 << 31)
