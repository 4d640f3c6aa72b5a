"""The results as a page of Markdown: a line for every run, and the targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from elastic3d.evaluation.items import Row

ANSWERS = {True: "met", False: "**not met**", None: "not measured"}
IDENTITY = ("method", "note", "budget", "steps", "run")


def page(results: Mapping[str, Any], scores: Mapping[str, str]) -> str:
    """A table of `rows` with the DiT's speed-up at each batch size and the columns `scores` (name: title), then the
    targets."""
    rows = results["rows"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    titles = ["method", "budget", "steps", "executed FLOPs / dense"]
    titles += [f"DiT speed-up, batch {batch}" for batch in batches]
    titles += [f"efficiency, batch {batch}" for batch in batches]
    lines = [_line([*titles, *scores.values()]), _line(["---"] * (len(titles) + len(scores)))]
    for group in _runs(rows):
        first = next(iter(group.values()))
        cells = [", ".join(filter(None, [first["method"], first["note"]])), first["budget"], first["steps"]]
        cells.append(_number(first["flops_ratio_to_baseline"], ".2f"))
        for name in ("dit_speedup", "efficiency"):
            cells += [_number(group[batch].get(name), ".2f") if batch in group else "" for batch in batches]
        lines.append(_line([*cells, *(_number(first.get(name), ".4g") for name in scores)]))
    targets = results["summary"]["targets"].items()
    lines += [
        "",
        *(f"- {name}: {_found(t['found'])}, {ANSWERS[t['met']]} ({t['wanted']})" for name, t in targets),
    ]
    return "\n".join(lines) + "\n"


def _runs(rows: Sequence[Row]) -> Iterator[dict[int, Row]]:
    """The rows of each run by batch size."""
    found: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in IDENTITY), {})[row["batch"]] = row
    yield from found.values()


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _found(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_found(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return " / ".join(map(_found, value))
    return "nothing" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
