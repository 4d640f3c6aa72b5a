"""How well the colours that `texture=project` puts on generated meshes hold, on renders of held-out shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from elastic3d.evaluation.views import psnr
from elastic3d.geometry.colour import ImageColours, with_vertex_colours
from elastic3d.geometry.normalize import normalize_mesh
from elastic3d.geometry.render import Camera, Light, Scene, frame, orbit_camera
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines.assets import posed
from elastic3d.preparation.shape import RawShape, random_colour, random_lights, view_cameras

SIZE = 224  # pixels a side of the views
TURNS = (-120.0, -60.0, 60.0, 120.0, 180.0)  # degrees from the input view to the unseen ones
SKY = [Light(ambient=1.0, diffuse=0, specular=0, shadows=False)]  # own colours are shown as they are

Floats = NDArray[np.floating]


def measure_shape(
    raw: RawShape, make: Callable[[Image.Image], trimesh.Trimesh], seed: int
) -> dict[str, float]:
    """Figures of one shape: its image is rendered, `make` makes a mesh of that, and the mesh is coloured and seen
    again.

    `psnr`: of the input view in dB, where mesh and mask overlap, and how far they do (`overlap`, an IoU). `rmse` and
    `rmse_mean`: of unseen views against the shape's own, colours from 0 to 1, by the mesh's colours and by the mean
    colour of the image, where both are seen; the light comes along with the camera, as in the training data. `fixed`
    and `fixed_mean`: the same where it stays, so that what was lit is seen from its dark side. Raises whatever `make`
    raises.
    """
    shape, colours = normalize_mesh(raw.mesh)[0], _own_colours(raw, seed)
    truth, generator = Scene(shape, colours), np.random.default_rng(seed)
    (camera,) = view_cameras(shape, 1, generator)
    lights = random_lights(camera, np.random.default_rng([seed, 2]))
    image = np.asarray(truth.render(camera, SIZE, lights).colour)
    mesh = make(Image.fromarray(image))
    pose, pixels = posed(mesh, Image.fromarray(image), ForegroundConfig())
    made = with_vertex_colours(mesh, ImageColours(mesh, pose.camera, pixels))
    assert isinstance(made.visual, trimesh.visual.ColorVisuals)
    scene = Scene(made, np.asarray(made.visual.face_colors)[:, :3])
    error = _differences(scene, pose.camera, pixels)
    mean = pixels[pixels[..., 3] >= 250][:, :3].mean(axis=0)
    errors: dict[str, list[Floats]] = {"rmse": [], "rmse_mean": [], "fixed": [], "fixed_mean": []}
    for turn in TURNS:
        unseen = _turned(camera, shape, turn)
        moved = random_lights(unseen, np.random.default_rng([seed, 2]))
        for name, light in (("rmse", moved), ("fixed", lights)):
            target = np.asarray(truth.render(unseen, SIZE, light).colour)
            errors[name].append(_differences(scene, unseen, target).ravel())
            errors[f"{name}_mean"].append(_differences(scene, unseen, target, mean).ravel())
    found = {name: float(np.sqrt(np.mean(np.concatenate(parts) ** 2))) for name, parts in errors.items()}
    return {"psnr": psnr(float(np.mean(error**2))), "overlap": pose.overlap, **found}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over shapes, the lowest PSNR, and on how many shapes unseen views are nearer than the mean colour."""
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    figures = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in names}
    figures["psnr_lowest"] = round(min(row["psnr"] for row in rows), 2)
    for name in ("rmse", "fixed"):
        figures[f"nearer_{name}"] = sum(row[name] < row[f"{name}_mean"] for row in rows)
    return {"shapes": len(rows), **figures}


def _own_colours(raw: RawShape, seed: int) -> NDArray[np.uint8]:
    """Of the faces (F, 3): the source's, or a palette."""
    if raw.colours is not None:
        return raw.colours[raw.part]
    generator = np.random.default_rng([seed, 1])
    return np.stack([random_colour(generator) for _ in range(int(raw.part.max()) + 1)])[raw.part]


def _turned(camera: Camera, shape: trimesh.Trimesh, degrees: float) -> Camera:
    """The camera moved around the shape, which stays in view."""
    x, y, z = np.asarray(camera.eye) - np.asarray(camera.target)
    azimuth = np.degrees(np.arctan2(x, z)) + degrees
    elevation = np.degrees(np.arctan2(y, np.hypot(x, z)))
    return frame(
        orbit_camera(float(azimuth), float(elevation), 4.0, camera.fov_deg), np.asarray(shape.vertices), 0.85
    )


def _differences(
    scene: Scene, camera: Camera, target: NDArray[np.uint8], colour: Floats | None = None
) -> Floats:
    """Colours (P, 3) of a scene, or one colour for all, less those of an RGBA image, where both are seen; 0 to 1."""
    view = scene.render(camera, len(target), SKY)
    both = np.asarray(view.silhouette) & (target[..., 3] >= 250)
    shown = np.asarray(view.colour)[both][:, :3].astype(float) if colour is None else colour
    return (shown - target[both][:, :3]) / 255
