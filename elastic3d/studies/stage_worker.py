"""One fresh process of `scripts/time_stages.py`: times the stages of whichever elastic3d is on its path.

It is run as a file and reads nothing of the package but the pipeline's public interface, so that it can measure an
older checkout too. Arguments: one JSON object. It prints one JSON object on the last line of its output.
"""

import json
import resource
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any


def main(options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of `import` and `load`, and of every stage of each mesh; the first mesh is the cold one.

    `batch`: those of each mesh of a batch.
    """
    if options[
        "cpu"
    ]:  # before anybody imports it: the times in a mesh's metadata are then of the processor too
        time.perf_counter = time.process_time
    start = time.perf_counter()
    import torch

    from elastic3d.geometry.mesh_io import save_mesh
    from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline

    imported = time.perf_counter()
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    pipeline = ImageTo3DPipeline.from_pretrained(options["model"], "cpu" if options["cpu"] else "auto")
    if options["compile"]:
        pipeline.compile()
    loaded = time.perf_counter()
    found: dict[str, Any] = {"import": 1000 * (imported - start), "load": 1000 * (loaded - imported)}

    def make(seeds: list[int]) -> dict[str, float]:
        """Stages of each mesh of one batch, on average."""
        begin, images = time.perf_counter(), [options["image"]] * len(seeds)
        results = pipeline(images, seeds, **options["settings"])
        made = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            for result in results:
                save_mesh(result.mesh, Path(folder) / "mesh.glb", extras=_metadata(result))
        end, stages = time.perf_counter(), dict.fromkeys(_metadata(results[0])["ms"], 0.0)
        for result in results:
            for stage, value in _metadata(result)["ms"].items():
                stages[stage] += value / len(seeds)
        return stages | {
            "write": 1000 * (end - made) / len(seeds),
            "total": 1000 * (end - begin) / len(seeds),
        }

    found["meshes"] = [make([seed]) for seed in range(1 + options["repeats"])]
    if options["batch"]:
        found["batch"] = make(list(range(options["batch"])))
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return found


def _metadata(result: Any) -> dict[str, Any]:
    """Of a mesh: the first field of a result, which older checkouts call otherwise."""
    return getattr(result, fields(result)[0].name)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
