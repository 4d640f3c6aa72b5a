"""Tools, toys and things on a desk; machine parts, bricks and instruments."""

from __future__ import annotations

import numpy as np
from manifold3d import CrossSection

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
    polygon,
    post,
    prism,
    rod,
    round_box,
    torus,
    tube,
)


def key(d: Dice) -> Parts:
    """A key that stands on its teeth side up, seen from the front."""
    thick, length, bow = d(0.07, 0.1), d(0.6, 0.8), d(0.17, 0.24)
    head = disc(bow).scale((1, d(0.8, 1.1))) if d.chance(0.6) else CrossSection.circle(bow, 6)
    head = head - disc(bow * d(0.35, 0.5), (-bow * 0.25, 0))
    shaft = polygon([(bow * 0.8, -0.045), (bow + length, -0.045), (bow + length, 0.045), (bow * 0.8, 0.045)])
    for index in range(d.whole(2, 4)):
        x, depth = bow + length - 0.06 - index * 0.11, d(0.09, 0.17)
        shaft = shaft + polygon([(x - 0.035, 0), (x + 0.035, 0), (x + 0.035, -depth), (x - 0.035, -depth)])
    return {"gold": plate(head + shaft, thick, bevel=0.015).rotate((0, 0, d.pick(0, 90, 0, 45)))}


def hammer(d: Dice) -> Parts:
    """A hammer, head up."""
    length, size = d(0.8, 1.0), d(0.13, 0.17)
    head = join(
        rod((-0.24, length, 0), (0.05, length, 0), size * 0.6),
        rod((-0.27, length, 0), (-0.16, length, 0), size * 0.75),
    )
    head = join(head, round_box(size * 1.2, size * 1.3, size * 1.2, 0.02, (0, length, 0)))
    if d.chance(0.5):
        claw = plate(
            [(0, -0.07), (0.16, -0.06), (0.3, -0.16), (0.2, 0.02), (0.0, 0.07)], size, (0.04, length, 0)
        )
        claw = claw - prism((0.36, length - 0.2, 0), (0.14, length, 0), 0.05, 3)
    else:
        claw = prism((0.03, length, 0), (0.3, length, 0), size * 0.75, 4, 0.03)
    handle = capsule((0, 0, 0), (0, length, 0), d(0.055, 0.075), 0.045).scale((1, 1, 1.25))
    return {"wood": handle, "metal": join(head, claw)}


def ring(d: Dice) -> Parts:
    """A finger ring with a stone, or a plain band."""
    radius, tube_radius = d(0.35, 0.42), d(0.05, 0.08)
    band = torus(radius, tube_radius, axis=(0, 0, 1)).scale((1, 1, d(1, 2)))
    if d.chance(0.25):
        return {"gold": band}
    size = d(0.12, 0.2)
    crown = prism((0, 0, 0), (0, size, 0), size, 8, size * 0.6)
    point = prism((0, -size * 0.9, 0), (0, 0, 0), 0.03, 8, size)
    stone = join(crown, point) if d.chance(0.7) else ball(size)
    seat = post(-size, -size * 0.3, size * 0.6, size * 0.85)
    lift = (0, radius + tube_radius + size * 0.7, 0)
    return {"gold": join(band, seat.translate(lift)), "gem": stone.translate(lift)}


def glasses(d: Dice) -> Parts:
    """Spectacles with their temples open."""
    radius, gap, thick = d(0.19, 0.25), d(0.09, 0.13), 0.035
    x = radius + gap / 2 + 0.02
    round_lens = d.chance(0.5)
    outer = disc(radius) if round_lens else polygon(_rounded(radius * 2.1, radius * d(1.3, 1.7), 0.07))
    lens, rim = outer.offset(-0.045), outer
    frame = plate(rim - lens, 0.07, (x, 0, 0), bevel=0.01)
    pane = plate(lens.offset(0.01), 0.035, (x, 0, 0))
    side, reach = x + radius, d(0.6, 0.8)
    temple = tube([(side - 0.02, 0.04, 0), (side, 0.04, -reach * 0.7), (side - 0.02, -0.1, -reach)], thick)
    bridge = tube([(-gap / 2 - 0.04, 0.02, 0), (0, 0.07, 0.02), (gap / 2 + 0.04, 0.02, 0)], thick)
    return {"frame": join(both_sides(join(frame, temple)), bridge), "glass": both_sides(pane)}


def phone(d: Dice) -> Parts:
    """A mobile phone that stands upright."""
    width, height, thick = d(0.45, 0.55), d(0.95, 1.1), d(0.07, 0.1)
    body = plate(polygon(_rounded(width, height, d(0.04, 0.1))), thick, bevel=0.02)
    pane = plate(polygon(_rounded(width * 0.9, height * d(0.8, 0.92), 0.03)), 0.03, (0, 0, thick / 2))
    lens = [
        rod((-width * 0.3, y, -thick / 2 - 0.03), (-width * 0.3, y, 0), 0.05)
        for y in (height * 0.4, height * 0.28)
    ]
    bump = round_box(0.16, 0.3, 0.04, 0.02, (-width * 0.3, height * 0.34, -thick / 2 - 0.005))
    return {"body": join(body, bump), "screen": pane, "glass": join(*lens)}


def book(d: Dice) -> Parts:
    """A closed book, standing or lying, or an open one."""
    width, height, thick = d(0.6, 0.75), d(0.85, 1.0), d(0.14, 0.28)
    if d.chance(0.3):
        page = plate([(0, 0.04), (0.2, 0.13), (0.6, 0.1), (0.6, 0.05), (0.2, 0.05)], height * 0.95)
        cover = plate([(0, 0), (0.63, 0.02), (0.63, 0.06), (0, 0.05)], height)
        return {"paper": both_sides(page).rotate((-20, 0, 0)), "cover": both_sides(cover).rotate((-20, 0, 0))}
    sides = [box(width, height, 0.04, (0, 0, side * thick / 2)) for side in (-1, 1)]
    spine = rod((-width / 2, -height / 2, 0), (-width / 2, height / 2, 0), thick / 2 + 0.02)
    pages = box(width * 0.94, height * 0.94, thick, (-0.01, 0, 0))
    pose = d.pick((0, 0, 0), (0, 90, 0), (-90, 0, 0))
    return {"cover": join(*sides, spine).rotate(pose), "paper": pages.rotate(pose)}


def die(d: Dice) -> Parts:
    """A die with its pips cut in."""
    body = round_box(1, 1, 1, d(0.08, 0.2))
    corners = [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    spots = {1: [(0, 0)], 2: [(-1, -1), (1, 1)], 3: [(-1, -1), (0, 0), (1, 1)], 4: corners}
    spots |= {5: [*corners, (0, 0)], 6: [*corners, (-1, 0), (1, 0)]}
    turns = {1: (0, 0, 0), 6: (180, 0, 0), 2: (90, 0, 0), 5: (-90, 0, 0), 3: (0, 90, 0), 4: (0, -90, 0)}
    pip = d(0.09, 0.12)
    holes = [
        ball(pip, (0.25 * x, 0.25 * y, 0.5 + pip * 0.25)).rotate(turns[face])
        for face in turns
        for x, y in spots[face]
    ]
    return {"body": body - join(*holes)}


def dumbbell(d: Dice) -> Parts:
    """A dumbbell along X with round, hexagonal or ball weights."""
    half, size, width = d(0.25, 0.35), d(0.2, 0.3), d(0.18, 0.28)
    bar = rod((-half - 0.05, 0, 0), (half + 0.05, 0, 0), d(0.05, 0.07))
    shape = d.pick("disc", "hexagon", "ball")
    if shape == "ball":
        weight = ball(size, (half + size * 0.7, 0, 0))
    elif shape == "hexagon":
        weight = prism((half, 0, 0), (half + width, 0, 0), size, 6)
    else:
        weight = join(
            rod((half, 0, 0), (half + width * 0.6, 0, 0), size),
            rod((half, 0, 0), (half + width, 0, 0), size * 0.7),
        )
    return {"metal": bar, "weights": both_sides(weight)}


def wrench(d: Dice) -> Parts:
    """An open-ended spanner with a ring at the other end."""
    length, head, thick = d(0.8, 1.0), d(0.14, 0.18), d(0.08, 0.11)
    handle = polygon([(-0.055, 0), (0.055, 0), (0.055, length), (-0.055, length)])
    jaw = disc(head, (0, length)) - polygon([(-0.08, length), (0.08, length), (0.08, 2), (-0.08, 2)])
    eye = disc(head * 0.85) - CrossSection.circle(head * 0.5, 6)
    shape = (
        handle
        + disc(head, (0, length))
        - polygon([(-0.08, length - 0.02), (0.08, length - 0.02), (0.08, 2), (-0.08, 2)])
    ) + jaw
    return {"metal": plate((shape - disc(head * 0.8)) + eye, thick, bevel=0.02)}


def screwdriver(d: Dice) -> Parts:
    """A screwdriver, tip up."""
    grip = d(0.35, 0.45)
    profile = [(0.06, 0), (0.1, 0.06), (d(0.08, 0.11), grip * 0.6), (0.07, grip)]
    handle = lathe(profile) - around(rod((0.12, -0.1, 0), (0.12, grip, 0), 0.03), 6)
    top = grip + d(0.4, 0.55)
    tip = post(grip - 0.02, top, 0.036)
    blade = box(0.11, 0.12, 0.045, (0, top, 0))
    return {"handle": handle, "metal": join(tip, blade)}


def spoon(d: Dice) -> Parts:
    """A spoon, bowl up, seen from the front."""
    width, length = d(0.14, 0.2), d(0.6, 0.8)
    scoop = ellipsoid(width, width * 1.4, 0.1) - ellipsoid(width * 0.8, width * 1.2, 0.09, (0, 0, 0.07))
    scoop = scoop.translate((0, length + width * 0.9, 0))
    return {"metal": join(scoop, capsule((0, 0, 0.02), (0, length, -0.03), 0.055, 0.035))}


def screw(d: Dice) -> Parts:
    """A screw or bolt, head up."""
    length, shank, head = d(0.55, 0.8), d(0.1, 0.14), d(0.24, 0.3)
    if d.chance(0.6):
        top = prism((0, length, 0), (0, length + d(0.14, 0.2), 0), head, 6)
    else:
        top = lathe([(head, length), (head * 0.8, length + 0.1), (0.02, length + 0.16)])
        top = top - box(1, 0.12, 0.07, (0, length + 0.16, 0))
    threads = [torus(shank, 0.03, (0, y, 0)) for y in np.arange(0.04, length * d(0.5, 0.85), 0.09)]
    return {"metal": join(top, post(0, length + 0.04, shank), *threads)}


def pencil(d: Dice) -> Parts:
    """A pencil, point up."""
    length, radius = d(0.9, 1.2), d(0.06, 0.085)
    cone = prism((0, length, 0), (0, length + 0.2, 0), radius, 24, 0.012)
    return {
        "body": prism((0, 0.1, 0), (0, length, 0), radius, 6),
        "wood": cone,
        "eraser": post(0, 0.1, radius),
    }


def camera(d: Dice) -> Parts:
    """A photo camera."""
    width, height, depth = d(0.85, 1.0), d(0.5, 0.62), d(0.26, 0.36)
    body = round_box(width, height, depth, 0.05)
    finder = round_box(width * 0.32, 0.18, depth * 0.8, 0.03, (d(-0.1, 0.1), height / 2 + 0.05, 0))
    size, reach = height * d(0.34, 0.42), d(0.15, 0.4)
    lens = rod((0, 0, depth / 2 - 0.02), (0, 0, depth / 2 + reach), size)
    hole = rod((0, 0, depth / 2 + reach - 0.06), (0, 0, 2), size * 0.75)
    knob = rod((-width * 0.35, 0, 0), (-width * 0.35, height / 2 + 0.07, 0), 0.07)
    return {"body": join(body, finder), "lens": lens - hole, "metal": knob}


def headphones(d: Dice) -> Parts:
    """Headphones, band up."""
    radius, ear = d(0.38, 0.46), d(0.16, 0.21)
    arc = [(np.cos(t) * radius, np.sin(t) * radius * 1.1, 0) for t in np.linspace(0, np.pi, 7)]
    cushion = rod((radius - 0.13, -0.02, 0), (radius + 0.0, -0.02, 0), ear)
    shell = rod((radius, -0.02, 0), (radius + 0.09, -0.02, 0), ear * 0.95, ear * 0.75)
    return {"band": tube(arc, d(0.04, 0.06)), "cushion": both_sides(cushion), "body": both_sides(shell)}


def padlock(d: Dice) -> Parts:
    """A locked padlock."""
    width, height = d(0.55, 0.7), d(0.45, 0.6)
    body = round_box(width, height, d(0.24, 0.32), 0.06)
    hole = join(rod((0, -0.02, 0), (0, -0.02, 1), 0.06), box(0.05, 0.16, 1, (0, -0.1, 0.5)))
    x, top = width * 0.3, height / 2 + d(0.25, 0.38)
    shackle = tube(
        [
            (-x, height / 2 - 0.05, 0),
            (-x, top - 0.1, 0),
            (0, top + 0.02, 0),
            (x, top - 0.1, 0),
            (x, height / 2 - 0.05, 0),
        ],
        d(0.05, 0.07),
    )
    return {"gold": body - hole, "metal": shackle}


def clock(d: Dice) -> Parts:
    """An alarm clock with two bells, or a plain clock, on two feet."""
    radius, depth = d(0.38, 0.46), d(0.2, 0.3)
    case = rod((0, 0, -depth / 2), (0, 0, depth / 2), radius)
    face = rod((0, 0, depth / 2 - 0.045), (0, 0, depth / 2 + 0.2), radius * 0.86)
    hour, minute = d(0, 2 * np.pi), d(0, 2 * np.pi)
    z = depth / 2 - 0.03
    hands = [
        capsule((0, 0, z), (np.sin(t) * size, np.cos(t) * size, z), 0.025)
        for t, size in ((hour, radius * 0.45), (minute, radius * 0.7))
    ]
    feet = both_sides(
        capsule((radius * 0.5, -radius * 0.7, 0), (radius * 0.72, -radius * 1.12, 0), 0.06, 0.04)
    )
    parts: Parts = {"body": case - face, "hands": join(*hands), "metal": feet}
    if d.chance(0.6):
        lobe = ball(0.17) - box(1, 0.5, 1, (0, -0.27, 0))
        parts["gold"] = both_sides(lobe.rotate((0, 0, -35)).translate((radius * 0.6, radius * 0.85, 0)))
    return parts


def magnet(d: Dice) -> Parts:
    """A horseshoe magnet, poles up."""
    radius, width, arm = d(0.3, 0.36), d(0.15, 0.2), d(0.3, 0.45)
    bow = disc(radius + width / 2) - disc(radius - width / 2)
    bow = bow - polygon([(-1, 0), (1, 0), (1, 1), (-1, 1)])
    thick = d(0.15, 0.2)
    return {
        "red": join(plate(bow, thick), both_sides(box(width, arm, thick, (radius, arm / 2 - 0.005, 0)))),
        "metal": both_sides(box(width, 0.16, thick, (radius, arm + 0.075, 0))),
    }


def umbrella(d: Dice) -> Parts:
    """An open umbrella."""
    radius, rise, length = d(0.5, 0.6), d(0.24, 0.36), d(0.85, 1.05)
    top = prism((0, length - rise, 0), (0, length, 0), radius, 8, 0.04)
    inner = prism((0, length - rise - 0.07, 0), (0, length - 0.09, 0), radius, 8, 0.02)
    hook = tube([(0, 0.1, 0), (0, 0.0, 0), (0.08, -0.09, 0), (0.16, 0.0, 0)], 0.036)
    stick = post(0.08, length + 0.08, 0.032)
    return {"cloth": top - inner, "metal": stick, "wood": hook}


def robot(d: Dice) -> Parts:
    """A toy robot."""
    width, height, depth = d(0.36, 0.48), d(0.4, 0.5), d(0.26, 0.34)
    head = d(0.24, 0.32)
    top = height / 2 + head / 2 + 0.04
    body = join(round_box(width, height, depth, 0.03), post(0, top, 0.07))
    skull = round_box(head * 1.15, head, head, 0.03, (0, top, 0))
    antenna = join(post(top, top + head * 0.9, 0.03), ball(0.05, (0, top + head * 0.9, 0)))
    eyes = both_sides(rod((head * 0.27, top + 0.03, 0), (head * 0.27, top + 0.03, head / 2 + 0.04), 0.05))
    x, y = width / 2 + 0.07, height * 0.36
    spread = d(0.0, 0.25)
    arm = join(ball(0.08, (x, y, 0)), capsule((x, y, 0), (x + spread, y - 0.36, d(0, 0.15)), 0.055))
    leg = join(
        rod((width * 0.27, -height / 2, 0), (width * 0.27, -height / 2 - 0.3, 0), 0.07),
        round_box(0.18, 0.1, 0.26, 0.03, (width * 0.27, -height / 2 - 0.32, 0.04)),
    )
    panel = box(width * 0.5, height * 0.35, 0.05, (0, 0.02, depth / 2))
    return {
        "metal": join(body, skull),
        "limbs": both_sides(join(arm, leg)),
        "eyes": join(eyes, panel, antenna),
    }


def _rounded(width: float, height: float, radius: float) -> list[tuple[float, float]]:
    corners = [(1, 1, 0), (-1, 1, 90), (-1, -1, 180), (1, -1, 270)]
    return [
        (
            x * (width / 2 - radius) + radius * float(np.cos(np.radians(start + turn))),
            y * (height / 2 - radius) + radius * float(np.sin(np.radians(start + turn))),
        )
        for x, y, start in corners
        for turn in range(0, 91, 15)
    ]


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
    body = d.pick(box(1, 1, 1), ball(0.6), post(-0.5, 0.5, 0.55))
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
    shell = post(0, height, radius)
    rims = [torus(radius, 0.04, (0, y, 0)) for y in (0.0, height)]
    rods = around(capsule((radius + 0.01, 0, 0), (radius + 0.01, height, 0), 0.03), d.whole(6, 8))
    return {"red": shell, "metal": join(*rims, rods)}
