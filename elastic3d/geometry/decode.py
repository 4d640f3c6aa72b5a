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

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import trimesh
from torch import Tensor

from elastic3d.errors import NoSurfaceError
from elastic3d.geometry.cells import corner_indices, crossed_cells, halved
from elastic3d.geometry.grid import block_order, node_points
from elastic3d.geometry.options import DecodeConfig
from elastic3d.geometry.surface import extract_surface

FieldFunction = Callable[[Tensor, Tensor], Tensor]
"""field(points (B,P,3) float32, sample index (B,) int64 on the CPU) -> values (B,P), positive inside."""

_CELLS = 1 << 15  # interpolated at a time
_IN_CELL = tuple((x, y, z) for x in range(3) for y in range(3) for z in range(3))


@dataclass
class DecodeStats:
    """What decoding one sample cost: the levels' resolutions and field evaluations, coarse to fine."""

    resolutions: list[int]
    queries_per_level: list[int]

    @property
    def queries(self) -> int:
        """Field evaluations in all."""
        return sum(self.queries_per_level)

    @property
    def full_queries(self) -> int:
        """Field evaluations of the full grid, (R+1)^3."""
        return (self.resolutions[-1] + 1) ** 3


def decode_meshes(
    field: FieldFunction, batch: int, config: DecodeConfig, device: torch.device | str = "cpu"
) -> list[trimesh.Trimesh | NoSurfaceError]:
    """Mesh of each of `batch` fields; a sample without a surface gives its error in place of a mesh.

    Raises:
        ValueError: the field is not finite somewhere, or has the wrong shape.
    """
    return [mesh for mesh, _ in iterate_meshes(field, batch, config, device)]


def iterate_meshes(
    field: FieldFunction, batch: int, config: DecodeConfig, device: torch.device | str = "cpu"
) -> Iterator[tuple[trimesh.Trimesh | NoSurfaceError, DecodeStats]]:
    """Like `decode_meshes`, one after the other with what each cost.

    Samples are decoded in turn, in calls of at most `max_points` points: one dense grid exists at a time, and
    a mesh can't depend on its batch mates, not even by the rounding of a larger matrix product.
    """
    for sample in range(batch):
        values, stats = decode_field(field, sample, config, device)
        try:
            yield extract_surface(values, config.box, config.surface), stats
        except NoSurfaceError as error:
            yield error, stats


def decode_field(
    field: FieldFunction,
    sample: int,
    config: DecodeConfig,
    device: torch.device | str = "cpu",
    on_level: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, DecodeStats]:
    """Values (R+1, R+1, R+1) float32 of one field: right at the surface, elsewhere only of the right sign.

    At the surface they are exact, or as far off as `config.tolerance` allows. `on_level` is called with (levels
    done, levels).

    Raises:
        ValueError: the field is not finite somewhere, or has the wrong shape.
    """
    levels = level_resolutions(config.resolution, config.coarse_resolution)
    grid = _Level(field, sample, config, torch.empty((levels[0] + 1,) * 3, device=device))
    grid.evaluate(torch.arange(grid.values.numel(), device=device))
    grids = [grid]
    for resolution in levels[1:]:
        if on_level is not None:
            on_level(len(grids), len(levels))
        last = resolution == levels[-1] and config.tolerance > 0
        grid = grid.finished() if last else grid.refined()
        grids.append(grid)
    if on_level is not None:
        on_level(len(levels), len(levels))
    return grid.values, DecodeStats(levels, [grid.queries for grid in grids])


def level_resolutions(resolution: int, coarse: int) -> list[int]:
    """Grids from coarse to fine: `resolution` halved while it is even and the half is `coarse` or more."""
    levels = [resolution]
    while levels[0] % 2 == 0 and levels[0] // 2 >= coarse:
        levels.insert(0, levels[0] // 2)
    return levels


class _Level:
    """The grid of one resolution: values (r+1, r+1, r+1), and at which nodes they are exact (`known`)."""

    def __init__(self, field: FieldFunction, sample: int, config: DecodeConfig, values: Tensor) -> None:
        self.field, self.sample, self.config, self.values = field, sample, config, values
        self.resolution = len(values) - 1
        self.known = torch.zeros_like(values, dtype=torch.bool)
        self.queries = 0

    def evaluate(self, indices: Tensor) -> None:
        """Put the field's exact values at flat node indices (P,); a call has points that lie close together."""
        self.known.view(-1)[indices] = True
        self.queries += len(indices)
        indices = indices[block_order(indices, self.resolution)]
        sample = torch.tensor([self.sample])  # a GPU would be waited for to read it
        found = [indices.new_empty(0, dtype=torch.float32)]
        for chunk in indices.split(self.config.max_points):
            points = node_points(chunk, self.resolution, self.config.box)
            with torch.no_grad():
                values = self.field(points[None], sample)
            if values.shape != (1, len(chunk)):
                raise ValueError(f"the field gave shape {tuple(values.shape)}, expected (1, {len(chunk)})")
            found.append(values[0].float())
        exact = torch.cat(found)
        if bad := int((~torch.isfinite(exact)).sum()):
            where = f"{bad} of {len(exact)} points of sample {self.sample}"
            raise ValueError(f"the field is not finite at {where}")
        self.values.view(-1)[indices] = exact

    def refined(self) -> _Level:
        """The grid of twice the resolution, exact at the surface."""
        fine = _Level(self.field, self.sample, self.config, _interpolated(self.values))
        fine.known[::2, ::2, ::2] = self.known
        fine._follow(self._thin_parts(fine, _crossed_ends(fine.values > 0)))
        return fine

    def finished(self) -> _Level:
        """The grid of twice the resolution, right within `config.tolerance` at the surface."""
        cells = crossed_cells(self.values > 0)
        while len(unknown := self._unknown_corners(cells)):
            self.evaluate(unknown)
            cells = crossed_cells(self.values > 0)
        fine = _Level(self.field, self.sample, self.config, _doubled(self.values))
        settled = torch.zeros_like(fine.known)
        wanted = torch.zeros_like(fine.known)
        for some in cells.split(_CELLS):
            values, doubt = halved(self.values, some, self.config.tolerance)
            for i, j, k in _IN_CELL:
                x, y, z = (2 * some + some.new_tensor([i, j, k])).unbind(dim=1)
                fine.values[x, y, z] = values[:, i, j, k]
                settled[x, y, z] = True
                at = doubt[:, i, j, k]
                wanted[x[at], y[at], z[at]] = True
        fine.known[::2, ::2, ::2] = self.known
        fine._follow(self._thin_parts(fine, wanted), settled)
        return fine

    def _unknown_corners(self, cells: Tensor) -> Tensor:
        """Flat indices (Q,) of the nodes without an exact value among the corners of cells (A, 3)."""
        corners = corner_indices(cells, self.resolution + 1)
        return corners[~self.known.view(-1)[corners]]

    def _thin_parts(self, fine: _Level, wanted: Tensor) -> Tensor:
        """`wanted` nodes of the finer grid, and those where a thin part may hide from this one."""
        for axis in range(3):
            x, y, z = fine._around(2 * _turning_edges(self.values, axis, self.config.thin_slack), axis)
            wanted[x, y, z] = True
        return wanted

    def _follow(self, wanted: Tensor, settled: Tensor | None = None) -> None:
        """Evaluate `wanted` nodes, and on across every sign change to nodes neither known nor `settled`."""
        indices = (wanted & ~self.known).view(-1).nonzero()[:, 0]
        if settled is not None:
            self.known |= settled
        while len(indices):
            self.evaluate(indices)
            indices = self._unknown_across(indices)

    def _around(self, edges: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """Nodes x, y, z (27 E,) around the middles of edges two cells long, from their lower ends (E, 3)."""
        offset = torch.cartesian_prod(*[torch.arange(-1, 2, device=edges.device)] * 3)
        offset[:, axis] += 1
        nodes = (edges[:, None] + offset).clamp(0, self.resolution).reshape(-1, 3)
        return nodes[:, 0], nodes[:, 1], nodes[:, 2]

    def _unknown_across(self, indices: Tensor) -> Tensor:
        """Nodes (Q,) without an exact value that have another sign than a neighbour among `indices` (P,)."""
        nodes = self.resolution + 1
        values, known = self.values.view(-1), self.known.view(-1)
        inside = values[indices] > 0
        found = []
        for stride in (nodes * nodes, nodes, 1):
            place = indices // stride % nodes
            for step in (-1, 1):
                within = (place + step >= 0) & (place + step < nodes)
                neighbour = indices[within] + step * stride
                found.append(neighbour[~known[neighbour] & ((values[neighbour] > 0) != inside[within])])
        return torch.cat(found).unique()


def _interpolated(values: Tensor) -> Tensor:
    """Trilinear interpolation (2r+1, 2r+1, 2r+1) of values (r+1, r+1, r+1); old nodes keep their values."""
    for axis in (2, 1, 0):
        cells = values.shape[axis] - 1
        finer = values.new_empty([2 * cells + 1 if a == axis else n for a, n in enumerate(values.shape)])
        lines, old = finer.movedim(axis, 0), values.movedim(axis, 0)
        lines[::2] = old
        torch.add(old[:-1], old[1:], out=lines[1::2]).mul_(0.5)
        values = finer
    return values


def _doubled(values: Tensor) -> Tensor:
    """(2r+1, 2r+1, 2r+1) from values (r+1, r+1, r+1): a new node has the value of the old one below it."""
    for axis in (2, 1, 0):
        values = values.repeat_interleave(2, dim=axis).narrow(axis, 0, 2 * values.shape[axis] - 1)
    return values.contiguous()


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
