"""Measure the colours of texture=project on held-out shapes: PSNR of the input view, unseen views against the mean
colour.

python scripts/measure_colour.py data.source=sweethome3d
python scripts/measure_colour.py data.source=infinigen data.seeds=10 limit=10 output=colour.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cli import run

from elastic3d.elastic.config import ElasticOptions
from elastic3d.errors import UserError
from elastic3d.pipelines.options import DEFAULT_MODEL
from elastic3d.studies.config import ColourConfig
from elastic3d.utils.files import check_paths, check_there, save_json

if TYPE_CHECKING:
    import trimesh
    from PIL import Image


def main(config: ColourConfig) -> int:
    """One line a shape, whose figures are saved at once; then the summary."""
    inputs = {"data.path": config.data.path, "data.splits": config.data.splits}
    check_there(inputs)  # before what takes seconds to import
    check_paths({"model": config.model, **inputs}, {"output": config.output})
    from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
    from elastic3d.preparation.prepare import open_source
    from elastic3d.preparation.splits import Split, read_splits
    from elastic3d.studies.colour import measure_shape, summary

    pipeline = ImageTo3DPipeline.from_pretrained(config.model or DEFAULT_MODEL)
    source, splits = open_source(config.data), read_splits(Path(config.data.splits))
    pipeline.configured(ElasticOptions(), config.quality)  # tells of a quality that the model does not have

    def make(image: Image.Image) -> trimesh.Trimesh:
        return pipeline(image, config.seed, quality=config.quality, resolution=config.resolution).mesh

    rows: list[dict[str, Any]] = []
    for item in source.items():
        name = f"{source.name}/{item.id}"
        if splits.get(name) is not Split.test:
            continue
        try:
            row = measure_shape(source.load(item), make, config.seed + len(rows))
        except UserError as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        rows.append({"name": name, **row})
        print(" ".join([name, *(f"{key} {value:.3f}" for key, value in row.items())]))
        if config.output is not None:
            save_json({"summary": summary(rows), "shapes": rows}, config.output)
        if len(rows) == config.limit:
            break
    if not rows:
        raise UserError(
            f"no shape of {source.name} was measured, expected one of the test split in {config.data.splits} of which"
            " a mesh can be made"
        )
    print(json.dumps(summary(rows), indent=1))
    return 0


if __name__ == "__main__":
    run(main, ColourConfig, "measure_colour")
