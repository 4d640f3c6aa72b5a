"""Letters and signs: extrusions, most of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from manifold3d import Manifold

from elastic3d.errors import UserError
from elastic3d.preparation.primitives.solids import (
    Dice,
    Parts,
    ball,
    box,
    disc,
    join,
    plate,
    polygon,
    rod,
    tube,
)

GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSans.ttf")


def glyph_of(seed: int) -> str:
    """The letter or digit that a seed stands for: 36 seeds in a row show each of them once."""
    return GLYPHS[seed * 7 % len(GLYPHS)]


def letter(d: Dice, glyph: str) -> Parts:
    """A letter or digit of a DejaVu font, extruded. UserError if matplotlib, which brings the font, is missing."""
    try:
        import matplotlib
        from matplotlib.font_manager import FontProperties
        from matplotlib.textpath import TextPath
    except ImportError as error:
        raise UserError("letters need matplotlib's fonts: pip install elastic3d[data]") from error
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / d.pick(*FONTS[:3], *FONTS)
    rings = TextPath((0, 0), glyph, size=1, prop=FontProperties(fname=font)).to_polygons(closed_only=True)
    outline = polygon(*(np.asarray(ring, np.float64)[:-1] for ring in rings))
    return {"body": plate(outline, d(0.12, 0.4), bevel=d.pick(0.0, 0.0, 0.02))}


def star(d: Dice) -> Parts:
    """A star of four to eight rays, flat or in relief."""
    rays, inner = d.pick(5, 5, 5, 4, 6, 8), d(0.4, 0.55)
    angles = np.pi / 2 + np.pi * np.arange(2 * rays) / rays
    radii = np.where(np.arange(2 * rays) % 2 == 0, 0.5, 0.5 * inner)
    outline = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
    thick = d(0.12, 0.26)
    if d.chance(0.5):
        return {"gold": plate(outline, thick, bevel=d.pick(0.0, 0.02))}
    front = np.concatenate([np.c_[outline, np.zeros(2 * rays)]])
    rays_3d = [
        _hull([*front[[i, (i + 1) % (2 * rays)]], [0, 0, 0], [0, 0, thick], [0, 0, -thick]])
        for i in range(2 * rays)
    ]
    return {"gold": join(ball(0.04), *rays_3d)}


def heart(d: Dice) -> Parts:
    """A heart, flat or puffed up."""
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    outline = np.stack([x, y], 1)[::-1] / 34
    thick = d(0.14, 0.34)
    if d.chance(0.5):
        return {"red": plate(outline, thick, bevel=d(0.02, 0.06))}
    layers = [
        plate(outline * np.sqrt(1 - h**2), 0.02 + 2 * thick * h, bevel=0) for h in np.linspace(0.02, 0.97, 32)
    ]
    return {"red": join(*layers)}


def arrow(d: Dice) -> Parts:
    """An arrow to the right, upwards or downwards; flat or round."""
    head, shaft, width = d(0.3, 0.42), d(0.45, 0.7), d(0.07, 0.12)
    if d.chance(0.4):
        body = join(
            rod((-shaft, 0, 0), (0, 0, 0), width * 0.8), rod((-0.01, 0, 0), (head, 0, 0), head * 0.6, 0.01)
        )
    else:
        outline = [
            (-shaft, -width),
            (0, -width),
            (0, -head * 0.7),
            (head, 0),
            (0, head * 0.7),
            (0, width),
            (-shaft, width),
        ]
        body = plate(outline, d(0.12, 0.24))
    return {"body": body.rotate((0, 0, d.pick(0, 90, -90, 45)))}


def cross(d: Dice) -> Parts:
    """A plus sign, a cross or an X."""
    width, thick, longer = d(0.11, 0.18), d(0.14, 0.3), d.pick(1.0, 1.0, 1.5)
    body = join(box(2 * width, longer, thick, (0, (1 - longer) / 2, 0)), box(1, 2 * width, thick))
    return {"body": body.rotate((0, 0, d.pick(0, 0, 45) if longer == 1 else 0))}


def moon(d: Dice) -> Parts:
    """A crescent."""
    section = disc(0.5) - disc(d(0.4, 0.46), (d(0.2, 0.3), d(-0.05, 0.1)))
    return {"yellow": plate(section, d(0.12, 0.24), bevel=d.pick(0.0, 0.02))}


def lightning(d: Dice) -> Parts:
    """A bolt of lightning."""
    wide = d(0.8, 1.2)
    outline = np.array(
        [(0.05, 0.5), (-0.25, -0.05), (-0.03, -0.05), (-0.12, -0.5), (0.27, 0.12), (0.04, 0.12), (0.22, 0.5)]
    )
    return {
        "yellow": plate(
            outline[::-1] * [wide, 1] if _clockwise(outline) else outline * [wide, 1], d(0.12, 0.25)
        )
    }


def knot(d: Dice) -> Parts:
    """A torus knot, its face to the front."""
    p, q = d.pick((2, 3), (2, 5), (3, 2), (3, 4))
    t = np.linspace(0, 2 * np.pi, 120)
    out = 0.34 + 0.13 * np.cos(q * t)
    curve = np.stack([out * np.cos(p * t), out * np.sin(p * t), 0.14 * np.sin(q * t)], 1)
    return {"body": tube(curve, d(0.045, 0.065), count=90)}


def stairs(d: Dice) -> Parts:
    """A flight of steps that climbs to the back."""
    count, rise, run, width = d.whole(4, 8), d(0.1, 0.15), d(0.12, 0.18), d(0.35, 0.7)
    depths = [run * (count - index) for index in range(count)]
    steps = [
        box(width, rise * (index + 1), depth, (0, rise * (index + 1) / 2, depth / 2 - run * count))
        for index, depth in enumerate(depths)
    ]
    return {"stone": join(*steps)}


def _hull(points: list[Any]) -> Manifold:
    return Manifold.hull_points(np.asarray(points, np.float64))


def _clockwise(outline: np.ndarray) -> bool:
    x, y = outline.T
    return bool((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() < 0)
