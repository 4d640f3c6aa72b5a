"""Generated meshes against ground truth, paired by name: python examples/evaluate_folders.py meshes truth"""

from __future__ import annotations

import sys
from pathlib import Path

from elastic3d.evaluation import evaluate_pair
from elastic3d.geometry.mesh_io import load_mesh


def main(pred: str, truth: str, **options: object) -> list[float]:
    """F@0.05 of each pair, printed and returned; `scripts/evaluate.py` also scores what is missing, and reports."""
    scores = []
    for file in sorted(Path(truth).iterdir()):
        made = Path(pred) / f"{file.stem}.glb"
        pair = evaluate_pair(load_mesh(made), load_mesh(file), **options)
        scores.append(float(pair.points["f_score@0.05"]))
        print(f"{file.stem}: F@0.05 {scores[-1]:.3f}, Chamfer-L1 {pair.points['chamfer_l1']:.4f}")
    return scores


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/evaluate_folders.py MESHES TRUTH")
    main(*sys.argv[1:])
