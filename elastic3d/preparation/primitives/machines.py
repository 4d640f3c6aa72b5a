"""Machine parts, bricks and instruments."""

from __future__ import annotations

import numpy as np

from elastic3d.preparation.primitives.solids import (
    Dice,
    Parts,
    around,
    ball,
    box,
    capsule,
    disc,
    join,
    plate,
    polygon,
    rod,
    torus,
    tube,
)


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
