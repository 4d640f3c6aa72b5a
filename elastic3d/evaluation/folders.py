"""A whole evaluation: folders in, one report out, as `scripts/evaluate.py` runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from elastic3d.errors import UserError
from elastic3d.evaluation import sets
from elastic3d.evaluation.align import turn_up
from elastic3d.evaluation.items import Item, find_items
from elastic3d.evaluation.options import EvaluateConfig, ProtocolConfig
from elastic3d.evaluation.report import Gate, build_report, load_gate, violations
from elastic3d.evaluation.runner import score_all
from elastic3d.evaluation.sets import Features
from elastic3d.evaluation.statistics import Rival, Row, compare
from elastic3d.evaluation.views import load_lpips
from elastic3d.geometry.mesh_io import load_mesh
from elastic3d.utils.files import printable

Progress = Callable[[int, int], None]  # rows done, rows in all
FEATURE_VIEWS = 8


def evaluate_folders(
    config: EvaluateConfig,
    features: Features | None = None,
    command: str = "",
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Score `config.pred` against `config.gt` and whatever else the options ask for; nothing is written
    but the journal of rows beside `config.output`.

    The report is that of `build_report`, with these keys where asked for: `floor` and `baseline` (a list of
    comparisons), `sets` (set metrics), `gate` (the bounds and the violated lines).

    Args:
        features: image features for the Frechet and kernel distances of `sets`; those are left out if None.
        progress: called after every row.

    Raises:
        UserError: a folder or a file of the options can't be used, or LPIPS is asked for and not installed.
    """
    protocol = config.effective_protocol()
    if protocol.lpips and protocol.views:
        load_lpips()  # else every row would fail by what is missing here
    gate: Gate | None = load_gate(config.gate) if config.gate else None
    items = find_items(config.pred, config.gt)
    rivals = {Rival.floor: config.floor, Rival.baseline: config.baseline}
    rival_items = {
        kind: [shared_items(f, config.gt, items) for f in folders] for kind, folders in rivals.items()
    }
    for kind, folders in rivals.items():
        for folder, run in zip(folders, rival_items[kind], strict=True):
            if not any(item.pred for item in run):
                names = f"the {kind.value} {printable(folder)} and {printable(config.gt)}"
                raise UserError(f"{names} have no name in common, expected the same file names")
    total = len(items) + sum(len(run) for runs in rival_items.values() for run in runs)
    journal, done = prepare_journal(config), count(1)

    def score(run: Sequence[Item]) -> list[Row]:
        return score_all(
            run, protocol, config.runner, config.workers, journal, lambda row: progress(next(done), total)
        )

    rows = score(items)
    report = build_report(rows, protocol, config.bootstrap, command)
    for kind, runs in rival_items.items():
        if runs:
            rival_rows = [counted(score(run), kind) for run in runs]
            compared = compare(rows, rival_rows, kind, config.bootstrap) if any(rival_rows) else []
            report[kind.name] = [dataclasses.asdict(comparison) for comparison in compared]
    if config.sets:
        report["sets"] = set_report(items, rows, protocol, features)
    if gate:
        report["gate"] = {"bounds": gate, "violations": violations(gate, report["mean"])}
    return report


def counted(rows: Sequence[Row], kind: Rival) -> list[Row]:
    """The rows that stand for a rival: a baseline's failures count against it, as the predictions' do, but a floor
    is a measure of noise, which a missing or broken mesh must not raise."""
    return [row for row in rows if kind is Rival.baseline or row["status"] == "ok"]


def shared_items(folder: Path, gt: Path, items: Sequence[Item]) -> list[Item]:
    """The items of `folder` against `gt` whose names are among `items` and have a ground truth."""
    names = {item.name for item in items}
    return [item for item in find_items(folder, gt) if item.name in names and item.gt]


def prepare_journal(config: EvaluateConfig) -> Path:
    """The journal beside the report, emptied unless the run resumes. UserError if it can't be written."""
    journal = config.output.with_suffix(".rows.jsonl")
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a" if config.resume else "w"):
            pass
    except OSError as error:
        raise UserError(f"can't write {printable(journal)}: {error.strerror or error}") from error
    return journal


def set_report(
    items: Sequence[Item], rows: Sequence[Row], protocol: ProtocolConfig, features: Features | None
) -> dict[str, Any]:
    """Set metrics of the scored predictions against their ground truths, each shape in its own frame.

    Failed items have no shape to compare and are left out; `shapes` says how many took part.
    """
    good = [item for item, row in zip(items, rows, strict=True) if row["status"] == "ok"]
    if not good:
        return {"shapes": 0}
    points: dict[str, list[Any]] = {"pred": [], "gt": []}
    seen: dict[str, list[Any]] = {"pred": [], "gt": []}
    for item in good:
        pred, gt = turn_up(load_mesh(item.pred[0]), protocol.pred_up), load_mesh(item.gt[0])
        for side, mesh in (("pred", pred), ("gt", gt)):
            points[side].append(sets.shape_points(mesh, seed=protocol.seed))
            if features:
                seen[side].append(sets.view_features(mesh, features, FEATURE_VIEWS))
    found = dataclasses.asdict(sets.set_scores(points["pred"], points["gt"]))
    if features:
        both = [np.concatenate(seen[side]) for side in ("pred", "gt")]
        found["frechet_distance"] = sets.frechet_distance(*both)
        found["kernel_distance"] = sets.kernel_distance(*both)
    return {"shapes": len(good), "points": len(points["pred"][0]), "views": FEATURE_VIEWS, **found}
