"""Rays through rendered views of a shape: where each runs through the box, and whether it meets the shape."""

from __future__ import annotations

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from elastic3d.errors import UserError
from elastic3d.geometry.options import BOX
from elastic3d.geometry.render import Camera
from elastic3d.training.datasets import Batch, PreparedShapes

VIEWS_STORED = ("views", "view_offsets", "cameras")


def view_rays(shapes: PreparedShapes, id: str, count: int, rng: np.random.Generator) -> Batch:
    """`ray_starts` and `ray_ends` (R,3), `covered` (R,): rays through random pixels of one random view of a shape, from
    where they enter the box to where they leave it, and 1 where the view shows the shape.

    UserError where the shape was prepared without views.
    """
    cameras, offsets = (shapes.read(id, name).numpy() for name in ("cameras", "view_offsets"))
    if not len(cameras):
        raise UserError(
            f"{id} has no views, expected some (shape.views=) for routing.mesh.silhouette above 0"
        )
    view = int(rng.integers(len(cameras)))
    data = shapes.read(id, "views").numpy()[offsets[view] : offsets[view + 1]].tobytes()
    shown = np.asarray(Image.open(io.BytesIO(data), formats=("PNG",)).convert("RGBA"))[..., 3] > 127
    x, y, z, *target, fov, _ = cameras[view].tolist()
    camera = Camera(eye=(x, y, z), target=(target[0], target[1], target[2]), fov_deg=fov)
    eye = np.array(camera.eye)
    pixels = rng.integers(len(shown), size=(4 * count, 2))
    directions = camera.rays(pixels + 0.5, len(shown))
    near, far = through_box(eye, directions)
    inside = np.flatnonzero(far > near)
    if not len(inside):
        raise UserError(f"{id} has a view {view} whose camera does not see the box")
    chosen = inside[:count] if len(inside) >= count else rng.choice(inside, count)
    starts, ends = (eye + t[chosen, None] * directions[chosen] for t in (near, far))
    covered = shown[tuple(pixels[chosen].T)]
    return {
        "ray_starts": torch.from_numpy(starts).float(),
        "ray_ends": torch.from_numpy(ends).float(),
        "covered": torch.from_numpy(covered).float(),
    }


def through_box(
    eye: NDArray[np.floating], directions: NDArray[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Distances (R,) from the eye (3,) along unit directions (R,3) at which rays enter and leave the box; the second is
    not the larger one where a ray misses it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        walls = (np.array([-BOX, BOX])[:, None, None] - eye) / directions
    low, high = np.nanmin(walls, axis=0), np.nanmax(walls, axis=0)
    return np.maximum(low.max(axis=1), 0.0), high.min(axis=1)
