"""Meshes side by side in a page of their own, turned by one camera: for a frame within the web app."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import numpy as np
import trimesh
from scipy.spatial import cKDTree

from elastic3d.evaluation.html import encoded, pack_surface
from elastic3d.geometry.cleanup import simplify

MOST_FACES = 60_000  # that are sent to the browser
LINES = 90  # pixels above and below the canvases
WIDEST = 400  # pixels of a canvas


def frame(meshes: Sequence[tuple[trimesh.Trimesh, str, str]]) -> str:
    """An iframe that shows meshes, each with a name and a note above it; vertex colours are shown where there are any.

    The frame's page reaches neither the network nor the page around it.
    """
    shown = [_packed(mesh) | {"name": name, "note": note} for mesh, name, note in meshes]
    page = (resources.files("elastic3d.serve") / "assets" / "viewer.html").read_text(encoding="utf-8")
    script = resources.files("elastic3d.evaluation") / "assets" / "viewer.js"
    page = page.replace("@@viewer.js@@", script.read_text(encoding="utf-8"))
    page = page.replace("@@meshes@@", json.dumps(shown, allow_nan=False).replace("<", "\\u003c"))
    side = f"min({WIDEST}px, {100 // len(shown)}cqw)"
    style = f"width: 100%; height: calc({LINES}px + {side}); border: 0"
    return (
        '<div style="container-type: inline-size">'
        f'<iframe title="Meshes" sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(page)}"></iframe></div>'
    )


def _packed(mesh: trimesh.Trimesh) -> dict[str, Any]:
    shown = simplify(mesh, MOST_FACES) if len(mesh.faces) > MOST_FACES else mesh
    packed = pack_surface(shown)
    visual = mesh.visual
    if isinstance(visual, trimesh.visual.ColorVisuals) and visual.kind == "vertex":
        colours = np.asarray(visual.vertex_colors, np.uint8)
        if shown is not mesh:
            colours = colours[cKDTree(mesh.vertices).query(shown.vertices)[1]]
        packed["colours"] = encoded(np.ascontiguousarray(colours))
    return packed
