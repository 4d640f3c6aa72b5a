"""Options of decoding a field to a mesh, and of cleaning the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elastic3d.utils.options import Options, option

BOX = 1.01
"""Half side of the decoding cube; normalised shapes end at 0.95, so their surface never touches it."""


class SurfaceMethod(Enum):
    """Library that extracts the iso-surface; all place it the same, `open3d` is faster and optional."""

    skimage = "skimage"
    open3d = "open3d"


@dataclass(kw_only=True)
class DecodeConfig(Options):
    """How a field becomes a mesh."""

    resolution: int = option(256, "cells a side of the grid", ge=8, le=512)
    coarse_resolution: int = option(
        24, "cells a side at which the whole cube is evaluated, at least", ge=4, le=512
    )
    tolerance: float = option(
        0.15,
        "how far, in cells, linear and cubic interpolation may disagree on a vertex before the last level is"
        " evaluated there; 0: evaluate it everywhere at the surface",
        ge=0,
        le=1,
    )
    thin_slack: float = option(
        4.0, "how eagerly parts thinner than a cell are sought; 0: not at all", ge=0, le=100
    )
    max_points: int = option(65536, "points in one call of the field", ge=1, le=1 << 30)
    surface: SurfaceMethod = option(SurfaceMethod.skimage, "library that extracts the surface")
    box: float = option(BOX, "half side of the cube that is decoded", ge=1e-3, le=1e3)


@dataclass(kw_only=True)
class CleanupConfig(Options):
    """What is done to an extracted mesh before it is saved."""

    min_component: float = option(
        0.01, "drop parts below this share of the largest part's area; 0: none", ge=0, le=1
    )
    max_faces: int = option(
        40000, "decimate to at most this many faces; 0: never", ge=4, le=(1 << 31) - 1, zero=True
    )
    require_closed: bool = option(False, "fail if the mesh has holes")
    smooth_normals: bool = option(True, "one smooth normal a vertex; false: flat faces")
    uv: bool = option(False, "unwrap texture coordinates (needs xatlas)")
