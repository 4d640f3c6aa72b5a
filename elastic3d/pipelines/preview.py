"""A turntable strip of a mesh, to look at without a viewer."""

from __future__ import annotations

import numpy as np
import trimesh
from PIL import Image
from trimesh.visual import ColorVisuals

from elastic3d.geometry.render import Camera, Light, Scene, ring_cameras


def turntable(
    mesh: trimesh.Trimesh, views: int = 8, size: int = 256, image: Image.Image | None = None
) -> Image.Image:
    """Views from all around, the first from the front, in a row on white: RGB, `size` high, as wide for each view.

    `image`, as the model saw it, comes before them. The light turns with the camera, so that all sides are as bright.
    Vertex colours are shown where there are any.
    """
    placed = mesh.copy()
    placed.apply_translation(-mesh.bounds.mean(axis=0))
    placed.apply_scale(1.18 / float(np.linalg.norm(placed.vertices, axis=1).max()))  # fits from every side
    visual = placed.visual
    colours = None
    if isinstance(visual, ColorVisuals) and visual.kind == "vertex":
        colours = visual.face_colors[:, :3]
    scene = Scene(placed, colours)
    tiles = (
        [image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)] if image is not None else []
    )
    for camera in ring_cameras(views, elevation_deg=20, distance=3.6, fov_deg=40):
        colour = scene.render(camera, size, light_beside(camera)).colour
        tiles.append(Image.fromarray(np.asarray(colour)))
    strip = Image.new("RGBA", (len(tiles) * size, size), "white")
    for i, tile in enumerate(tiles):
        strip.alpha_composite(tile, (i * size, 0))
    return strip.convert("RGB")


def light_beside(camera: Camera) -> Light:
    """A light above the left shoulder of whoever looks, without shadows."""
    right, up, forward = camera.axes()
    x, y, z = -0.5 * right + 0.6 * up - forward
    return Light(direction=(float(x), float(y), float(z)), shadows=False)
