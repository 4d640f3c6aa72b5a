"""From a field to meshes, coarse to fine: evaluate only near the surface, get the mesh of the full grid.

A level starts from the level below, interpolated to twice the resolution, and evaluates
1. the ends of grid edges whose interpolated signs differ: the surface as foreseen;
2. the surroundings of coarse edges towards which the field heads for zero from both sides: a part thinner
   than a cell leaves no other trace;
3. what the exact values show to lie at the surface after all, until every edge that the surface crosses has
   exact values at both ends: a surface found anywhere is followed everywhere.
Marching cubes places its vertices on crossed edges, so the mesh is the full grid's, unless a component as
small as a coarse cell stays unseen.

The last level has more crossed edges than all others together, and most of the field there is smooth. With
`tolerance` above 0 it is interpolated cubically in the cells that the surface crosses, and evaluated where a vertex
would move by more than the tolerance if it were interpolated linearly, around thin parts, and on from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.geometry.options import BOX, DecodeConfig

FieldFunction = Callable[[Tensor], Tensor]
"""field(points (P,3) float32) -> values (P,), positive inside."""

MANY_FACES = 1_000_000  # take about three seconds to reduce
_FULL = 24  # faces a squared cell of the grid's side: twice those of the surface of the whole cube
_CELLS = 1 << 15  # interpolated at a time
_BLOCK = (
    8  # nodes a side of the blocks in which the field is evaluated: points that lie close together are faster
)


@dataclass
class DecodeStats:
    """What decoding one sample cost: the levels' resolutions and field evaluations, coarse to fine."""

    resolutions: list[int]
    queries_per_level: list[int]

    @property
    def queries(self) -> int:
        """Field evaluations in all."""
        return sum(self.queries_per_level)


def decode_field(
    field: FieldFunction,
    config: DecodeConfig,
    device: torch.device | str = "cpu",
    on_level: Callable[[int, int], object] = lambda *_: None,
) -> tuple[Tensor, DecodeStats]:
    """Values (R+1, R+1, R+1) float32 of one field: right at the surface, elsewhere only of the right sign.

    At the surface they are exact, or as far off as `config.tolerance` allows. `on_level` is called with (levels
    done, levels).

    Raises:
        ValueError: the field is not finite somewhere, or has the wrong shape.
    """
    resolutions = resolutions_of(config)
    coarse = torch.empty((resolutions[0] + 1,) * 3, device=device, dtype=torch.float32)
    levels = [_Level(field, config, coarse)]
    levels[0].evaluate(torch.arange(levels[0].values.numel(), device=device))
    for resolution in resolutions[1:]:
        on_level(len(levels), len(resolutions))
        last = resolution == config.resolution and config.tolerance > 0
        levels.append(levels[-1].finished() if last else levels[-1].refined())
    on_level(len(levels), len(levels))
    return levels[-1].values, DecodeStats(resolutions, [level.queries for level in levels])


def resolutions_of(config: DecodeConfig) -> list[int]:
    """Cells a side of every level, coarse to fine: halved while they are even, to no less than the coarse one."""
    found = [config.resolution]
    while found[0] % 2 == 0 and found[0] // 2 >= config.coarse_resolution:
        found.insert(0, found[0] // 2)
    return found


class _Level:
    """The grid of one resolution: values (r+1, r+1, r+1), and at which nodes they are exact (`known`)."""

    def __init__(self, field: FieldFunction, config: DecodeConfig, values: Tensor) -> None:
        self.field, self.config, self.values = field, config, values
        self.resolution = len(values) - 1
        self.known = torch.zeros_like(values, dtype=torch.bool)
        self.queries = 0

    def evaluate(self, indices: Tensor) -> None:
        """Put the field's exact values at flat node indices (P,); a call has points that lie close together."""
        self.known.view(-1)[indices] = True
        self.queries += len(indices)
        x, y, z = (at // _BLOCK for at in _places(indices, self.resolution + 1))
        blocks = (self.resolution + 1) // _BLOCK + 1
        indices = indices[((x * blocks + y) * blocks + z).argsort(stable=True)]
        for chunk in indices.split(self.config.max_points):
            points = node_points(chunk, self.resolution, self.config.box)
            with torch.no_grad():
                values = self.field(points)
            if values.shape != (len(chunk),):
                raise ValueError(f"the field gave shape {tuple(values.shape)}, expected ({len(chunk)},)")
            self.values.view(-1)[chunk] = values.float()
        if bad := int((~torch.isfinite(self.values.view(-1)[indices])).sum()):
            raise ValueError(f"the field is not finite at {bad} of {len(indices)} points")

    def refined(self) -> _Level:
        """The grid of twice the resolution, exact at the surface."""
        fine = self._finer("trilinear")
        fine._follow(self._thin_parts(fine, _crossed_ends(fine.values > 0)), fine.known)
        return fine

    def finished(self) -> _Level:
        """The grid of twice the resolution, right within `config.tolerance` at the surface."""
        while len(unknown := self._unknown_corners(cells := crossed_cells(self.values > 0))):
            self.evaluate(unknown)
        fine = self._finer("nearest")
        settled, wanted = torch.zeros_like(fine.known), torch.zeros_like(fine.known)
        for some in cells.split(_CELLS):
            values, doubt = halved(self.values, some, self.config.tolerance)
            for i, j, k in itertools.product(range(3), repeat=3):  # the nodes of a cell
                x, y, z = (2 * some + some.new_tensor([i, j, k])).unbind(dim=1)
                fine.values[x, y, z] = values[:, i, j, k]
                settled[x, y, z] = True
                at = doubt[:, i, j, k]
                wanted[x[at], y[at], z[at]] = True
        fine._follow(self._thin_parts(fine, wanted), settled)
        return fine

    def _finer(self, mode: str) -> _Level:
        """The grid of twice the resolution, where old nodes keep their values, and new ones are interpolated: in the
        `mode` trilinear, or nearest, which is the old node below."""
        size, corners = [2 * self.resolution + 1] * 3, True if mode == "trilinear" else None
        values = nn.functional.interpolate(self.values[None, None], size, mode=mode, align_corners=corners)
        fine = _Level(self.field, self.config, values[0, 0])
        fine.known[::2, ::2, ::2] = self.known
        return fine

    def _unknown_corners(self, cells: Tensor) -> Tensor:
        """Flat indices (Q,) of the nodes without an exact value among the corners of cells (A, 3)."""
        n = self.resolution + 1
        first = (cells[:, 0] * n + cells[:, 1]) * n + cells[:, 2]
        offsets = [(x * n + y) * n + z for x, y, z in itertools.product((0, 1), repeat=3)]
        corners = torch.cat([first + offset for offset in offsets]).unique()
        return corners[~self.known.view(-1)[corners]]

    def _thin_parts(self, fine: _Level, wanted: Tensor) -> Tensor:
        """`wanted` nodes of the finer grid, and those around edges where a thin part may hide from this one."""
        around = torch.cartesian_prod(*[torch.arange(-1, 2, device=wanted.device)] * 3)
        for axis in range(3):
            middles = 2 * _turning_edges(self.values, axis, self.config.thin_slack)
            middles[:, axis] += 1
            x, y, z = (middles[:, None] + around).clamp(0, fine.resolution).unbind(dim=-1)
            wanted[x, y, z] = True
        return wanted

    def _follow(self, wanted: Tensor, settled: Tensor) -> None:
        """Evaluate `wanted` nodes, and on across every sign change to nodes neither known nor `settled`."""
        indices = (wanted & ~self.known).view(-1).nonzero()[:, 0]
        self.known |= settled
        while len(indices):
            self.evaluate(indices)
            indices = self._unknown_across(indices)

    def _unknown_across(self, indices: Tensor) -> Tensor:
        """Nodes (Q,) without an exact value that have another sign than a neighbour among `indices` (P,)."""
        nodes = self.resolution + 1
        values, known = self.values.view(-1), self.known.view(-1)
        inside, places = values[indices] > 0, _places(indices, nodes)
        found = []
        for stride, place in zip((nodes**2, nodes, 1), places, strict=True):
            for step in (-1, 1):
                within = (place + step >= 0) & (place + step < nodes)
                neighbour = indices[within] + step * stride
                found.append(neighbour[~known[neighbour] & ((values[neighbour] > 0) != inside[within])])
        return torch.cat(found).unique()


def _crossed_ends(inside: Tensor) -> Tensor:
    """Which nodes (n, n, n) have a neighbour on the other side of the surface, from `inside` (n, n, n)."""
    ends = torch.zeros_like(inside)
    for axis in range(3):
        line, mark = inside.movedim(axis, 0), ends.movedim(axis, 0)
        crossed = line[:-1] != line[1:]
        mark[:-1] |= crossed
        mark[1:] |= crossed
    return ends


def _turning_edges(values: Tensor, axis: int, slack: float) -> Tensor:
    """Lower ends (E, 3) of edges along `axis` that may hide two crossings, from values (n, n, n).

    Both ends lie on the same side at distances u, v from zero, and the field nears zero by p and q over the
    edges before and after. Straight lines on from both ends meet at (u q + v p - p q) / (p + q), exact for the
    distance to a plate. Slopes `slack` times as steep, for parts that pass beside the edge and fields that
    flatten, meet at (u q + v p - slack p q) / (p + q). The edge counts if that is at or beyond zero.
    """
    line = values.movedim(axis, 0)
    before, u, v, after = line[:-3], line[1:-2], line[2:-1], line[3:]
    side = torch.where(u > 0, 1.0, -1.0)
    p, q = (before - u) * side, (after - v) * side
    hidden = ((u > 0) == (v > 0)) & (p > 0) & (q > 0) & ((u * q + v * p) * side <= slack * p * q)
    edges = hidden.movedim(0, axis).nonzero()
    edges[:, axis] += 1
    return edges


def crossed_cells(inside: Tensor) -> Tensor:
    """Lowest corners (A, 3) of the cells whose eight corners are not all on one side, from `inside` (n, n, n)."""
    some = every = inside
    for axis in range(3):
        length = some.shape[axis] - 1
        some = some.narrow(axis, 0, length) | some.narrow(axis, 1, length)
        every = every.narrow(axis, 0, length) & every.narrow(axis, 1, length)
    return (some & ~every).nonzero()


def halved(values: Tensor, cells: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The nodes of a grid of half the spacing in cells (A, 3) of values (n, n, n), by cubic interpolation.

    Returns values and doubts, both (A, 3, 3, 3), the cell's own corners included. A node is in doubt if an edge from
    it is crossed at another place, by more than `tolerance` of its length, than linear interpolation has it: there
    the field bends too much for the four nodes in a row to say how. So is every new node of a cell at the grid's
    border, where there are no four.
    """
    last = len(values) - 1
    steps = torch.arange(-1, 3, device=cells.device)
    x, y, z = (cells[:, None] + steps[:, None]).clamp(0, last).unbind(dim=-1)
    near = values[x[:, :, None, None], y[:, None, :, None], z[:, None, None, :]].flatten(1)
    cubic = (near @ _matrix([-1 / 16, 9 / 16, 9 / 16, -1 / 16], near)).view(-1, 3, 3, 3)
    linear = (near @ _matrix([0.0, 0.5, 0.5, 0.0], near)).view(-1, 3, 3, 3)
    difference = (cubic - linear).abs_()
    doubt = ((cells == 0) | (cells == last - 1)).any(dim=1)[:, None, None, None].expand(cubic.shape).clone()
    for axis in (1, 2, 3):
        low, high = cubic.narrow(axis, 0, 2), cubic.narrow(axis, 1, 2)
        off = torch.maximum(difference.narrow(axis, 0, 2), difference.narrow(axis, 1, 2))
        edge = ((low > 0) != (high > 0)) & (off > tolerance * (low - high).abs())
        for start in (0, 1):
            doubt.narrow(axis, start, 2).logical_or_(edge)
    return cubic, doubt


def _matrix(middle: list[float], like: Tensor) -> Tensor:
    """(64, 27): four nodes in a row on each axis -> the middle two and, by weights `middle`, the one between them."""
    line = like.new_tensor([[0.0, 1.0, 0.0, 0.0], middle, [0.0, 0.0, 1.0, 0.0]])
    return torch.kron(torch.kron(line, line), line).T.contiguous()


def _places(indices: Tensor, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, z (P,) of flat indices (P,) into (nodes, nodes, nodes)."""
    # torch.unravel_index would import SymPy, which takes a third of a second
    return indices // nodes**2, indices // nodes % nodes, indices % nodes


def node_points(indices: Tensor, resolution: int, box: float = BOX) -> Tensor:
    """Positions (P, 3) float32 of nodes with flat indices (P,) into a grid of R cells a side from -box to +box.

    Node i of an axis is at -box + 2 box i / R, of R + 1 nodes; indices are in C order of xyz.
    """
    axis = (-box + 2 * box * torch.arange(resolution + 1, dtype=torch.float64) / resolution).float()
    return axis.to(indices.device)[torch.stack(_places(indices, resolution + 1), dim=-1)]


# -------------------------------------------------------------------------------------------- from a grid to a mesh


def reducible(values: torch.Tensor, max_faces: int) -> torch.Tensor:
    """Values (n, n, n), or every second node of them, or every fourth where the surface is of noise.

    Only where its faces are reduced to an eighth or less afterwards, whose time does not grow without a bound then.
    A smooth surface keeps its grid. A level of `decode` is exact at the surface: this is the mesh of a coarser one.
    """
    while 0 < 8 * max_faces <= MANY_FACES and len(values) % 2 == 1 and len(values) > 64:
        inside = (values > 0).cpu().numpy()  # whose counting is ten times faster than PyTorch's
        crossings = sum(np.count_nonzero(np.diff(inside, axis=axis)) for axis in range(3))
        if 2 * crossings <= max(MANY_FACES, _FULL * len(values) ** 2):  # a vertex on each, two faces a vertex
            break
        values = values[::2, ::2, ::2]
    return values
