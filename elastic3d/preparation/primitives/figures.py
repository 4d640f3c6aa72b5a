"""Animals, people, toys and ghosts, which look along +Z, fish and snail along +X; and chess pieces."""

from __future__ import annotations

from collections.abc import Callable

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
    disc,
    ellipsoid,
    join,
    lathe,
    plate,
    post,
    rod,
    round_box,
    torus,
    tube,
)


def _four_legs(d: Dice, length: float, width: float, drop: float, radius: float) -> Manifold:
    spread = d(0.0, 0.06)
    legs = [
        capsule((side * width, 0, z), (side * width, -drop, z + spread * lean), radius * 1.2, radius)
        for side in (-1, 1)
        for z, lean in ((length * 0.42, 1), (-length * 0.42, -1))
    ]
    return join(*legs)


def eyes(x: float, y: float, z: float, size: float = 0.035) -> Manifold:
    """Two beads at x and -x."""
    return both_sides(ball(size, (x, y, z)))


def dog(d: Dice) -> Parts:
    """A dog on four legs."""
    length, girth, drop = d(0.55, 0.75), d(0.14, 0.19), d(0.32, 0.45)
    body = capsule((0, 0, length * 0.4), (0, 0, -length * 0.4), girth, girth * 0.9)
    z, y, head = length * 0.62, girth + d(0.14, 0.24), d(0.14, 0.17)
    neck = capsule((0, 0.03, length * 0.4), (0, y, z), 0.1)
    snout = capsule((0, y - 0.03, z), (0, y - 0.06, z + d(0.18, 0.26)), 0.08, 0.06)
    ears = both_sides(
        capsule((0.1, y + 0.08, z - 0.02), (0.16, y - 0.08, z), 0.05, 0.045)
        if d.chance(0.5)
        else rod((0.08, y + 0.08, z - 0.02), (0.11, y + 0.27, z - 0.04), 0.06, 0.02)
    )
    tail = tube(
        [(0, 0.05, -length * 0.45), (0, 0.18, -length * 0.6), (0, d(0.2, 0.4), -length * 0.66)], 0.045
    )
    skin = join(
        body, neck, ball(head, (0, y, z)), snout, tail, _four_legs(d, length, girth * 0.65, drop, 0.055)
    )
    nose = ball(0.04, (0, y - 0.03, z + 0.26))
    return {"fur": skin, "fur 2": ears, "eyes": join(nose, eyes(0.07, y + 0.05, z + head * 0.85))}


def cat(d: Dice) -> Parts:
    """A cat that sits."""
    body = capsule((0, 0.2, -0.08), (0, d(0.42, 0.5), 0.06), d(0.2, 0.25), 0.13)
    y, head = d(0.66, 0.76), d(0.16, 0.19)
    ears = both_sides(rod((0.09, y + head * 0.6, 0.1), (0.13, y + head * 1.6, 0.1), 0.08, 0.015))
    legs = both_sides(
        join(
            capsule((0.09, 0.4, 0.12), (0.09, 0.05, 0.2), 0.055),
            ellipsoid(0.08, 0.06, 0.14, (0.17, 0.06, 0.1)),
        )
    )
    tail = tube([(0, 0.08, -0.25), (0.2, 0.05, -0.35), (0.34, 0.07, -0.1), (0.32, 0.1, 0.08)], 0.045)
    neck = capsule((0, 0.4, 0.05), (0, y, 0.12), 0.1)
    head_ball = ellipsoid(head * 1.1, head, head, (0, y, 0.12))
    face = join(eyes(0.07, y + 0.03, 0.12 + head * 0.85), ball(0.025, (0, y - 0.02, 0.13 + head)))
    return {"fur": join(body, neck, head_ball, ears, legs, tail), "eyes": face}


def duck(d: Dice) -> Parts:
    """A rubber duck."""
    width, length = d(0.26, 0.32), d(0.36, 0.44)
    body = ellipsoid(width, width * d(0.75, 0.9), length) - box(2, 0.2, 2, (0, -width * 0.75 - 0.1, 0))
    tail = capsule((0, 0.03, -length * 0.7), (0, width * 0.75, -length * 1.1), 0.12, 0.035)
    y, z, head = width * 0.95 + 0.08, length * 0.55, d(0.18, 0.22)
    beak = ellipsoid(0.1, 0.04, 0.14, (0, y - 0.03, z + head))
    wings = both_sides(ellipsoid(0.07, 0.13, 0.22, (width * 0.92, 0.03, -0.06)))
    neck = capsule((0, 0.05, z * 0.8), (0, y, z), 0.14)
    return {
        "feathers": join(body, tail, neck, ball(head, (0, y, z)), wings),
        "beak": beak,
        "eyes": eyes(head * 0.5, y + head * 0.35, z + head * 0.75),
    }


def fish(d: Dice) -> Parts:
    """A fish seen from its side: it swims along +X."""
    length, height, width = d(0.38, 0.5), d(0.18, 0.3), d(0.1, 0.16)
    body = ellipsoid(length, height, width)
    tail = plate(
        [(-length * 0.8, 0), (-length * 1.35, height), (-length * 1.2, 0), (-length * 1.35, -height)], 0.06
    )
    fin = plate([(0.15, height * 0.85), (-0.1, height * 1.5), (-0.22, height * 0.7)], 0.055)
    belly = plate([(0.05, -height * 0.85), (-0.12, -height * 1.35), (-0.18, -height * 0.7)], 0.055)
    side = [ellipsoid(0.12, 0.05, 0.03, (0.02, -0.04, s * width)) for s in (-1, 1)]
    eyes = [ball(0.04, (length * 0.68, height * 0.2, s * width * 0.6)) for s in (-1, 1)]
    return {"scales": body, "fins": join(tail, fin, belly, *side), "eyes": join(*eyes)}


def pig(d: Dice) -> Parts:
    """A pig or a piggy bank."""
    girth, length = d(0.26, 0.32), d(0.36, 0.44)
    body = ellipsoid(girth, girth, length)
    y, z = d(0.06, 0.14), length * 0.85
    snout = rod((0, y - 0.02, z), (0, y - 0.03, z + 0.24), 0.09)
    ears = both_sides(rod((0.1, y + 0.12, z - 0.02), (0.17, y + 0.29, z + 0.06), 0.08, 0.02))
    legs = join(
        *(
            rod((sx, -girth * 0.6, sz), (sx, -girth * 1.35, sz), 0.075)
            for sx in (-0.15, 0.15)
            for sz in (-0.2, 0.2)
        )
    )
    tail = torus(0.06, 0.03, (0, 0.08, -length), (0, 0, 1))
    return {
        "skin": join(body, ball(0.2, (0, y, z)), snout, ears, legs, tail),
        "eyes": eyes(0.09, y + 0.09, z + 0.17),
    }


def elephant(d: Dice) -> Parts:
    """An elephant."""
    girth, length = d(0.27, 0.32), d(0.36, 0.42)
    y, z, head = 0.16, length + 0.08, d(0.19, 0.22)
    trunk = tube(
        [(0, y - 0.05, z + 0.12), (0, y - 0.2, z + 0.26), (0, -0.36, z + 0.24), (0, -0.42, z + 0.36)],
        0.08,
        0.045,
    )
    ears = both_sides(ellipsoid(0.17, 0.2, 0.045, (head + 0.08, y + 0.02, z - 0.06)))
    tusks = both_sides(
        tube([(0.09, y - 0.12, z + 0.1), (0.12, y - 0.24, z + 0.2), (0.11, y - 0.2, z + 0.32)], 0.035)
    )
    legs = join(*(rod((sx, 0, sz), (sx, -0.52, sz), 0.1) for sx in (-0.16, 0.16) for sz in (-0.22, 0.22)))
    tail = capsule((0, 0.05, -length), (0, -0.25, -length - 0.08), 0.032)
    skin = join(ellipsoid(girth, girth, length), ball(head, (0, y, z)), trunk, ears, legs, tail)
    return {"grey": skin, "ivory": tusks, "eyes": eyes(0.13, y + 0.08, z + 0.12, 0.03)}


def giraffe(d: Dice) -> Parts:
    """A giraffe."""
    neck, drop = d(0.55, 0.8), d(0.45, 0.55)
    body = capsule((0, 0.04, 0.16), (0, -0.02, -0.2), 0.15, 0.13)
    top, z = 0.1 + neck, 0.16 + neck * d(0.25, 0.4)
    throat = capsule((0, 0.05, 0.2), (0, top, z), 0.09, 0.06)
    head = capsule((0, top, z), (0, top - 0.06, z + 0.2), 0.075, 0.05)
    horns = both_sides(capsule((0.04, top + 0.04, z - 0.01), (0.05, top + 0.14, z - 0.03), 0.025, 0.032))
    ears = both_sides(ellipsoid(0.08, 0.035, 0.03, (0.11, top + 0.04, z - 0.03)))
    legs = _four_legs(d, 0.46, 0.08, drop + 0.1, 0.042)
    tail = capsule((0, 0.0, -0.3), (0, -0.25, -0.36), 0.03)
    return {
        "fur": join(body, throat, head, ears, legs, tail),
        "horn": horns,
        "eyes": eyes(0.06, top + 0.02, z + 0.05, 0.025),
    }


def rabbit(d: Dice) -> Parts:
    """A rabbit that sits upright, ears up."""
    y, head, ear = 0.56, d(0.15, 0.18), d(0.26, 0.38)
    body = ellipsoid(d(0.2, 0.24), 0.28, 0.22, (0, 0.26, 0))
    ears = both_sides(
        ellipsoid(0.06, ear / 2, 0.04, (0, ear * 0.4, 0))
        .rotate((0, 0, d(-18, -5)))
        .translate((0.08, y + head * 0.8, 0.03))
    )
    feet = both_sides(
        join(
            ellipsoid(0.08, 0.06, 0.16, (0.13, 0.05, 0.16)),
            capsule((0.12, 0.34, 0.12), (0.08, 0.24, 0.24), 0.05),
        )
    )
    skin = join(body, ball(head, (0, y, 0.06)), ears, feet)
    return {
        "fur": skin,
        "white": ball(0.08, (0, 0.12, -0.23)),
        "eyes": join(eyes(0.08, y + 0.03, 0.06 + head * 0.85, 0.03), ball(0.03, (0, y - 0.02, 0.07 + head))),
    }


def turtle(d: Dice) -> Parts:
    """A turtle."""
    radius, rise = d(0.4, 0.48), d(0.22, 0.32)
    shell = ellipsoid(radius * 0.88, rise, radius, (0, 0, 0)) - box(2, 1, 2, (0, -0.5, 0))
    rim = ellipsoid(radius * 0.95, 0.06, radius * 1.07)
    head = join(
        capsule((0, 0, radius * 0.8), (0, 0.08, radius + 0.16), 0.08), ball(0.115, (0, 0.1, radius + 0.18))
    )
    legs = [
        capsule((sx * 0.26, 0, sz * 0.27), (sx * 0.42, -0.12, sz * 0.36), 0.085)
        for sx in (-1, 1)
        for sz in (-1, 1)
    ]
    tail = rod((0, 0, -radius), (0, -0.04, -radius - 0.18), 0.06, 0.02)
    return {
        "shell": join(shell, rim),
        "skin": join(head, tail, *legs),
        "eyes": eyes(0.07, 0.14, radius + 0.26, 0.03),
    }


def snail(d: Dice) -> Parts:
    """A snail seen from its side: it creeps along +X."""
    size, wide = d(0.24, 0.32), d(0.13, 0.18)
    foot = tube([(-0.55, -0.02, 0), (-0.1, 0, 0), (0.3, 0.02, 0), (0.5, 0.2, 0)], 0.07, 0.085)
    horns = join(*(capsule((0.5, 0.22, s * 0.04), (0.58, 0.44, s * 0.12), 0.025, 0.036) for s in (-1, 1)))
    angles = np.linspace(0, 4 * np.pi, 26)
    curl = [
        ((size * (0.12 + 0.06 * t)) * np.cos(t), size + (size * (0.12 + 0.06 * t)) * np.sin(t), 0)
        for t in angles
    ]
    spiral = join(
        *(
            capsule(a, b, size * (0.1 + 0.016 * t))
            for a, b, t in zip(curl[:-1], curl[1:], angles[1:], strict=True)
        )
    )
    disc = ellipsoid(size * 0.95, size * 0.95, wide * 0.8, (0, size, 0))
    return {"skin": join(foot, horns), "shell": join(spiral.scale((1, 1, wide / size * 2)), disc)}


def penguin(d: Dice) -> Parts:
    """A penguin."""
    height, girth = d(0.5, 0.6), d(0.22, 0.28)
    body = ellipsoid(girth, height * 0.75, girth, (0, height * 0.7, 0))
    head_y = height * 1.45
    wings = both_sides(
        ellipsoid(0.05, height * 0.45, 0.11)
        .rotate((0, 0, d(12, 30)))
        .translate((girth + 0.04, height * 0.75, 0))
    )
    belly = ellipsoid(girth * 0.8, height * 0.6, girth * 0.6, (0, height * 0.64, girth * 0.5))
    beak = rod((0, head_y, 0.1), (0, head_y - 0.02, 0.34), 0.06, 0.015)
    feet = both_sides(ellipsoid(0.1, 0.045, 0.15, (0.11, 0.02, 0.1)))
    return {
        "black": join(body, ball(d(0.17, 0.2), (0, head_y, 0)), wings),
        "white": belly,
        "beak": join(beak, feet),
        "eyes": eyes(0.08, head_y + 0.06, 0.16, 0.03),
    }


def bird(d: Dice) -> Parts:
    """A small bird that flies, its wings spread."""
    span, length = d(0.5, 0.65), d(0.24, 0.32)
    body = ellipsoid(0.13, 0.12, length)
    wing = plate([(0, 0.12), (span * 0.6, 0.16), (span, -0.05), (span * 0.5, -0.12), (0, -0.14)], 0.05)
    wings = both_sides(wing.rotate((-90, 0, 0)).rotate((0, 0, d(-5, 25))))
    head = ball(0.11, (0, 0.08, length))
    beak = rod((0, 0.07, length + 0.06), (0, 0.05, length + 0.24), 0.045, 0.012)
    tail = (
        plate([(-0.04, 0), (0.04, 0), (0.14, 0.3), (-0.14, 0.3)], 0.045)
        .rotate((-90, 0, 0))
        .translate((0, 0.02, -length * 0.8))
    )
    return {
        "feathers": join(body, head, wings, tail),
        "beak": beak,
        "eyes": eyes(0.07, 0.12, length + 0.07, 0.025),
    }


def star_fish(d: Dice) -> Parts:
    """A starfish upright, its face to the front."""
    girth, squash = d(0.14, 0.18), d(0.5, 0.8)
    arm = capsule((0, 0, 0), (0, d(0.36, 0.46), 0), girth, 0.055)
    body = join(*(arm.rotate((0, 0, 72 * i)) for i in range(5))).scale((1, 1, squash))
    return {"skin": body, "eyes": eyes(0.07, 0.06, 0.85 * girth * squash, 0.035)}


def butterfly(d: Dice) -> Parts:
    """A butterfly, wings spread to the front."""
    body = join(capsule((0, -0.24, 0), (0, 0.22, 0), 0.05), ball(0.075, (0, 0.28, 0)))
    upper = ellipsoid(d(0.26, 0.33), d(0.18, 0.24), 0.035, (0.3, 0, 0)).rotate((0, 0, d(25, 45)))
    lower = ellipsoid(d(0.18, 0.24), d(0.13, 0.18), 0.035, (0.22, 0, 0)).rotate((0, 0, d(-50, -35)))
    feelers = both_sides(tube([(0.02, 0.3, 0), (0.08, 0.42, 0), (0.15, 0.48, 0)], 0.022, count=6))
    fold = d(-25, 10)
    wings = both_sides(join(upper, lower).rotate((0, fold, 0)))
    return {"black": join(body, feelers), "wings": wings}


def person(d: Dice) -> Parts:
    """A figure that stands, walks or lifts its arms."""
    swing, lift = d(-0.12, 0.12), d.pick(d(-0.42, -0.36), d(-0.2, 0.3))
    torso = capsule((0, 0.5, 0), (0, 0.8, 0), d(0.12, 0.15), d(0.13, 0.17))
    arms = [
        tube(
            [
                (s * 0.16, 0.84, 0),
                (s * 0.32, 0.84 + lift * 0.5, s * swing),
                (s * 0.3, 0.84 + lift, s * swing * 2 + 0.05),
            ],
            0.055,
        )
        for s in (-1, 1)
    ]
    legs = [capsule((s * 0.09, 0.48, 0), (s * 0.12, 0.06, -s * swing * 1.5), 0.085, 0.06) for s in (-1, 1)]
    shoes = [ellipsoid(0.07, 0.06, 0.13, (s * 0.12, 0.04, -s * swing * 1.5 + 0.05)) for s in (-1, 1)]
    head = join(capsule((0, 0.85, 0), (0, 1.1, 0), 0.055), ball(d(0.14, 0.19), (0, 1.16, 0)))
    return {"cloth": torso, "skin": join(head, *arms), "trousers": join(*legs), "shoes": join(*shoes)}


def teddy(d: Dice) -> Parts:
    """A teddy bear that sits."""
    belly, head = d(0.26, 0.31), d(0.22, 0.26)
    y = belly * 1.9 + head * 0.55
    limbs = join(
        capsule((belly * 0.7, belly * 1.5, 0), (belly * 1.45, belly * d(0.9, 1.6), 0.16), 0.1),
        capsule((0.13, 0.1, 0.1), (0.28, 0.08, 0.42), 0.12),
    )
    skin = join(
        ellipsoid(belly, belly * 1.15, belly, (0, belly, 0)), ball(head, (0, y, 0)), both_sides(limbs)
    )
    ears = both_sides(ellipsoid(0.1, 0.1, 0.055, (head * 0.75, y + head * 0.8, 0)))
    muzzle = ellipsoid(0.1, 0.08, 0.09, (0, y - 0.05, head * 0.9))
    return {
        "fur": skin,
        "fur 2": join(ears, muzzle),
        "eyes": join(eyes(0.09, y + 0.06, head * 0.9), ball(0.035, (0, y - 0.01, head + 0.06))),
    }


def snowman(d: Dice) -> Parts:
    """A snowman with a carrot, and often a hat and arms."""
    sizes = [d(0.32, 0.38), d(0.23, 0.28), d(0.16, 0.2)]
    centres = [0.0, sizes[0] + sizes[1] * 0.6, sizes[0] + sizes[1] * 1.5 + sizes[2] * 0.65]
    snow = join(*(ball(size, (0, y, 0)) for size, y in zip(sizes, centres, strict=True)))
    top = centres[2]
    parts: Parts = {
        "snow": snow,
        "carrot": rod((0, top, sizes[2] * 0.8), (0, top, sizes[2] + 0.22), 0.05, 0.012),
    }
    buttons = [ball(0.035, (0, centres[1] + y, np.sqrt(sizes[1] ** 2 - y**2))) for y in (-0.07, 0.06)]
    parts["eyes"] = join(*buttons, eyes(0.07, top + 0.06, sizes[2] * 0.85, 0.03))
    if d.chance(0.75):
        low = top + sizes[2] * 0.75
        parts["black"] = join(post(low, low + 0.045, 0.25), post(low, low + d(0.18, 0.3), 0.16))
    if d.chance(0.7):
        arm = capsule(
            (sizes[1] * 0.8, centres[1] + 0.05, 0), (sizes[1] + 0.34, centres[1] + d(0.05, 0.3), 0.03), 0.032
        )
        parts["wood"] = both_sides(arm)
    return parts


def ghost(d: Dice) -> Parts:
    """A ghost with a wavy hem."""
    height, radius = d(0.6, 0.8), d(0.28, 0.34)
    body = join(post(0, height, radius * 1.15, radius), ball(radius, (0, height, 0)))
    hem = around(ball(radius * 0.28, (radius * 0.95, 0, 0)), 8, 22)
    eyes = both_sides(ellipsoid(0.055, 0.08, 0.3, (0.1, height + 0.05, radius)))
    mouth = ellipsoid(0.06, 0.05, 0.3, (0, height - 0.12, radius))
    arms = both_sides(capsule((radius * 0.8, height * 0.75, 0.1), (radius + 0.12, height * 0.7, 0.2), 0.08))
    return {"white": join(body, arms) - hem - eyes - mouth}


def chess_piece(kind: str) -> Callable[[Dice], Parts]:
    """The builder of a chess piece: pawn, rook, bishop, queen, king or knight."""

    def build(d: Dice) -> Parts:
        foot, waist, height = d(0.24, 0.3), d(0.09, 0.12), CHESS_HEIGHTS[kind] * d(0.92, 1.1)
        shoulder = height * d(0.66, 0.74)
        base = lathe([(foot, 0), (foot, 0.07), (foot * 0.8, 0.13), (waist * 1.4, 0.22), (waist, shoulder)])
        if kind == "knight":
            low = lathe([(foot, 0), (foot, 0.07), (foot * 0.75, 0.16)])
            return {"body": join(low, _horse_head(d).translate((0, 0.12, 0)))}
        collar = lathe([(waist, shoulder - 0.05), (waist * 1.9, shoulder), (waist, shoulder + 0.05)])
        return {"body": join(base, collar, _chess_head(kind, d, shoulder, height, waist))}

    build.__doc__ = f"A chess {kind}."
    return build


CHESS_HEIGHTS = {"pawn": 0.75, "rook": 0.85, "bishop": 1.0, "queen": 1.15, "king": 1.25, "knight": 0.95}


def _chess_head(kind: str, d: Dice, low: float, height: float, waist: float) -> Manifold:
    size = height - low
    if kind == "pawn":
        return ball(size * 0.62, (0, low + size * 0.5, 0))
    if kind == "rook":
        tower = lathe([(waist, low), (waist * 1.9, low + 0.08), (waist * 1.9, height)], smooth=False)
        notch = round_box(0.07, 0.12, 1, 0.001, (0, height, 0))
        hole = post(height - 0.06, height + 1, waist * 1.25)
        return tower - hole - join(notch, notch.rotate((0, 60, 0)), notch.rotate((0, 120, 0)))
    if kind == "bishop":
        drop = lathe(
            [
                (waist * 0.8, low),
                (waist * 1.5, low + size * 0.35),
                (waist * 0.7, low + size * 0.8),
                (0.02, height),
            ]
        )
        cut = round_box(0.3, 0.045, 0.5, 0.001).rotate((0, 0, 40)).translate((0.12, low + size * 0.62, 0))
        return join(drop - cut, ball(0.045, (0, height, 0)))
    crown = lathe([(waist * 0.9, low), (waist * 1.2, low + size * 0.4), (waist * 1.9, low + size * 0.75)])
    if kind == "queen":
        beads = around(ball(0.05, (waist * 1.75, low + size * 0.8, 0)), 8)
        return join(
            crown,
            beads,
            lathe([(waist * 1.5, low + size * 0.7), (0.05, height - 0.04)]),
            ball(0.055, (0, height, 0)),
        )
    cross = join(
        round_box(0.055, 0.24, 0.055, 0.01, (0, height, 0)),
        round_box(0.17, 0.055, 0.055, 0.01, (0, height + 0.03, 0)),
    )
    return join(crown, lathe([(waist * 1.9, low + size * 0.72), (0.05, height - 0.06)]), cross)


def _horse_head(d: Dice) -> Manifold:
    outline = [
        (-0.16, 0), (0.16, 0), (0.17, 0.2), (0.1, 0.36), (0.13, 0.42), (0.29, 0.36), (0.33, 0.46),
        (0.24, 0.6), (0.1, 0.7), (0.07, 0.8), (0.0, 0.72), (-0.12, 0.62), (-0.19, 0.42), (-0.2, 0.2),
    ]  # fmt: skip
    eye = plate(disc(0.035, (0.1, 0.58)), 0.3)
    stretch = d(0.9, 1.1)
    return (plate(outline, d(0.18, 0.24), bevel=0.05) - eye).scale((1, stretch, 1)).rotate((0, -90, 0))
