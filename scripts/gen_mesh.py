"""Make a mesh from an image of an object, or from a prompt.

    python scripts/gen_mesh.py image=chair.png output=chair.glb
    python scripts/gen_mesh.py image=photos/ output=meshes/ resume=true
    python scripts/gen_mesh.py image=chair.png output=chair.glb quality=fast
    python scripts/gen_mesh.py image=chair.png output=chair.glb budget=0.5 trace=routes.png
    python scripts/gen_mesh.py model=hunyuan3d2 weights=FOLDER image=chair.png output=chair.glb
    python scripts/gen_mesh.py image=chair.png output=chair.stl size_mm=120 up=z
    python scripts/gen_mesh.py image=chair.png output=chair.glb texture=project
    python scripts/gen_mesh.py image=photos/ output=meshes/ runner=ray workers=4 resume=true
    python scripts/gen_mesh.py prompt="a wooden bar chair" output=chair.glb

A folder or glob of images is done in batches: a bad file is reported and skipped, `summary.json` records
everything, and the exit code is 1 if any failed. An image needs a transparent or a plain background.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import run

from elastic3d.checkpoints.options import check_weights
from elastic3d.errors import UserError
from elastic3d.evaluation.options import Runner
from elastic3d.pipelines.options import GenerateConfig
from elastic3d.utils.claims import sole_use
from elastic3d.utils.files import check_there

if TYPE_CHECKING:
    from elastic3d.pipelines.call import OnProgress
    from elastic3d.pipelines.generation import Job, Outcome

STAGES = {"condition": "image", "dit": "step", "decode": "decoding", "cleanup": "mesh"}


def main(config: GenerateConfig) -> int:
    """Plan, load the model, generate; 1 if any image failed."""
    check_there({**config.inputs, "dinov2": config.dinov2})  # before what takes seconds to import
    if config.weights:
        check_weights(config.weights)
    from tqdm import tqdm

    from elastic3d.pipelines import generation

    start = time.perf_counter()
    plan = generation.plan(config)
    single = len(plan.jobs) == 1 and plan.folder is None
    outcomes: list[generation.Outcome] = []
    make = maker(plan.jobs, config)
    # two commands at once would each leave a summary without the other's meshes
    claim = sole_use(plan.folder) if plan.folder and len(plan.jobs) > 1 else nullcontext()
    with claim, tqdm(total=len(plan.jobs), unit="mesh", leave=False, disable=None) as bar:

        def tell(outcome: generation.Outcome) -> None:
            outcomes.append(outcome)
            bar.update()
            if outcome.status == "failed" and not single:
                bar.write(f"failed: {outcome.error}", file=sys.stderr)

        def show(stage: str, done: int, total: int) -> None:
            bar.set_postfix_str(f"{STAGES[stage]} {done}/{total}")

        try:
            make(tell, show)
        finally:
            if plan.folder is not None and outcomes:
                generation.save_summary(plan.folder, config, outcomes, len(plan.jobs))
    if single and outcomes[0].status == "failed":
        raise UserError(outcomes[0].error)
    if config.trace:
        generation.save_routes(Path(config.trace), outcomes)
    report(outcomes, time.perf_counter() - start, plan.folder is not None)
    return int(any(outcome.status == "failed" for outcome in outcomes))


def maker(
    jobs: Sequence[Job], config: GenerateConfig
) -> Callable[[Callable[[Outcome], None], OnProgress], None]:
    """What makes the meshes, its model loaded: in this process, or over a Ray cluster."""
    from elastic3d.pipelines.generation import check_options, generate, load_pipeline

    if config.runner is Runner.ray:
        from elastic3d.pipelines.ray_generation import generate_over_ray

        return lambda tell, _: generate_over_ray(jobs, config, tell)
    pipeline = load_pipeline(config, len(jobs))
    draw = None
    if config.prompt:
        from elastic3d.pipelines.text_to_3d import prompt_drawer

        draw, config = prompt_drawer(config, pipeline)
    if config.trace or len(jobs) > 1:  # before a folder is made, and its first mesh
        check_options(pipeline, config)
    return lambda tell, show: generate(pipeline, jobs, config, tell, show, draw, alone=len(jobs) == 1)


def report(outcomes: list, seconds: float, summary: bool) -> None:
    """A line for a mesh, with its warnings; of several that a summary has, and where some are not made, a count."""
    shown = [mesh for mesh in outcomes if mesh.status == "ok" and not (summary and len(outcomes) > 1)]
    for mesh in shown:
        print(f"{mesh.output}: {mesh.faces:,} faces, {mesh.print_summary}, {seconds:.1f} s")
        for warning in mesh.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    if len(shown) == len(outcomes):
        return
    counts = [f"{sum(o.status == s for o in outcomes)} {s}" for s in ("ok", "failed", "skipped")]
    print(f"{len(outcomes)} meshes: {', '.join(counts)}, {seconds:.1f} s")
    if summary and (warned := sum(bool(mesh.warnings or mesh.image_warnings) for mesh in outcomes)):
        print(f"warning: {warned} of {len(outcomes)} meshes have warnings: see summary.json", file=sys.stderr)


if __name__ == "__main__":
    run(main, GenerateConfig, "gen_mesh")
