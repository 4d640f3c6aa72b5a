"""Several methods on the same shapes, side by side: reports in, one table out, as Markdown and as rows of a CSV file.

A method may have several reports, one a seed: each shape's values are averaged over them first, so that the
intervals (bootstrap over shapes) say how sure a mean is on other shapes, and a shape counts once. Differences to
the baseline are paired by shape.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from elastic3d.errors import UserError
from elastic3d.evaluation.report import markdown_table
from elastic3d.evaluation.statistics import Interval, Row, averages, bootstrap_mean, direction
from elastic3d.utils.claims import SETTINGS_NAME
from elastic3d.utils.files import load_json, printable

Report = dict[str, Any]
Rows = Sequence[Sequence[Row]]  # of each seed

_REPORT = {"protocol": dict, "items": [{"name": str}]}
_NO_VALUE = "–"
_SEED = re.compile(r"(?:(.+)-)?seed-(\d+)")
_GENERATED = "generated"  # the method of reports that are named by their seed alone
# Settings of the protocol that no number of the table depends on.
_ELSEWHERE = {"name", "views", "view_size", "lpips", "surface_health", "near_points", "near_sigma"}


# A number of every row, and its heading.
COLUMNS = {
    "chamfer_l1": "Chamfer-L1", "f_score@0.02": "F@0.02", "f_score@0.05": "F@0.05", "volume_iou": "volume IoU",
    "watertight": "watertight", "largest_component>0.5": "largest component > 50 %",
    "largest_component>0.9": "largest component > 90 %",
}  # fmt: skip
_SHARES = ("watertight", "largest_component>0.5", "largest_component>0.9")  # whose means are shares of shapes


@dataclass(frozen=True)
class Line:
    """One method's mean of one column. `seed` is the report's name where the line is of one seed of several.

    `difference` is that to the baseline, paired by shape, and `better` the share of shapes on which the method is
    strictly better; None where it is not compared.
    """

    method: str
    seed: str | None
    metric: str
    mean: Interval
    difference: Interval | None
    better: float | None


@dataclass(frozen=True)
class Summary:
    """The table of one set of shapes. `methods` maps each to its number of seeds."""

    title: str
    shapes: int
    protocol: dict[str, Any]
    methods: dict[str, int]
    baseline: str | None
    lines: list[Line]

    def label(self, line: Line) -> str:
        """The method of a line, and its seed where there are several."""
        seeds = self.methods[line.method]
        return line.method if seeds == 1 else f"{line.method}, {line.seed or f'mean of {seeds} seeds'}"


def find_reports(folder: Path) -> dict[str, list[Path]]:
    """The reports (*.json) of a folder by method: the file's name, or what is before `seed-<number>` in it.

    Raises:
        UserError: it is no folder, or holds no report.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder, expected one with reports of scripts/evaluate.py")
    seeds: dict[str, dict[int, Path]] = defaultdict(dict)
    claim = folder / SETTINGS_NAME  # of scripts/held_out.py, where reports lie beside its meshes
    for path in sorted(set(folder.glob("*.json")) - {claim}):
        match = _SEED.fullmatch(name := printable(path.stem))
        method, seed = (match[1] or _GENERATED, int(match[2])) if match else (name, 0)
        if seed in seeds[method]:
            raise UserError(f"{seeds[method][seed]} and {path} are both seed {seed} of {method}")
        seeds[method][seed] = path
    if not seeds:
        raise UserError(f"{folder} has no report (*.json), expected those of scripts/evaluate.py")
    return {method: [found[seed] for seed in sorted(found)] for method, found in seeds.items()}


def load_report(path: Path) -> Report:
    """A report as `scripts/evaluate.py` wrote it, its rows with `largest_component>...`: whether the largest component
    holds more than a share of the area; a failed prediction has none. UserError if there is none."""
    if not path.exists():
        raise UserError(f"there is no report {path}")
    try:
        report: Report = load_json(path, _REPORT)
    except UserError as error:
        raise UserError(f"{path} is no report of scripts/evaluate.py ({error})") from error
    for row in report["items"]:
        for name in (*COLUMNS, "dominant_component_share"):
            if not isinstance(row.get(name), (int, float, NoneType)):
                raise UserError(f"{path}: {name} of {row['name']} is {row[name]!r}, expected a number")
        for above in (0.5, 0.9) if "watertight" in row else ():
            row[f"largest_component>{above}"] = float((row.get("dominant_component_share") or 0) > above)
    return report


def summarize(
    title: str, files: Mapping[str, Sequence[Path]], baseline: str | None = None, resamples: int = 2000
) -> Summary:
    """Put the methods' reports side by side, the baseline last.

    A shape without a value (volume IoU of an open mesh) is left out of that mean and of its difference.

    Args:
        files: the reports of each method, one a seed.
        baseline: the method that the others are compared with; None for no comparison.

    Raises:
        UserError: a file is no report, there is no such baseline, or the reports differ in protocol or items.
    """
    if baseline is not None and baseline not in files:
        raise UserError(f"baseline={baseline}: expected one of {', '.join(files)}, or null")
    for method, paths in files.items():
        if not paths:
            raise UserError(f"{method} has no report, expected at least one file")
    methods = sorted(files, key=lambda method: method == baseline)
    loaded = {path: load_report(path) for method in methods for path in files[method]}
    _check_alike(loaded)
    rows = {method: [loaded[path]["items"] for path in files[method]] for method in methods}
    lines = []
    for method in methods:
        runs: list[tuple[str | None, Rows]] = [(None, rows[method])]
        if len(files[method]) > 1:
            stems = {path.stem for path in files[method]}
            alike = len(stems) < len(files[method])  # such as a/report.json and b/report.json
            runs += [(printable(p if alike else p.stem), [loaded[p]["items"]]) for p in files[method]]
        rival = rows[baseline] if baseline not in (None, method) else None
        for seed, run in runs:
            found = (_line(method, seed, metric, run, rival, resamples) for metric in COLUMNS)
            lines += [line for line in found if line is not None]
    first = next(iter(loaded.values()))
    seeds = {method: len(files[method]) for method in methods}
    return Summary(title, len(first["items"]), first["protocol"], seeds, baseline, lines)


def _line(
    method: str, seed: str | None, metric: str, run: Rows, rival: Rows | None, resamples: int
) -> Line | None:
    """The line of one column; None where no shape has a value."""
    mine, theirs = (averages(chain.from_iterable(rows), metric) for rows in (run, rival or []))
    if not mine:
        return None
    sign = direction(metric)
    both, difference, better = sorted(mine.keys() & theirs.keys()), None, None
    if both and sign is not None:
        change = np.array([mine[name] - theirs[name] for name in both])
        difference, better = bootstrap_mean(change, resamples), float((sign * change < 0).mean())
    mean = bootstrap_mean([mine[name] for name in sorted(mine)], resamples)
    return Line(method, seed, metric, mean, difference, better)


def _check_alike(reports: Mapping[Path, Report]) -> None:
    """UserError unless all have one protocol, as far as the columns depend on it, and the same items."""
    (first_path, first), *others = reports.items()
    names = {row["name"] for row in first["items"]}
    for path, report in others:
        ours, theirs = first["protocol"], report["protocol"]
        for key in sorted((ours.keys() | theirs.keys()) - _ELSEWHERE):
            if ours.get(key) != theirs.get(key):
                raise UserError(
                    f"{first_path} and {path} were scored differently: protocol.{key} is {ours.get(key)} and "
                    f"{theirs.get(key)}, expected one protocol"
                )
        odd = sorted(names ^ {row["name"] for row in report["items"]})
        if odd:
            raise UserError(
                f"{first_path} and {path} have different items, expected the same: {len(odd)} are in one only, "
                f"such as {odd[0]}"
            )


# ------------------------------------------------------------------------------------------------- tables


def markdown(summaries: Sequence[Summary]) -> str:
    """Every table with its comparison; ends in a line break."""
    return "\n\n".join(_section(summary) for summary in summaries) + "\n"


def csv_rows(summary: Summary) -> list[Row]:
    """One row a method (and seed) and metric, rounded to six digits; without a baseline, the last cells are empty."""
    rows = []
    for line in summary.lines:
        row: Row = {"set": summary.title, "method": summary.label(line), "metric": line.metric}
        for prefix, found in (("", line.mean), ("difference_", line.difference)):
            if found is not None:
                row |= {f"{prefix}{end}": round(getattr(found, end), 6) for end in ("mean", "low", "high")}
                row[f"{prefix}shapes"] = found.count
        rows.append(row if line.better is None else row | {"better": round(line.better, 6)})
    return rows


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
    columns = {line.metric: COLUMNS[line.metric] for line in lines}
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        found.setdefault(summary.label(line), {})[line.metric] = cell(line)
    rows = [[label, *(cells.get(key, _NO_VALUE) for key in columns)] for label, cells in found.items()]
    return markdown_table(["method", *columns.values()], rows)


def _mean(line: Line) -> str:
    """Of a single seed without its interval, as the method's own is what counts."""
    found = line.mean
    if line.metric in _SHARES:
        return f"{100 * found.mean:.1f} %"
    if line.seed is not None:
        return f"{found.mean:.3f}"
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def _difference(line: Line) -> str:
    found, better = line.difference, line.better
    assert found is not None and better is not None
    return f"{found.mean:+.3f} ({found.low:+.3f} to {found.high:+.3f}), better on {100 * better:.0f} %"


def _gaps(summary: Summary) -> str:
    """Which methods' means rest on fewer shapes than there are."""
    gaps: dict[str, list[str]] = {}
    for line in summary.lines:
        if line.seed is None and line.mean.count < summary.shapes:
            gaps.setdefault(COLUMNS[line.metric], []).append(f"{line.mean.count} of {line.method}")
    return "".join(f" Shapes with a {title}: {', '.join(counts)}." for title, counts in gaps.items())
