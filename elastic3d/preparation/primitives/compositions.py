"""Abstract shapes: one to nine primitives, put together, carved and warped at random."""

from __future__ import annotations

from manifold3d import Manifold

from elastic3d.preparation.primitives.solids import (
    Dice,
    Parts,
    bend,
    both_sides,
    box,
    bumps,
    capsule,
    ellipsoid,
    join,
    prism,
    profile_curve,
    rod,
    round_box,
    taper,
    torus,
    twist,
)
from elastic3d.preparation.primitives.solids import lathe as revolve

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
        low, high = solid.bounding_box()[1], solid.bounding_box()[4]
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
        solid = rod((0, -b, 0), (0, b, 0), a)
    elif kind == 4:
        solid = rod((0, -b, 0), (0, b, 0), a, a * d.pick(0.03, 0.3, 0.6))
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
