"""Cells of a grid that a surface crosses, and the field between their nodes by cubic interpolation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MANY_FACES = 1_000_000  # take about three seconds to reduce
CORNERS = tuple((x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1))


def reducible(values: Tensor, max_faces: int) -> Tensor:
    """Values (n, n, n), or every second node of them, or every fourth: a surface of at most `MANY_FACES` faces.

    Only where it is reduced to an eighth of that or less afterwards, as a surface of noise: the time of that does not
    grow without a bound then. A level of `decode` is exact at the surface, so this is the mesh of a coarser one.
    """
    while 0 < 8 * max_faces <= MANY_FACES and len(values) % 2 == 1 and len(values) > 64:
        inside = (values > 0).cpu().numpy()  # whose counting is ten times faster than PyTorch's
        axes = (inside.swapaxes(0, axis) for axis in range(3))
        crossings = sum(int(np.count_nonzero(line[:-1] != line[1:])) for line in axes)
        if 2 * crossings <= MANY_FACES:  # a vertex on each, two faces a vertex
            break
        values = values[::2, ::2, ::2]
    return values


def crossed_cells(inside: Tensor) -> Tensor:
    """Lowest corners (A, 3) of the cells whose eight corners are not all on one side, from `inside` (n, n, n)."""
    some = every = inside
    for axis in range(3):
        length = some.shape[axis] - 1
        some = some.narrow(axis, 0, length) | some.narrow(axis, 1, length)
        every = every.narrow(axis, 0, length) & every.narrow(axis, 1, length)
    return (some & ~every).nonzero()


def corner_indices(cells: Tensor, nodes: int) -> Tensor:
    """Flat indices (C,), sorted and unique, into (nodes, nodes, nodes) of the corners of cells (A, 3)."""
    first = (cells[:, 0] * nodes + cells[:, 1]) * nodes + cells[:, 2]
    return torch.cat([first + (x * nodes + y) * nodes + z for x, y, z in CORNERS]).unique()


def halved(values: Tensor, cells: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The nodes of a grid of half the spacing in cells (A, 3) of values (n, n, n), by cubic interpolation.

    Returns values and doubts, both (A, 3, 3, 3), the cell's own corners included. A node is in doubt if an edge from
    it is crossed at another place, by more than `tolerance` of its length, than linear interpolation has it: there
    the field bends too much for the four nodes in a row to say how. So is every new node of a cell at the grid's
    border, where there are no four.
    """
    last = len(values) - 1
    steps = torch.arange(-1, 3, device=cells.device)
    x, y, z = (cells[:, axis, None] + steps for axis in range(3))
    x, y, z = (axis.clamp(0, last) for axis in (x, y, z))
    near = values[x[:, :, None, None], y[:, None, :, None], z[:, None, None, :]].flatten(1)
    cubic = (near @ _matrix([-1 / 16, 9 / 16, 9 / 16, -1 / 16], near)).view(-1, 3, 3, 3)
    linear = (near @ _matrix([0.0, 0.5, 0.5, 0.0], near)).view(-1, 3, 3, 3)
    difference = (cubic - linear).abs_()
    doubt = ((cells == 0) | (cells == last - 1)).any(dim=1)[:, None, None, None].expand(cubic.shape).clone()
    for axis in (1, 2, 3):
        ends = [cubic.narrow(axis, start, 2) for start in (0, 1)]
        off = torch.maximum(difference.narrow(axis, 0, 2), difference.narrow(axis, 1, 2))
        crossed = (ends[0] > 0) != (ends[1] > 0)
        edge = crossed & (off > tolerance * (ends[0] - ends[1]).abs())
        for start in (0, 1):
            doubt.narrow(axis, start, 2).logical_or_(edge)
    return cubic, doubt


def _matrix(middle: list[float], like: Tensor) -> Tensor:
    """(64, 27): four nodes in a row on each axis -> the middle two and, by weights `middle`, the one between them."""
    line = like.new_tensor([[0.0, 1.0, 0.0, 0.0], middle, [0.0, 0.0, 1.0, 0.0]])
    return torch.kron(torch.kron(line, line), line).T.contiguous()
