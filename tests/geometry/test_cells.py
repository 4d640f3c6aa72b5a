import pytest
import torch

from elastic3d.geometry.decode import crossed_cells, halved, reducible
from elastic3d.geometry.surface import extract_surface


def cubic(points: torch.Tensor) -> torch.Tensor:
    """A cubic in each coordinate, which four nodes in a row determine."""
    x, y, z = points.unbind(-1)
    return x**3 - 2 * x * y**2 + z**2 * y - 0.3 * x * y * z + 0.1


def grid(nodes: int) -> torch.Tensor:
    axis = torch.linspace(-1, 1, nodes, dtype=torch.float64)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


def test_crossed_cells_are_those_with_corners_on_both_sides():
    inside = torch.rand(6, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.8
    found = {tuple(cell) for cell in crossed_cells(inside).tolist()}
    for x in range(5):
        for y in range(5):
            for z in range(5):
                cell = inside[x : x + 2, y : y + 2, z : z + 2]
                assert ((x, y, z) in found) == bool(cell.any() and not cell.all())


def test_a_cubic_field_is_halved_exactly():
    coarse, fine = cubic(grid(9)), cubic(grid(17))
    cells = torch.cartesian_prod(*[torch.arange(1, 7)] * 3)
    values, _ = halved(coarse, cells, 0.2)
    for (x, y, z), found in zip(cells.tolist(), values, strict=True):
        torch.testing.assert_close(found, fine[2 * x : 2 * x + 3, 2 * y : 2 * y + 3, 2 * z : 2 * z + 3])


def test_doubt_is_where_linear_interpolation_moves_a_crossing():
    axis = torch.arange(6, dtype=torch.float64)
    cells = torch.tensor([[2, 2, 2]])
    straight = (axis - 2.4)[:, None, None].expand(6, 6, 6)
    assert not halved(straight, cells, 1e-6)[1].any()
    bent = (straight + 0.3 * straight**2).contiguous()
    off = 0.3 * 0.25  # of the middle node: a second difference of 0.6, an eighth of it
    length = bent[3, 0, 0] - (0.1 + 0.3 * 0.01)  # of the crossed half edge, from x = 2 to 2.5
    length = (0.1 + 0.3 * 0.01) - bent[2, 0, 0]
    share = float(off / length)
    assert not halved(bent, cells, 1.01 * share)[1].any()
    doubt = halved(bent, cells, 0.99 * share)[1][0]
    assert doubt[:2].all() and not doubt[2].any(), "both ends of the crossed half, along the others"


@pytest.mark.parametrize("cell", [[0, 2, 2], [2, 2, 4]])
def test_the_border_is_in_doubt(cell):
    field = (torch.arange(6.0) - 2.4)[:, None, None].expand(6, 6, 6)
    assert halved(field, torch.tensor([cell]), 1.0)[1].all()


def test_a_surface_of_too_many_faces_is_taken_from_fewer_nodes(monkeypatch):
    noise = torch.randn(65, 65, 65, generator=torch.Generator().manual_seed(0))
    whole = len(extract_surface(noise).faces)
    assert whole > 100_000
    monkeypatch.setattr("elastic3d.geometry.decode.MANY_FACES", whole // 2)
    assert torch.equal(reducible(noise, 1000), noise[::2, ::2, ::2])
    assert len(extract_surface(reducible(noise, 1000)).faces) < whole // 2
    for max_faces in (0, whole // 4):  # never reduced, or by too little
        assert reducible(noise, max_faces) is noise
    ball = 0.5 - grid(65).norm(dim=-1)
    assert reducible(ball, 1000) is ball


def test_a_smooth_surface_keeps_its_grid_and_its_thin_parts(monkeypatch):
    """However fine it is: a ball that fills the cube, and two plates as thin as a cell, both of too many faces."""
    points = grid(129)
    ball = 0.97 - points.norm(dim=-1)
    distance = (points[..., 2].abs() - 0.5 - 1 / 64).abs()
    plates = torch.minimum(1 / 64 - distance, 0.9 - points[..., :2].abs().amax(dim=-1))
    monkeypatch.setattr("elastic3d.geometry.decode.MANY_FACES", 40_000)
    for values in (ball, plates):
        assert len(extract_surface(values).faces) > 40_000
        assert reducible(values, 1000) is values
