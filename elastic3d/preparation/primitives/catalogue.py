"""The `primitives` source: all categories of composed shapes, and the shape of a category and a seed, built where it is
needed in a tenth of a second."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import trimesh
from numpy.typing import NDArray

from elastic3d.errors import UserError
from elastic3d.preparation.primitives import figures, plants, symbols, things, vehicles, vessels
from elastic3d.preparation.primitives.solids import Dice, Parts, to_arrays
from elastic3d.preparation.shape import RawShape, random_colour
from elastic3d.preparation.sources import Item, Source, with_article

CATEGORIES: dict[str, Callable[..., Parts]] = {
    "mug": vessels.mug, "dog": figures.dog, "composition": symbols.composition, "car": vehicles.car,
    "key": things.key, "letter": symbols.letter, "goblet": vessels.goblet, "tree": plants.tree,
    "plane": vehicles.plane, "carving": symbols.carving, "hammer": things.hammer, "gear": things.gear,
    "chess_pawn": figures.chess_piece("pawn"), "chess_knight": figures.chess_piece("knight"),
    "duck": figures.duck, "boat": vehicles.boat, "warped": symbols.warped, "ring": things.ring,
    "donut": plants.donut, "vase_with_handles": vessels.vase, "cat": figures.cat, "house": vehicles.house,
    "lathe": symbols.lathe, "glasses": things.glasses, "star": symbols.star, "teapot": vessels.teapot,
    "fish": figures.fish, "truck": vehicles.truck, "phone": things.phone, "heart": symbols.heart,
    "chess_rook": figures.chess_piece("rook"), "chess_bishop": figures.chess_piece("bishop"),
    "snowman": figures.snowman, "rocket": vehicles.rocket, "book": things.book,
    "ice_cream": plants.ice_cream, "bottle": vessels.bottle, "mushroom": plants.mushroom,
    "helicopter": vehicles.helicopter, "die": things.die, "arrow": symbols.arrow,
    "chess_queen": figures.chess_piece("queen"), "chess_king": figures.chess_piece("king"),
    "penguin": figures.penguin, "castle": vehicles.castle, "dumbbell": things.dumbbell,
    "cupcake": plants.cupcake, "jug": vessels.jug, "elephant": figures.elephant, "bus": vehicles.bus,
    "wrench": things.wrench, "spring": things.spring, "bucket": vessels.bucket, "rabbit": figures.rabbit,
    "train": vehicles.train, "camera": things.camera, "cake": plants.cake, "plant_pot": vessels.plant_pot,
    "turtle": figures.turtle, "submarine": vehicles.submarine, "robot": things.robot, "pipe": things.pipe,
    "trophy": vessels.trophy, "giraffe": figures.giraffe, "lighthouse": vehicles.lighthouse,
    "headphones": things.headphones, "knot": symbols.knot, "bell": vessels.bell, "person": figures.person,
    "tractor": vehicles.tractor, "padlock": things.padlock, "burger": plants.burger,
    "candle": vessels.candle, "teddy": figures.teddy, "windmill": vehicles.windmill, "screw": things.screw,
    "hollow_frame": things.hollow_frame, "barrel": vessels.barrel, "bird": figures.bird,
    "tank": vehicles.tank, "clock": things.clock, "brick": things.brick, "bowling_pin": vessels.bowling_pin,
    "pig": figures.pig, "bridge": vehicles.arch_bridge, "umbrella": things.umbrella,
    "guitar": things.guitar, "spinning_top": vessels.spinning_top, "snail": figures.snail,
    "screwdriver": things.screwdriver, "drum": things.drum, "palm": plants.palm, "magnet": things.magnet,
    "moon": symbols.moon, "apple": plants.apple, "spoon": things.spoon, "cross": symbols.cross,
    "flower": plants.flower, "pencil": things.pencil, "stairs": symbols.stairs, "banana": plants.banana,
    "table_lamp": vessels.table_lamp, "chain": things.chain, "butterfly": figures.butterfly,
    "lightning": symbols.lightning, "pear": plants.pear, "bowl": vessels.bowl, "ghost": figures.ghost,
    "lollipop": plants.lollipop, "starfish": figures.star_fish, "coins": vessels.coin_stack,
    "cloud": plants.cloud,
}  # fmt: skip
# Seeds in a round; of the others one.
PER_ROUND = {"composition": 6, "letter": 6, "carving": 4, "warped": 4, "lathe": 3}
COUNTED = ("composition", "carving", "warped")  # their builders are told how many primitives to use

# sRGB of materials that have a colour of their own; others are drawn
COLOURS: dict[str, tuple[int, int, int]] = {
    "wood": (140, 95, 55), "wood 2": (120, 80, 50), "metal": (165, 168, 172), "gold": (215, 175, 75),
    "eyes": (30, 28, 30), "leaves": (75, 135, 60), "snow": (240, 243, 248), "white": (238, 238, 234),
    "black": (42, 42, 48), "carrot": (235, 125, 40), "beak": (240, 160, 45), "tyre": (45, 45, 48),
    "glass": (150, 190, 215), "red": (200, 50, 45), "yellow": (240, 205, 70), "clay": (185, 105, 75),
    "wax": (240, 230, 205), "flame": (250, 190, 70), "paper": (240, 235, 220), "ivory": (240, 232, 210),
    "grey": (135, 135, 142), "stone": (165, 160, 150), "tiles": (165, 75, 60), "brick": (165, 85, 70),
    "lamp": (250, 235, 170), "dough": (215, 165, 100), "waffle": (215, 160, 90), "meat": (105, 65, 45),
    "olive": (100, 110, 70), "pear": (190, 200, 85), "screen": (40, 50, 65), "skin": (225, 180, 150),
    "hands": (40, 40, 45), "nut": (110, 75, 50),
}  # fmt: skip


@dataclass(frozen=True)
class Composed:
    """One shape of the catalogue; the same (category, seed) is the same mesh."""

    category: str
    seed: int

    @property
    def name(self) -> str:
        """Identifier within the source."""
        return f"{self.category}-{self.seed:05d}"

    @property
    def caption(self) -> str:
        """What it shows."""
        if self.category == "letter":
            glyph = symbols.glyph_of(self.seed)
            return f"the {'digit' if glyph.isdigit() else 'letter'} {glyph}"
        if self.category in COUNTED:
            count = symbols.count_of(self.seed)
            noun = CAPTIONS.get(self.category, self.category)
            return f"a {noun} of {count} primitive{'s' if count > 1 else ''}"
        return with_article(CAPTIONS.get(self.category, self.category.replace("_", " ")))

    def build(self) -> RawShape:
        """The mesh: one closed surface, with a part for every material."""
        dice = Dice(zlib.crc32(self.category.encode()), self.seed)
        parts = self._parts(dice)
        stretch = (dice(0.88, 1.12), dice(0.88, 1.12), dice(0.88, 1.12))
        parts = {name: solid.scale(stretch) for name, solid in parts.items() if not solid.is_empty()}
        vertices, faces, part, names = to_arrays(parts)
        return RawShape(trimesh.Trimesh(vertices, faces, process=False), part, _colours(names, dice))

    def _parts(self, dice: Dice) -> Parts:
        build = CATEGORIES[self.category]
        if self.category == "letter":
            return build(dice, symbols.glyph_of(self.seed))
        if self.category in COUNTED:
            return build(dice, symbols.count_of(self.seed))
        return build(dice)


CAPTIONS = {
    "vase_with_handles": "vase",
    "lathe": "turned solid",
    "warped": "warped solid",
    "hollow_frame": "pierced solid",
    "plant_pot": "plant in a pot",
    "coins": "stack of coins",
    "spring": "coil spring",
    "brick": "toy brick",
    "bridge": "stone bridge",
    "pipe": "pipe fitting",
    "lightning": "lightning bolt",
    "stairs": "flight of stairs",
    "glasses": "pair of glasses",
    "headphones": "pair of headphones",
} | {f"chess_{kind}": f"chess {kind}" for kind in figures.CHESS_HEIGHTS}


def _colours(names: list[str], dice: Dice) -> NDArray[np.uint8]:
    generator = np.random.default_rng(dice.whole(0, 2**31))
    rows = []
    for name in names:
        own = COLOURS.get(name)
        jittered = None if own is None else np.clip(np.array(own) + generator.normal(0, 14, 3), 0, 255)
        rows.append(random_colour(generator) if jittered is None else np.round(jittered).astype(np.uint8))
    return np.stack(rows)


def shapes(categories: list[str], count: int) -> list[Composed]:
    """The first `count` shapes in rounds over the categories. UserError for an unknown category."""
    unknown = [name for name in categories if name not in CATEGORIES]
    if unknown:
        raise UserError(f"no category of primitives {unknown[0]!r}, expected one of {', '.join(CATEGORIES)}")
    chosen = {name: PER_ROUND.get(name, 1) for name in categories or CATEGORIES}
    rounds = -(-count // sum(chosen.values()))
    every = (
        Composed(name, index * seeds + extra)
        for index in range(rounds)
        for name, seeds in chosen.items()
        for extra in range(seeds)
    )
    return list(islice(every, count))


class PrimitivesSource(Source):
    """The first `count` shapes of the catalogue; any prefix is balanced over the categories.

    UserError if letters are among them and their fonts are missing.
    """

    name = "primitives"

    def __init__(self, categories: list[str], count: int) -> None:
        self._shapes = {shape.name: shape for shape in shapes(categories, count)}
        if any(shape.category == "letter" for shape in self._shapes.values()):
            symbols.fonts_folder()

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
