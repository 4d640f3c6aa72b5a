from collections.abc import Callable

import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from torch import Tensor

from elastic3d.errors import NoSurfaceError
from elastic3d.geometry.decode import decode_field, node_points
from elastic3d.geometry.options import BOX, DecodeConfig
from elastic3d.geometry.surface import extract_surface

Field = Callable[[Tensor], Tensor]


def box(half: list[float], centre: list[float], turn: int | None = None) -> Field:
    axes = torch.eye(3)
    if turn is not None:
        axes = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(turn)))[0]

    def field(points: Tensor) -> Tensor:
        q = ((points - torch.tensor(centre)) @ axes).abs() - torch.tensor(half)
        return -(q.clamp(min=0).norm(dim=-1) + q.amax(dim=-1).clamp(max=0))

    return field


def rod(start: list[float], end: list[float], radius: float) -> Field:
    a, along = torch.tensor(start), torch.tensor(end) - torch.tensor(start)

    def field(points: Tensor) -> Tensor:
        t = (((points - a) * along).sum(-1) / along.square().sum()).clamp(0, 1)
        return radius - (points - a - t[:, None] * along).norm(dim=-1)

    return field


def torus(major: float, minor: float) -> Field:
    def field(points: Tensor) -> Tensor:
        return minor - torch.hypot(points[:, [0, 2]].norm(dim=-1) - major, points[:, 1] - 0.1)

    return field


def spheres(count: int, radius: float, seed: int) -> Field:
    centres = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) * 1.8 - 0.9

    def field(points: Tensor) -> Tensor:
        distance = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
        return radius - distance.amin(dim=-1)

    return field


def network(seed: int, frequency: float = 3.0) -> Field:
    """A random field as a network makes it: smooth, wavy, of no known scale."""
    generator = torch.Generator().manual_seed(seed)
    wave, hidden, out = (torch.randn(*s, generator=generator) for s in [(3, 16), (32, 32), (32, 1)])

    def field(points: Tensor) -> Tensor:
        x = points @ (wave * frequency)
        x = torch.relu(torch.cat([x.sin(), x.cos()], dim=-1) @ (hidden / 4))
        return (x @ (out / 6))[:, 0] - 1.5 * (points.norm(dim=-1) - 0.6)

    return field


def union(*fields: Field) -> Field:
    return lambda points: torch.stack([field(points) for field in fields]).amax(dim=0)


def truncated(field: Field, width: float) -> Field:
    """As learned fields are: proportional to the distance near the surface, flat beyond `width`."""
    return lambda points: 8 * torch.tanh(field(points) / width)


RESOLUTION, COARSE = 96, 24
VOXEL = 2 * BOX / RESOLUTION
LEG = 0.02
TABLE = union(
    box([0.8, 0.02, 0.6], [0, 0.5, 0]),
    *[rod([x, -0.5, z], [x, 0.5, z], LEG) for x in (-0.77, 0.771) for z in (-0.57, 0.563)],
)
SHAPES: dict[str, Field] = {
    "table on thin legs": TABLE,
    "slanted rods": union(
        rod([-0.9, -0.8, 0.1], [0.7, 0.9, -0.6], LEG), rod([0.9, 0, -0.8], [-0.3, -0.9, 0.8], LEG)
    ),
    "plate between nodes": box([0.7, 0.6, 0.4 * VOXEL], [0, 0, 2 * VOXEL]),
    "turned plate": box([0.7, 0.6, 0.75 * VOXEL], [0, 0, 0], turn=1),
    "plate close to a body": union(
        box([0.5, 0.5, 0.3], [0, 0, 0]), box([0.6, 0.6, 0.45 * VOXEL], [0, 0, 0.3 + 3 * VOXEL])
    ),
    "wire": torus(0.7, LEG),
    "floaters": spheres(30, 1.5 * VOXEL, seed=3),
    "thin shell": lambda p: 1.2 * VOXEL - box([0.6, 0.4, 0.5], [0, 0, 0], turn=2)(p).abs(),
    "network": network(0),
    "wavy network": network(1, frequency=8),
}


def full_grid(field: Field, resolution: int) -> Tensor:
    points = node_points(torch.arange((resolution + 1) ** 3), resolution)
    values = [field(chunk) for chunk in points.split(1 << 19)]
    return torch.cat(values).reshape((resolution + 1,) * 3)


def chamfer(a: trimesh.Trimesh, b: trimesh.Trimesh) -> float:
    """Chamfer-L1 of the vertices: exactly 0 for equal meshes."""
    there, back = cKDTree(b.vertices).query(a.vertices)[0], cKDTree(a.vertices).query(b.vertices)[0]
    return float(there.mean() + back.mean())


@pytest.mark.parametrize("kind", ["distance", "truncated"])
@pytest.mark.parametrize("name", SHAPES)
def test_mesh_is_that_of_the_full_grid(name: str, kind: str) -> None:
    field = SHAPES[name]
    if kind == "truncated":
        field = truncated(field, 1.0 if "network" in name else 0.11)
    config = DecodeConfig(resolution=RESOLUTION, coarse_resolution=COARSE, tolerance=0)
    values, stats = decode_field(field, config)
    exact = full_grid(field, RESOLUTION)
    assert torch.equal(values > 0, exact > 0), "every node has the right side"
    assert chamfer(extract_surface(values), extract_surface(exact)) < 0.01 * VOXEL
    assert stats.queries == sum(stats.queries_per_level) < exact.numel() / 4


def test_default_at_256_is_exact_and_fifteen_times_cheaper() -> None:
    field = truncated(union(torus(0.7, 0.015), spheres(1, 0.012, seed=0)), 0.05)
    values, stats = decode_field(field, DecodeConfig(tolerance=0))
    exact = full_grid(field, 256)
    assert torch.equal(values > 0, exact > 0)
    assert chamfer(extract_surface(values), extract_surface(exact)) < 0.1 * 2 * BOX / 256
    assert stats.resolutions == [32, 64, 128, 256]
    for shape in (TABLE, SHAPES["thin shell"]):
        _, stats = decode_field(truncated(shape, 0.05), DecodeConfig())
        assert stats.queries * 15 < exact.numel()


@settings(max_examples=10, deadline=None)
@given(
    ends=st.lists(st.floats(-0.85, 0.85), min_size=6, max_size=6),
    radius=st.floats(0.75, 3),
    width=st.floats(0.12, 1),
)
def test_no_rod_or_floater_is_lost(ends: list[float], radius: float, width: float) -> None:
    """Radius in voxels of a grid of 64, seen from 16 cells a side; the field flattens after two of those."""
    shape = rod(ends[:3], [end + 1e-3 for end in ends[3:]], radius * 2 * BOX / 64)
    field = truncated(shape, max(width, 2 * 2 * BOX / 16))
    values, _ = decode_field(field, DecodeConfig(resolution=64, coarse_resolution=16, tolerance=0))
    assert torch.equal(values > 0, full_grid(field, 64) > 0)


def test_calls_are_bounded_and_nothing_is_refined_where_there_is_nothing() -> None:
    sizes = []

    def counted(points: Tensor) -> Tensor:
        sizes.append(len(points))
        assert points.dtype == torch.float32 and points.shape[1:] == (3,)
        return network(0)(points)

    config = DecodeConfig(resolution=64, coarse_resolution=16, max_points=3000)
    _, stats = decode_field(counted, config)
    assert max(sizes) <= 3000 and sum(sizes) == stats.queries
    values, nothing = decode_field(lambda points: -torch.ones(len(points)), config)
    assert nothing.queries == 17**3 < stats.queries
    with pytest.raises(NoSurfaceError):
        extract_surface(values)


@pytest.mark.parametrize(
    ("resolution", "coarse", "levels"),
    [(256, 64, [64, 128, 256]), (96, 24, [24, 48, 96]), (100, 30, [50, 100]), (63, 8, [63]), (64, 64, [64])],
)
def test_levels(resolution: int, coarse: int, levels: list[int]) -> None:
    values, stats = decode_field(
        box([0.5, 0.5, 0.5], [0, 0, 0]),
        DecodeConfig(resolution=resolution, coarse_resolution=coarse),
    )
    assert values.shape == (resolution + 1,) * 3 and stats.resolutions == levels
    assert stats.queries < values.numel() or len(levels) == 1


INTERPOLATED = [
    (name, width)
    for name in SHAPES
    for width in (0.11, 1.0)
    # left out: a sphere of 1.5 cells is nothing but curvature, and waves of 0.11 are as long as a coarse cell
    if name != "floaters" and (name, width) != ("wavy network", 0.11)
]


@pytest.mark.parametrize(("name", "width"), INTERPOLATED)
def test_an_interpolated_last_level_is_less_than_a_tenth_of_a_cell_off(name: str, width: float) -> None:
    field = truncated(SHAPES[name], width)
    values, stats = decode_field(field, DecodeConfig(resolution=128))
    exact, whole = decode_field(field, DecodeConfig(resolution=128, tolerance=0))
    assert chamfer(extract_surface(values), extract_surface(exact)) < 0.1 * 2 * BOX / 128
    assert stats.queries < 1.02 * whole.queries, "where nothing is sure, only corners of cells are added"


def test_a_smooth_field_needs_few_queries_on_the_last_level() -> None:
    field = truncated(torus(0.6, 0.25), 0.2)
    config = DecodeConfig(resolution=128)
    _, stats = decode_field(field, config)
    _, exact = decode_field(field, DecodeConfig(resolution=128, tolerance=0))
    assert stats.queries_per_level[-1] < 0.15 * exact.queries_per_level[-1]


def test_progress_tells_every_level() -> None:
    told: list[tuple[int, int]] = []
    config = DecodeConfig(resolution=64, coarse_resolution=16)
    decode_field(torus(0.6, 0.2), config, on_level=lambda *level: told.append(level))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_bad_fields_and_options() -> None:
    config = DecodeConfig(resolution=16, coarse_resolution=8)

    def broken(points: Tensor) -> Tensor:
        return torch.where(points.amin(dim=-1) > 0.7, torch.nan, 0.5 - points.norm(dim=-1))

    with pytest.raises(ValueError, match="not finite at 8 of 729 points"):
        decode_field(broken, config)
    with pytest.raises(ValueError, match=r"shape \(729, 1\), expected \(729,\)"):
        decode_field(lambda points: points[:, :1], config)
    options = [("resolution", 1024), ("resolution", 4), ("max_points", 0), ("thin_slack", -1)]
    for option, value in options:
        with pytest.raises(ValueError, match=f"{option} is {value}"):
            DecodeConfig(**{option: value})
