"""Write the committed split lists anew; needs the sweethome3d package and two minutes.

python scripts/make_splits.py output=data/splits
"""

from __future__ import annotations

from pathlib import Path

from _cli import run
from tqdm import tqdm

from elastic3d.errors import UserError
from elastic3d.evaluation.sets import shape_points
from elastic3d.preparation.infinigen import assets
from elastic3d.preparation.options import SplitsConfig
from elastic3d.preparation.prepare import cache_folder
from elastic3d.preparation.primitives.catalogue import PER_ROUND, shapes
from elastic3d.preparation.splits import (
    Split,
    infinigen_split,
    near_duplicate_groups,
    primitives_split,
    split_groups,
    write_splits,
)
from elastic3d.preparation.sweethome3d import SweetHome3DSource, find_package
from elastic3d.utils.files import check_paths


def main(config: SplitsConfig) -> int:
    """Split Infinigen by seed and SweetHome3D by group of near duplicates."""
    check_paths({"path": config.path}, {}, {"output": config.output})
    splits = {f"infinigen/{asset.name}": infinigen_split(asset.seed) for asset in assets([], config.seeds)}
    splits |= {
        f"primitives/{shape.name}": primitives_split(shape.seed, PER_ROUND.get(shape.category, 1))
        for shape in shapes([], config.primitives)
    }
    splits |= split_groups(sweethome3d_groups(config), config.test, config.val, config.seed)
    write_splits(Path(config.output), splits)
    for split in Split:
        print(f"{split.value}: {sum(which is split for which in splits.values())}")
    return 0


def sweethome3d_groups(config: SplitsConfig) -> dict[str, int]:
    """Group number of every usable model, by "source/id"."""
    downloads = cache_folder(config.cache_dir) / "sweethome3d"
    source = SweetHome3DSource(find_package(downloads, config.path), downloads)
    clouds = {}
    for item in tqdm(source.items(), unit="model"):
        try:
            clouds[f"{item.source}/{item.id}"] = shape_points(source.load(item).mesh)
        except UserError as error:
            print(f"left out {item.id}: {error}")
    groups = near_duplicate_groups(list(clouds.values()), config.threshold)
    return {name: int(group) for name, group in zip(clouds, groups, strict=True)}


if __name__ == "__main__":
    run(main, SplitsConfig, "make_splits")
