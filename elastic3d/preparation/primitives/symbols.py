"""Letters and signs, extrusions most of them, and abstract shapes: one to nine primitives, put together, carved and
warped at random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from manifold3d import Manifold

from elastic3d.errors import UserError
from elastic3d.preparation.primitives.solids import (
    Dice,
    Parts,
    ball,
    bend,
    both_sides,
    box,
    bumps,
    capsule,
    disc,
    ellipsoid,
    height_of,
    join,
    plate,
    polygon,
    post,
    prism,
    profile_curve,
    rod,
    round_box,
    taper,
    torus,
    tube,
    twist,
)
from elastic3d.preparation.primitives.solids import lathe as revolve

GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSans.ttf")


def glyph_of(seed: int) -> str:
    """The letter or digit that a seed stands for: 36 seeds in a row show each of them once."""
    return GLYPHS[seed * 7 % len(GLYPHS)]


def fonts_folder() -> Path:
    """Where the fonts of the letters are. UserError if matplotlib, which brings them, or one of them is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("letters need matplotlib's fonts: pip install 'elastic3d[data]'") from error
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    if missing := [name for name in FONTS if not (folder / name).is_file()]:
        raise UserError(f"letters need {missing[0]} in {folder}: reinstall matplotlib with pip")
    return folder


def letter(d: Dice, glyph: str) -> Parts:
    """A letter or digit of a DejaVu font, extruded. UserError if the font is missing."""
    font = fonts_folder() / d.pick(*FONTS[:3], *FONTS)
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

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
    front = np.c_[outline, np.zeros(2 * rays)]
    middle = np.array([[0, 0, 0], [0, 0, thick], [0, 0, -thick]])
    sides = [front[[i, (i + 1) % (2 * rays)]] for i in range(2 * rays)]
    rays_3d = [Manifold.hull_points(np.concatenate([side, middle])) for side in sides]
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
    points = [
        (0.05, 0.5),
        (-0.25, -0.05),
        (-0.03, -0.05),
        (-0.12, -0.5),
        (0.27, 0.12),
        (0.04, 0.12),
        (0.22, 0.5),
    ]
    return {"yellow": plate(np.array(points) * [wide, 1], d(0.12, 0.25))}


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


MOST = 9


def count_of(seed: int) -> int:
    """How many primitives the composition of a seed has: nine seeds in a row show one to nine."""
    return 1 + seed * 4 % MOST


def composition(d: Dice, count: int) -> Parts:
    """`count` primitives that touch; in a third of the shapes mirrored in X."""
    solids = [_primitive(d)]
    while len(solids) < count:
        solids.append(_beside(d, d.pick(*solids), _primitive(d, d(0.5, 1.0))))
    if count > 1 and d.chance(0.33):
        solids = [both_sides(solid) for solid in solids]
    return {f"part {index}": solid for index, solid in enumerate(solids)}


def carving(d: Dice, count: int) -> Parts:
    """One primitive from which others are cut, or with which they are intersected."""
    body, done = _primitive(d), 1
    for _ in range(8 * count):
        if done >= count:
            break
        tool = _beside(d, body, _primitive(d, d(0.5, 0.9)))
        carved = body ^ tool.scale((1.8, 1.8, 1.8)) if d.chance(0.2) else body - tool
        if 0.5 * body.volume() < carved.volume() < 0.97 * body.volume() and _is_stout(carved):
            body, done = carved, done + 1
    return {"body": body}


def warped(d: Dice, count: int) -> Parts:
    """A stack of one to three primitives, bent, twisted, tapered or with bumps."""
    solids, top = [], 0.0
    for _ in range(1 + count // 4):
        solid = _primitive(d).scale((0.8, 1.6, 0.8))
        low, high = height_of(solid)
        solids.append(solid.translate((0, top - low - 0.08, 0)))
        top += high - low - 0.16
    body = join(*solids)
    for _ in range(d.whole(1, 2)):
        way = d.pick("bend", "twist", "taper", "bumps")
        if way == "bend":
            body = bend(body, d.pick(-1, 1) * d(40, 130))
        elif way == "twist":
            body = twist(body, d.pick(-1, 1) * d(60, 200))
        elif way == "taper":
            body = taper(body, d(0.35, 0.6) if d.chance(0.7) else d(1.3, 1.8))
        else:
            body = bumps(body, d(0.02, 0.05), d(1.5, 4), d(0, 6))
    return {"body": max(body.decompose(), key=Manifold.volume)}


def lathe(d: Dice) -> Parts:
    """A solid of revolution with a random profile."""
    knots, y, radius = [], 0.0, d(0.15, 0.45)
    for _ in range(d.whole(4, 8)):
        knots.append((radius, y))
        y += d(0.08, 0.3)
        radius = min(0.5, max(0.05, radius + d(-0.28, 0.28)))
    curve = profile_curve(knots, 40) if d.chance(0.6) else knots
    body = revolve(curve, smooth=False)
    return {"body": twist(body.scale((1, 1, 0.6)), d(30, 120)) if d.chance(0.15) else body}


def _primitive(d: Dice, size: float = 1.0) -> Manifold:
    """A primitive of about a unit's size around the origin, turned by a quarter, freely or not at all."""
    a, b, c = (0.5 * size * d(0.4, 1.0) for _ in range(3))
    kind = d.whole(0, 7)
    if kind == 0:
        solid = box(2 * a, 2 * b, 2 * c)
    elif kind == 1:
        solid = round_box(2 * a, 2 * b, 2 * c, 0.3 * min(a, b, c))
    elif kind == 2:
        solid = ellipsoid(a, b, c) if d.chance(0.5) else ellipsoid(a, a, a)
    elif kind == 3:
        solid = post(-b, b, a)
    elif kind == 4:
        solid = post(-b, b, a, a * d.pick(0.03, 0.3, 0.6))
    elif kind == 5:
        solid = torus(0.4 * size, 0.4 * size * d(0.2, 0.45))
    elif kind == 6:
        solid = capsule((0, -b, 0), (0, b, 0), a * 0.7, a * d(0.4, 0.7))
    else:
        solid = prism((0, -b, 0), (0, b, 0), a, d.whole(3, 6), a * d.pick(1.0, 1.0, 0.5, 0.05))
    turn = d.pick("none", "none", "quarter", "free")
    if turn == "none":
        return solid
    return solid.rotate((90, 0, 0) if turn == "quarter" else (d(0, 360), d(0, 360), d(0, 360)))


def _beside(d: Dice, base: Manifold, solid: Manifold) -> Manifold:
    """A solid moved so that its centre lies near the surface of another's bounding box, mostly along an axis."""
    box_ = base.bounding_box()
    centre = [(low + high) / 2 for low, high in zip(box_[:3], box_[3:], strict=True)]
    half = [(high - low) / 2 for low, high in zip(box_[:3], box_[3:], strict=True)]
    way = d.direction().tolist()
    if d.chance(0.6):
        axis = d.whole(0, 2)
        way = [d.pick(-1.0, 1.0) if index == axis else d.pick(0.0, 0.0, 0.5) for index in range(3)]
    return solid.translate([c + 0.85 * h * w for c, h, w in zip(centre, half, way, strict=True)])


def _is_stout(solid: Manifold) -> bool:
    """Whether it is in one piece and no shell or shred: a ball's mean thickness is a third of its diameter."""
    box_ = solid.bounding_box()
    longest = max(high - low for low, high in zip(box_[:3], box_[3:], strict=True))
    thickness = 2 * solid.volume() / solid.surface_area()
    return thickness > 0.13 * longest and len(solid.decompose()) == 1
