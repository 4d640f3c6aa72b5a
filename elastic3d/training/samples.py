"""Images of meshes for the training record."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import trimesh
from torch import Tensor

from elastic3d.geometry.decode import decode_meshes
from elastic3d.geometry.options import DecodeConfig
from elastic3d.geometry.render import Scene, orbit_camera
from elastic3d.models.shape_vae import ShapeVAE


def field_meshes(vae: ShapeVAE, latents: Tensor, resolution: int) -> list[trimesh.Trimesh | None]:
    """Meshes of DiT-space latents (B,N,C); None where a field has no surface."""
    tokens = vae.decode(latents)
    config = DecodeConfig(resolution=resolution)
    meshes = decode_meshes(vae.field(tokens), len(latents), config, latents.device)
    return [mesh if isinstance(mesh, trimesh.Trimesh) else None for mesh in meshes]


def mesh_image(mesh: trimesh.Trimesh | None, size: int = 160) -> np.ndarray:
    """A view from the front right (size, size, 3) uint8 on white; white where there is no mesh."""
    if mesh is None:
        return np.full((size, size, 3), 255, np.uint8)
    view = Scene(mesh).render(orbit_camera(30, 20, 3.4, 40), size)
    return on_white(view.colour)


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Straight-alpha RGBA (H,W,4) uint8 over white -> (H,W,3) uint8."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def contact_sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Images of one size (H,W,3) in rows of one length -> one image."""
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
