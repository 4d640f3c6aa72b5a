"""What a generation looks like: a turntable strip of its mesh, and a heat map of its routes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image, ImageDraw, ImageFont
from trimesh.visual import ColorVisuals, TextureVisuals

from elastic3d.elastic.config import ElasticConfig
from elastic3d.errors import UserError
from elastic3d.geometry.render import Camera, Light, Scene, ring_cameras
from elastic3d.models.images import DRAWING, save_image

CELL, MARGIN, GAP, LEFT, LINE = 14, 34, 12, 128, 20
SKIPPED, REUSED, EMPTY, INK = (235, 235, 235), (245, 160, 60), (255, 255, 255), (30, 30, 30)
FONT = ImageFont.load_default(12)


def turntable(
    mesh: trimesh.Trimesh, views: int = 8, size: int = 256, image: Image.Image | None = None
) -> Image.Image:
    """Views from all around, the first from the front, in a row on white: RGB, `size` high, as wide for each view.

    `image`, as the model saw it, comes before them. The light turns with the camera, so that all sides are as bright.
    Vertex colours or a texture of base colours are shown where there are any.
    """
    placed = mesh.copy()
    placed.apply_translation(-mesh.bounds.mean(axis=0))
    placed.apply_scale(1.18 / float(np.linalg.norm(placed.vertices, axis=1).max()))  # fits from every side
    visual, colours = placed.visual, None
    if isinstance(visual, TextureVisuals) and getattr(visual.material, "baseColorTexture", None) is not None:
        placed.visual = visual = visual.to_color()
    if isinstance(visual, ColorVisuals) and visual.kind == "vertex":
        colours = visual.face_colors[:, :3]
    scene = Scene(placed, colours)
    tiles = (
        [image.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)] if image is not None else []
    )
    for camera in ring_cameras(views, elevation_deg=20, distance=3.6, fov_deg=40):
        colour = scene.render(camera, size, light_beside(camera)).colour
        tiles.append(Image.fromarray(np.asarray(colour)))
    strip = Image.new("RGBA", (len(tiles) * size, size), "white")
    for i, tile in enumerate(tiles):
        strip.alpha_composite(tile, (i * size, 0))
    return strip.convert("RGB")


def light_beside(camera: Camera) -> Light:
    """A light above the left shoulder of whoever looks, without shadows."""
    right, up, forward = camera.axes()
    x, y, z = -0.5 * right + 0.6 * up - forward
    return Light(direction=(float(x), float(y), float(z)), shadows=False)


def route_title(name: str, metadata: dict[str, Any]) -> str:
    """What stands above the image of metadata's routes."""
    share = metadata["flops_executed"] / metadata["flops_dense"]
    return f"{name}, seed {metadata['seed']}: {share:.0%} of the dense FLOPs"


def check_routes(trace: str, settings: ElasticConfig) -> None:
    """UserError where a model that runs so has no routes to draw to the file `trace`."""
    if not settings.elastic:
        raise UserError(
            f"trace={trace} can't be drawn: the dense model runs, which has no routes; expected another budget="
        )


def draw_routes(panels: Sequence[tuple[str, dict[str, Any]]], path: Path) -> None:
    """A heat map, blocks down and sampling steps across, one panel for each (title, `routes` of metadata), and a
    legend. The unconditional branch of guidance stands below the conditional one."""
    if not panels:
        raise UserError(f"there are no routes to draw in {path}")
    images = [_panel(title, routes) for title, routes in panels]
    images.append(_legend(max((routes["widths"] for _, routes in panels), key=len)))
    sheet = Image.new("RGB", (max(p.width for p in images), sum(p.height for p in images)), EMPTY)
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    save_image(sheet, path, DRAWING)


def _panel(title: str, routes: dict[str, Any]) -> Image.Image:
    steps, blocks, widths = routes["actions"], len(routes["blocks"]), len(routes["widths"])
    branches = max(len(step) for step in steps)
    tall = blocks * CELL + GAP
    bottom = MARGIN + branches * tall
    width = max(LEFT + len(steps) * CELL + GAP, int(FONT.getlength(title)) + 2 * GAP)
    image = Image.new("RGB", (width, bottom + 3 * GAP), EMPTY)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, INK, FONT)
    for branch in range(branches):
        top = MARGIN + branch * tall
        name = f"{('conditional', 'unconditional')[branch]}:\nblock" if branches > 1 else "block"
        draw.multiline_text((GAP, top + blocks * CELL / 2), name, INK, FONT, anchor="lm")
        for row in _ticks(blocks):
            draw.text((LEFT - 4, top + (row + 0.5) * CELL), str(row), INK, FONT, anchor="rm")
    for column in _ticks(len(steps)):
        draw.text((LEFT + (column + 0.5) * CELL, bottom - GAP + 4), str(column + 1), INK, FONT, anchor="mt")
    draw.text((LEFT, bottom + GAP), "sampling step", INK, FONT)
    for column, step in enumerate(steps):
        for branch, actions in enumerate(step):
            for row, symbol in enumerate(actions):
                left, top = LEFT + column * CELL, MARGIN + branch * tall + row * CELL
                draw.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill=_colour(symbol, widths))
    return image


def _legend(widths: Sequence[float]) -> Image.Image:
    """What each colour says, one a line."""
    names = {"c": "reused: the residual of an earlier step", ".": "skipped: the block's input goes on"}
    for number in range(len(widths), 0, -1):
        share = "" if len(widths) == 1 else f", {widths[number - 1]:.0%} of the MLP"
        names = {f"{number % 16:X}": f"executed{share}"} | names
    names = dict(sorted(names.items(), key=lambda item: item[0] in "c."))
    length = int(max(map(FONT.getlength, names.values())))
    image = Image.new("RGB", (length + 3 * GAP + CELL, len(names) * LINE + GAP), EMPTY)
    draw = ImageDraw.Draw(image)
    for row, (symbol, name) in enumerate(names.items()):
        top = row * LINE
        draw.rectangle((GAP, top, GAP + CELL, top + CELL), _colour(symbol, len(widths)), outline=INK)
        draw.text((2 * GAP + CELL, top + CELL / 2), name, INK, FONT, anchor="lm")
    return image


def _ticks(count: int) -> range:
    """Numbers that are written along an axis: all of a few, else every fourth."""
    return range(0, count, 1 if count <= 8 else 4)


def _colour(symbol: str, widths: int) -> tuple[int, int, int]:
    """Grey was skipped, orange reused, and the darker the blue the wider the block ran."""
    if symbol in ".c":
        return SKIPPED if symbol == "." else REUSED
    share = (int(symbol, 16) or 16) / widths
    return tuple(round(255 + share * (full - 255)) for full in (20, 60, 140))  # type: ignore[return-value]
