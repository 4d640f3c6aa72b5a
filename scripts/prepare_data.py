"""Turn meshes into shards of training data.

    python scripts/prepare_data.py source=folder path=my_meshes output=data/prepared
    python scripts/prepare_data.py source=infinigen workers=8 generators=4
    python scripts/prepare_data.py source=sweethome3d
    python scripts/prepare_data.py source=primitives

Kill it at any point and run it again: it goes on where it was. Shapes that can't be used are skipped and
listed.
"""

from __future__ import annotations

from pathlib import Path

from _cli import run

from elastic3d.preparation.options import PrepareConfig, SourceName
from elastic3d.preparation.prepare import next_commands, prepare_data
from elastic3d.utils.files import check_paths


def main(config: PrepareConfig) -> int:
    """Prepare a source of shapes: distances, surface samples and views, in shards that training reads."""
    folder = Path(config.output) / (config.name or config.source.value)
    check_paths({"path": config.path, "splits": config.splits}, {}, {"output": folder})
    summary = prepare_data(config)
    print(f"{summary.prepared} shapes in {summary.folder}, {len(summary.failures)} skipped")
    for name, reason in list(summary.failures.items())[:20]:
        print(f"  {name}: {reason}")
    if not summary.prepared:
        remedy = "mend or replace the meshes named above and run this again"
        if config.source is not SourceName.folder:
            remedy = "run this again with retry=true once the reasons above are gone"
        print(f"nothing can be trained on yet: {remedy}")
        return 1
    if config.source is SourceName.folder:
        print("next, to fine-tune the bundled model on them:", *next_commands(config), sep="\n  ")
    return 0


if __name__ == "__main__":
    run(main, PrepareConfig, "prepare_data")
