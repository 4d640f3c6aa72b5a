"""Plants, fruit and food, and the weather above them."""

from __future__ import annotations

import numpy as np

from elastic3d.preparation.primitives.solids import (
    Dice,
    Parts,
    around,
    ball,
    box,
    capsule,
    ellipsoid,
    join,
    lathe,
    plate,
    polygon,
    post,
    rod,
    torus,
    tube,
)


def tree(d: Dice) -> Parts:
    """A broad-leaved tree or a conifer."""
    trunk, height = d(0.06, 0.1), d(0.3, 0.5)
    stem = post(0, height + 0.2, trunk * 1.25, trunk * 0.8)
    if d.chance(0.5):
        tiers, size = d.whole(2, 4), d(0.32, 0.42)
        crown = [
            post(height + i * 0.24, height + i * 0.24 + 0.4, size * (1 - i / (tiers + 1)), 0.02)
            for i in range(tiers)
        ]
    else:
        size = d(0.22, 0.3)
        crown = [ball(size * 1.1, (0, height + size * 1.2, 0))]
        for _ in range(d.whole(3, 7)):
            side = d.direction() * size * 0.9
            crown.append(ball(size * d(0.6, 0.9), (side[0], height + size * 1.3 + side[1], side[2])))
    return {"wood": stem, "leaves": join(*crown)}


def palm(d: Dice) -> Parts:
    """A palm tree."""
    lean, height = d(-0.3, 0.3), d(0.8, 1.0)
    stem = tube([(0, 0, 0), (lean * 0.3, height * 0.5, 0), (lean, height, 0)], 0.075, 0.05)
    reach, droop = d(0.36, 0.46), d(0.15, 0.35)
    leaf = tube([(0, 0, 0), (reach * 0.5, 0.12, 0), (reach, 0.12 - droop, 0)], 0.055, 0.03, 9).scale(
        (1, 0.8, 1.6)
    )
    nuts = around(ball(0.06, (0.08, -0.06, 0)), 3)
    return {
        "wood": stem,
        "leaves": around(leaf, d.whole(5, 7)).translate((lean, height, 0)),
        "nut": nuts.translate((lean, height, 0)),
    }


def mushroom(d: Dice) -> Parts:
    """A toadstool."""
    cap, rise, height = d(0.36, 0.5), d(0.2, 0.4), d(0.45, 0.7)
    stem = lathe([(d(0.13, 0.2), 0), (d(0.09, 0.13), height * 0.6), (0.12, height + 0.06)])
    hat = ellipsoid(cap, rise, cap, (0, height, 0)) - ellipsoid(
        cap * 1.1, 0.5, cap * 1.1, (0, height - 0.48, 0)
    )
    spots = [
        post(0, 1.06, 0.13, 0.16).rotate((tilt, 0, 0)).rotate((0, turn, 0))
        for tilt, turn in ((10, d(0, 360)), *((50, d(0, 30) + 60 * i) for i in range(6)))
    ]
    dots = join(*spots).scale((cap, rise, cap)).translate((0, height, 0)) - box(
        2, 2, 2, (0, height - 0.96, 0)
    )
    return {"red": hat, "ivory": stem, "white": dots if d.chance(0.6) else stem}


def flower(d: Dice) -> Parts:
    """A flower on its stem, its face to the front."""
    petals, length, size = d.whole(5, 8), d(0.15, 0.22), d(0.09, 0.13)
    petal = ellipsoid(length * 0.6, 0.055, length * 0.38, (size + length * 0.25, 0, 0))
    tilt = d(40, 80)
    blossom = around(petal, petals).rotate((tilt, 0, 0)).translate((0, 0.9, 0.05))
    heart = ellipsoid(size, 0.07, size).rotate((tilt, 0, 0)).translate((0, 0.91, 0.07))
    stem = tube([(0, 0, 0), (d(-0.02, 0.02), 0.45, 0), (0, 0.9, 0.02)], 0.036)
    leaf = ellipsoid(0.17, 0.035, 0.075).rotate((0, 0, 35)).translate((0.13, d(0.25, 0.45), 0))
    leaves = join(leaf, leaf.mirror((1, 0, 0)).translate((0, d(-0.1, 0.1), 0)))
    return {"petals": blossom, "yellow": heart, "leaves": join(stem, leaves)}


def apple(d: Dice) -> Parts:
    """An apple with its stalk."""
    radius = d(0.4, 0.48)
    body = lathe(
        [
            (0.02, 0.06),
            (radius * 0.5, 0),
            (radius, 0.45),
            (radius * 0.75, 0.76),
            (radius * 0.3, 0.8),
            (0.02, 0.68),
        ]
    )
    stalk = tube([(0, 0.64, 0), (0.02, 0.85, 0), (d(0.05, 0.12), 1.0, 0)], 0.036)
    leaf = ellipsoid(0.16, 0.04, 0.08).rotate((0, 0, 25)).translate((0.18, 0.94, 0))
    return {"red": body, "wood": stalk, "leaves": leaf}


def pear(d: Dice) -> Parts:
    """A pear with its stalk."""
    radius, neck = d(0.3, 0.38), d(0.12, 0.18)
    body = lathe(
        [(0.04, 0.02), (radius * 0.7, 0.08), (radius, 0.34), (neck * 1.2, 0.7), (neck, 0.84), (0.03, 0.93)]
    )
    return {"pear": body, "wood": tube([(0, 0.88, 0), (0.02, 1.0, 0), (d(-0.1, 0.1), 1.1, 0)], 0.034)}


def banana(d: Dice) -> Parts:
    """A banana that lies on its back."""
    reach, sag, girth = d(0.45, 0.52), d(0.22, 0.34), d(0.09, 0.12)
    points = [
        (-reach, sag, 0),
        (-reach * 0.5, sag * 0.25, 0),
        (0, 0, 0),
        (reach * 0.5, sag * 0.25, 0),
        (reach, sag, 0),
    ]
    ends = [
        capsule(points[0], (-reach - 0.06, sag + 0.1, 0), girth * 0.55, 0.04),
        capsule(points[-1], (reach + 0.05, sag + 0.09, 0), girth * 0.5, 0.03),
    ]
    left, right = tube(points[2::-1], girth, girth * 0.55), tube(points[2:], girth, girth * 0.5)
    return {"yellow": join(left, right), "wood": join(*ends)}


def cloud(d: Dice) -> Parts:
    """A cloud of balls with a flat bottom."""
    lobes = [
        ball(d(0.16, 0.28), (x, d(0.02, 0.2), d(-0.08, 0.08))) for x in np.linspace(-0.4, 0.4, d.whole(4, 6))
    ]
    return {"white": join(*lobes) - box(3, 1, 3, (0, -0.5, 0))}


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
    cone = post(0, length, 0.03, size * 0.95)
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
    cream = join(*tiers, post(height, height + 0.42, radius * 0.8, 0.03))
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
    levels = [post(height * i, height * (i + 1), radius * (1 - 0.27 * i)) for i in range(tiers)]
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
    meat = post(0.13, 0.13 + thick, radius * 1.03)
    leaf = around(ellipsoid(0.12, 0.03, 0.14, (radius, 0.16 + thick, 0)), 10)
    cheese = box(radius * 1.5, 0.045, radius * 1.5, (0, 0.14 + thick, 0)).rotate((0, d(0, 90), 0))
    top = ellipsoid(radius, d(0.26, 0.36), radius, (0, 0.17 + thick, 0)) - box(3, 1, 3, (0, -0.33 + thick, 0))
    return {"dough": join(bottom, top), "meat": meat, "leaves": leaf, "yellow": cheese}


def lollipop(d: Dice) -> Parts:
    """A lollipop or a popsicle."""
    stick = post(0, 0.6, 0.04)
    if d.chance(0.5):
        return {"sugar": rod((0, 0.85, -0.07), (0, 0.85, 0.07), d(0.28, 0.36)), "ivory": stick}
    bar = polygon(
        [(-0.2, 0.45), (0.2, 0.45), (0.2, 1.0), (0.14, 1.12), (0, 1.17), (-0.14, 1.12), (-0.2, 1.0)]
    )
    return {"sugar": plate(bar, d(0.16, 0.22), bevel=0.04), "ivory": stick}
