"""Rows to a report: means with bootstrap intervals and bounds on them, the report as JSON, CSV and text, and the
machine that numbers were taken on."""

from __future__ import annotations

import csv
import difflib
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from elastic3d import __version__
from elastic3d.errors import UserError
from elastic3d.evaluation.options import ProtocolConfig
from elastic3d.evaluation.runner import usable_cores
from elastic3d.evaluation.statistics import Interval, Rival, Row, bootstrap_mean, comparison_table
from elastic3d.utils.files import atomic_path, load_yaml, printable
from elastic3d.utils.options import to_dict

Gate = dict[str, dict[str, float]]

# What the numbers mean, said in every report.
DEFINITIONS = {
    "frame": "ground truth's bounding-box centre at the origin, its longest side from -1 to 1",
    "chamfer": "sum of both directions",
    "failed_items": "score as a single point at the centre of the ground truth; not averaged without one",
    "intervals": "95 % percentile bootstrap over items",
}
_NOT_SCORES = ("seconds",)
_LIBRARIES = ("numpy", "scipy", "trimesh", "libigl", "embreex")
_MACHINE = ("torch", "numpy", "scipy", "scikit-image", "trimesh", "safetensors")


def summarise(rows: Sequence[Row], resamples: int = 2000) -> dict[str, Interval]:
    """Mean and interval of every number in the rows, in order of appearance; rows without a value are left out."""
    keys = {key: None for row in rows for key, value in row.items() if isinstance(value, (bool, int, float))}
    summary = {}
    for key in keys:
        if key not in _NOT_SCORES:
            values = [float(row[key]) for row in rows if row.get(key) is not None]
            summary[key] = bootstrap_mean(values, resamples)
    return summary


def build_report(
    rows: Sequence[Row], protocol: ProtocolConfig, resamples: int = 2000, command: str = ""
) -> dict[str, Any]:
    """The report as plain JSON data.

    Keys: `elastic3d` (version), `command`, `environment`, `protocol`, `count` (items, ok, failed), `mean`,
    `interval` (low, high), `values` (how many rows are behind each mean), `items` (the rows).
    """
    summary = summarise(rows, resamples)
    ok = sum(row["status"] == "ok" for row in rows)
    return {
        "elastic3d": __version__,
        "command": command,
        "environment": environment(),
        "protocol": to_dict(protocol) | DEFINITIONS,
        "count": {"items": len(rows), "ok": ok, "failed": len(rows) - ok},
        "mean": {key: interval.mean for key, interval in summary.items()},
        "interval": {key: [interval.low, interval.high] for key, interval in summary.items()},
        "values": {key: interval.count for key, interval in summary.items()},
        "items": list(rows),
    }


def environment() -> dict[str, str]:
    """Versions of Python and of the libraries that do the arithmetic, and the machine."""
    versions = {name: version(name) for name in _LIBRARIES}
    return {"python": platform.python_version(), "machine": platform.platform(), **versions}


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row, a column for every key that occurs; an absent value is an empty cell."""
    columns = list({key: None for row in rows for key in row})
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def markdown_table(titles: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown, without the last line break; None is an empty cell."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join('' if c is None else str(c) for c in cells)} |" for cells in lines)


def text_report(report: dict[str, Any]) -> str:
    """Everything in the report for a terminal: table, failures, comparisons, set metrics, gate."""
    parts = [text_table(report)]
    for kind in Rival:
        if kind.name in report:
            parts.append(comparison_table(report[kind.name], kind))
    if "sets" in report:
        parts.append("\n".join(f"{key:<24}{value:>12.5g}" for key, value in report["sets"].items()))
    if "gate" in report:
        broken = report["gate"]["violations"]
        parts.append("\n".join(f"gate: {line}" for line in broken) if broken else "gate: all bounds hold")
    return "\n\n".join(parts)


def text_table(report: dict[str, Any]) -> str:
    """The headline table and the failed items, for a terminal."""
    protocol, count = report["protocol"], report["count"]
    lines = [
        f"protocol {protocol['name']}: {protocol['points']:,} points, seed {protocol['seed']}, "
        f"align {protocol['align']}, Chamfer is the {protocol['chamfer']}",
        f"{count['items']} items, {count['ok']} ok, {count['failed']} failed",
        "",
        f"{'metric':<24}{'mean':>12}{'95 % interval':>26}{'values':>8}",
    ]
    for key, mean in report["mean"].items():
        low, high = report["interval"][key]
        lines.append(f"{key:<24}{mean:>12.5g}{f'{low:.5g} .. {high:.5g}':>26}{report['values'][key]:>8}")
    failed = [row for row in report["items"] if row["status"] != "ok"]
    lines += ["", *(f"failed: {row['name']}: {row['error']}" for row in failed)] if failed else []
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- gate


def load_gate(path: Path) -> Gate:
    """Bounds on means, such as `f_score@0.02: {min: 0.95}`, of a YAML file. UserError where it can't be read, or does
    not map metrics to `min` and `max` numbers."""
    name = printable(path)
    try:
        data = load_yaml(path)
    except UserError as error:
        raise UserError(f"can't read the gate {name} ({error})") from error
    if not data:
        raise UserError(
            f"the gate {name} has no bounds, expected lines such as 'f_score@0.02: {{min: 0.95}}'"
        )
    for metric, bounds in data.items():
        known = isinstance(bounds, dict) and bounds and set(bounds) <= {"min", "max"}
        if not known or not all(_is_number(bound) for bound in bounds.values()):
            raise UserError(
                f"the gate {name} has {metric}: {bounds}, expected {{min: number}} or {{max: number}}"
            )
    return data


def violations(gate: Gate, means: Mapping[str, float]) -> list[str]:
    """One line for each bound that a mean breaks; a metric without a mean breaks its bounds too."""
    lines = []
    for metric, bounds in gate.items():
        if metric not in means:
            close = difflib.get_close_matches(str(metric), means, n=3)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            lines.append(f"{metric}: not measured{hint}")
            continue
        for kind, word, sign in (("min", "below", 1), ("max", "above", -1)):
            if kind in bounds and sign * means[metric] < sign * bounds[kind]:
                lines.append(f"{metric}: {means[metric]:.6g} is {word} {kind} {bounds[kind]:g}")
    return lines


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


# ------------------------------------------------------------------------------------------------- machine


def machine() -> dict[str, Any]:
    """Processor, cores, memory, accelerator, threads, versions, and how busy the machine is now."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gb": _memory(),
        "accelerator": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "elastic3d": __version__,
        **{name: _version(name) for name in _MACHINE},
    }


@cache
def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
