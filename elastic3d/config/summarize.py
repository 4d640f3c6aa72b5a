"""Options of `scripts/summarize.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastic3d.config.base import check_range, option
from elastic3d.errors import UserError


@dataclass(kw_only=True)
class SummarizeConfig:
    """Which reports are put side by side: folders of them, or files named one by one."""

    folders: list[Path] = option(
        [],
        "Folders of reports (*.json), a table each: a file is a method, and seed-0.json, seed-1.json ... are"
        " the seeds of the method generated (big-seed-0.json ... of big).",
    )
    reports: dict[str, list[Path]] = option(
        {}, "In place of folders: the reports of each method, one a seed, as {mine: [a.json, b.json]}."
    )
    baseline: str | None = option("nearest", "The method that the others are compared with; null: none.")
    output: Path | None = option(None, "Folder for summary.md and summary.csv; null: only print.")
    bootstrap: int = option(2000, "Resamples behind the confidence intervals.")

    def __post_init__(self) -> None:
        check_range("bootstrap", self.bootstrap, 1, 1_000_000)
        if bool(self.folders) == bool(self.reports):
            raise UserError("expected either folders= or reports=, the reports of scripts/evaluate.py")
        names = [folder.resolve().name for folder in self.folders]
        if len(set(names)) < len(names):
            raise UserError(
                f"folders are named {', '.join(names)}, expected a name of its own for each table"
            )
