"""Options of decoding a field to a mesh, and of cleaning the mesh."""

from __future__ import annotations

from enum import Enum


class SurfaceMethod(Enum):
    """Library that extracts the iso-surface; all place it the same, `open3d` is faster and optional."""

    skimage = "skimage"
    open3d = "open3d"
