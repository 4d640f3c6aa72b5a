"""The `primitives` source: shapes composed by program, built where they are needed in a tenth of a second."""

from __future__ import annotations

from elastic3d.preparation.primitives.catalogue import shapes
from elastic3d.preparation.sources import AlwaysReady, Item
from elastic3d.preparation.views import RawShape


class PrimitivesSource(AlwaysReady):
    """The first `count` shapes of the catalogue; any prefix is balanced over the categories."""

    name = "primitives"

    def __init__(self, categories: list[str], count: int) -> None:
        self._shapes = {shape.name: shape for shape in shapes(categories, count)}

    def items(self) -> list[Item]:
        """Categories interleaved."""
        return [
            Item(
                id=shape.name,
                source=self.name,
                category=shape.category,
                caption=shape.caption,
                licence="Apache-2.0",
                creator="the elastic3d maintainers",
                source_id=f"{shape.category}({shape.seed})",
            )
            for shape in self._shapes.values()
        ]

    def load(self, item: Item) -> RawShape:
        """Build the shape."""
        return self._shapes[item.id].build()
