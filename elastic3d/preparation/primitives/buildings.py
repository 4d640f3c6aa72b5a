"""Buildings."""

from __future__ import annotations

import numpy as np

from elastic3d.preparation.primitives.solids import (
    Dice,
    Parts,
    ball,
    both_sides,
    box,
    join,
    plate,
    prism,
    rod,
)


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
    battlement = join(rod((0, height, 0), (0, height + 0.16, 0), radius * 1.2)) - rod(
        (0, height + 0.04, 0), (0, 2, 0), radius * 0.9
    )
    notch = box(0.1, 0.1, 2, (0, height + 0.13, 0))
    tower = join(
        rod((0, 0, 0), (0, height + 0.02, 0), radius * 1.05, radius),
        battlement - join(*(notch.rotate((0, 45 * i, 0)) for i in range(4))),
    )
    if d.chance(0.4):
        return {"stone": tower, "wood": join(box(0.14, 0.26, 0.08, (0, 0.13, radius)))}
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
    tower = rod((0, 0.05, 0), (0, height, 0), foot, top)
    gallery = rod((0, height, 0), (0, height + 0.05, 0), top * 1.5)
    lantern = rod((0, height, 0), (0, height + 0.18, 0), top * 0.75)
    roof = rod((0, height + 0.17, 0), (0, height + 0.32, 0), top * 1.1, 0.03)
    rock = prism((0, 0, 0), (0, 0.1, 0), foot * 1.7, 9, foot * 1.3)
    bands = [
        rod(
            (0, height * a, 0),
            (0, height * b, 0),
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
    arm = rod((0, 0, 0), (0, 0.5, 0), 0.03)
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
