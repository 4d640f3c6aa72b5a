"""Measure what images a model knows, so that it warns of others.

    python scripts/measure_familiarity.py prepared=data/prepared
    python scripts/measure_familiarity.py probe=[photos,drawings]

Writes `familiarity.safetensors`, which the pipeline reads, and `familiarity.json`, how it was measured, into the
model's folder.
"""

from __future__ import annotations

from _cli import run

from elastic3d.training.options import FamiliarityConfig
from elastic3d.utils.files import check_paths, check_there


def main(config: FamiliarityConfig) -> int:
    """Measure, write, and say how many images are called unfamiliar."""
    inputs = {name: getattr(config, name) for name in ("prepared", "train", "val", "probe")}
    check_there(inputs)  # before what takes seconds to import
    from elastic3d.pipelines.runtime import find_model
    from elastic3d.training.familiarity import measure_familiarity

    written = [find_model(config.model) / name for name in ("familiarity.safetensors", "familiarity.json")]
    check_paths(inputs, {"model": written})
    record = measure_familiarity(config)
    print(f"threshold {record['threshold']:.3f} of {record['train_images']} training images")
    print(f"unfamiliar: {record['val_false_alarms']:.1%} of {record['val_images']} validation images")
    for name, probe in record["probes"].items():
        print(f"unfamiliar: {probe['unfamiliar']:.1%} of {probe['images']} images in {name}")
    return 0


if __name__ == "__main__":
    run(main, FamiliarityConfig, "measure_familiarity")
