"""Write a tiny model with random weights in the layout of a published one, to try every command without a download.

    python scripts/make_tiny_weights.py model=triposg output=outputs/tiny-triposg
    python scripts/gen_mesh.py model=triposg weights=outputs/tiny-triposg image=chair.png output=blob.glb

Its meshes are blobs: only that the commands run is shown, and how.
"""

from __future__ import annotations

from pathlib import Path

from _cli import run

from elastic3d.checkpoints.options import TinyWeightsConfig
from elastic3d.utils.files import check_paths


def main(config: TinyWeightsConfig) -> None:
    """Draw, write."""
    from elastic3d.checkpoints.tiny import write_tiny

    check_paths({}, {}, {"output": Path(config.output)})
    print(
        f"{write_tiny(config.model, config.output, config.seed)}: a tiny {config.model} with random weights"
    )


if __name__ == "__main__":
    run(main, TinyWeightsConfig, "make_tiny_weights")
