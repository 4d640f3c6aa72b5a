"""Images from prompts: the models, how they are made, and their scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from elastic3d.benchmark.config import ImageBenchmarkConfig
from elastic3d.benchmark.image_scores import (
    METRICS,
    Arrays,
    Features,
    Maps,
    References,
    compare_images,
    feature_maps,
    kept,
    load_references,
)
from elastic3d.benchmark.methods import DENSE, MAIN, Job, Model, Planner, Run
from elastic3d.benchmark.rows import average, bounds
from elastic3d.benchmark.task import SHEET_SIDE, Pixels, Scores, Task
from elastic3d.diffusion.options import Solver
from elastic3d.errors import UserError
from elastic3d.evaluation.items import spread
from elastic3d.evaluation.statistics import Row
from elastic3d.models.image_encoder import EfficientNetLite
from elastic3d.models.images import save_image
from elastic3d.models.options import ImageEncoderConfig
from elastic3d.models.weights import find_weights
from elastic3d.pipelines.image_loading import weight_files
from elastic3d.pipelines.image_to_3d import Result
from elastic3d.pipelines.options import DEFAULT_IMAGE_MODEL, NO_ROUTERS_NAME
from elastic3d.pipelines.runtime import find_model
from elastic3d.pipelines.text_to_image import ROUTERS_NAME, TextToImagePipeline, check_prompt, read_prompts
from elastic3d.utils.files import file_sha256

Condition = tuple[dict[str, Tensor], dict[str, Any]]  # of the prompts, of the guidance
SAME_STEPS, REFERENCE = "dense", "reference"  # the dense images in the default and in many steps
SEEN = 4  # sets of images in memory: both anchors, and what is beside them


class ImageTask(Task):
    """The `Task` of images."""

    noun, plural, suffix = "image", "images", ".png"
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
    compared = tuple((anchor, metric) for anchor in (SAME_STEPS, REFERENCE) for metric in METRICS)
    losses = {f"{metric}_{anchor}": anchor for anchor, metric in compared} | {"frechet": ""}

    config: ImageBenchmarkConfig

    def __init__(self, config: ImageBenchmarkConfig) -> None:
        """UserError for an option, a prompt or a model that can't be used."""
        prompts = spread(self.find_items(config.prompts), config.limit)
        planner = Planner(config, load_models(config))
        for prompt in prompts:
            check_prompt(prompt, planner.models[DENSE].pipeline.backbone)
        self.side = config.resolution or planner.models[DENSE].resolution
        self.anchors = {SAME_STEPS: planner.baseline, REFERENCE: planner.reference}
        self._seen = lru_cache(SEEN)(self._look)
        self._references: References | None = None
        size = (config.resolution, config.resolution) if config.resolution else None
        super().__init__(planner, prompts, {"size": size})

    def find_items(self, path: Path) -> list[Any]:
        """Prompts of a file."""
        return read_prompts(path)

    # ---------------------------------------------------------------------------------------------- making

    def produced(self, run: Run, jobs: Sequence[Job]) -> list[Any]:
        """Images of a batch; one that can't be made is grey."""
        try:
            return super().produced(run, jobs)
        except UserError as error:
            if len(jobs) > 1:  # of which one?
                return [result for job in jobs for result in self.produced(run, [job])]
            return [Result({}, error=error, image=Image.new("RGB", (self.side, self.side), (128, 128, 128)))]

    def save(self, result: Any, path: Path) -> None:
        """Write the image with its metadata."""
        save_image(result.image, path, result.metadata)

    def condition_of(self, run: Run, jobs: Sequence[Job]) -> Condition:
        """Embedded prompts, and what guidance needs."""
        pipeline = self.model(run).pipeline
        text = pipeline.encode([job.name for job in jobs])
        return text, pipeline.backbone.guidance_arguments(self.planner.guidance(run.model), len(jobs))

    def sample(self, run: Run, condition: Condition, jobs: Sequence[Job]) -> Tensor:
        """Latents (B,N,C) of the transformer."""
        pipeline = self.model(run).pipeline
        if pipeline.session is not None:
            pipeline.session.settings = run.settings
        settings = pipeline.settings_of(run.steps, self.config.guidance, self.size["size"])
        return pipeline.sample(*condition, [job.seed for job in jobs], settings)

    def latent_scores(self, run: Run, found: Tensor, dense: Tensor) -> dict[str, float]:
        """Mean PSNR of the images, in dB; 100 where they are equal."""
        pipeline = self.model(run).pipeline
        size = pipeline.settings_of(None, None, self.size["size"]).size
        images = [pipeline.backbone.decode(latents, size).float().clamp(0, 1) for latents in (found, dense)]
        error = (images[0] - images[1]).square().flatten(1).mean(1).clamp_min(1e-10)
        return {"psnr_dense": float(-10 * error.log10().mean())}

    # ---------------------------------------------------------------------------------------------- scores

    @cached_property
    def network(self) -> EfficientNetLite:
        """EfficientNet-Lite0, frozen, whose features score images."""
        config = ImageEncoderConfig(image_size=self.config.feature_size)
        return EfficientNetLite(config).to(self.planner.models[DENSE].pipeline.backbone.device)

    def score(self, runs: Sequence[Run]) -> Scores:
        """All runs whose images are all made, beside the anchors. The floor of an anchor is its images beside those of
        the seed before."""
        done, seeds = [run for run in runs if not self.missing(run)], self.config.seeds
        anchors = {name: run for name, run in self.anchors.items() if run in done}
        scores, pooled = Scores(), defaultdict[str, list[Features]](list)
        with tqdm(total=len(seeds) * len(done), desc="scores", unit="run", dynamic_ncols=True) as bar:
            for seed, run in [(seed, run) for seed in seeds for run in done]:
                others = {name: (anchor, seed) for name, anchor in anchors.items()}
                if len(seeds) > 1:
                    before = seeds[seeds.index(seed) - 1]
                    own = [name for name, anchor in anchors.items() if anchor == run]
                    others |= {f"{name}_floor": (run, before) for name in own}
                names = {name: (other.name, when) for name, (other, when) in others.items()}
                found = kept(
                    self.config.output / "scores" / run.name / f"seed-{seed}.npz",
                    (names, self.items, self.config.feature_size),
                    partial(self._scored, run, seed, others),
                )
                pooled[run.name].append(found["pooled"].astype(np.float32))
                for name in others:
                    scores.rows[run.name, name] += _rows(found, name, seed)
                bar.update()
        if pooled:
            self._references = load_references(self.config, self.network, self.side)
        if self._references is not None:
            every = self.items * len(seeds)
            for name, parts in pooled.items():
                scores.further[name] = self._references.scores(np.concatenate(parts), every)
        return scores

    def _scored(self, run: Run, seed: int, others: Mapping[str, tuple[Run, int]]) -> Arrays:
        """`pooled` (P,1280) of a run's images, and `<other>/<metric>` (P,) of them beside each other's."""
        images, maps, pooled = self._seen(run, seed)
        found: Arrays = {"pooled": pooled.astype(np.float16)}
        for name, other in others.items():
            true, seen, _ = self._seen(*other)
            scores = compare_images(images, true, (maps, seen))
            found |= {f"{name}/{metric}": values for metric, values in scores.items()}
        return found

    def _look(self, run: Run, seed: int) -> tuple[Pixels, Maps, Features]:
        """A run's images (P,H,W,3) of a seed, and what the network sees in them."""
        images = []
        for item in self.items:
            with Image.open(self.path(run, Job(item, seed))) as image:
                images.append(np.asarray(image))
        return np.stack(images), *feature_maps(self.network, np.stack(images))

    def columns(self, run: Run, scores: Scores) -> dict[str, Any]:
        """Mean scores against both anchors with their floors, an interval over prompts for the feature distance, and
        the distances to real images."""
        found: dict[str, Any] = {}
        for name, anchor in self.anchors.items():
            rows, floor = scores.rows[run.name, name], scores.rows[anchor.name, f"{name}_floor"]
            for metric in METRICS:
                found[f"{metric}_{name}"] = average(rows, metric)
                found[f"{metric}_{name}_floor"] = average(floor, metric)
            found |= bounds(rows, "feature", f"feature_{name}")
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

    def image(self, path: Path) -> Pixels:
        """The image, enlarged."""
        with Image.open(path) as image:
            return np.asarray(image.resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS))


def _rows(found: Arrays, anchor: str, seed: int) -> list[Row]:
    columns = [found[f"{anchor}/{metric}"].tolist() for metric in METRICS]
    return [
        {"name": f"seed-{seed}/{number:05d}"}
        | {name: None if np.isnan(v) else v for name, v in zip(METRICS, values, strict=True)}
        for number, values in enumerate(zip(*columns, strict=True))
    ]


def load_models(config: ImageBenchmarkConfig) -> dict[str, Model]:
    """`model` with its routers, `dense` without (the stock class, nothing attached), and a variant for each folder.
    UserError for a folder that holds no pipeline or routers, or such as do not fit."""
    folder = find_model(config.weights or DEFAULT_IMAGE_MODEL)

    def model(routers: Path | None, dense: str | None = None) -> Model:
        pipeline = TextToImagePipeline.from_pretrained(
            config.backbone, folder, routers or NO_ROUTERS_NAME, device=config.device, dtype=config.dtype
        )
        backbone, files = pipeline.backbone, [find_weights(routers)] if routers else []
        digest = file_sha256(*weight_files(folder), *files)
        sampler = backbone.pipe.scheduler.config.shift, Solver.euler.value
        steps, guidance = backbone.default_sampling()
        return Model(
            pipeline, backbone.transformer, steps, guidance, backbone.default_size, sampler, digest, dense or digest,
            pipe=backbone.pipe,
        )  # fmt: skip

    plain = model(None)
    own = Path(config.routers) if config.routers else folder / ROUTERS_NAME
    main = model(own, plain.dense_sha256) if config.routers or own.is_dir() else plain
    variants = {n: model(Path(path), plain.dense_sha256) for n, path in config.variants.items()}
    return {DENSE: plain, MAIN: main, **variants}
