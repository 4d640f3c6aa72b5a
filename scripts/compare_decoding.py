"""Decode the same latents at several resolutions and compare the meshes with one that is evaluated everywhere.

    python scripts/compare_decoding.py output=outputs/decoding

Latents come from the model's samples of a folder of images, and from made shapes with thin parts. Run it again and it
goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

from _cli import run

from elastic3d.benchmark.stages_options import DecodingConfig
from elastic3d.utils.paths import check_distinct


def main(config: DecodingConfig) -> int:
    """Measure, write the files, print the table."""
    from elastic3d.benchmark.decoding import compare_decoding

    check_distinct({"images": config.images, "model": Path(config.model)}, {"output": config.output})
    print(compare_decoding(config))
    return 0


if __name__ == "__main__":
    run(main, DecodingConfig, "compare_decoding")
