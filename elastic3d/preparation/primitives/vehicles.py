"""Vehicles, which drive along +Z, and buildings."""

from __future__ import annotations

import numpy as np
from manifold3d import Manifold

from elastic3d.preparation.primitives.solids import (
    Dice,
    Parts,
    around,
    ball,
    both_sides,
    box,
    capsule,
    ellipsoid,
    join,
    lathe,
    plate,
    post,
    prism,
    rod,
    round_box,
    torus,
    tube,
)


def _side(outline: list[tuple[float, float]], width: float, bevel: float = 0.0) -> Manifold:
    """A side view of (forward, up) points, `width` across."""
    return plate(outline, width, bevel=bevel).rotate((0, -90, 0))


def _wheels(places: list[float], across: float, radius: float, width: float, y: float) -> Manifold:
    tyres = [
        rod((x - width / 2, y, z), (x + width / 2, y, z), radius) for z in places for x in (-across, across)
    ]
    return join(*tyres)


def car(d: Dice) -> Parts:
    """A car: saloon, hatchback or sports car."""
    half, width, belt, roof = d(0.5, 0.58), d(0.4, 0.5), d(0.26, 0.32), d(0.44, 0.54)
    back, front = d(-0.95, -0.5) * half, d(0.35, 0.55) * half
    lower = [(-half, 0.1), (half, 0.1), (half, belt * 0.8), (front, belt), (-half, belt)]
    cabin = [(back - 0.08, belt - 0.02), (front, belt - 0.02), (front - 0.2, roof), (back + 0.08, roof)]
    wheel = d(0.11, 0.14)
    places = [-half * 0.62, half * 0.62]
    arches = _wheels(places, width / 2, wheel * 1.2, 0.2, wheel)
    lights = both_sides(
        rod((width * 0.33, belt * 0.62, half - 0.05), (width * 0.33, belt * 0.62, half + 0.03), 0.05)
    )
    return {
        "paint": _side(lower, width, 0.05) - arches,
        "glass": _side(cabin, width * 0.84, 0.04),
        "tyre": _wheels(places, width / 2 - 0.05, wheel, 0.11, wheel),
        "lamp": lights,
    }


def truck(d: Dice) -> Parts:
    """A lorry with a cab and a box, or a flat bed with a load."""
    half, width, wheel = d(0.55, 0.65), d(0.34, 0.42), d(0.1, 0.13)
    frame = box(width * 0.9, 0.08, half * 2, (0, wheel * 1.6, 0))
    floor = wheel * 1.6 + 0.03
    height = d(0.32, 0.42)
    cab = _side(
        [
            (half, floor),
            (half, floor + height * 0.5),
            (half - 0.06, floor + height),
            (half - 0.3, floor + height),
            (half - 0.3, floor),
        ],
        width,
        0.02,
    )
    window = box(width * 0.8, height * 0.35, 0.1, (0, floor + height * 0.7, half - 0.05))
    length = 2 * half - 0.35
    if d.chance(0.65):
        load = box(width, height * d(1.0, 1.3), length, (0, floor + height * 0.55, half - 0.35 - length / 2))
    else:
        load = box(width, 0.16, length, (0, floor + 0.08, half - 0.35 - length / 2)) - box(
            width - 0.1, 0.2, length - 0.1, (0, floor + 0.15, half - 0.35 - length / 2)
        )
    wheels = _wheels([half - 0.18, -half + 0.15, -half + 0.4], width / 2 - 0.03, wheel, 0.1, wheel)
    return {"paint": cab, "body": join(load, frame), "glass": window, "tyre": wheels}


def bus(d: Dice) -> Parts:
    """A bus."""
    half, width, height, wheel = d(0.5, 0.6), d(0.3, 0.36), d(0.36, 0.5), 0.09
    body = round_box(width, height, 2 * half, 0.05, (0, wheel + height / 2, 0))
    count = d.whole(4, 6)
    pitch = 1.8 * half / count
    panes = [
        box(
            width + 0.05,
            height * 0.3,
            pitch * 0.7,
            (0, wheel + height * 0.68, -half * 0.9 + pitch * (i + 0.5)),
        )
        for i in range(count)
    ]
    front = box(width * 0.8, height * 0.38, 0.05, (0, wheel + height * 0.65, half))
    return {
        "paint": body,
        "glass": join(*panes, front),
        "tyre": _wheels([-half * 0.6, half * 0.6], width / 2 - 0.02, wheel, 0.09, wheel),
    }


def train(d: Dice) -> Parts:
    """A steam engine."""
    radius, length, wheel = d(0.15, 0.19), d(0.5, 0.62), d(0.09, 0.11)
    base = box(0.34, 0.08, length + 0.34, (0, wheel * 1.5, 0))
    y = wheel * 1.5 + radius
    boiler = rod((0, y, -0.1), (0, y, length * 0.62), radius)
    cab = box(0.36, 0.4, 0.28, (0, wheel * 1.5 + 0.2, -length * 0.5 + 0.05)) - box(
        1, 0.15, 0.17, (0, wheel * 1.5 + 0.29, -length * 0.5 + 0.05)
    )
    roof = box(0.42, 0.05, 0.36, (0, wheel * 1.5 + 0.42, -length * 0.5 + 0.05))
    chimney = rod((0, y, length * 0.45), (0, y + radius + d(0.15, 0.25), length * 0.45), 0.055, d(0.055, 0.1))
    dome = ball(0.08, (0, y + radius, length * 0.1))
    wheels = _wheels(list(np.linspace(-length * 0.5, length * 0.5, 4)), 0.16, wheel, 0.07, wheel)
    return {"paint": join(boiler, cab), "red": join(base, roof), "black": join(chimney, dome), "tyre": wheels}


def plane(d: Dice) -> Parts:
    """An airliner or a propeller plane."""
    girth, length, span = d(0.07, 0.1), d(0.5, 0.6), d(0.5, 0.65)
    body = join(
        capsule((0, 0, length * 0.75), (0, 0, -length * 0.4), girth),
        capsule((0, 0, -length * 0.4), (0, 0.05, -length), girth, 0.045),
    )
    chord, sweep = d(0.16, 0.24), d(0.0, 0.35)
    wing = plate(
        [(0, chord / 2), (span, chord * 0.2 - sweep), (span, -chord * 0.25 - sweep), (0, -chord / 2)], 0.045
    )
    wings = both_sides(wing.rotate((90, 0, 0)).mirror((0, 0, 1)).translate((0, -0.02, 0.08)))
    tail = plate(
        [(0, 0.08), (span * 0.36, -0.04 - sweep * 0.3), (span * 0.36, -0.12 - sweep * 0.3), (0, -0.1)], 0.042
    )
    tails = both_sides(tail.rotate((90, 0, 0)).mirror((0, 0, 1)).translate((0, 0.05, -length * 0.88)))
    fin = _side(
        [(-length * 0.72, 0.02), (-length * 1.0, 0.28), (-length * 1.12, 0.28), (-length * 1.04, 0.02)], 0.045
    )
    if d.chance(0.5):
        z, x = 0.14 - sweep * 0.3, span * 0.4
        engines = both_sides(rod((x, -0.09, z - 0.1), (x, -0.09, z + 0.12), 0.055))
    else:
        blade = ellipsoid(0.035, 0.2, 0.025)
        hub = rod((0, 0, length * 0.7), (0, 0, length * 0.7 + girth + 0.1), 0.05, 0.03)
        engines = join(hub, blade.translate((0, 0, length * 0.75 + girth + 0.02)))
    return {"body": body, "wings": join(wings, tails, fin), "metal": engines}


def helicopter(d: Dice) -> Parts:
    """A helicopter."""
    girth = d(0.17, 0.22)
    body = ellipsoid(girth, girth, girth * 1.5)
    boom = rod((0, 0.05, -0.2), (0, 0.1, -d(0.65, 0.8)), 0.07, 0.04)
    fin = _side([(-0.58, 0.08), (-0.78, 0.26), (-0.86, 0.26), (-0.8, 0.06)], 0.045)
    mast = post(girth * 0.8, girth + 0.12, 0.035)
    blade = ellipsoid(d(0.5, 0.62), 0.025, 0.05, (0, girth + 0.12, 0))
    turn = d(0, 90)
    skid = join(
        capsule((0.18, -girth - 0.12, -0.25), (0.18, -girth - 0.12, 0.3), 0.03),
        *(capsule((0.08, -girth * 0.7, z), (0.18, -girth - 0.12, z), 0.026) for z in (-0.1, 0.14)),
    )
    rotor = join(blade, blade.rotate((0, 90, 0))).rotate((0, turn, 0))
    return {
        "paint": join(body, boom, fin),
        "metal": join(mast, rotor, both_sides(skid)),
        "glass": ellipsoid(girth * 0.85, girth * 0.75, girth, (0, 0.03, girth * 0.65)),
    }


def boat(d: Dice) -> Parts:
    """A sailing boat or a steamer, its bow to the front."""
    half, width, depth = d(0.45, 0.55), d(0.18, 0.24), d(0.18, 0.26)
    deck = [
        (0, half),
        (width * 0.8, half * 0.3),
        (width, -half * 0.3),
        (width * 0.75, -half),
        (-width * 0.75, -half),
        (-width, -half * 0.3),
        (-width * 0.8, half * 0.3),
    ]
    levels = [
        plate(np.array(deck) * s, 0.02).translate((0, 0, z))
        for s, z in ((1, 0), (0.92, -depth * 0.5), (0.6, -depth))
    ]
    hull = join(levels[0] + levels[1], levels[1]).hull() + (levels[1] + levels[2]).hull()
    hull = hull.rotate((-90, 0, 0)).mirror((0, 0, 1))
    if d.chance(0.6):
        mast, back = d(0.8, 1.0), half * 0.85
        pole = rod((0, -0.06, 0.05), (0, mast, 0.05), 0.03)
        main = _side([(0.05, 0.12), (0.05, mast * 0.95), (-back, 0.12)], 0.04)
        jib = _side([(0.06, 0.1), (0.06, mast * 0.8), (half * 0.9, 0.1)], 0.04)
        return {"paint": hull, "wood": pole, "white": join(main, jib)}
    cabin = join(
        box(width, 0.18, half * 0.9, (0, 0.08, -0.05)), box(width * 0.7, 0.14, half * 0.45, (0, 0.22, 0))
    )
    funnels = [rod((0, 0.1, z), (0, 0.5, z - 0.03), 0.06) for z in ((-0.15,), (-0.2, 0.0))[d.whole(0, 1)]]
    return {"paint": hull, "white": cabin, "red": join(*funnels)}


def rocket(d: Dice) -> Parts:
    """A rocket that stands on its fins."""
    radius, height, fins = d(0.14, 0.22), d(0.6, 0.9), d.whole(3, 4)
    body = lathe([(radius * 0.7, 0.12), (radius, 0.12 + height * 0.4), (radius * 0.9, 0.12 + height * 0.75)])
    nose = lathe(
        [(radius * 0.9, 0.12 + height * 0.75), (radius * 0.5, 0.12 + height), (0.01, 0.2 + height * 1.15)]
    )
    reach = d(0.18, 0.28)
    fin = plate(
        [(radius * 0.6, 0.45), (radius + reach, 0.12), (radius + reach, 0), (radius * 0.6, 0.16)], 0.05
    )
    window = rod((0, 0.12 + height * 0.55, 0), (0, 0.12 + height * 0.55, radius + 0.02), radius * 0.4)
    rim = torus(radius * 0.4, 0.03, (0, 0.12 + height * 0.55, radius * 0.98), (0, 0, 1))
    nozzle = post(0.03, 0.2, radius * 0.6, radius * 0.4)
    return {
        "white": body,
        "red": join(nose, around(fin, fins, 90)),
        "glass": window,
        "metal": join(rim, nozzle),
    }


def submarine(d: Dice) -> Parts:
    """A submarine."""
    girth, half = d(0.17, 0.22), d(0.32, 0.42)
    hull = capsule((0, 0, half), (0, 0, -half), girth, girth * 0.8)
    tower = rod((0, 0, 0.05), (0, girth + 0.18, 0.05), 0.11, 0.1).scale((0.8, 1, 1.3))
    scope = tube(
        [(0, girth + 0.1, 0.05), (0, girth + 0.3, 0.05), (0, girth + 0.34, 0.1), (0, girth + 0.34, 0.18)],
        0.03,
        count=8,
    )
    z = -half - girth * 0.75
    screw = join(
        ellipsoid(0.05, 0.19, 0.03, (0, 0, z - 0.06)),
        ellipsoid(0.19, 0.05, 0.03, (0, 0, z - 0.06)),
        rod((0, 0, z + 0.05), (0, 0, z - 0.1), 0.04),
    )
    ports = both_sides(join(*(ball(0.06, (girth * 0.88, 0.03, p)) for p in (-0.18, 0.03, 0.24))))
    fins = both_sides(
        plate([(girth * 0.5, 0), (girth + 0.14, 0), (girth + 0.14, 0.1), (girth * 0.5, 0.16)], 0.045)
        .rotate((90, 0, 0))
        .translate((0, 0, -half))
    )
    return {"paint": join(hull, tower), "metal": join(scope, screw, fins), "glass": ports}


def tank(d: Dice) -> Parts:
    """A tank with its gun to the front."""
    half, width = d(0.42, 0.5), d(0.3, 0.36)
    track = _side(
        [
            (-half, 0.08),
            (-half * 0.8, 0),
            (half * 0.8, 0),
            (half, 0.08),
            (half * 0.92, 0.2),
            (-half * 0.92, 0.2),
        ],
        0.15,
        0.02,
    )
    hull = _side(
        [
            (-half * 0.95, 0.12),
            (half * 0.8, 0.12),
            (half * 1.05, 0.22),
            (half * 0.6, 0.34),
            (-half * 0.95, 0.34),
        ],
        width * 1.3,
    )
    turret = lathe([(0.24, 0.33), (0.24, 0.4), (0.17, d(0.5, 0.55))], smooth=False).scale((1, 1, 1.15))
    gun = rod((0, 0.43, 0.1), (0, 0.45 + d(0, 0.1), half + d(0.1, 0.35)), 0.04)
    return {
        "olive": join(hull, turret),
        "metal": gun,
        "tyre": both_sides(track.translate((width * 0.72, 0, 0))),
    }


def tractor(d: Dice) -> Parts:
    """A tractor with large wheels behind."""
    big, small = d(0.24, 0.3), d(0.13, 0.16)
    bonnet = round_box(0.24, 0.24, 0.52, 0.03, (0, big + 0.08, 0.28))
    cab = box(0.34, 0.42, 0.36, (0, big + 0.28, -0.14))
    panes = join(box(0.5, 0.22, 0.26, (0, big + 0.33, -0.14)), box(0.24, 0.22, 0.6, (0, big + 0.33, -0.14)))
    roof = round_box(0.42, 0.06, 0.46, 0.02, (0, big + 0.5, -0.14))
    pipe = rod((0.07, big + 0.1, 0.4), (0.07, big + 0.5, 0.4), 0.032)
    wheels = join(_wheels([-0.15], 0.27, big, 0.14, big), _wheels([0.42], 0.2, small, 0.1, small))
    axle = join(
        rod((-0.25, big, -0.15), (0.25, big, -0.15), 0.06),
        rod((-0.2, small, 0.42), (0.2, small, 0.42), 0.05),
        box(0.12, big, 0.7, (0, big * 0.75, 0.13)),
    )
    return {"paint": join(bonnet, cab - panes), "red": roof, "metal": join(pipe, axle), "tyre": wheels}


def house(d: Dice) -> Parts:
    """A house with a pitched roof, a door and windows."""
    width, depth, wall, pitch = d(0.6, 0.85), d(0.55, 0.8), d(0.4, 0.6), d(0.25, 0.45)
    walls = plate(
        [(-width / 2, 0), (width / 2, 0), (width / 2, wall), (0, wall + pitch), (-width / 2, wall)], depth
    )
    over, slope = 0.07, pitch / (width / 2)
    roof = [
        (0, wall + pitch + 0.08),
        (width / 2 + over, wall - over * slope + 0.08),
        (width / 2 + over, wall - over * slope),
        (0, wall + pitch - 0.01),
    ]
    tiles = both_sides(plate(roof, depth + 2 * over))
    front = depth / 2
    door = box(0.16, 0.3, 0.06, (d.pick(0.0, -0.12, 0.12), 0.15, front))
    window = box(0.14, 0.14, 0.06, (width * 0.33, wall * 0.62, front))
    panes = both_sides(join(window, box(0.06, 0.15, 0.15, (width / 2, wall * 0.6, d(-0.1, 0.1)))))
    parts: Parts = {"wall": walls, "tiles": tiles, "wood": door, "glass": panes}
    if d.chance(0.6):
        parts["brick"] = box(0.11, 0.4, 0.11, (width * 0.26, wall + pitch * 0.75, -depth * 0.2))
    return parts


def castle(d: Dice) -> Parts:
    """A castle tower, or a gate between two towers."""
    radius, height = d(0.2, 0.26), d(0.75, 1.0)
    battlement = post(height, height + 0.16, radius * 1.2) - post(height + 0.04, 2, radius * 0.9)
    notch = box(0.1, 0.1, 2, (0, height + 0.13, 0))
    tower = join(
        post(0, height + 0.02, radius * 1.05, radius),
        battlement - join(*(notch.rotate((0, 45 * i, 0)) for i in range(4))),
    )
    if d.chance(0.4):
        return {"stone": tower, "wood": box(0.14, 0.26, 0.08, (0, 0.13, radius))}
    x, low = 0.5, height * 0.62
    gate = box(1.0, low, 0.2, (0, low / 2, 0)) - join(
        box(0.26, 0.5, 1, (0, 0.0, 0)), rod((0, 0.25, -1), (0, 0.25, 1), 0.13)
    )
    teeth = join(*(box(0.1, 0.14, 0.2, (0.2 * i - 0.3, low, 0)) for i in range(4)))
    parts: Parts = {"stone": join(gate, teeth, both_sides(tower.translate((x, 0, 0))))}
    if d.chance(0.5):
        parts["tiles"] = both_sides(rod((x, height + 0.05, 0), (x, height + 0.45, 0), radius * 1.05, 0.02))
    return parts


def lighthouse(d: Dice) -> Parts:
    """A lighthouse."""
    foot, top, height = d(0.2, 0.26), d(0.12, 0.16), d(0.75, 1.0)
    tower = post(0.05, height, foot, top)
    gallery = post(height, height + 0.05, top * 1.5)
    lantern = post(height, height + 0.18, top * 0.75)
    roof = post(height + 0.17, height + 0.32, top * 1.1, 0.03)
    rock = prism((0, 0, 0), (0, 0.1, 0), foot * 1.7, 9, foot * 1.3)
    bands = [
        post(
            height * a,
            height * b,
            *(1.02 * (foot + (top - foot) * (h * height - 0.05) / (height - 0.05)) for h in (a, b)),
        )
        for a, b in ((0.25, 0.42), (0.62, 0.8))
    ]
    return {"white": tower, "red": join(roof, gallery, *bands), "lamp": lantern, "stone": rock}


def windmill(d: Dice) -> Parts:
    """A windmill with four sails to the front."""
    foot, top, height, sides = d(0.24, 0.3), d(0.15, 0.19), d(0.65, 0.85), d.pick(6, 8, 32)
    tower = prism((0, 0, 0), (0, height, 0), foot, sides, top)
    cap = ball(top * 1.1, (0, height, 0)) - box(2, 1, 2, (0, height - 0.52, 0))
    hub = rod((0, height - 0.03, 0), (0, height - 0.03, top + 0.14), 0.045)
    sail = box(0.13, d(0.34, 0.42), 0.04, (0.04, 0.3, 0))
    arm = post(0, 0.5, 0.03)
    turn = d(0, 90)
    sails = join(*(join(sail, arm).rotate((0, 0, turn + 90 * i)) for i in range(4))).translate(
        (0, height - 0.03, top + 0.11)
    )
    return {
        "wall": tower,
        "tiles": cap,
        "wood": join(hub, sails),
        "wood 2": box(0.14, 0.24, 0.06, (0, 0.12, foot * 0.93)),
    }


def arch_bridge(d: Dice) -> Parts:
    """A stone bridge seen from its side."""
    width, rise, depth = 0.6, d(0.08, 0.18), d(0.24, 0.36)
    x = np.linspace(-width, width, 25)
    upper = 0.36 + rise * np.cos(x / width * np.pi / 2)
    outline = np.concatenate([np.stack([x, upper], 1), [[width, 0], [-width, 0]]])
    count = d.whole(1, 3)
    pitch = 2 * width / count
    holes = [
        rod((-width + pitch * (i + 0.5), 0, -1), (-width + pitch * (i + 0.5), 0, 1), min(pitch * 0.4, 0.34))
        for i in range(count)
    ]
    road = np.concatenate([np.stack([x, upper + 0.08], 1), np.stack([x[::-1], upper[::-1] - 0.01], 1)])
    rails = [plate(road, 0.06, (0, 0, side * (depth / 2 - 0.03))) for side in (-1, 1)]
    return {"stone": join(plate(outline, depth) - join(*holes), *rails)}
