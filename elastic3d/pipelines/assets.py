"""The colours of a mesh, projected from the image that it was made from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import trimesh
from numpy.typing import NDArray

from elastic3d.errors import UserError
from elastic3d.geometry.colour import ImageColours, with_texture, with_vertex_colours
from elastic3d.geometry.pose import Pose, find_pose
from elastic3d.models.images import VIEW_NAMES, ImageInput, centred, cut_out, load_image
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines.options import AssetConfig, Texture

COLOURED_SUFFIXES = (".glb", ".ply", ".obj")
LEAST_SIDE, MOST_SIDE = 96, 768  # of the image whose colours are taken; its own where that lies between
BORDER = 0.1  # share of its side that stays free
_POOR_FIT = 0.75  # below this overlap of mask and mesh the colours are partly guessed


def check_asset(config: AssetConfig, suffix: str, uv: bool) -> None:
    """UserError where a file that ends in `suffix` can't hold what is asked for; before anything is generated."""
    if config.texture is Texture.none:
        return
    if suffix.lower() not in COLOURED_SUFFIXES:
        raise UserError(
            f"texture=project: {suffix} holds no colours, expected {', '.join(COLOURED_SUFFIXES)}"
        )
    if uv and suffix.lower() != ".glb":
        raise UserError(f"texture=project uv=true: {suffix} holds no texture, expected .glb (or uv=false)")


def coloured(
    mesh: trimesh.Trimesh, image: ImageInput, foreground: ForegroundConfig, config: AssetConfig
) -> tuple[trimesh.Trimesh, dict[str, object]]:
    """The mesh with the image's colours (as a texture if it has texture coordinates), and where the camera is."""
    try:
        pose, pixels = posed(mesh, image, foreground)
        colours = ImageColours(mesh, pose.camera, pixels)
    except ValueError as error:
        raise UserError(f"texture=project: {error}") from error
    has_uv = getattr(mesh.visual, "uv", None) is not None
    painted = (
        with_texture(mesh, colours, config.texture_size) if has_uv else with_vertex_colours(mesh, colours)
    )
    found: dict[str, object] = {
        "azimuth_deg": round(pose.azimuth_deg, 1),
        "elevation_deg": round(pose.elevation_deg, 1),
        "fov_deg": round(pose.camera.fov_deg, 1),
        "overlap": round(pose.overlap, 3),
    }
    if pose.overlap < _POOR_FIT:
        found["warning"] = (
            f"the mesh covers the object in the image by {pose.overlap:.0%} only: colours may be misplaced"
        )
    return painted, found


def posed(
    mesh: trimesh.Trimesh, image: ImageInput, foreground: ForegroundConfig
) -> tuple[Pose, NDArray[np.uint8]]:
    """The camera of an image of a mesh, and what it sees: the object alone, RGBA (S, S, 4). ValueError if there is
    none."""
    pixels = object_pixels(image, foreground)
    return find_pose(mesh, pixels), pixels


def object_pixels(image: ImageInput, foreground: ForegroundConfig) -> NDArray[np.uint8]:
    """The object of a (front) image alone, RGBA (S, S, 4). UserError if there is none from the front."""
    if isinstance(image, Mapping):
        if VIEW_NAMES[0] not in image:
            raise UserError(
                f"there are images from {', '.join(image)}, expected one from the {VIEW_NAMES[0]}"
            )
        image = image[VIEW_NAMES[0]]
    cut = cut_out(load_image(image), foreground)
    left, top, right, bottom = cut.getchannel("A").getbbox() or (0, 0, *cut.size)
    side = round(max(right - left, bottom - top) / (1 - BORDER))
    return np.asarray(centred(cut, int(np.clip(side, LEAST_SIDE, MOST_SIDE)), BORDER))
