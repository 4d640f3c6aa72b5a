"""A summary of methods as Markdown and as CSV rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elastic3d.evaluation.items import Row
from elastic3d.evaluation.statistics import Interval
from elastic3d.evaluation.summary import Line, Summary

_NO_VALUE = "–"


def markdown(summaries: Sequence[Summary]) -> str:
    """Every table with its comparison; ends in a line break."""
    return "\n\n".join(_section(summary) for summary in summaries) + "\n"


def csv_rows(summary: Summary) -> list[Row]:
    """One row a method (and seed) and metric, rounded to six digits; without a baseline, the last cells are empty."""
    rows = []
    for line in summary.lines:
        row: Row = {"set": summary.title, "method": _label(summary, line), "metric": line.column.key}
        row |= _cells("", line.mean)
        if line.difference is not None:
            row |= _cells("difference_", line.difference.interval)
            row["better"] = round(line.difference.better, 6)
        rows.append(row)
    return rows


def _cells(prefix: str, found: Interval) -> Row:
    numbers = {name: round(getattr(found, name), 6) for name in ("mean", "low", "high")}
    return {f"{prefix}{name}": value for name, value in (numbers | {"shapes": found.count}).items()}


def _section(summary: Summary) -> str:
    protocol = summary.protocol
    parts = [
        f"**{summary.title}, {summary.shapes} shapes**",
        _table(summary, summary.lines, _mean),
        f"Protocol: {protocol['points']:,} points, seed {protocol['seed']}, align {protocol['align']}; means with 95 % "
        "bootstrap intervals over shapes, several seeds averaged by shape first." + _gaps(summary),
    ]
    compared = [line for line in summary.lines if line.difference is not None]
    if compared:
        parts += [
            f"Minus {summary.baseline}, paired by shape (95 % bootstrap interval; share of shapes that are better):",
            _table(summary, compared, _difference),
        ]
    return "\n\n".join(parts)


def _table(summary: Summary, lines: Sequence[Line], cell: Callable[[Line], str]) -> str:
    columns = list({line.column.key: line.column for line in lines}.values())
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        found.setdefault(_label(summary, line), {})[line.column.key] = cell(line)
    rows = [["method", *(column.title for column in columns)], ["---"] * (1 + len(columns))]
    rows += [
        [label, *(cells.get(column.key, _NO_VALUE) for column in columns)] for label, cells in found.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _label(summary: Summary, line: Line) -> str:
    seeds = summary.methods[line.method]
    if seeds == 1:
        return line.method
    return f"{line.method}, {line.seed or f'mean of {seeds} seeds'}"


def _mean(line: Line) -> str:
    """Of a single seed without its interval, as the method's own is what counts."""
    found = line.mean
    if line.column.share:
        return f"{100 * found.mean:.1f} %"
    if line.seed is not None:
        return f"{found.mean:.3f}"
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def _difference(line: Line) -> str:
    assert line.difference is not None
    found, better = line.difference.interval, line.difference.better
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}), better on {100 * better:.0f} %"


def _gaps(summary: Summary) -> str:
    """Which methods' means rest on fewer shapes than there are."""
    gaps: dict[str, list[str]] = {}
    for line in summary.lines:
        if line.seed is None and line.mean.count < summary.shapes:
            gaps.setdefault(line.column.title, []).append(f"{line.mean.count} of {line.method}")
    return "".join(f" Shapes with a {title}: {', '.join(counts)}." for title, counts in gaps.items())
