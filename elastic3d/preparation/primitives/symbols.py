"""Letters, signs, machine parts and sweets: extrusions and rings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from elastic3d.errors import UserError
from elastic3d.preparation.primitives.solids import (
    Dice,
    Parts,
    around,
    ball,
    box,
    capsule,
    disc,
    ellipsoid,
    join,
    lathe,
    plate,
    polygon,
    rod,
    torus,
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
    outline = polygon(*(ring[:-1] for ring in rings))
    return {"body": plate(outline, d(0.12, 0.4), bevel=d.pick(0.0, 0.0, 0.02))}


def gear(d: Dice) -> Parts:
    """A gear, upright or flat, with a bore and sometimes windows."""
    teeth, radius, depth = d.whole(8, 18), 0.45, d(0.09, 0.14)
    step = 2 * np.pi / teeth
    corners = [
        (0.0, radius - depth),
        (0.22, radius - depth),
        (0.34, radius),
        (0.62, radius),
        (0.74, radius - depth),
    ]
    rim = [(r * np.cos((i + t) * step), r * np.sin((i + t) * step)) for i in range(teeth) for t, r in corners]
    bore = d(0.07, 0.13)
    section = polygon(rim) - disc(bore)
    thick = d(0.1, 0.24)
    if d.chance(0.4):
        holes = d.whole(4, 6)
        for turn in 2 * np.pi * np.arange(holes) / holes:
            section = section - disc(0.07, (0.22 * np.cos(turn), 0.22 * np.sin(turn)))
    body = plate(section, thick)
    if d.chance(0.5):
        body = join(body, plate(disc(bore + 0.08) - disc(bore), thick + 0.14))
    return {"metal": body.rotate(d.pick((0, 0, 0), (0, 0, 0), (-90, 0, 0)))}


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


def donut(d: Dice) -> Parts:
    """A ring of dough with icing and sprinkles."""
    ring, tube_radius = d(0.33, 0.38), d(0.13, 0.2)
    dough = torus(ring, tube_radius).scale((1, d(0.8, 1.0), 1))
    icing = torus(ring, tube_radius * 1.08) - box(3, 1, 3, (0, -0.5 + tube_radius * 0.15, 0))
    parts: Parts = {"dough": dough, "icing": icing}
    if d.chance(0.5):
        grains = []
        for _ in range(d.whole(8, 16)):
            turn, out = d(0, 2 * np.pi), ring + tube_radius * d(-0.5, 0.5)
            at = np.array(
                [
                    out * np.cos(turn),
                    np.sqrt(max(0.0, (tube_radius * 1.08) ** 2 - (out - ring) ** 2)),
                    out * np.sin(turn),
                ]
            )
            way = d.direction() * [0.05, 0.01, 0.05]
            grains.append(capsule(at - way, at + way, 0.028))
        parts["sprinkles"] = join(*grains)
    return parts


def ice_cream(d: Dice) -> Parts:
    """Scoops in a cone."""
    scoops, size, length = d.whole(1, 3), d(0.2, 0.26), d(0.5, 0.65)
    cone = rod((0, 0, 0), (0, length, 0), 0.03, size * 0.95)
    parts: Parts = {"waffle": cone}
    for index in range(scoops):
        parts[f"scoop {index}"] = ball(
            size * (1 - 0.1 * index), (0, length + size * (0.35 + 1.15 * index), 0)
        )
    if d.chance(0.4):
        parts["red"] = ball(0.07, (0, length + size * (1.35 + 1.15 * (scoops - 1)), 0))
    return parts


def cupcake(d: Dice) -> Parts:
    """A cupcake with a swirl."""
    radius, height = d(0.26, 0.32), d(0.3, 0.38)
    cup = lathe([(radius * 0.72, 0), (radius, height)], smooth=False)
    folds = join(cup, around(rod((radius * 0.72, 0, 0), (radius, height, 0), 0.035), 16))
    tiers = [
        torus((radius * 1.05 - 0.12) * s, 0.11 * s**0.5, (0, height + y, 0))
        for s, y in ((1.0, 0.05), (0.7, 0.18), (0.4, 0.3))
    ]
    cream = join(*tiers, rod((0, height, 0), (0, height + 0.42, 0), radius * 0.8, 0.03))
    return {"cup": folds, "icing": cream, "red": ball(0.08, (0, height + 0.45, 0))}


def cake(d: Dice) -> Parts:
    """A round cake of one to three tiers with candles, or a slice."""
    if d.chance(0.35):
        outline = [(0, 0), (0.8, -0.26), (0.86, 0), (0.8, 0.26)]
        slice_ = [
            plate(outline, h).rotate((-90, 0, 0)).translate((-0.4, y, 0))
            for h, y in ((0.2, 0.1), (0.08, 0.24), (0.16, 0.36), (0.07, 0.46))
        ]
        return {
            "dough": join(slice_[0], slice_[2]),
            "icing": join(slice_[1], slice_[3]),
            "red": ball(0.09, (0.2, 0.55, 0)),
        }
    tiers, radius, height = d.whole(1, 3), d(0.4, 0.5), d(0.2, 0.28)
    levels = [
        rod((0, height * i, 0), (0, height * (i + 1), 0), radius * (1 - 0.27 * i)) for i in range(tiers)
    ]
    beads = [around(ball(0.05, (radius * (1 - 0.27 * i), height * (i + 1), 0)), 12) for i in range(tiers)]
    candle = rod(
        (radius * 0.4 * (1 - 0.2 * tiers), height * tiers - 0.01, 0),
        (radius * 0.4 * (1 - 0.2 * tiers), height * tiers + 0.2, 0),
        0.032,
    )
    return {"dough": join(*levels), "icing": join(*beads), "wax": around(candle, d.whole(3, 5))}


def burger(d: Dice) -> Parts:
    """A burger in its bun."""
    radius, thick = d(0.42, 0.5), d(0.1, 0.15)
    bottom = lathe([(radius * 0.9, 0), (radius, 0.08), (radius, 0.13)])
    meat = rod((0, 0.13, 0), (0, 0.13 + thick, 0), radius * 1.03)
    leaf = around(ellipsoid(0.12, 0.03, 0.14, (radius, 0.16 + thick, 0)), 10)
    cheese = box(radius * 1.5, 0.045, radius * 1.5, (0, 0.14 + thick, 0)).rotate((0, d(0, 90), 0))
    top = ellipsoid(radius, d(0.26, 0.36), radius, (0, 0.17 + thick, 0)) - box(3, 1, 3, (0, -0.33 + thick, 0))
    return {"dough": join(bottom, top), "meat": meat, "leaves": leaf, "yellow": cheese}


def chain(d: Dice) -> Parts:
    """Links of a chain, hung in a row."""
    size, tube_radius, count = d(0.14, 0.18), d(0.04, 0.055), d.whole(2, 4)
    link = torus(size, tube_radius, axis=(0, 0, 1)).scale((0.8, 1.3, 1))
    pitch = 2 * (size * 1.3 - tube_radius * 1.15)
    return {
        "metal": join(*(link.rotate((0, 90 * (i % 2), 0)).translate((0, i * pitch, 0)) for i in range(count)))
    }


def spring(d: Dice) -> Parts:
    """A coil spring upright."""
    turns, radius, wire = d.whole(3, 5), d(0.22, 0.32), d(0.04, 0.06)
    t = np.linspace(0, 2 * np.pi * turns, turns * 16)
    curve = np.stack([radius * np.cos(t), t / t[-1], radius * np.sin(t)], 1)
    return {"metal": tube(curve, wire, count=turns * 18)}


def knot(d: Dice) -> Parts:
    """A torus knot, its face to the front."""
    p, q = d.pick((2, 3), (2, 5), (3, 2), (3, 4))
    t = np.linspace(0, 2 * np.pi, 120)
    out = 0.34 + 0.13 * np.cos(q * t)
    curve = np.stack([out * np.cos(p * t), out * np.sin(p * t), 0.14 * np.sin(q * t)], 1)
    return {"body": tube(curve, d(0.045, 0.065), count=90)}


def pipe(d: Dice) -> Parts:
    """A piece of piping: elbow, tee or cross, with flanges."""
    radius, reach = d(0.12, 0.18), d(0.4, 0.5)
    ways = d.pick(
        [(0, 1, 0), (1, 0, 0)],
        [(0, 1, 0), (1, 0, 0), (-1, 0, 0)],
        [(0, 1, 0), (0, -1, 0), (1, 0, 0), (-1, 0, 0)],
    )
    ends = [np.array(way) * reach for way in ways]
    outer = join(ball(radius), *(rod((0, 0, 0), end, radius) for end in ends))
    flanges = join(*(rod(end * 0.85, end, radius * 1.5) for end in ends))
    inner = join(ball(radius - 0.05), *(rod((0, 0, 0), end * 1.1, radius - 0.05) for end in ends))
    return {"metal": outer - inner, "flange": flanges - inner}


def hollow_frame(d: Dice) -> Parts:
    """A cube, a sphere or a cylinder pierced along its axes."""
    body = d.pick(box(1, 1, 1), ball(0.6), rod((0, -0.5, 0), (0, 0.5, 0), 0.55))
    size = d(0.24, 0.32)
    hole = box(2 * size, 2 * size, 3) if d.chance(0.5) else rod((0, 0, -2), (0, 0, 2), size)
    cut = join(hole, hole.rotate((0, 90, 0)), hole.rotate((90, 0, 0)))
    return {"body": body - cut}


def brick(d: Dice) -> Parts:
    """A toy brick with studs."""
    columns, rows, height = d.whole(1, 4), d.whole(1, 2), d.pick(0.35, 0.35, 0.14)
    body = box(0.3 * columns, height, 0.3 * rows, (0, height / 2, 0))
    studs = [
        rod(
            (0.3 * (i + 0.5 - columns / 2), height - 0.01, 0.3 * (j + 0.5 - rows / 2)),
            (0.3 * (i + 0.5 - columns / 2), height + 0.07, 0.3 * (j + 0.5 - rows / 2)),
            0.09,
        )
        for i in range(columns)
        for j in range(rows)
    ]
    return {"body": join(body, *studs)}


def stairs(d: Dice) -> Parts:
    """A flight of steps that climbs to the back."""
    count, rise, run, width = d.whole(4, 8), d(0.1, 0.15), d(0.12, 0.18), d(0.35, 0.7)
    depths = [run * (count - index) for index in range(count)]
    steps = [
        box(width, rise * (index + 1), depth, (0, rise * (index + 1) / 2, depth / 2 - run * count))
        for index, depth in enumerate(depths)
    ]
    return {"stone": join(*steps)}


def guitar(d: Dice) -> Parts:
    """A guitar, neck up, its face to the front."""
    lower, upper, neck = d(0.26, 0.3), d(0.19, 0.22), d(0.5, 0.62)
    outline = (disc(lower) + disc(upper, (0, lower + 0.08))).offset(0.05).offset(-0.09).offset(0.04)
    depth = d(0.12, 0.18)
    body = plate(outline, depth, bevel=0.02)
    top = lower + 0.2
    hole = rod((0, lower * 0.75, 0.02), (0, lower * 0.75, 1), 0.085)
    bridge = box(0.2, 0.045, 0.07, (0, -0.08, depth / 2))
    fretboard = box(0.08, neck, 0.06, (0, top + neck / 2, 0.06))
    head = box(0.13, 0.18, 0.06, (0, top + neck + 0.07, 0.04))
    return {"wood": body - hole, "black": join(fretboard, bridge), "body": head}


def drum(d: Dice) -> Parts:
    """A drum with its rims."""
    radius, height = d(0.36, 0.45), d(0.3, 0.7)
    shell = rod((0, 0, 0), (0, height, 0), radius)
    rims = [torus(radius, 0.04, (0, y, 0)) for y in (0.0, height)]
    rods = around(capsule((radius + 0.01, 0, 0), (radius + 0.01, height, 0), 0.03), d.whole(6, 8))
    return {"red": shell, "metal": join(*rims, rods)}


def _hull(points: list[object]) -> object:
    from manifold3d import Manifold

    return Manifold.hull_points(np.asarray(points, np.float64))


def _clockwise(outline: np.ndarray) -> bool:
    x, y = outline.T
    return bool((x * np.roll(y, -1) - y * np.roll(x, -1)).sum() < 0)
