"""The report as one HTML file that opens anywhere: no request leaves it, and its viewer is part of it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from elastic3d.errors import UserError
from elastic3d.evaluation.exhibits import HEAT_MAX, Exhibit, make_exhibit
from elastic3d.evaluation.items import Row, find_items
from elastic3d.evaluation.options import EvaluateConfig
from elastic3d.geometry.mesh_io import load_mesh
from elastic3d.utils.files import atomic_path
from elastic3d.utils.structured import load_json

RANKED_BY = "chamfer_l1"


def write_html(report: dict[str, Any], config: EvaluateConfig, frontier: list[dict[str, Any]]) -> None:
    """Write the page of a report to `config.html`; the worst and best items are loaded and rendered again.

    `frontier` holds the rows of benchmark runs (`load_frontier`), or nothing. UserError if the page can't be
    written.
    """
    assert config.html is not None
    worst, best = rank(report["items"], config.html_items)
    files = {item.name: item for item in find_items(config.pred, config.gt)}
    exhibits = {
        name: make_exhibit(
            load_mesh(files[name].pred[0]), load_mesh(files[name].gt[0]), config.effective_protocol()
        )
        for name in dict.fromkeys(worst + best)
    }
    page = build_page(report, worst, best, exhibits, frontier)
    with atomic_path(config.html) as temporary:
        temporary.write_text(page, encoding="utf-8")


def rank(rows: list[Row], count: int) -> tuple[list[str], list[str]]:
    """Names of up to `count` worst and `count` best scored items by Chamfer-L1; no name is in both lists."""
    scored = sorted((row for row in rows if row["status"] == "ok"), key=lambda row: -row[RANKED_BY])
    names = [row["name"] for row in scored]
    worst = names[: min(count, (len(names) + 1) // 2)]
    return worst, [name for name in reversed(names) if name not in worst][:count]


def load_frontier(path: Path) -> list[dict[str, Any]]:
    """The `rows` of a benchmark's results.json. UserError if the file has none."""
    try:
        rows: list[dict[str, Any]] = load_json(path, {"rows": [dict]})["rows"]
    except UserError as error:
        raise UserError(f"{path} is no results.json of scripts/benchmark.py ({error})") from error
    return rows


def build_page(
    report: dict[str, Any],
    worst: list[str],
    best: list[str],
    exhibits: dict[str, Exhibit],
    frontier: list[dict[str, Any]],
) -> str:
    """The whole page as text."""
    data = {
        "report": report,
        "worst": worst,
        "best": best,
        "renders": {name: exhibit.renders for name, exhibit in exhibits.items()},
        "meshes": {name: exhibit.meshes for name, exhibit in exhibits.items()},
        "frontier": frontier,
        "heat_max": HEAT_MAX,
    }
    assets = resources.files("elastic3d.evaluation") / "assets"
    page = (assets / "report.html").read_text(encoding="utf-8")
    for name in ("style.css", "viewer.js", "report.js"):
        page = page.replace(f"@@{name}@@", (assets / name).read_text(encoding="utf-8"))
    # "</script>" inside a string would end the element; names come from files of any origin
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return page.replace("@@data@@", text)
