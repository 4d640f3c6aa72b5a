import numpy as np
import pytest
import torch

from elastic3d.errors import NoSurfaceError, UserError
from elastic3d.geometry.decode import node_points
from elastic3d.geometry.options import BOX, SurfaceMethod
from elastic3d.geometry.surface import extract_surface


def works(method: SurfaceMethod) -> bool:
    try:
        extract_surface(np.pad(np.ones((1, 1, 1)), 1, constant_values=-1), method=method)
    except UserError:
        return False
    return True


METHODS = [
    pytest.param(m, marks=pytest.mark.skipif(not works(m), reason=f"{m.value} is not usable here"))
    for m in SurfaceMethod
]


def sphere_field(resolution: int, centre: np.ndarray, radius: float) -> np.ndarray:
    axis = np.linspace(-BOX, BOX, resolution + 1)
    x, y, z = np.meshgrid(*(axis - c for c in centre), indexing="ij", sparse=True)
    return (radius - np.sqrt(x**2 + y**2 + z**2)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("resolution", [64, 128, 256])
def test_sphere_is_placed_within_a_tenth_of_a_voxel(method: SurfaceMethod, resolution: int) -> None:
    centre, radius = np.array([0.1, -0.2, 0.05]), 0.6
    mesh = extract_surface(sphere_field(resolution, centre, radius), method=method)
    voxel = 2 * BOX / resolution
    distance = np.linalg.norm(mesh.vertices - centre, axis=1)
    assert abs(distance - radius).max() < 0.1 * voxel
    assert abs(mesh.bounds.mean(axis=0) - centre).max() < 0.1 * voxel
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=2e-3), "outward winding, whole volume"
    assert mesh.is_watertight and mesh.is_winding_consistent


@pytest.mark.parametrize("method", METHODS)
def test_axes_keep_their_order_and_sides(method: SurfaceMethod) -> None:
    points = node_points(torch.arange(49**3), 48)
    half, centre = torch.tensor([0.2, 0.4, 0.6]), torch.tensor([0.3, -0.2, 0.1])
    field = -(torch.abs(points - centre) - half).amax(dim=-1).reshape(49, 49, 49)
    mesh = extract_surface(field, method=method)
    np.testing.assert_allclose(mesh.bounds, torch.stack([centre - half, centre + half]), atol=0.1 * 2.02 / 48)


@pytest.mark.parametrize("method", METHODS)
def test_solid_leaving_the_cube_is_closed_at_its_face(method: SurfaceMethod) -> None:
    field = sphere_field(32, np.array([1.0, 0.0, 0.0]), 0.5)
    mesh = extract_surface(field, method=method)
    assert mesh.is_watertight
    assert mesh.bounds[1, 0] == pytest.approx(BOX, abs=0.1 * 2.02 / 32)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_no_surface(method: SurfaceMethod, value: float) -> None:
    with pytest.raises(NoSurfaceError, match="no surface"):
        extract_surface(np.full((9, 9, 9), value), method=method)
    shell = np.full((9, 9, 9), -1.0)
    shell[0] = 1.0
    with pytest.raises(NoSurfaceError, match="only on its faces"):
        extract_surface(shell, method=method)


def test_bad_fields() -> None:
    field = sphere_field(8, np.zeros(3), 0.5)
    field[0, 0, :3] = [np.nan, np.inf, np.nan]
    with pytest.raises(ValueError, match="3 of 729 values that are not finite"):
        extract_surface(field)
    with pytest.raises(ValueError, match=r"\(4, 4, 5\), expected a cube"):
        extract_surface(np.zeros((4, 4, 5)))
    with pytest.raises(ValueError, match="cubes"):
        extract_surface(sphere_field(8, np.zeros(3), 0.5), method="cubes")


def test_grid_order_and_ends() -> None:
    points = node_points(torch.arange(5**3), 4).reshape(5, 5, 5, 3)
    assert torch.equal(points[0, 0, 0], torch.full((3,), -BOX))
    assert torch.equal(points[4, 4, 4], torch.full((3,), BOX))
    assert points[3, 1, 2].tolist() == pytest.approx([BOX / 2, -BOX / 2, 0])
    assert torch.equal(node_points(torch.tensor([3 * 25 + 1 * 5 + 2]), 4)[0], points[3, 1, 2])
