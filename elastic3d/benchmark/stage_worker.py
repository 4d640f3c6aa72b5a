"""One fresh process of `scripts/time_stages.py`: times the stages of whichever elastic3d is on its path.

It is run as a file and reads nothing of the package but the pipeline's public interface, so that it can measure an
older checkout too. Arguments: one JSON object. It prints one JSON object on the last line of its output.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of `import` and `load`, and of every stage of each mesh; the first mesh is the cold one."""
    start = time.perf_counter()
    import torch

    from elastic3d.geometry.mesh_io import save_mesh
    from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline

    imported = time.perf_counter()
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    pipeline = ImageTo3DPipeline.from_pretrained(options["model"])
    loaded = time.perf_counter()
    meshes = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1 + options["repeats"]):
            begin, cpu = time.perf_counter(), time.process_time()
            result = pipeline(
                options["image"], seed=seed, resolution=options["resolution"], elastic=options["elastic"]
            )
            made = time.perf_counter()
            save_mesh(result.mesh, Path(folder) / "mesh.glb", extras=result.metadata)
            end = time.perf_counter()
            stages = dict(result.metadata["ms"]) | {"write": 1000 * (end - made)}
            meshes.append(
                stages | {"total": 1000 * (end - begin), "total (CPU)": 1000 * (time.process_time() - cpu)}
            )
    return {
        "import": 1000 * (imported - start),
        "load": 1000 * (loaded - imported),
        "meshes": meshes,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
