"""Tiny prepared shards of spheres and boxes, whose distances are known in closed form."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

COUNT = 512


def sphere(radius: float, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Stored tensors of a sphere at the origin."""
    normals = rng.standard_normal((COUNT, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    near = normals * radius + 0.02 * rng.standard_normal((COUNT, 3))
    volume = rng.uniform(-1.01, 1.01, (COUNT, 3))

    def distances(points: np.ndarray) -> np.ndarray:
        return np.concatenate([points, radius - np.linalg.norm(points, axis=1, keepdims=True)], axis=1)

    arrays = {
        "surface": np.concatenate([normals * radius, normals], axis=1),
        "sharp": np.zeros((0, 6)),
        "near": distances(near),
        "volume": distances(volume),
    }
    return {name: torch.from_numpy(array).half() for name, array in arrays.items()}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A data folder: `prepared/balls` in two shards, and splits of which one shape is missing."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "prepared" / "balls"
    folder.mkdir(parents=True)
    for shard, ids in enumerate((range(3), range(3, 6))):
        tensors = {
            f"ball{i}/{name}": tensor for i in ids for name, tensor in sphere(0.4 + 0.1 * i, rng).items()
        }
        save_file(tensors, folder / f"shard-{shard:05d}.safetensors")
    (tmp_path / "train.txt").write_text("".join(f"balls/ball{i}\n" for i in range(5)) + "balls/absent\n")
    (tmp_path / "val.txt").write_text("balls/ball5\n")
    return tmp_path
