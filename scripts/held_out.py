"""Make meshes of held-out shapes: reconstructed, generated from one view, and the nearest training shape.

    python scripts/held_out.py data.source=infinigen output=outputs/held_out
    python scripts/evaluate.py pred=outputs/held_out/seed-0 gt=outputs/held_out/gt output=outputs/held_out/seed-0.json

Run it again and it goes on where it was. `sheet.png` shows input, generated, ground truth and nearest side by side.
"""

from __future__ import annotations

from _cli import run

from elastic3d.training.options import HeldOutConfig
from elastic3d.utils.files import check_paths, check_there


def main(config: HeldOutConfig) -> int:
    """Write the folders of meshes."""
    lists = {"split": config.split, "train": config.train}
    prepared = {"data.path": config.data.path, "data.output": config.data.output}
    check_there({**lists, **prepared})  # before what takes seconds to import
    check_paths({"model": config.model, **lists, **prepared}, {}, {"output": config.output})
    from elastic3d.training.held_out import build_held_out

    ids = build_held_out(config)
    print(f"{len(ids)} held-out shapes in {config.output}; score a folder with scripts/evaluate.py")
    return 0


if __name__ == "__main__":
    run(main, HeldOutConfig, "held_out")
