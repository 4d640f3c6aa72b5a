"""Time published DiTs at full size with random weights: dense, and at budgets that need no training.

    python scripts/time_full_size.py output=outputs/full_size.json
    python scripts/time_full_size.py width=256 latents=256 models=[triposg] device=cpu

The first needs a GPU of 24 GB. On a CPU take the width and the number of latents that it can bear: times are CPU time
then. Speed-ups are those of the DiT alone, and are put beside those of its FLOPs.
"""

from __future__ import annotations

from _cli import run

from elastic3d.studies.config import FullSizeConfig
from elastic3d.utils.files import check_paths


def main(config: FullSizeConfig) -> int:
    """Measure, write the JSON, print the table."""
    from elastic3d.studies.full_size import measure_full_size, printed

    check_paths({}, {"output": config.output})
    print(printed(measure_full_size(config)))
    return 0


if __name__ == "__main__":
    run(main, FullSizeConfig, "time_full_size")
