"""A source of boxes that fail in every way a mesh can; also for processes that a test starts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import trimesh

from elastic3d.errors import UserError
from elastic3d.preparation.options import ShapeConfig
from elastic3d.preparation.shape import RawShape
from elastic3d.preparation.shards import Recipe, Shard, plan_shards
from elastic3d.preparation.sources import Item, Source

TINY = ShapeConfig(
    resolution=32, surface_points=64, sharp_points=32, near_points=64, volume_points=64, views=1, view_size=16
)
RECIPE = Recipe(TINY, 0, frozenset({"test/b1"}))


class Boxes(Source):
    """Boxes called b0, b1 ..., and items that fail in every way a mesh can."""

    name = "test"

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def items(self) -> list[Item]:
        given = {"source": self.name, "category": "box", "caption": "a box"}
        return [
            Item(id=name, licence="none", creator="test", source_id=name, **given) for name in self._names
        ]

    def load(self, item: Item) -> RawShape:
        if item.id == "broken":
            raise UserError("no such mesh")
        if item.id == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if item.id == "hang":
            time.sleep(600)
        mesh = trimesh.creation.box((1, 1, 1 + int(item.id[1:])))
        return RawShape(mesh, np.zeros(len(mesh.faces), int))


def plan(names: list[str], folder: Path, size: int = 2) -> tuple[list[Shard], Boxes]:
    source = Boxes(names)
    return plan_shards(source.items(), folder, size), source
