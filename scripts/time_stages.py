"""Time the stages from an image to a written mesh, in fresh processes, and those of another checkout in turn.

    python scripts/time_stages.py output=outputs/stages.json
    git worktree add ../before v0.1.0 && python scripts/time_stages.py against=../before

`import` and `load` are those of a fresh process; `first mesh` is the first that it makes, `warm` those after it.
Ratios are taken within a round, where both checkouts ran one after the other: above 1 this one is faster.
"""

from __future__ import annotations

from _cli import run

from elastic3d.studies.config import StagesConfig
from elastic3d.utils.files import check_paths, check_there


def main(config: StagesConfig) -> int:
    """Measure, write the JSON, print the table."""
    check_there({"image": config.image, "against": config.against})  # before what takes seconds to import
    from elastic3d.studies.stages import measure_stages, printed

    reads = {"image": config.image, "model": config.model, "against": config.against}
    check_paths(reads, {"output": config.output})
    print(printed(measure_stages(config)["table"]))
    return 0


if __name__ == "__main__":
    run(main, StagesConfig, "time_stages")
