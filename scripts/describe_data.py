"""The numbers of the data card: counts of prepared shapes, and how close solids are to their raw meshes.

python scripts/describe_data.py source=infinigen output=data/prepared
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from _cli import run
from tqdm import tqdm

from elastic3d.preparation.options import PrepareConfig
from elastic3d.preparation.prepare import open_source
from elastic3d.preparation.shape import measure_ceiling
from elastic3d.preparation.shards import finished_sidecars
from elastic3d.preparation.splits import Split, read_splits


def main(config: PrepareConfig) -> int:
    """Count what is prepared; with limit=N also measure the ceiling on N test shapes."""
    source, splits = open_source(config), read_splits(Path(config.splits))
    folder = Path(config.output) / (config.name or source.name)
    rows = [row for _, described in finished_sidecars(folder) for row in described["items"]]
    counts = Counter(
        (row["category"], splits.get(f"{row['source']}/{row['id']}", Split.train)) for row in rows
    )
    print(f"{len(rows)} shapes in {folder}; licences: {dict(Counter(row['licence'] for row in rows))}")
    print("| category | train | val | test |\n| --- | --- | --- | --- |")
    for category in sorted({row["category"] for row in rows}):
        print(f"| {category} | " + " | ".join(str(counts[category, split]) for split in Split) + " |")
    held_out = {row["id"] for row in rows if splits.get(f"{row['source']}/{row['id']}") is Split.test}
    items = [item for item in source.items() if item.id in held_out][: config.limit]
    found = [
        measure_ceiling(source.load(item), config.shape.resolution) for item in tqdm(items, unit="shape")
    ]
    for name in ("chamfer_l1", "f_score_02", "f_score_05", "volume_ratio"):
        values = [value for ceiling in found if (value := getattr(ceiling, name)) is not None]
        if values:
            print(f"{name}: mean {np.mean(values):.4f}, median {np.median(values):.4f}, {len(values)} shapes")
    return 0


if __name__ == "__main__":
    run(main, PrepareConfig, "prepare_data")
