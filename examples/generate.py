"""An image to a mesh, in Python: python examples/generate.py chair.png chair.glb"""

from __future__ import annotations

import sys

from elastic3d.geometry.mesh_io import save_mesh
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline


def main(image: str, output: str, model: str = "data/pretrained/shape-small", **options: object) -> None:
    """Options are those of the pipeline's call: seed, steps, guidance, resolution, budget, ..."""
    pipeline = ImageTo3DPipeline.from_pretrained(model)
    result = pipeline(image, **options)
    save_mesh(result.mesh, output, extras=result.metadata)
    print(f"{output}: {len(result.mesh.faces):,} faces, {result.metadata['ms']}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python examples/generate.py IMAGE MESH [MODEL]")
    main(*sys.argv[1:])
