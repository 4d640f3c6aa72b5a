"""Decode the same latents at several resolutions, and the plain way; compare the meshes, the times and the truth.

    python scripts/compare_decoding.py output=outputs/decoding
    python scripts/compare_decoding.py images=outputs/held_out/images gt=outputs/held_out/gt seeds=[0]

Latents come from the model's samples of a folder of images, and from shapes: made ones with thin parts, or those of a
folder. Run it again and it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

from _cli import run

from elastic3d.studies.config import DecodingConfig
from elastic3d.utils.files import check_paths, check_there


def main(config: DecodingConfig) -> int:
    """Measure, write the files, print the table."""
    check_there({"images": config.images, "gt": config.gt})  # before what takes seconds to import
    from elastic3d.studies.decoding import compare_decoding

    reads = {"images": config.images, "gt": config.gt, "model": Path(config.model)}
    check_paths(reads, {}, {"output": config.output})
    print(compare_decoding(config))
    return 0


if __name__ == "__main__":
    run(main, DecodingConfig, "compare_decoding")
