"""The regular grid a field is sampled on: R cells a side, R+1 nodes, from -box to +box on every axis."""

from __future__ import annotations

import numpy as np
import torch

BOX = 1.01
"""Half side of the decoding cube; normalised shapes end at 0.95, so their surface never touches it."""


def node_coordinates(resolution: int, box: float = BOX) -> np.ndarray:
    """Coordinates (R+1,) float64 of the nodes along one axis; node i is at -box + 2 box i / R."""
    if resolution < 1:
        raise ValueError(f"resolution is {resolution}, expected at least 1 cell a side")
    return -box + 2 * box * np.arange(resolution + 1) / resolution


def node_points(indices: torch.Tensor, resolution: int, box: float = BOX) -> torch.Tensor:
    """Positions (P, 3) float32 of nodes with flat indices (P,) into an (R+1)^3 array, C order of xyz."""
    nodes = resolution + 1
    axis = torch.from_numpy(node_coordinates(resolution, box)).float().to(indices.device)
    x, y, z = indices // nodes**2, indices // nodes % nodes, indices % nodes
    return torch.stack([axis[x], axis[y], axis[z]], dim=-1)


def grid_points(resolution: int, box: float = BOX) -> torch.Tensor:
    """Positions ((R+1)^3, 3) float32 of every node in C order of [x, y, z]."""
    return node_points(torch.arange((resolution + 1) ** 3), resolution, box)


def block_order(indices: torch.Tensor, resolution: int, side: int = 8) -> torch.Tensor:
    """The order (P,) that sorts nodes with flat indices (P,) into an (R+1)^3 array by blocks of `side`^3 nodes."""
    nodes = resolution + 1
    blocks = nodes // side + 1
    x, y, z = indices // nodes**2 // side, indices // nodes % nodes // side, indices % nodes // side
    return ((x * blocks + y) * blocks + z).argsort(stable=True)
