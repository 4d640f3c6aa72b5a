"""A whole benchmark of a text-to-image model, as `scripts/benchmark.py` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from elastic3d.benchmark.images.features import PictureFeatures
from elastic3d.benchmark.images.foreign import grid
from elastic3d.benchmark.images.models import load_image_models
from elastic3d.benchmark.images.options import DEFAULT_PROMPTS, ImageBenchmarkConfig
from elastic3d.benchmark.images.place import ImagePlace, foreign_run, make_pictures
from elastic3d.benchmark.images.prompts import read_prompts
from elastic3d.benchmark.images.references import load_references
from elastic3d.benchmark.images.report import write_report
from elastic3d.benchmark.images.scores import score_runs
from elastic3d.benchmark.images.store import PictureStore
from elastic3d.benchmark.methods import DENSE, Case, Planner, needed_runs, plan
from elastic3d.benchmark.options import Phase
from elastic3d.benchmark.store import spread
from elastic3d.benchmark.timing import load_rounds, measure, timing_key
from elastic3d.errors import UserError
from elastic3d.pipelines.text_to_image import check_prompt


def benchmark_images(config: ImageBenchmarkConfig, repository: Path, command: str = "") -> dict[str, Any]:
    """Do the phases, or what is left of them, and write the report. -> what results.json holds.

    Raises:
        UserError: an option, a prompt or a model that can't be used, found before anything is run.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    prompts = spread(read_prompts(config.prompts or repository / DEFAULT_PROMPTS), config.limit)
    models = load_image_models(config, repository)
    for prompt in prompts:
        check_prompt(prompt, models[DENSE].pipeline.backbone)
    planner, cases = plan(config, models, len(prompts))
    cases += foreign_cases(planner, config)
    if not cases:
        raise UserError("there is nothing to run: choose other methods, budgets, caches or variants")
    config.output.mkdir(parents=True, exist_ok=True)
    place = ImagePlace(planner, PictureStore(config.output), prompts)
    runs = needed_runs(planner, cases)
    if Phase.quality in config.phases:
        make_pictures(place, runs)
    device = models[DENSE].pipeline.backbone.device
    features = PictureFeatures(config.feature_size, device)
    scores = score_runs(place, runs, features)
    side = config.resolution or models[DENSE].config.resolution
    references = load_references(config, features, side) if scores.pooled else None
    timed = [run for run in runs if run != planner.reference() or run in [case.run for case in cases]]
    if Phase.timing in config.phases:
        rounds = measure(place, timed)
    else:
        rounds = load_rounds(config.output / "timing.json", timing_key(place, timed))
    return write_report(place, cases, scores, rounds, references, command)


def foreign_cases(planner: Planner, config: ImageBenchmarkConfig) -> list[Case]:
    """A row for each cache of others and each point of its grid."""
    return [
        Case(cache.title, foreign_run(planner, cache, steps), None, cache.note)
        for steps in config.cache_steps or [planner.baseline_steps]
        for cache in grid(config)
    ]
