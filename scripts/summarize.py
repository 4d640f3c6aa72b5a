"""Put reports of scripts/evaluate.py side by side: each method's means, and its difference to a baseline.

    python scripts/summarize.py folders=outputs/held_out output=outputs/held_out
    python scripts/summarize.py 'reports={mine: [a.json, b.json], theirs: [c.json]}' baseline=theirs

Prints Markdown. All reports of a table must have one protocol and the same items.
"""

from __future__ import annotations

from _cli import run

from elastic3d.evaluation.options import SummarizeConfig
from elastic3d.utils.files import check_paths, printable


def main(config: SummarizeConfig) -> int:
    """Print the tables and write them to the output folder, if there is one."""
    from elastic3d.evaluation.report import write_csv
    from elastic3d.evaluation.summary import csv_rows, find_reports, markdown, summarize
    from elastic3d.utils.files import atomic_path

    sets = {printable(folder.resolve().name): find_reports(folder) for folder in config.folders}
    sets = sets or {"reports": config.reports}
    if config.output:
        outputs = [config.output / name for name in ("summary.md", "summary.csv")]
        methods = [files for found in sets.values() for files in found.values()]
        check_paths({"reports": [path for files in methods for path in files]}, {"output": outputs})
    summaries = [summarize(title, files, config.baseline, config.bootstrap) for title, files in sets.items()]
    text = markdown(summaries)
    if config.output:
        with atomic_path(config.output / "summary.md") as path:
            path.write_text(text, encoding="utf-8")
        write_csv([row for summary in summaries for row in csv_rows(summary)], config.output / "summary.csv")
    print(text, end="")
    return 0


if __name__ == "__main__":
    run(main, SummarizeConfig, "summarize")
