"""A whole benchmark, as `scripts/benchmark.py` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from elastic3d.benchmark.methods import needed_runs, plan
from elastic3d.benchmark.models import load_models
from elastic3d.benchmark.options import BenchmarkConfig, Phase
from elastic3d.benchmark.quality import Workplace, make_meshes, pair_truth, score_runs
from elastic3d.benchmark.report import write_report
from elastic3d.benchmark.store import Store, find_pictures, spread
from elastic3d.benchmark.timing import load_rounds, measure, timing_key
from elastic3d.errors import UserError
from elastic3d.models.foreground import prepare_picture
from elastic3d.models.options import ForegroundConfig


def benchmark(config: BenchmarkConfig, repository: Path, command: str = "") -> dict[str, Any]:
    """Do the phases, or what is left of them, and write the report. -> what results.json holds.

    Raises:
        UserError: an option, a folder, a picture or a model that can't be used, found before anything is run.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    images = spread(find_pictures(config.images), config.limit)
    truth = pair_truth(config.gt, images)
    models = load_models(config, repository)
    planner, cases = plan(config, models, len(images))
    if not cases:
        raise UserError("there is nothing to run: choose other methods, budgets or variants")
    for image in images:
        prepare_picture(
            image, ForegroundConfig(), models["model"].encoder.image_size
        )  # raises where it can't be used
    config.output.mkdir(parents=True, exist_ok=True)
    place = Workplace(planner, Store(config.output), images)
    runs = needed_runs(planner, cases)
    if Phase.quality in config.phases:
        make_meshes(place, runs)
    scores = score_runs(place, runs, truth)
    timed = [run for run in runs if run != planner.reference() or run in [case.run for case in cases]]
    if Phase.timing in config.phases:
        rounds = measure(place, timed)
    else:
        rounds = load_rounds(config.output / "timing.json", timing_key(place, timed))
    return write_report(place, cases, scores, rounds, dict(truth), command)
