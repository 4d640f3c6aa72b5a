"""A folder of images in one batch, half of the dense FLOPs: python examples/batch_with_budget.py photos meshes"""

from __future__ import annotations

import sys
from pathlib import Path

from elastic3d.geometry.mesh_io import save_mesh
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline


def main(
    images: str,
    output: str,
    model: str = "data/pretrained/shape-small",
    budget: float = 0.5,
    **options: object,
) -> None:
    """An image that can't be used is told and left out; the others are made."""
    pipeline = ImageTo3DPipeline.from_pretrained(model)
    files = sorted(Path(images).glob("*.png"))
    results = pipeline(files, seed=list(range(len(files))), budget=budget, **options)
    for file, result in zip(files, results, strict=True):
        if result.error:
            print(f"{file.name}: {result.error}")
            continue
        executed = result.metadata["flops_executed"] / result.metadata["flops_dense"]
        save_mesh(result.mesh, Path(output) / f"{file.stem}.glb", extras=result.metadata)
        print(f"{file.stem}.glb: {executed:.0%} of the dense FLOPs executed")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python examples/batch_with_budget.py IMAGES MESHES [MODEL]")
    main(*sys.argv[1:])
