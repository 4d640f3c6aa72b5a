"""Rewrite a published checkpoint as a model folder of this project, to train routers on it.

    python scripts/import_weights.py model=triposg weights=FOLDER output=models/triposg
    python scripts/import_weights.py model=hunyuan3d2 weights=FOLDER output=models/hunyuan3d2

The weights stay under their own licence. Only a VAE with an encoder can turn meshes into training data: where
Hunyuan3D-2's own has none, `vae_subfolder=hunyuan3d-vae-v2-0-withencoder` takes another.
"""

from __future__ import annotations

from _cli import run

from elastic3d.checkpoints.options import ImportConfig, check_weights
from elastic3d.utils.files import check_paths, check_there


def main(config: ImportConfig) -> None:
    """Read, check, write."""
    check_weights(config.weights)  # before what takes seconds to import
    check_there({"dinov2": config.dinov2})
    check_paths({"weights": config.weights, "dinov2": config.dinov2}, {}, {"output": config.output})
    from elastic3d.pipelines.published import import_checkpoint

    print(import_checkpoint(config))


if __name__ == "__main__":
    run(main, ImportConfig, "import_weights")
