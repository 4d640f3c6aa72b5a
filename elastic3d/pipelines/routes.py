"""The metadata of a generation's routes, and their image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from elastic3d.elastic.config import ElasticConfig
from elastic3d.elastic.cost import trace_dense_flops, trace_flops, trace_router_flops
from elastic3d.elastic.session import ElasticSession
from elastic3d.errors import UserError
from elastic3d.models.flops import dit_blocks_flops
from elastic3d.models.options import DiTConfig, SkipDiTConfig
from elastic3d.utils.files import atomic_path
from elastic3d.utils.options import to_dict

CELL, MARGIN, GAP = 10, 34, 12
SKIPPED, REUSED, EMPTY = (235, 235, 235), (245, 160, 60), (255, 255, 255)


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
    elastic = to_dict(replace(settings, cache=settings.cache or session.router_config.cache()))
    return [
        {
            **{name: flops[row] for name, flops in totals.items()},
            "elastic": elastic,
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
    """A heat map, blocks down and steps across, one panel for each (title, `routes` of metadata).

    Grey was skipped, orange reused an earlier residual, and the darker the blue the wider the block ran. The
    unconditional branch stands below the conditional one.
    """
    if not panels:
        raise UserError(f"there are no routes to draw in {path}")
    images = [_panel(title, routes) for title, routes in panels]
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
    height = MARGIN + branches * (blocks * CELL + GAP)
    width = max(2 * GAP + len(steps) * CELL, 2 * GAP + 7 * len(title))
    image = Image.new("RGB", (width, height), EMPTY)
    draw = ImageDraw.Draw(image)
    draw.text((GAP, GAP), title, fill=(0, 0, 0))
    for column, step in enumerate(steps):
        for branch, actions in enumerate(step):
            for row, symbol in enumerate(actions):
                left = GAP + column * CELL
                top = MARGIN + branch * (blocks * CELL + GAP) + row * CELL
                draw.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill=_colour(symbol, widths))
    return image


def _colour(symbol: str, widths: int) -> tuple[int, int, int]:
    if symbol in ".c":
        return SKIPPED if symbol == "." else REUSED
    share = (int(symbol, 16) or 16) / widths
    return tuple(round(255 + share * (full - 255)) for full in (20, 60, 140))  # type: ignore[return-value]
