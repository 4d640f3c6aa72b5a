"""Making the pictures of a benchmark. What is on disk already is not made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from elastic3d.adapters import adapter_for
from elastic3d.benchmark.controls import Controls
from elastic3d.benchmark.execute import elastic_options, following
from elastic3d.benchmark.images.foreign import ForeignCache, magnitude_ratios, running
from elastic3d.benchmark.images.meter import counted, metered
from elastic3d.benchmark.images.models import ImageModel
from elastic3d.benchmark.images.options import CacheName, ImageBenchmarkConfig
from elastic3d.benchmark.images.prompts import read_prompts
from elastic3d.benchmark.images.store import Made, PictureStore, PromptJob
from elastic3d.benchmark.images.velocity import velocity_error
from elastic3d.benchmark.methods import DENSE, MAIN, Planner, Routes, Run
from elastic3d.benchmark.store import spread
from elastic3d.errors import UserError
from elastic3d.pipelines.text_to_image import ImageResult
from elastic3d.routing.passes import RouteSource
from elastic3d.routing.protocol import ModelAdapter
from elastic3d.utils.structured import load_json, save_json

Condition = tuple[dict[str, Tensor], dict[str, Any]]  # of the prompts, of the guidance


class ImagePlace:
    """The `Place` of pictures."""

    def __init__(self, planner: Planner, store: PictureStore, prompts: Sequence[str]) -> None:
        assert isinstance(planner.config, ImageBenchmarkConfig)
        self.planner, self.store, self.prompts = planner, store, list(prompts)
        self.config = planner.config
        self.jobs = [PromptJob(prompt, seed) for seed in self.config.seeds for prompt in self.prompts]
        self.controls = Controls(self)
        self._measured: dict[str, float] = {}

    def model(self, name: str) -> ImageModel:
        """One of the models."""
        return cast(ImageModel, self.planner.models[name])

    @property
    def size(self) -> tuple[int, int] | None:
        """Width and height that were asked for."""
        side = self.config.resolution
        return (side, side) if side else None

    # ------------------------------------------------------------------------------------------------- a batch

    @contextmanager
    def ready(self, run: Run) -> Iterator[None]:
        """While it lasts, the pipeline has the run's foreign cache, if there is one."""
        if run.foreign is None:
            yield
            return
        ratios = self._ratios(run.steps) if run.foreign.kind is CacheName.mag_cache else ()
        with running(self.model(run.model).pipeline.backbone.pipe, run.foreign, run.steps, ratios):
            yield

    def condition_of(self, run: Run, jobs: Sequence[PromptJob]) -> Condition:
        """Embedded prompts, and what guidance needs."""
        pipeline = self.model(run.model).pipeline
        guidance = pipeline.settings_of(run.steps, self.config.guidance, self.size).guidance
        text = pipeline.encode([job.prompt for job in jobs])
        return text, pipeline.backbone.guidance_arguments(guidance, len(jobs))

    def sample(
        self, run: Run, condition: Condition, jobs: Sequence[PromptJob], source: RouteSource | None
    ) -> Tensor:
        """The transformer alone: latents (B,N,C)."""
        pipeline = self.model(run.model).pipeline
        settings = pipeline.settings_of(run.steps, self.config.guidance, self.size)
        if pipeline.session is not None:
            pipeline.session.settings = run.settings
        with following(pipeline.session, source):
            latents = pipeline.sample(*condition, [job.seed for job in jobs], settings)
        if latents.device.type == "cuda":
            torch.cuda.synchronize()
        return latents

    def produce(self, run: Run, jobs: Sequence[PromptJob], source: RouteSource | None) -> list[ImageResult]:
        """From prompt to picture; the run must be `ready`."""
        pipeline = self.model(run.model).pipeline
        with following(pipeline.session, source):
            return pipeline(
                [job.prompt for job in jobs],
                [job.seed for job in jobs],
                steps=run.steps,
                guidance=self.config.guidance,
                size=self.size,
                **elastic_options(pipeline.session, run),
            )

    def velocity_error(self, jobs: Sequence[PromptJob]) -> Callable[[Tensor], float]:
        """Fixed routes (I,) -> relative squared error of the guided velocity."""
        dense = self.planner.run(MAIN, self.planner.baseline_steps, Routes.dense)
        condition = self.condition_of(dense, jobs)
        data = self.sample(dense, condition, jobs, None)
        calls, steps = self.config.calibration_calls, self.planner.baseline_steps
        pipeline = self.model(MAIN).pipeline
        settings = pipeline.settings_of(steps, self.config.guidance, self.size)
        return velocity_error(pipeline, settings, data, condition, calls)

    # ------------------------------------------------------------------------------------------------- all jobs

    def make(self, run: Run, jobs: Sequence[PromptJob]) -> None:
        """Make and keep the pictures of jobs of one seed."""
        alone = run.foreign is not None and run.foreign.by_batch and not self.config.batched_decisions
        made: dict[str, Made] = {}
        for batch in [[job] for job in jobs] if alone else [list(jobs)]:
            try:
                made |= self._made(run, batch)
            except UserError:  # of which one?
                for job in batch:
                    made |= self._made_or_failed(run, job)
        self.store.save(run, jobs[0].seed, made)

    def _made(self, run: Run, jobs: Sequence[PromptJob]) -> dict[str, Made]:
        source = self.controls.source(run, jobs)
        if run.foreign is None:
            results = self.produce(run, jobs, source)
        elif run.foreign.by_batch:
            with counted(self.model(run.model).dit, *self._lengths) as count, self.ready(run):
                results = self.produce(run, jobs, source)
            share = count.share
        else:
            share = self._scheduled_share(run)
            with self.ready(run):
                results = self.produce(run, jobs, source)
        made = {}
        for job, result in zip(jobs, results, strict=True):
            if run.foreign is not None:
                result.receipt["flops_executed"] = round(share * result.receipt["flops_dense"])
            record = {"status": "ok", "error": None, "receipt": result.receipt}
            made[job.prompt] = Made(np.asarray(result.image), record)
        return made

    def _made_or_failed(self, run: Run, job: PromptJob) -> dict[str, Made]:
        """A picture that can't be made is grey."""
        try:
            return self._made(run, [job])
        except UserError as error:
            side = self.size or (self.model(run.model).pipeline.backbone.default_size,) * 2
            record = {"status": "failed", "error": str(error), "receipt": {}}
            return {job.prompt: Made(np.full((side[1], side[0], 3), 128, np.uint8), record)}

    @cached_property
    def _lengths(self) -> tuple[ModelAdapter, list[int]]:
        """The adapter of the transformer, and its tokens: of a picture, of a prompt."""
        run, jobs = self.planner.dense(2), self.jobs[:1]
        text, rest = self.condition_of(run, jobs)
        latents = self.sample(run, (text, rest), jobs, None)
        return adapter_for(self.model(DENSE).dit), [latents.shape[1], text["prompt_embeds"].shape[1]]

    def _scheduled_share(self, run: Run) -> float:
        """Executed share of the blocks' FLOPs of a cache that does the same for all samples, measured once.

        What a dense generation spends outside the blocks is taken off.
        """
        if run.name not in self._measured:
            jobs, transformer = self.jobs[:1], self.model(run.model).dit
            with metered(transformer) as meter:
                receipt = self.produce(self.planner.dense(run.steps), jobs, None)[0].receipt
            outside = meter.total - receipt["flops_dense"]
            with self.ready(run), metered(transformer) as meter:
                self.produce(run, jobs, None)
            self._measured[run.name] = (meter.total - outside) / receipt["flops_dense"]
        return self._measured[run.name]

    def _ratios(self, steps: int) -> list[float]:
        """MagCache's calibration for so many steps, kept in `tables`."""
        run = self.planner.dense(steps)
        jobs = self.calibration_jobs()
        path = self.controls.folder / f"magnitudes-{run.name}.json"
        key = [[job.prompt, job.seed] for job in jobs]
        stored = load_json(path, {"jobs": list, "ratios": [float]}) if path.is_file() else {}
        if stored.get("jobs") != key:
            pipe = self.model(DENSE).pipeline.backbone.pipe
            ratios = magnitude_ratios(pipe, lambda: self.produce(run, jobs, None), steps)
            stored = {"jobs": key, "ratios": ratios}
            save_json(stored, path)
        return stored["ratios"]

    def routes_of(self, run: Run, job: PromptJob) -> dict[str, Any]:
        """The routes that a run took for a job."""
        if self.store.record(run, job) is None:
            self.make(run, [job])
        record = self.store.record(run, job)
        assert record is not None
        return record["receipt"]["routes"]

    def missing(self, run: Run, seed: int) -> list[PromptJob]:
        """Jobs of a seed of which a run has no record."""
        jobs = [PromptJob(prompt, seed) for prompt in self.prompts]
        return [job for job in jobs if self.store.record(run, job) is None]

    # ------------------------------------------------------------------------------------------------ which jobs

    def timing_jobs(self) -> list[PromptJob]:
        """A few prompts, spread evenly."""
        return [PromptJob(p, self.config.seeds[0]) for p in spread(self.prompts, self.config.timing_prompts)]

    def timing_facts(self) -> list[Any]:
        """The prompts."""
        return [[job.prompt for job in self.timing_jobs()]]

    def calibration_jobs(self) -> list[PromptJob]:
        """The first prompts, with the seeds in turn."""
        path, seeds = self.config.calibration, self.config.seeds
        chosen = (read_prompts(path) if path else self.prompts)[: self.config.calibration_samples]
        return [PromptJob(prompt, seeds[i % len(seeds)]) for i, prompt in enumerate(chosen)]

    def neighbour(self, job: PromptJob) -> PromptJob:
        """The next prompt, with the same seed."""
        after = (self.prompts.index(job.prompt) + 1) % len(self.prompts)
        return PromptJob(self.prompts[after], job.seed)


def make_pictures(place: ImagePlace, runs: Sequence[Run]) -> None:
    """Every picture that is still missing, with a progress bar over all of them."""
    seeds, size = place.config.seeds, place.config.batch_size
    todo = {(run, seed): place.missing(run, seed) for run in runs for seed in seeds}
    total, left = len(runs) * len(place.jobs), sum(map(len, todo.values()))
    with tqdm(total=total, initial=total - left, desc="pictures", unit="picture", dynamic_ncols=True) as bar:
        for (run, seed), jobs in todo.items():
            bar.set_postfix_str(f"{run.name}, seed {seed}")
            for start in range(0, len(jobs), size):
                place.make(run, jobs[start : start + size])
                bar.update(len(jobs[start : start + size]))


def foreign_run(planner: Planner, cache: ForeignCache, steps: int) -> Run:
    """The dense model with a cache of others."""
    return planner.run(DENSE, steps, Routes.dense, foreign=cache)
