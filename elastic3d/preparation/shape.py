"""Everything that is stored of one shape, computed from its raw mesh, and how far the solid that is trained and scored
on is from that mesh. Views show the object alone, as a user would cut it out of a photo."""

from __future__ import annotations

import colorsys
import hashlib
import io
from dataclasses import dataclass

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from elastic3d.evaluation.metrics import chamfer_l1, correspond, f_score
from elastic3d.geometry.normalize import normalize_mesh, normalize_to
from elastic3d.geometry.options import BOX
from elastic3d.geometry.render import Camera, Light, Scene, frame, orbit_camera
from elastic3d.geometry.sampling import sample_sharp_edges, sample_surface
from elastic3d.geometry.solid import signed_distance, solidify
from elastic3d.preparation.options import ShapeConfig

CEILING_POINTS = 100_000
NEAR_SIGMAS = (0.01, 0.04)  # half of the near points each
SMOOTH_BELOW = 60_000  # faces; a finer mesh looks smooth with flat faces, and its vertex normals cost time

# (weight, hue, saturation, value) ranges of materials one meets in a home
_MATERIALS = (
    (0.35, (0.04, 0.11), (0.2, 0.7), (0.35, 0.95)),  # wood, leather, brass
    (0.35, (0.0, 1.0), (0.0, 0.08), (0.2, 1.0)),  # black to white, metal, porcelain
    (0.30, (0.0, 1.0), (0.15, 0.8), (0.4, 1.0)),  # fabric and plastic of any colour
)


@dataclass(frozen=True)
class RawShape:
    """A mesh as its source gives it (Y up, front +Z), with a part number for every face.

    `colours` (M, 3) uint8 are the sRGB colours of the parts where the source knows them.
    """

    mesh: trimesh.Trimesh
    part: NDArray[np.integer]  # (F,)
    colours: NDArray[np.uint8] | None = None


def random_colour(generator: np.random.Generator) -> NDArray[np.uint8]:
    """A plausible sRGB colour (3,) uint8."""
    weights = [row[0] for row in _MATERIALS]
    _, *ranges = _MATERIALS[generator.choice(len(_MATERIALS), p=weights)]
    hsv = [float(generator.uniform(*limits)) for limits in ranges]
    return np.round(255 * np.array(colorsys.hsv_to_rgb(*hsv))).astype(np.uint8)


def random_lights(camera: Camera, generator: np.random.Generator) -> list[Light]:
    """A key light of any hardness from above, seldom from behind the object; often one or two weaker ones too."""
    ambient = float(generator.uniform(0.3, 0.65))
    strength = float(generator.uniform(0.9, 1.25) - ambient)
    count = int(generator.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))
    shares = np.sort(generator.dirichlet(np.full(count, 2.0)))[::-1]
    lights = []
    for index, share in enumerate(shares):
        spread, low = (60, 0.35) if index == 0 else (100, -0.1)
        lights.append(
            Light(
                direction=_light_direction(camera, generator, spread, low),
                ambient=ambient if index == 0 else 0.0,
                diffuse=float(share * strength),
                specular=float(share * generator.uniform(0, 0.3) ** 1.5),
                shadows=bool(generator.random() < 0.7),
            )
        )
    return lights


def _light_direction(
    camera: Camera, generator: np.random.Generator, spread_deg: float, lowest: float
) -> tuple[float, float, float]:
    back = -camera.axes()[2]
    azimuth = np.arctan2(back[0], back[2]) + np.radians(generator.normal(0, spread_deg))
    height = generator.uniform(lowest, 0.95)
    side = np.sqrt(1 - height**2)
    return float(side * np.sin(azimuth)), float(height), float(side * np.cos(azimuth))


def view_cameras(mesh: trimesh.Trimesh, count: int, generator: np.random.Generator) -> list[Camera]:
    """Cameras all round, two thirds of them in front; the first one sees the front at an angle.

    Elevation -10 to 60 degrees, angle of view 15 to 65 degrees (most 25 to 50), the object fills 80 to 95 % of the
    frame.
    """
    front = max(1, round(count * 2 / 3))
    azimuths = [float(generator.choice([-1, 1]) * generator.uniform(20, 50))]
    azimuths += [-90 + 180 * (i + generator.random()) / (front - 1) for i in range(front - 1)]
    azimuths += [90 + 180 * (i + generator.random()) / (count - front) for i in range(count - front)]
    vertices = np.asarray(mesh.vertices)
    outline = vertices[generator.permutation(len(vertices))[:4000]]
    extremes = np.concatenate([vertices.argmin(axis=0), vertices.argmax(axis=0)])
    outline = np.concatenate([outline, vertices[extremes]])
    cameras = []
    for index, azimuth in enumerate(azimuths[:count]):
        elevation = generator.uniform(10, 30) if index == 0 else generator.uniform(-10, 60)
        fov = generator.uniform(25, 50) if generator.random() < 0.8 else generator.uniform(15, 65)
        start = orbit_camera(azimuth, elevation, 4.0, float(fov))
        cameras.append(frame(start, outline, fill=float(generator.uniform(0.8, 0.95))))
    return cameras


def render_views(
    shape: RawShape, count: int, size: int, generator: np.random.Generator
) -> tuple[list[bytes], NDArray[np.float32]]:
    """`count` RGBA PNGs and their cameras (V, 8): eye 3, target 3, fov in degrees, elevation in degrees.

    Half of the views show the shape's own colours (the source's, or a palette drawn once), half a fresh
    palette.
    """
    parts = int(shape.part.max()) + 1
    own = np.stack([random_colour(generator) for _ in range(parts)])
    if shape.colours is not None:
        own = shape.colours
    scene = Scene(shape.mesh, smooth=len(shape.mesh.faces) < SMOOTH_BELOW)
    images, rows = [], []
    for camera in view_cameras(shape.mesh, count, generator):
        fresh = np.stack([random_colour(generator) for _ in range(parts)])
        palette = own if generator.random() < 0.5 else fresh
        scene.face_colours = palette[shape.part]
        pixels = scene.render(camera, size, random_lights(camera, generator)).colour
        images.append(encode_png(pixels))
        elevation = np.degrees(np.arcsin(np.clip(-camera.axes()[2, 1], -1, 1)))
        rows.append([*camera.eye, *camera.target, camera.fov_deg, elevation])
    return images, np.array(rows, np.float32).reshape(count, 8)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """RGBA (H, W, 4) as the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


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
    points, normals = sample_surface(solid, config.surface_points, seed)
    near = _near(solid, config.near_points, seed, generator)
    volume = generator.uniform(-BOX, BOX, (config.volume_points, 3))
    stored = np.concatenate([near, volume]).astype(np.float16)
    measured = _half(stored, signed_distance(solid, stored)[:, None])
    arrays: dict[str, NDArray[np.generic]] = {
        "surface": _half(points, normals),
        "sharp": _half(*sample_sharp_edges(solid, config.sharp_points, seed)),
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
        arrays["solid_vertices"] = np.asarray(solid.vertices, np.float32)
        arrays["solid_faces"] = np.asarray(solid.faces, np.int32)
    return arrays


def _near(
    solid: trimesh.Trimesh, count: int, seed: int, generator: np.random.Generator
) -> NDArray[np.floating]:
    points, _ = sample_surface(solid, count, seed + 1)
    sigma = np.where(np.arange(count) % 2 == 0, *NEAR_SIGMAS)[:, None]
    return np.clip(points + sigma * generator.standard_normal((count, 3)), -BOX, BOX)


def _half(*columns: NDArray[np.floating]) -> NDArray[np.float16]:
    return np.concatenate([column.astype(np.float16) for column in columns], axis=1)


@dataclass(frozen=True)
class Ceiling:
    """Scores of an outer surface against its raw mesh, in units where the raw mesh's longest side is 2."""

    chamfer_l1: float  # both directions, summed
    f_score_02: float  # at 0.02
    f_score_05: float  # at 0.05
    volume_ratio: float | None  # solid over raw; None unless the raw mesh is watertight


def measure_ceiling(raw: RawShape, resolution: int = 128) -> Ceiling:
    """The best scores against the raw mesh that a method which reproduces the solid can reach."""
    mesh, _ = normalize_mesh(raw.mesh)
    solid = solidify(mesh, resolution)
    truth, outer = normalize_to(mesh, solid)
    pairs = correspond(
        sample_surface(outer, CEILING_POINTS, 0)[0], sample_surface(truth, CEILING_POINTS, 1)[0]
    )
    return Ceiling(
        chamfer_l1=chamfer_l1(pairs),
        f_score_02=f_score(pairs, 0.02),
        f_score_05=f_score(pairs, 0.05),
        volume_ratio=float(solid.volume / mesh.volume) if mesh.is_volume else None,
    )
