"""Images from prompts: the models, what was made so far, and its scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from elastic3d.benchmark.config import DEFAULT_PROMPTS, CacheName, ImageBenchmarkConfig
from elastic3d.benchmark.image_scores import (
    METRICS,
    REFERENCE,
    SAME_STEPS,
    ImageFeatures,
    Judge,
    Pixels,
    References,
    load_references,
)
from elastic3d.benchmark.methods import DENSE, MAIN, Case, Job, Model, Planner, Run
from elastic3d.benchmark.rivals import by_batch, magnitude_ratios
from elastic3d.benchmark.rows import average, bounds
from elastic3d.benchmark.task import Scores, Task
from elastic3d.diffusion.options import Solver
from elastic3d.elastic import detach
from elastic3d.errors import UserError
from elastic3d.evaluation.items import spread
from elastic3d.evaluation.statistics import Row
from elastic3d.models.weights import find_weights
from elastic3d.pipelines.image_loading import weight_files
from elastic3d.pipelines.options import DEFAULT_IMAGE_MODEL
from elastic3d.pipelines.text_to_image import (
    ROUTERS_NAME,
    TextToImagePipeline,
    check_prompt,
    read_prompts,
)
from elastic3d.utils.files import atomic_path, file_sha256
from elastic3d.utils.structured import load_json, save_json

Condition = tuple[dict[str, Tensor], dict[str, Any]]  # of the prompts, of the guidance
Entries = dict[str, tuple[Pixels, dict[str, Any]]]  # by prompt: the image, and what was noted of it
SHEET_SIDE = 128
OPEN = 6  # files kept in memory


class ImageTask(Task):
    """The `Task` of images. Kept as `<output>/runs/<run>/seed-<s>.npz`, a file a run and seed: a kill loses little."""

    noun, plural = "image", "images"
    table = {
        "psnr_dense": "PSNR to dense", "ssim_dense": "SSIM to dense", "feature_dense": "feature distance to dense",
        "feature_reference": "to reference", "frechet": "Frechet distance", "category_accuracy": "category",
    }  # fmt: skip
    plot = {
        "feature_dense": "feature distance to the dense image (lower is better)",
        "ssim_dense": "SSIM with the dense image (higher is better)",
        "feature_reference": "feature distance to the reference (lower is better)",
        "frechet": "Frechet distance to real images (lower is better)",
    }
    losses = {f"{m}_{anchor}": anchor for anchor in (SAME_STEPS, REFERENCE) for m in METRICS} | {
        "frechet": ""
    }
    compared = tuple((anchor, metric) for anchor in (SAME_STEPS, REFERENCE) for metric in METRICS)

    config: ImageBenchmarkConfig

    def __init__(self, config: ImageBenchmarkConfig, repository: Path) -> None:
        """UserError for an option, a prompt or a model that can't be used."""
        prompts = spread(self.find_items(config.prompts or repository / DEFAULT_PROMPTS), config.limit)
        planner = Planner(config, load_models(config, repository))
        for prompt in prompts:
            check_prompt(prompt, planner.models[DENSE].pipeline.backbone)
        self._open = lru_cache(OPEN)(_entries)
        self._references: References | None = None
        size = (config.resolution, config.resolution) if config.resolution else None
        super().__init__(planner, prompts, config.timing_prompts, {"size": size})

    def find_items(self, path: Path) -> list[Any]:
        """Prompts of a file."""
        return read_prompts(path)

    # ---------------------------------------------------------------------------------------------- making

    def record(self, run: Run, job: Job) -> dict[str, Any] | None:
        """What was noted of an image; None where it is still to be made."""
        entry = self._read(run, job.seed).get(job.name)
        return entry[1] if entry else None

    def images(self, run: Run, seed: int, prompts: Sequence[str]) -> Pixels:
        """Images (P,H,W,3) of prompts that are all made."""
        entries = self._read(run, seed)
        return np.stack([entries[prompt][0] for prompt in prompts])

    def make(self, run: Run, jobs: Sequence[Job]) -> None:
        """Make and keep the images of jobs of one seed; one that can't be made is grey."""
        alone = run.rival is not None and by_batch(run.rival) and not self.config.batched_decisions
        entries = self._read(run, jobs[0].seed)
        for batch in [[job] for job in jobs] if alone else [list(jobs)]:
            entries |= self._made(run, batch)
        records = json.dumps({prompt: record for prompt, (_, record) in entries.items()})
        with atomic_path(self._path(run, jobs[0].seed)) as temporary, temporary.open("wb") as file:
            pixels = np.stack([image for image, _ in entries.values()])
            np.savez_compressed(file, images=pixels, records=np.frombuffer(records.encode(), np.uint8))

    def _made(self, run: Run, jobs: Sequence[Job]) -> Entries:
        try:
            results = self.produced(run, jobs)
        except UserError as error:
            if len(jobs) > 1:  # of which one?
                return {name: entry for job in jobs for name, entry in self._made(run, [job]).items()}
            side = self.config.resolution or self.model(run).resolution
            grey = np.full((side, side, 3), 128, np.uint8)
            return {jobs[0].name: (grey, {"status": "failed", "error": str(error), "metadata": {}})}
        return {
            job.name: (np.asarray(result.image), {"status": "ok", "error": None, "metadata": result.metadata})
            for job, result in zip(jobs, results, strict=True)
        }

    def _path(self, run: Run, seed: int) -> Path:
        return self.config.output / "runs" / run.name / f"seed-{seed}.npz"

    def _read(self, run: Run, seed: int) -> Entries:
        """What a file holds."""
        return self._open(self._path(run, seed))

    def condition_of(self, run: Run, jobs: Sequence[Job]) -> Condition:
        """Embedded prompts, and what guidance needs."""
        pipeline = self.model(run).pipeline
        text = pipeline.encode([job.name for job in jobs])
        return text, pipeline.backbone.guidance_arguments(self.planner.guidance(run.model), len(jobs))

    def latents(self, run: Run, condition: Condition, seeds: list[int]) -> Tensor:
        """Latents (B,N,C) of the transformer."""
        pipeline = self.model(run).pipeline
        if pipeline.session is not None:
            pipeline.session.settings = run.settings
        settings = pipeline.settings_of(run.steps, self.config.guidance, self.size["size"])
        return pipeline.sample(*condition, seeds, settings)

    def latent_scores(self, run: Run, found: Tensor, dense: Tensor) -> dict[str, float]:
        """Mean PSNR of the images, in dB; 100 where they are equal."""
        pipeline = self.model(run).pipeline
        size = pipeline.settings_of(None, None, self.size["size"]).size
        images = [pipeline.backbone.decode(latents, size).float().clamp(0, 1) for latents in (found, dense)]
        error = (images[0] - images[1]).square().flatten(1).mean(1).clamp_min(1e-10)
        return {"psnr_dense": float(-10 * error.log10().mean())}

    def pipe(self, run: Run) -> Any:
        """The pipeline of diffusers."""
        return self.model(run).pipeline.backbone.pipe

    def ratios(self, run: Run) -> Sequence[float]:
        """MagCache's calibration for as many steps, kept in `tables`."""
        if run.rival is None or run.rival.kind is not CacheName.mag_cache:
            return ()
        dense, jobs = self.planner.dense(run.steps), self.controls.calibration
        path = self.controls.folder / f"magnitudes-{dense.name}.json"
        key = [[job.name, job.seed] for job in jobs]
        stored = load_json(path, {"jobs": list, "ratios": [float]}) if path.is_file() else {}
        if stored.get("jobs") != key:
            dit = self.model(dense).dit
            ratios = magnitude_ratios(dit, lambda: self.produce(dense, jobs), run.steps)
            stored = {"jobs": key, "ratios": ratios}
            save_json(stored, path)
        return stored["ratios"]

    # ---------------------------------------------------------------------------------------------- scores

    @cached_property
    def features(self) -> ImageFeatures:
        """The network that scores images."""
        return ImageFeatures(self.config.feature_size, self.planner.models[DENSE].pipeline.backbone.device)

    def score(self, runs: Sequence[Run]) -> Scores:
        """All runs whose images are all made; the floor of an anchor is its images against those of the next seed."""
        planner, done = self.planner, [run for run in runs if not self.missing(run)]
        anchors = {SAME_STEPS: planner.dense(planner.baseline_steps), REFERENCE: planner.reference()}
        scores, pooled = Judge(self, {n: run for n, run in anchors.items() if run in done}).score(done)
        if pooled:
            side = self.config.resolution or planner.models[DENSE].resolution
            self._references = load_references(self.config, self.features, side)
        if self._references is not None:
            every = self.items * len(self.config.seeds)
            scores.further = {name: self._references.scores(found, every) for name, found in pooled.items()}
        return scores

    def columns(self, run: Run, scores: Scores) -> dict[str, Any]:
        """Mean scores against both anchors with their floors, an interval over prompts for the feature distance, and
        the distances to real images."""
        found: dict[str, Any] = {}
        for anchor in (SAME_STEPS, REFERENCE):
            rows = scores.rows.get((run.name, anchor), [])
            for metric in METRICS:
                found[f"{metric}_{anchor}"] = average(rows, metric)
                found[f"{metric}_{anchor}_floor"] = average(scores.floors.get(anchor, []), metric)
            found |= bounds(rows, "feature", f"feature_{anchor}", self.config.bootstrap)
        unknown = dict.fromkeys(("frechet", "kernel", "category_accuracy"))
        return found | unknown | scores.further.get(run.name, {})

    def holds(self, row: Row) -> bool | None:
        """Nearer to the dense images than those of another seed are, by all three scores."""
        nearer = []
        for metric in METRICS:
            value, floor = row[f"{metric}_{SAME_STEPS}"], row[f"{metric}_{SAME_STEPS}_floor"]
            if value is not None and floor is not None:
                nearer.append(value < floor if metric == "feature" else value > floor)
        return all(nearer) if nearer else None

    # ---------------------------------------------------------------------------------------------- report

    def about(self) -> dict[str, Any]:
        """How many prompts and real images."""
        real = self._references.about() if self._references else {"real_images": 0}
        return {"prompts": len(self.items), **real}

    def sheet(self, cases: Sequence[Case]) -> tuple[list[str], list[list[Pixels]]] | None:
        """A row a prompt: the reference, dense, elastic at each budget, and some of the fewer steps."""
        steps, seed = self.planner.baseline_steps, self.config.seeds[0]
        runs = {f"{self.config.reference_steps} steps": self.planner.reference()} | self.shown(cases)
        fewer = [case.run for case in cases if case.method == "fewer_steps" and case.run.steps < steps]
        runs |= {f"{run.steps} steps": run for run in spread(fewer, 4)}
        prompts = spread(self.items, self.config.sheet_prompts)
        runs = {name: run for name, run in runs.items() if self._read(run, seed).keys() >= set(prompts)}
        if not runs or not self.config.sheet_prompts:
            return None

        def enlarged(image: Pixels) -> Pixels:
            return np.asarray(
                Image.fromarray(image).resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS)
            )

        columns = [map(enlarged, self.images(run, seed, prompts)) for run in runs.values()]
        return list(runs), [list(row) for row in zip(*columns, strict=True)]


def _entries(path: Path) -> Entries:
    """What a file holds; empty where there is none yet."""
    if not path.is_file():
        return {}
    with np.load(path) as file:
        records, pixels = json.loads(file["records"].tobytes()), file["images"]
    return {p: (image, record) for (p, record), image in zip(records.items(), pixels, strict=True)}


def load_models(config: ImageBenchmarkConfig, repository: Path) -> dict[str, Model]:
    """`model` with its routers, `dense` without (the stock class, nothing attached), and a variant for each folder.

    `repository` is where the bundled model is. UserError for a folder that holds no pipeline or routers, or such as do
    not fit.
    """
    folder = Path(config.weights) if config.weights else repository / DEFAULT_IMAGE_MODEL

    def load(routers: Path | None) -> TextToImagePipeline:
        return TextToImagePipeline.from_pretrained(
            config.backbone, folder, routers, device=config.device, dtype=config.dtype
        )

    plain = load(None)
    if plain.session is not None:
        detach(plain.backbone.pipe)
    dense = file_sha256(*weight_files(folder))

    def model(pipeline: TextToImagePipeline, routers: Path | None) -> Model:
        backbone, files = pipeline.backbone, [find_weights(routers)] if routers else []
        digest = file_sha256(*weight_files(folder), *files)
        sampler = backbone.pipe.scheduler.config.shift, Solver.euler.value
        steps, guidance = backbone.default_sampling()
        return Model(
            pipeline, backbone.transformer, steps, guidance, backbone.default_size, sampler, digest, dense
        )

    models = {DENSE: model(plain, None)}
    own = Path(config.routers) if config.routers else folder / ROUTERS_NAME
    models[MAIN] = model(load(own), own) if config.routers or own.is_dir() else models[DENSE]
    for name, path in config.variants.items():
        models[name] = model(load(Path(path)), Path(path))
    return models
