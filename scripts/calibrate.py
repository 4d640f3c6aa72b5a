"""Calibrate what keeps a budget without routers, on a handful of images of yours, or of prompts.

    python scripts/calibrate.py model=triposg weights=FOLDER image=photos/
    python scripts/calibrate.py image=data/samples output=outputs/calibration
    python scripts/calibrate.py backbone=flux weights=/models/FLUX.1-dev prompts=prompts.txt

The model generates each of them once, densely; what is measured is kept in training_free.json beside the weights, where
gen_mesh.py and gen_image.py find it.
"""

from __future__ import annotations

import time

from _cli import run

from elastic3d.checkpoints.options import check_weights
from elastic3d.pipelines.options import CalibratePolicyConfig
from elastic3d.utils.files import check_paths, check_there


def main(config: CalibratePolicyConfig) -> None:
    """Load the model, generate, write."""
    # before what takes seconds to import
    check_there({name: getattr(config, name) for name in ("image", "prompts", "dinov2")})
    check_weights(config.weights if config.model else "")
    from tqdm import tqdm

    from elastic3d.pipelines.calibration import calibrate_policy, target_file

    target, start = target_file(config), time.perf_counter()
    check_paths({"prompts": config.prompts or None}, {"output": target})
    with tqdm(total=config.samples, unit="sample", leave=False, disable=None) as bar:
        path, found = calibrate_policy(config, lambda done, total: bar.update())
    about, seconds = found.about, time.perf_counter() - start
    print(f"{path}: {about['samples']} generations of {about['steps']} steps, {seconds:.1f} s")


if __name__ == "__main__":
    run(main, CalibratePolicyConfig, "calibrate")
