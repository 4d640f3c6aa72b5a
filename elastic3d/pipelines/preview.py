"""A turntable strip of a mesh, to look at without a viewer."""

from __future__ import annotations

import numpy as np
import trimesh
from PIL import Image

from elastic3d.geometry.render import Scene, ring_cameras


def turntable(mesh: trimesh.Trimesh, views: int = 8, size: int = 256) -> Image.Image:
    """Views from all around, the first from the front, in a row on white: RGB, `views * size` x `size`."""
    placed = mesh.copy()
    placed.apply_translation(-mesh.bounds.mean(axis=0))
    placed.apply_scale(1.18 / float(np.linalg.norm(placed.vertices, axis=1).max()))  # fits from every side
    scene = Scene(placed)
    strip = Image.new("RGBA", (views * size, size), "white")
    for i, camera in enumerate(ring_cameras(views, elevation_deg=20, distance=3.6, fov_deg=40)):
        view = Image.fromarray(np.asarray(scene.render(camera, size).colour))
        strip.alpha_composite(view, (i * size, 0))
    return strip.convert("RGB")
