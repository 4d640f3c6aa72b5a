"""The metadata of a generation's routes, and their image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from elastic3d.elastic.config import ElasticConfig
from elastic3d.elastic.cost import trace_dense_flops, trace_flops, trace_router_flops
from elastic3d.elastic.session import ElasticSession
from elastic3d.elastic.training_free import StepPolicy
from elastic3d.errors import UserError
from elastic3d.models.flops import dit_blocks_flops
from elastic3d.models.options import DiTConfig, SkipDiTConfig
from elastic3d.utils.files import atomic_path
from elastic3d.utils.options import to_dict

CELL, MARGIN, GAP, LEFT, LINE = 14, 34, 12, 128, 20
SKIPPED, REUSED, EMPTY, INK = (235, 235, 235), (245, 160, 60), (255, 255, 255), (30, 30, 30)
FONT = ImageFont.load_default(12)


def dense_metadata(
    dit: DiTConfig | SkipDiTConfig, moves: int, guidance: float, condition_tokens: int
) -> dict[str, int]:
    """FLOPs of a dense DiT's blocks over all moves and branches, for one sample."""
    branches = 2 if guidance != 1.0 and not dit.guidance_embed else 1
    flops = moves * branches * dit_blocks_flops(dit, dit.num_latents, condition_tokens)
    return {"flops_executed": flops, "flops_dense": flops}


def route_metadata(
    session: ElasticSession | None, settings: ElasticConfig, samples: int
) -> list[dict[str, Any]]:
    """What the blocks did for each sample of the newest generation, and what it cost; nothing where it was dense."""
    if session is None or not settings.elastic:
        return [{} for _ in range(samples)]
    trace = session.trace
    assert trace is not None
    totals = {
        name: flops(trace).sum((0, 1, 3)).long().tolist()
        for name, flops in (
            ("flops_executed", trace_flops),
            ("flops_dense", trace_dense_flops),
            ("flops_routers", trace_router_flops),
        )
    }
    policy = {"policy": session.source.about} if isinstance(session.source, StepPolicy) else {}
    elastic = to_dict(replace(settings, cache=settings.cache or session.router_config.cache()))
    return [
        {
            **{name: flops[row] for name, flops in totals.items()},
            "elastic": elastic,
            **policy,
            "updated": session.coarseness is not None,
            "one_branch": session.guided,
            "routes": {"blocks": trace.blocks, "widths": list(trace.ratios), "actions": trace.sample(row)},
        }
        for row in range(samples)
    ]


def route_title(name: str, metadata: dict[str, Any]) -> str:
    """What stands above the image of metadata's routes."""
    share = metadata["flops_executed"] / metadata["flops_dense"]
    return f"{name}, seed {metadata['seed']}: {share:.0%} of the dense FLOPs"


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
    with atomic_path(path) as temporary:
        sheet.save(temporary)


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
