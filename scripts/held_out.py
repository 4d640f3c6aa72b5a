"""Make meshes of held-out shapes: reconstructed, generated from one view, and the nearest training shape.

    python scripts/held_out.py data.source=infinigen output=outputs/held_out
    python scripts/evaluate.py pred=outputs/held_out/seed-0 gt=outputs/held_out/gt output=outputs/held_out/seed-0.json

Run it again and it goes on where it was. `sheet.png` shows input, generated, ground truth and nearest side by side.
"""

from __future__ import annotations

from typing import Any

from _cli import run

from elastic3d.training.held_out import HeldOutConfig
from elastic3d.utils.files import check_paths


def main(config: HeldOutConfig) -> int:
    """Write the folders of meshes."""
    from elastic3d.training.held_out import build_held_out

    inputs: dict[str, Any] = {"model": config.model, "split": config.split, "train": config.train}
    check_paths(inputs | {"data.output": config.data.output}, {}, {"output": config.output})
    ids = build_held_out(config)
    print(f"{len(ids)} held-out shapes in {config.output}; score a folder with scripts/evaluate.py")
    return 0


if __name__ == "__main__":
    run(main, HeldOutConfig, "held_out")
