"""Vessels and other things from a lathe."""

from __future__ import annotations

from elastic3d.preparation.primitives.solids import (
    Dice,
    Parts,
    ball,
    both_sides,
    join,
    lathe,
    post,
    round_box,
    torus,
    tube,
    vessel,
)


def mug(d: Dice) -> Parts:
    """A cylindrical cup with an ear."""
    radius, height, wall = d(0.32, 0.45), d(0.75, 1.1), d(0.05, 0.07)
    foot, belly = radius * d(0.8, 1.0), radius * d(0.95, 1.12)
    body = vessel([(foot, 0), (belly, height * 0.4), (radius, height)], wall)
    low, high, reach = height * d(0.15, 0.28), height * d(0.72, 0.88), d(0.24, 0.36)
    inside = radius * 0.93
    ear = [
        (inside, low, 0),
        (radius + reach, low + 0.1 * height, 0),
        (radius + reach, high - 0.08 * height, 0),
        (inside, high, 0),
    ]
    handle = tube(ear, d(0.045, 0.065)) - post(wall, 2, inside - wall)
    return {"body": body, d.pick("body 2", "handle"): handle}


def goblet(d: Dice) -> Parts:
    """A cup on a stem."""
    bowl, height, stem = d(0.28, 0.42), d(0.9, 1.2), d(0.045, 0.07)
    start = height * d(0.38, 0.5)
    cup = vessel(
        [(stem, start), (bowl * 0.85, start + 0.12), (bowl * d(1, 1.1), start + 0.35), (bowl * 0.9, height)],
        0.045,
        0.07,
    )
    foot = lathe([(bowl * d(0.75, 1), 0), (bowl * 0.7, 0.05), (stem, 0.12), (stem, start + 0.03)])
    return {"glass": join(cup, foot)}


def vase(d: Dice) -> Parts:
    """A vase with a belly and a neck."""
    height, belly, neck = d(0.9, 1.4), d(0.28, 0.5), d(0.12, 0.24)
    foot, lip = belly * d(0.5, 0.9), neck * d(1.1, 1.8)
    top = height * d(0.68, 0.85)
    profile = [(foot, 0), (belly, height * d(0.25, 0.5)), (neck, top), (lip, height)]
    parts: Parts = {"ceramic": vessel(profile, 0.05)}
    if d.chance(0.3):
        x = belly * 0.75
        ear = tube([(neck * 0.8, top, 0), (belly * 1.05, top, 0), (x, height * 0.5, 0)], 0.04)
        inner = lathe([(belly * 0.6, height * 0.3), (neck * 0.6, height)])
        parts["handles"] = both_sides(ear - inner)
    return parts


def bottle(d: Dice) -> Parts:
    """A closed bottle."""
    radius, height, neck = d(0.16, 0.26), d(0.85, 1.2), d(0.06, 0.09)
    shoulder = height * d(0.5, 0.72)
    profile = [
        (radius * 0.95, 0),
        (radius, 0.06),
        (radius * d(0.85, 1), shoulder),
        (neck, min(shoulder + d(0.12, 0.25), height * 0.92)),
        (neck, height),
    ]
    parts: Parts = {"glass": lathe(profile)}
    if d.chance(0.7):
        parts["cap"] = post(height - 0.02, height + 0.08, neck * d(1.1, 1.5))
    if d.chance(0.6):
        low = d(0.12, 0.25)
        parts["label"] = post(low, low + d(0.15, 0.25), radius * 1.05)
    return parts


def bowl(d: Dice) -> Parts:
    """An open bowl on a small foot."""
    radius, height = d(0.45, 0.6), d(0.3, 0.5)
    foot = radius * d(0.35, 0.6)
    body = vessel([(foot, 0), (radius * 0.85, height * 0.5), (radius, height)], 0.055)
    return {"ceramic": join(body, post(-0.05, 0.04, foot * 0.9))}


def teapot(d: Dice) -> Parts:
    """A pot with a spout on one side, a handle on the other, and a lid."""
    radius, height = d(0.4, 0.5), d(0.5, 0.68)
    top, foot = radius * d(0.4, 0.55), radius * d(0.55, 0.75)
    body = lathe([(foot, 0), (radius, height * 0.45), (top, height)])
    rise, low = height * d(0.9, 1.1), height * d(0.3, 0.45)
    spout = tube(
        [(radius * 0.7, low, 0), (radius * 1.35, low + 0.08, 0), (radius * 1.6, rise, 0)], 0.11, 0.055
    )
    reach = radius + d(0.22, 0.32)
    points = [
        (-radius * 0.6, height * 0.88, 0),
        (-reach, height * 0.9, 0),
        (-reach, height * 0.4, 0),
        (-radius * 0.8, height * 0.2, 0),
    ]
    lid = lathe([(top * 1.1, height - 0.03), (top, height + 0.04), (top * 0.4, height + 0.1)])
    knob = ball(d(0.06, 0.09), (0, height + 0.15, 0))
    return {"ceramic": join(body, spout), "handle": tube(points, d(0.045, 0.06)), "lid": join(lid, knob)}


def jug(d: Dice) -> Parts:
    """A tall jug with a lip and a handle."""
    height, belly, neck = d(0.9, 1.2), d(0.3, 0.42), d(0.2, 0.27)
    profile = [(belly * 0.75, 0), (belly, height * 0.35), (neck, height * 0.8), (neck * 1.2, height)]
    body = vessel(profile, 0.05)
    lip = vessel([(0.03, -0.12), (0.1, 0.0)], 0.04).scale((1.4, 1.4, 1.0)).translate((-neck * 1.2, height, 0))
    inner = lathe(
        [(belly - 0.06, height * 0.2), (belly - 0.06, height * 0.4), (neck - 0.05, height * 0.8), (neck, 2)]
    )
    reach = belly + d(0.16, 0.3)
    ear = [(neck, height * 0.92, 0), (reach, height * 0.85, 0), (belly * 0.9, height * d(0.25, 0.4), 0)]
    return {"ceramic": join(body, lip - inner), "handle": tube(ear, d(0.04, 0.055)) - inner}


def bucket(d: Dice) -> Parts:
    """A bucket with its bail up."""
    foot, rim, height = d(0.28, 0.34), d(0.38, 0.46), d(0.6, 0.75)
    body = join(vessel([(foot, 0), (rim, height)], 0.05), torus(rim, 0.04, (0, height, 0)))
    body = body - post(0.05, 2, foot - 0.06)
    top = height + d(0.3, 0.45)
    bail = tube(
        [
            (-rim, height, 0),
            (-rim * 0.7, top - 0.1, 0),
            (0, top, 0),
            (rim * 0.7, top - 0.1, 0),
            (rim, height, 0),
        ],
        0.032,
    )
    return {"body": body, "metal": bail}


def plant_pot(d: Dice) -> Parts:
    """A cactus or a bush in a pot."""
    height, rim = d(0.35, 0.5), d(0.26, 0.36)
    clay = join(
        lathe([(rim * 0.7, 0), (rim * 0.95, height * 0.8)], smooth=False),
        post(height * 0.75, height, rim),
    )
    if d.chance(0.5):
        top, radius = height + d(0.4, 0.7), d(0.1, 0.15)
        plant = tube([(0, height - 0.05, 0), (0, height + 0.2, 0), (0, top, 0)], radius, count=6)
        for side in (-1, 1):
            low = height + d(0.12, 0.3)
            reach = side * (radius + d(0.12, 0.2))
            arm = tube([(0, low, 0), (reach, low, 0), (reach, low + d(0.2, 0.35), 0)], radius * 0.6, count=10)
            plant = join(plant, arm)
    else:
        size = d(0.18, 0.26)
        leaves = [
            ball(size * d(0.7, 1), (size * d(-1, 1), height + size * d(0.4, 1.8), size * d(-1, 1)))
            for _ in range(6)
        ]
        plant = join(*leaves, ball(size, (0, height + size * 0.5, 0)))
    return {"clay": clay, "leaves": plant}


def spinning_top(d: Dice) -> Parts:
    """A spinning top on its tip."""
    radius, height = d(0.4, 0.55), d(0.35, 0.55)
    body = lathe(
        [
            (0.03, 0),
            (radius * 0.5, height * 0.35),
            (radius, height * 0.65),
            (radius * 0.5, height * 0.9),
            (0.06, height),
        ]
    )
    return {"body": body, "handle": post(height * 0.9, height + d(0.2, 0.4), d(0.04, 0.07))}


def bowling_pin(d: Dice) -> Parts:
    """A bowling pin or a skittle."""
    belly, neck = d(0.2, 0.26), d(0.08, 0.11)
    profile = [(0.12, 0), (belly, 0.35), (neck, 0.78), (neck * d(1.25, 1.6), 0.95), (0.05, 1.08)]
    return {"body": lathe(profile), "band": torus(neck * 0.93, 0.035, (0, 0.78, 0))}


def trophy(d: Dice) -> Parts:
    """A cup with two ears on a plinth."""
    base = round_box(0.42, d(0.14, 0.24), 0.42, 0.03, (0, 0.1, 0))
    rim = d(0.28, 0.38)
    stem = lathe([(0.17, 0.12), (0.05, 0.28), (0.05, 0.42)])
    cup = vessel([(0.06, 0.38), (rim * 0.9, 0.58), (rim, 0.98)], 0.045, 0.08)
    ear = [(rim * 0.9, 0.9, 0), (rim + 0.2, 0.88, 0), (rim + 0.12, 0.66, 0), (rim * 0.8, 0.58, 0)]
    inner = post(0.62, 2, rim - 0.05)
    return {"wood": base, "gold": join(stem, cup, both_sides(tube(ear, 0.036) - inner))}


def candle(d: Dice) -> Parts:
    """A candle with its flame on a holder."""
    radius, height = d(0.1, 0.18), d(0.5, 0.8)
    dish = vessel([(radius * 1.6, 0), (radius * 2.2, 0.12)], 0.05)
    ear = torus(0.11, 0.035, (radius * 2.2 + 0.08, 0.08, 0), (0, 0, 1))
    flame = lathe([(0.02, 0), (0.07, 0.08), (0.01, 0.24)]).translate((0, height, 0))
    wick = post(height - 0.02, height + 0.05, 0.025)
    return {
        "metal": join(dish, ear),
        "wax": post(0.02, height, radius),
        "flame": join(flame, wick),
    }


def table_lamp(d: Dice) -> Parts:
    """A lamp with a shade."""
    foot, height, shade = d(0.2, 0.28), d(0.6, 0.8), d(0.28, 0.4)
    stand = lathe([(foot, 0), (foot * 0.8, 0.06), (0.05, 0.12), (d(0.06, 0.16), 0.32), (0.045, height)])
    body = vessel([(shade, height - 0.08), (shade * d(0.5, 0.8), height + d(0.25, 0.4))], 0.045)
    return {"metal": stand, "cloth": body}


def bell(d: Dice) -> Parts:
    """A bell with its clapper and a handle."""
    rim, height = d(0.38, 0.46), d(0.6, 0.75)
    outer = [
        (rim, 0),
        (rim * 0.8, 0.1),
        (rim * 0.6, height * 0.5),
        (rim * 0.5, height * 0.85),
        (0.08, height),
    ]
    inner = [(max(0.01, r - 0.06), y - 0.05) for r, y in outer]
    grip = lathe([(0.06, height - 0.02), (d(0.06, 0.1), height + 0.2), (0.06, height + 0.35)])
    shell = lathe(outer) - lathe(inner)
    return {
        "gold": shell,
        "metal": join(ball(0.1, (0, 0.05, 0)), post(0.05, height, 0.035)),
        "wood": grip,
    }


def barrel(d: Dice) -> Parts:
    """A barrel with its hoops."""
    radius, belly, height = d(0.3, 0.36), d(0.4, 0.46), d(0.85, 1.05)
    body = lathe([(radius, 0), (belly, height / 2), (radius, height)])
    hoops = [torus(radius + (belly - radius) * 0.45, 0.04, (0, y * height, 0)) for y in (0.18, 0.82)]
    top = post(height - 0.05, height + 1, radius - 0.06)
    return {"wood": body - top, "metal": join(*hoops)}


def coin_stack(d: Dice) -> Parts:
    """Some coins on each other, a little out of line."""
    thick = d(0.07, 0.1)
    coins = [
        post(i * thick, (i + 1) * thick, 0.4 - 0.03 * (i % 2)).translate((d(-0.05, 0.05), 0, d(-0.05, 0.05)))
        for i in range(d.whole(2, 9))
    ]
    return {"gold": join(*coins)}
