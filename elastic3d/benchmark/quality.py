"""The quality phase: every mesh of every run, and its scores. What is on disk already is not made again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from elastic3d.benchmark import execute
from elastic3d.benchmark.controls import Controls
from elastic3d.benchmark.execute import make
from elastic3d.benchmark.methods import MAIN, Planner, Run
from elastic3d.benchmark.options import BenchmarkConfig
from elastic3d.benchmark.store import Job, Store, find_pictures, spread
from elastic3d.diffusion.flow import sampling_times
from elastic3d.errors import UserError
from elastic3d.evaluation.items import Item, Row, find_meshes
from elastic3d.evaluation.options import Align, UpAxis
from elastic3d.evaluation.runner import score_all
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline, Result
from elastic3d.routing.passes import RouteSource

TRUTH, REFERENCE, SAME_STEPS, FLOOR = "truth", "reference", "same_steps", "floor"
Scores = dict[tuple[str, str], list[Row]]  # (run, what it is compared with) -> a row for each job


@dataclass
class Workplace:
    """What both phases work with."""

    planner: Planner
    store: Store
    images: list[Path]

    def __post_init__(self) -> None:
        config = self.planner.config
        assert isinstance(config, BenchmarkConfig)
        self.config = config
        self.jobs = [Job(image, seed) for seed in self.config.seeds for image in self.images]
        self.controls = Controls(self)

    def make(self, run: Run, jobs: Sequence[Job], bar: tqdm | None = None) -> None:
        """Make and keep the meshes of one batch."""
        pipeline = self._pipeline(run.model)
        source = self.controls.source(run, jobs)
        results = make(pipeline, run, jobs, self.config, source, _on_step(bar, run))
        for job, result in zip(jobs, results, strict=True):
            self.store.save(run, job, result)

    def routes_of(self, run: Run, job: Job) -> dict[str, Any]:
        """The routes that a run took for a job."""
        if self.store.record(run, job) is None:
            self.make(run, [job])
        record = self.store.record(run, job)
        assert record is not None
        return record["receipt"]["routes"]

    def _pipeline(self, model: str) -> ImageTo3DPipeline:
        return cast(ImageTo3DPipeline, self.planner.models[model])

    def timing_jobs(self) -> list[Job]:
        """A few pictures, spread evenly."""
        return [Job(i, self.config.seeds[0]) for i in spread(self.images, self.config.timing_images)]

    def timing_facts(self) -> list[Any]:
        """Names of the pictures."""
        return [[image.name for image in self.images], self.config.timing_images]

    def calibration_jobs(self) -> list[Job]:
        """The first pictures, with the seeds in turn."""
        calibration, seeds = self.config.calibration, self.config.seeds
        chosen = (find_pictures(calibration) if calibration else self.images)[
            : self.config.calibration_samples
        ]
        return [Job(image, seeds[i % len(seeds)]) for i, image in enumerate(chosen)]

    def neighbour(self, job: Job) -> Job:
        """The next picture, with the same seed."""
        return Job(self.images[(self.images.index(job.image) + 1) % len(self.images)], job.seed)

    def ready(self, run: Run) -> AbstractContextManager[None]:
        """Updates are merged before a clock starts: a model that goes on with the same settings does it once."""
        pipeline = self._pipeline(run.model)
        session, times = pipeline.session, sampling_times(pipeline.config, run.steps)[:-1].tolist()
        if session is not None and run.settings.elastic:
            session.settings = run.settings
            session.coarsen(run.steps, run.settings.budget, self.planner.guidance(run.model), times)
            with torch.no_grad():
                for block in session.blocks:
                    block.running()
        return nullcontext()

    def condition_of(self, run: Run, jobs: Sequence[Job]) -> Tensor:
        """Condition tokens (B,M,Cc)."""
        return execute.condition_of(self._pipeline(run.model), jobs)

    def sample(self, run: Run, condition: Tensor, jobs: Sequence[Job], source: RouteSource | None) -> Tensor:
        """The DiT alone: latents (B,N,C)."""
        seeds = [job.seed for job in jobs]
        return execute.sample_latents(self._pipeline(run.model), run, condition, seeds, self.config, source)

    def produce(self, run: Run, jobs: Sequence[Job], source: RouteSource | None) -> list[Result]:
        """From picture to clean surface, kept nowhere."""
        return execute.make(self._pipeline(run.model), run, jobs, self.config, source)

    def velocity_error(self, jobs: Sequence[Job]) -> Callable[[Tensor], float]:
        """Fixed routes (I,) -> relative squared error of the guided velocity."""
        return execute.velocity_error(self._pipeline(MAIN), self.planner, jobs, self.config)

    def missing(self, run: Run) -> list[Job]:
        """Jobs of which a run has no record."""
        return [job for job in self.jobs if self.store.record(run, job) is None]


def make_meshes(place: Workplace, runs: Sequence[Run]) -> None:
    """Every mesh that is still missing, with a progress bar over all of them."""
    todo = {run: place.missing(run) for run in runs}
    total = len(runs) * len(place.jobs)
    missing = sum(map(len, todo.values()))
    with tqdm(total=total, initial=total - missing, desc="meshes", unit="mesh", dynamic_ncols=True) as bar:
        for run, jobs in todo.items():
            for start in range(0, len(jobs), place.config.batch_size):
                batch = jobs[start : start + place.config.batch_size]
                place.make(run, batch, bar)
                bar.update(len(batch))


def _on_step(bar: tqdm | None, run: Run) -> Any:
    if bar is None:
        return None
    refresh = sys.stderr.isatty()  # in a log file, a line a batch is enough
    return lambda done, steps: bar.set_postfix_str(f"{run.name}, step {done}/{steps}", refresh)


# ------------------------------------------------------------------------------------------------------- scores


def pair_truth(config_gt: Path | None, images: Sequence[Path]) -> dict[str, Path]:
    """Ground truth mesh of each picture by its name; empty where there is no folder of them.

    Raises:
        UserError: a picture without a mesh, or with several.
    """
    if config_gt is None:
        return {}
    meshes = find_meshes(config_gt)
    for image in images:
        found = meshes.get(image.stem, [])
        if len(found) != 1:
            raise UserError(f"gt={config_gt} has {len(found)} meshes named {image.stem}, expected one")
    return {image.stem: meshes[image.stem][0] for image in images}


def score_runs(place: Workplace, runs: Sequence[Run], truth: dict[str, Path]) -> Scores:
    """Each run against ground truth, the reference and the dense model in as many steps; also the seed floor.

    A failed mesh has the scores of an empty one; a comparison with a mesh that is not there has none. Only runs whose
    meshes are all made are scored.
    """
    config, planner = place.config, place.planner
    done = {run for run in runs if not place.missing(run)}
    reference = planner.reference()
    against: dict[tuple[str, str], list[Item]] = {}
    for run in runs:
        if run not in done:
            continue
        if truth:
            pairs = [(place.store.mesh(run, job), truth[job.image.stem]) for job in place.jobs]
            against[run.name, TRUTH] = _items(run, TRUTH, place, pairs)
        for kind, other in ((REFERENCE, reference), (SAME_STEPS, planner.dense(run.steps))):
            if other in done:
                pairs = [(place.store.mesh(run, job), place.store.mesh(other, job)) for job in place.jobs]
                against[run.name, kind] = _items(run, kind, place, pairs)
    if reference in done and len(config.seeds) > 1:
        after = dict(zip(config.seeds, [*config.seeds[1:], config.seeds[0]], strict=True))
        pairs = [
            (place.store.mesh(reference, Job(job.image, after[job.seed])), place.store.mesh(reference, job))
            for job in place.jobs
        ]
        against[reference.name, FLOOR] = _items(reference, FLOOR, place, pairs)
    return _scored(place, against)


def _items(run: Run, kind: str, place: Workplace, pairs: Sequence[tuple[Path, Path]]) -> list[Item]:
    """Items named `<run>/<kind>/seed-<s>/<picture>`; a file that is not there is an absent side."""
    return [
        Item(
            f"{run.name}/{kind}/seed-{job.seed}/{job.image.stem}",
            (pred,) if pred.is_file() else (),
            (gt,) if gt.is_file() else (),
        )
        for job, (pred, gt) in zip(place.jobs, pairs, strict=True)
    ]


def _scored(place: Workplace, against: dict[tuple[str, str], list[Item]]) -> Scores:
    """Score all items, those with the ground truth and those between meshes each by their protocol, and regroup."""
    config = place.config
    between = replace(
        config.protocol, views=0, surface_health=False, near_points=0, align=Align.none, pred_up=UpAxis.y
    )
    rows: dict[str, Row] = {}
    for name, protocol in (("truth", config.protocol), ("paired", between)):
        items = [
            item
            for (_, kind), group in against.items()
            if (kind == TRUTH) == (name == "truth")
            for item in group
            if not (item.pred and item.pred == item.gt)
        ]
        journal = config.output / f"scores-{name}.jsonl"
        with tqdm(total=len(items), desc=f"scores, {name}", unit="pair", dynamic_ncols=True) as bar:
            found = score_all(
                items, protocol, workers=config.workers, journal=journal, on_row=lambda row: bar.update()
            )
        rows |= {row["name"]: row for row in found}
    return {key: [_short(item, rows.get(item.name)) for item in group] for key, group in against.items()}


def _short(item: Item, row: Row | None) -> Row:
    """The row, named `seed-<s>/<picture>`; a mesh is its own perfect copy."""
    name = "/".join(item.name.split("/")[-2:])
    if row is None:
        row = {"status": "ok", "error": None, "chamfer_l1": 0.0, "volume_iou": 1.0}
    return {**row, "name": name}
