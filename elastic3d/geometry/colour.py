"""Colours of an image on a mesh: projected onto what the image shows, carried on to the rest.

What is seen takes the image's colour, less and less towards grazing views. The rest takes a mean of what was seen
nearby, where nearby counts position and normal, and what was seen counts at its mirror image too (left and right: most
objects are symmetric). Lighting is not removed: it is part of the colours.
"""

from __future__ import annotations

import numpy as np
import trimesh
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt, map_coordinates, maximum_filter
from scipy.spatial import cKDTree

from elastic3d.geometry.mesh_io import unit_normals
from elastic3d.geometry.render import Camera

Floats = NDArray[np.floating]

_GRAZING, _FACING = 0.1, 0.4  # cosine to the view at which the image does not count yet, and counts fully
_OUTLINE = 1.5  # pixels along the mask's edge that may hold the background's colour
_LIFT = 4e-3  # how far from the surface rays of visibility start
_NORMAL = 0.5  # distance that opposite normals make, over 2
_MIRRORED = 0.1  # distance that being seen on the other side alone makes
_NEIGHBOURS = 12
_PROBE = 160  # pixels a side of the view whose surface points are the ones that were seen


class ImageColours:
    """The colours of a mesh that an image shows through a camera.

    Args:
        mesh: in the model's frame, symmetric in x if at all.
        image: RGBA (S, S, 4); what is transparent or at the edge of the object gives no colour.

    Raises ValueError if the camera sees nothing of the mesh, or the image is transparent.
    """

    def __init__(self, mesh: trimesh.Trimesh, camera: Camera, image: NDArray[np.uint8]) -> None:
        self._camera = camera
        self._image = filled(image)
        self._rays = rtcore_scene.EmbreeScene()
        TriangleMesh(self._rays, np.ascontiguousarray(mesh.triangles, np.float32))
        points, normals = self._seen(mesh)
        weight = self.weight(points, normals)
        if not (weight > 0.5).any():
            weight = np.ones_like(weight)
        points, normals = points[weight > 0.5], normals[weight > 0.5]
        if not len(points):
            raise ValueError("the camera sees nothing of the mesh")
        self._known = np.tile(self.projected(points), (2, 1))
        flip = np.array([-1.0, 1.0, 1.0])
        keys = _key(points, normals), _key(points * flip, normals * flip)
        aside = np.repeat([0.0, _MIRRORED], len(points))[:, None]
        self._tree = cKDTree(np.concatenate([np.concatenate(keys), aside], axis=1))

    def at(self, points: Floats, normals: Floats) -> Floats:
        """sRGB colours (P, 3), 0 to 255, of surface points (P, 3) with unit normals (P, 3)."""
        return self.mixed(points, normals, self.carried(points, normals))

    def mixed(self, points: Floats, normals: Floats, rest: Floats) -> Floats:
        """As `at`, where what the image does not show has the colours `rest` (P, 3)."""
        weight = self.weight(points, normals)[:, None]
        return weight * self.projected(points) + (1 - weight) * rest

    def projected(self, points: Floats) -> Floats:
        """Colours (P, 3) of the image where points lie in it; at its edge beyond."""
        size = len(self._image)
        flat = self._camera.project(points)
        place = np.stack([(1 - flat[:, 1]) / 2 * size - 0.5, (1 + flat[:, 0]) / 2 * size - 0.5])
        channels = [map_coordinates(self._image[..., c], place, order=1, mode="nearest") for c in range(3)]
        return np.stack(channels, axis=1)

    def weight(self, points: Floats, normals: Floats) -> Floats:
        """How much the image says about points (P,): 1 where it shows them frontally, 0 where it does not."""
        towards = np.asarray(self._camera.eye) - points
        distance = np.linalg.norm(towards, axis=1)
        towards = towards / distance[:, None]
        rise = np.clip((np.einsum("pk,pk->p", towards, normals) - _GRAZING) / (_FACING - _GRAZING), 0, 1)
        origins = np.ascontiguousarray(points + _LIFT * (normals + towards), np.float32)
        ways = np.ascontiguousarray(towards, np.float32)
        hidden = np.asarray(self._rays.run(origins, ways, query="OCCLUDED")) >= 0 if len(points) else False
        return rise * rise * (3 - 2 * rise) * ~np.asarray(hidden, bool)

    def carried(self, points: Floats, normals: Floats) -> Floats:
        """Colours (P, 3) from what was seen nearby or mirrored."""
        keys = np.concatenate([_key(points, normals), np.zeros((len(points), 1))], axis=1)
        distance, index = self._tree.query(keys, k=min(_NEIGHBOURS, len(self._known)))
        distance, index = distance.reshape(len(points), -1), index.reshape(len(points), -1)
        share = 1 / (distance**2 + 1e-4)
        share /= share.sum(axis=1, keepdims=True)
        return np.einsum("pk,pkc->pc", share, self._known[index])

    def _seen(self, mesh: trimesh.Trimesh) -> tuple[Floats, Floats]:
        """Points (P, 3) and normals (P, 3) of the surface behind the pixels of a view."""
        rows, columns = np.divmod(np.arange(_PROBE**2), _PROBE)
        directions = self._camera.rays(np.stack([rows, columns], axis=1) + 0.5, _PROBE)
        origins = np.broadcast_to(np.array(self._camera.eye, np.float32), directions.shape)
        _, face, share = cast(self._rays, origins, directions)
        return interpolated(mesh, face, share)


def cast(
    rays: rtcore_scene.EmbreeScene, origins: Floats, directions: Floats
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """The rays (H,) that hit a mesh, the faces (H,), and where in them: barycentric coordinates (H, 3)."""
    found = rays.run(
        np.ascontiguousarray(origins, np.float32), np.ascontiguousarray(directions, np.float32), output=True
    )
    face = np.asarray(found["primID"]).astype(np.int64)
    hit = np.flatnonzero(face >= 0)
    u, v = (np.asarray(found[name], np.float64)[hit] for name in "uv")
    return hit, face[hit], np.stack([1 - u - v, u, v], axis=1)


def interpolated(mesh: trimesh.Trimesh, face: NDArray[np.int64], share: Floats) -> tuple[Floats, Floats]:
    """Points (P, 3) and unit normals (P, 3) at barycentric coordinates (P, 3) of faces (P,)."""
    corners = np.asarray(mesh.faces)[face]
    points = np.einsum("pk,pkc->pc", share, np.asarray(mesh.vertices)[corners])
    normals = np.einsum("pk,pkc->pc", share, unit_normals(mesh)[corners])
    return points, normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)


def filled(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The colours (S, S, 3) of an RGBA image, each pixel outside the object that of the nearest one well inside.

    ValueError for a transparent image.
    """
    mask = image[..., 3] >= 250
    mask = mask if mask.any() else image[..., 3] >= 128
    if not mask.any():
        raise ValueError("the image is transparent, expected an object")
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    ridge = mask & (depth >= maximum_filter(depth, 3))  # parts of few pixels keep their middle
    inside = (depth > _OUTLINE) | ridge
    rows, columns = distance_transform_edt(~inside, return_distances=False, return_indices=True)
    return image[rows, columns, :3].astype(np.float64)


def with_vertex_colours(mesh: trimesh.Trimesh, colours: ImageColours) -> trimesh.Trimesh:
    """The mesh with sRGB colours at its vertices."""
    normals = unit_normals(mesh)
    rgb = np.clip(np.round(colours.at(np.asarray(mesh.vertices), normals)), 0, 255).astype(np.uint8)
    result = trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=normals, process=False)
    result.visual = trimesh.visual.ColorVisuals(
        result, vertex_colors=np.concatenate([rgb, np.full((len(rgb), 1), 255, np.uint8)], axis=1)
    )
    return result


def with_texture(mesh: trimesh.Trimesh, colours: ImageColours, size: int) -> trimesh.Trimesh:
    """A mesh that has texture coordinates, with a baseColor texture of `size` x `size` pixels.

    What lies between the charts takes the colour of the nearest one, so that no seam shows when it is scaled down.
    """
    uv = np.asarray(mesh.visual.uv, np.float64)  # type: ignore[union-attr]  # as the caller says
    flat = trimesh.Trimesh(np.pad(uv, [(0, 0), (0, 1)]), mesh.faces, process=False)
    scene = rtcore_scene.EmbreeScene()
    TriangleMesh(scene, np.ascontiguousarray(flat.triangles, np.float32))
    rows, columns = np.divmod(np.arange(size * size), size)
    origins = np.stack([(columns + 0.5) / size, 1 - (rows + 0.5) / size, np.ones(size * size)], axis=1)
    texel, face, share = cast(scene, origins, np.broadcast_to([0.0, 0.0, -1.0], origins.shape))
    points, normals = interpolated(mesh, face, share)
    carried = colours.carried(np.asarray(mesh.vertices), unit_normals(mesh))
    rest = np.einsum("pk,pkc->pc", share, carried[np.asarray(mesh.faces)[face]])
    pixels, covered = np.zeros((size * size, 3)), np.zeros(size * size, bool)
    pixels[texel], covered[texel] = colours.mixed(points, normals, rest), True
    near = distance_transform_edt(~covered.reshape(size, size), return_distances=False, return_indices=True)
    image = np.clip(np.round(pixels), 0, 255).astype(np.uint8).reshape(size, size, 3)[near[0], near[1]]
    result = mesh.copy()
    result.visual = trimesh.visual.TextureVisuals(
        uv=uv,
        material=trimesh.visual.material.PBRMaterial(
            name="image", baseColorTexture=Image.fromarray(image), metallicFactor=0.0, roughnessFactor=0.9
        ),
    )
    return result


def _key(points: Floats, normals: Floats) -> Floats:
    return np.concatenate([points, _NORMAL / 2 * normals], axis=1)
