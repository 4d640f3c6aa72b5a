"""Chess pieces."""

from __future__ import annotations

from collections.abc import Callable

from manifold3d import Manifold

from elastic3d.preparation.primitives.solids import (
    Dice,
    Parts,
    around,
    ball,
    disc,
    join,
    lathe,
    plate,
    rod,
    round_box,
)


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
