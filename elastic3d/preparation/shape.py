"""Everything that is stored of one shape, computed from its raw mesh."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from elastic3d.geometry.normalize import normalize_mesh
from elastic3d.geometry.options import BOX
from elastic3d.geometry.sampling import sample_sharp_edges, sample_surface
from elastic3d.geometry.solid import Solid, solidify
from elastic3d.preparation.options import ShapeConfig
from elastic3d.preparation.views import RawShape, render_views

NEAR_SIGMAS = (0.01, 0.04)  # half of the near points each


def item_seed(source: str, name: str, seed: int) -> int:
    """A seed of 32 bits that depends on nothing but the item and the run's seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}/{name}".encode()).digest()[:4], "big")


def prepare_shape(
    raw: RawShape, config: ShapeConfig, seed: int, keep_solid: bool = False
) -> dict[str, NDArray[np.generic]]:
    """The arrays of a shape, by the names that shards use. ValueError if the mesh has no surface.

    surface (P, 6) f16    uniform points and outward normals of the outer surface
    sharp (Q, 6) f16      the same along its sharp edges; (0, 6) if it has none
    near, volume (P, 4) f16   points and signed distance (positive inside) at exactly those rounded points
    views u8, view_offsets (V+1,), cameras (V, 8)   PNG files one after the other
    solid_vertices (V, 3) f32, solid_faces (F, 3) i32   the outer surface itself, if `keep_solid`
    """
    mesh, _ = normalize_mesh(raw.mesh)
    solid = solidify(mesh, config.resolution)
    generator = np.random.default_rng(seed)
    points, normals = sample_surface(solid.mesh, config.surface_points, seed)
    near = _near(solid, config.near_points, seed, generator)
    volume = generator.uniform(-BOX, BOX, (config.volume_points, 3))
    stored = np.concatenate([near, volume]).astype(np.float16)
    measured = _half(stored, solid.signed_distance(stored)[:, None])
    arrays: dict[str, NDArray[np.generic]] = {
        "surface": _half(points, normals),
        "sharp": _half(*sample_sharp_edges(solid.mesh, config.sharp_points, seed)),
        "near": measured[: config.near_points],
        "volume": measured[config.near_points :],
    }
    images, cameras = render_views(
        RawShape(mesh, raw.part, raw.colours), config.views, config.view_size, generator
    )
    arrays["views"] = np.frombuffer(b"".join(images), np.uint8)
    arrays["view_offsets"] = np.cumsum([0, *map(len, images)]).astype(np.int64)
    arrays["cameras"] = cameras
    if keep_solid:
        arrays["solid_vertices"] = np.asarray(solid.mesh.vertices, np.float32)
        arrays["solid_faces"] = np.asarray(solid.mesh.faces, np.int32)
    return arrays


def _near(solid: Solid, count: int, seed: int, generator: np.random.Generator) -> NDArray[np.floating]:
    points, _ = sample_surface(solid.mesh, count, seed + 1)
    sigma = np.where(np.arange(count) % 2 == 0, *NEAR_SIGMAS)[:, None]
    return np.clip(points + sigma * generator.standard_normal((count, 3)), -BOX, BOX)


def _half(*columns: NDArray[np.floating]) -> NDArray[np.float16]:
    return np.concatenate([column.astype(np.float16) for column in columns], axis=1)
