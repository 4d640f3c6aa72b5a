"""Figures: people, toys and ghosts, which look along +Z, and chess pieces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from manifold3d import Manifold

from elastic3d.preparation.primitives.animals import eyes
from elastic3d.preparation.primitives.solids import (
    Dice,
    Parts,
    around,
    ball,
    both_sides,
    capsule,
    disc,
    ellipsoid,
    join,
    lathe,
    plate,
    rod,
    round_box,
    tube,
)


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
        parts["black"] = join(
            rod((0, low, 0), (0, low + 0.045, 0), 0.25), rod((0, low, 0), (0, low + d(0.18, 0.3), 0), 0.16)
        )
    if d.chance(0.7):
        arm = capsule(
            (sizes[1] * 0.8, centres[1] + 0.05, 0), (sizes[1] + 0.34, centres[1] + d(0.05, 0.3), 0.03), 0.032
        )
        parts["wood"] = both_sides(arm)
    return parts


def ghost(d: Dice) -> Parts:
    """A ghost with a wavy hem."""
    height, radius = d(0.6, 0.8), d(0.28, 0.34)
    body = join(rod((0, 0, 0), (0, height, 0), radius * 1.15, radius), ball(radius, (0, height, 0)))
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
        hole = rod((0, height - 0.06, 0), (0, height + 1, 0), waist * 1.25)
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
