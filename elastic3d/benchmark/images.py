"""Images from prompts: the models, how they are made, and their scores.

Images are scored against the dense ones of the same prompt and seed; by their features beside real images, which are
held-out renders; and for a classifier that learned from others. What is computed is kept in files.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from elastic3d import __version__
from elastic3d.benchmark.config import ImageBenchmarkConfig
from elastic3d.benchmark.methods import DENSE, MAIN, Job, Model, Planner, Run
from elastic3d.benchmark.report import as_loss, average, bounds
from elastic3d.benchmark.task import SHEET_SIDE, Pixels, Scores, Task
from elastic3d.diffusion.options import Solver
from elastic3d.elastic.attachment import holds_routers
from elastic3d.errors import UserError
from elastic3d.evaluation.items import spread
from elastic3d.evaluation.sets import Probe, fit_probe, frechet_distance, kernel_distance
from elastic3d.evaluation.statistics import Row
from elastic3d.evaluation.views import feature_distance, psnr, ssim
from elastic3d.models.image_encoder import EfficientNetLite
from elastic3d.models.images import save_image
from elastic3d.models.options import ImageEncoderConfig
from elastic3d.models.weights import find_weights
from elastic3d.pipelines.call import Result
from elastic3d.pipelines.image_loading import weight_files
from elastic3d.pipelines.options import DEFAULT_IMAGE_MODEL, NO_ROUTERS_NAME
from elastic3d.pipelines.runtime import find_model
from elastic3d.pipelines.text_to_image import ROUTERS_NAME, TextToImagePipeline, check_prompt, read_prompts
from elastic3d.training.datasets import read_split
from elastic3d.training.image import ImageStageConfig
from elastic3d.training.image_data import ImageFolder, ImageSource, ShapeViews, noun_in
from elastic3d.utils.files import atomic_path, file_sha256

METRICS = ("psnr", "ssim", "feature")
SSIM_SIDE = 11  # pixels of its window
BATCH = 32
LEAST = 20  # training images of a category that the classifier knows
VIEWS = 2  # of a shape
PROBE_SHAPES = 1500  # whose views the classifier learns from
Maps = list[Tensor]
Arrays = dict[str, NDArray[Any]]
Features = NDArray[np.float32]
Condition = tuple[dict[str, Tensor], dict[str, Any]]  # of the prompts, of the guidance
SAME_STEPS, REFERENCE = "dense", "reference"  # the dense images in the default and in many steps
SEEN = 4  # sets of images in memory: both anchors, and what is beside them


class ImageTask(Task):
    """The `Task` of images."""

    noun, plural, inputs, suffix = "image", "images", "prompts", ".png"
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
        for seed, run in tqdm(list(product(seeds, done)), desc="scores", unit="run", dynamic_ncols=True):
            others = {name: (anchor, seed) for name, anchor in anchors.items()}
            if len(seeds) > 1:
                before = seeds[seeds.index(seed) - 1]
                others |= {f"{name}_floor": (run, before) for name in anchors if anchors[name] == run}
            names = {name: (other.name, when) for name, (other, when) in others.items()}
            path = self.config.output / "scores" / run.name / f"seed-{seed}.npz"
            facts = names, self.items, self.config.feature_size
            found = kept(path, facts, partial(self._scored, run, seed, others))
            pooled[run.name].append(found["pooled"].astype(np.float32))
            for name in others:
                scores.rows[run.name, name] += _rows(found, name, seed)
        if pooled:
            self._references = load_references(self.config, self.network, self.side)
        if self._references is not None:
            for name, parts in pooled.items():
                prompts = self.items * len(seeds)
                scores.further[name] = self._references.scores(np.concatenate(parts), prompts)
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
        images = np.stack([np.asarray(Image.open(self.path(run, Job(item, seed)))) for item in self.items])
        return images, *feature_maps(self.network, images)

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
        found = [(name, row[f"{name}_{SAME_STEPS}"], row[f"{name}_{SAME_STEPS}_floor"]) for name in METRICS]
        nearer = [as_loss(n, own) < as_loss(n, floor) for n, own, floor in found if None not in (own, floor)]
        return all(nearer) if nearer else None

    def about(self) -> dict[str, Any]:
        """How many prompts and real images."""
        return super().about() | (self._references.about() if self._references else {"real_images": 0})

    def image(self, path: Path) -> Pixels:
        """The image, enlarged."""
        return np.asarray(Image.open(path).resize((SHEET_SIDE, SHEET_SIDE), Image.Resampling.LANCZOS))


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
        digests, part, side = (digest, dense or digest), backbone.transformer, backbone.default_size
        return Model(pipeline, part, steps, guidance, side, sampler, *digests, pipe=backbone.pipe)

    plain = model(None)
    own = Path(config.routers) if config.routers else folder / ROUTERS_NAME
    main = model(own, plain.dense_sha256) if config.routers or holds_routers(own) else plain
    variants = {n: model(Path(path), plain.dense_sha256) for n, path in config.variants.items()}
    return {DENSE: plain, MAIN: main, **variants}


@torch.no_grad()
def feature_maps(network: EfficientNetLite, images: Pixels) -> tuple[Maps, Features]:
    """Images (P,H,W,3) uint8 -> a map (P,C,h,w) f16 for each resolution, and pooled features (P,1280).

    The network sees all at its own size; smaller images are enlarged, all in the same way.
    """
    size, parts, pooled = (network.config.image_size,) * 2, list[Maps](), list[Features]()
    for batch in torch.from_numpy(images).permute(0, 3, 1, 2).split(BATCH):
        x = batch.float().to(network.mean.device) / 255
        if x.shape[-2:] != size:
            x = torch.nn.functional.interpolate(x, size, mode="bilinear", antialias=True)
        maps, flat = network.pyramid(x)
        parts.append([each.half().cpu() for each in maps])
        pooled.append(flat.cpu().numpy())
    return [torch.cat(scale) for scale in zip(*parts, strict=True)], np.concatenate(pooled)


def compare_images(first: Pixels, second: Pixels, maps: tuple[Maps, Maps]) -> dict[str, NDArray[np.float64]]:
    """PSNR in dB, SSIM and feature distance (P,) of images (P,H,W,3) uint8, with what the network saw in them.

    SSIM is nan for images smaller than its window.
    """
    a, b = first / 255.0, second / 255.0
    small = min(a.shape[1:3]) < SSIM_SIDE
    return {
        "psnr": np.array([psnr(float(e)) for e in np.square(a - b).mean(axis=(1, 2, 3))]),
        "ssim": np.array([np.nan if small else ssim(x, y) for x, y in zip(a, b, strict=True)]),
        "feature": feature_distance(*maps).double().numpy(),
    }


def kept(path: Path, facts: object, make: Callable[[], Arrays]) -> Arrays:
    """What a file holds; made and written first where there is none, or one of other `facts` or another version."""
    key = hashlib.sha256(repr((__version__, facts)).encode()).hexdigest()
    if path.is_file():
        with np.load(path) as file:
            if str(file["key"]) == key:
                return {name: file[name] for name in file.files if name != "key"}
    found = make()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, key=np.array(key), **found)  # type: ignore[arg-type]
    return found


@dataclass(frozen=True)
class References:
    """Pooled features (R,D) of held-out renders; a classifier, and its accuracy on them."""

    features: Features
    probe: Probe | None = None
    trained_on: int = 0
    accuracy: float | None = None

    def scores(self, features: Features, prompts: Sequence[str]) -> dict[str, float | None]:
        """Distances of generated images to these, and whether the classifier finds what the prompts name; None where it
        knows none of that."""
        nouns = [noun_in(prompt) for prompt in prompts]
        found = {"category_accuracy": self.probe.accuracy(features, nouns) if self.probe else None}
        if len(features) > 1:
            found["frechet"] = frechet_distance(features, self.features)
            found["kernel"] = kernel_distance(features, self.features)
        return found

    def about(self) -> dict[str, Any]:
        """For the report."""
        probe = {"classes": len(self.probe.classes) if self.probe else 0, "images": self.trained_on}
        return {"real_images": len(self.features), "classifier": probe | {"held_out_accuracy": self.accuracy}}


def load_references(config: ImageBenchmarkConfig, network: EfficientNetLite, size: int) -> References | None:
    """Features of the real images, computed once and kept in the output; None where there are no real images.

    Args:
        size: pixels a side of the generated images, to which the real ones are brought first.

    Raises:
        UserError: `references` is no folder of images with captions, or no shape is in the `prepared` that was given.
    """
    prepared = config.prepared or Path("data/prepared")
    if not (config.references or config.prepared or prepared.is_dir()):
        return None
    sources = _sources(config, prepared)
    facts = (size, prepared, config.feature_size, [each.made_of() for each in sources.values()])
    found = kept(config.output / "references.npz", facts, partial(_encoded, sources, network, size))
    counts = Counter(found["train_nouns"].tolist() if "train" in found else ())
    nouns = [noun for noun, count in counts.items() if count >= LEAST]
    if len(nouns) < 2:
        return References(found["real"])
    known = np.isin(found["train_nouns"], nouns)
    probe = fit_probe(found["train"][known], found["train_nouns"][known].tolist())
    accuracy = probe.accuracy(found["real"], found["real_nouns"].tolist())
    return References(found["real"], probe, int(known.sum()), accuracy)


def _sources(config: ImageBenchmarkConfig, prepared: Path) -> dict[str, ImageSource]:
    options = ImageStageConfig(views=VIEWS, val_every=1)  # of a folder's images all
    if config.references is not None:
        return {"real": ImageFolder(config.references, options, validation=True)}
    train, val, test = ([config.splits / f"{name}.txt"] for name in ("train", "val", "test"))
    return {
        "real": ShapeViews(prepared, read_split(val + test), options, 0, 1),
        "train": ShapeViews(prepared, read_split(train), options, PROBE_SHAPES, 0),
    }


def _encoded(sources: Mapping[str, ImageSource], network: EfficientNetLite, size: int) -> Arrays:
    """Features (R,D) and the nouns of all images of each source; those that can't be read are left out."""
    found: Arrays = {}
    for name, source in sources.items():
        parts, nouns = list[Features](), list[str]()
        for index in tqdm(range(len(source)), desc=f"real images, {name}", dynamic_ncols=True):
            try:
                loaded = source.load(index, size)
            except UserError:
                continue
            if loaded:
                parts.append(feature_maps(network, np.stack([np.asarray(each.image) for each in loaded]))[1])
                nouns += [noun_in(each.captions[-1]) for each in loaded]
        if len(nouns) < 2:
            raise UserError(f"{len(nouns)} real images could be read, expected at least 2")
        found |= {name: np.concatenate(parts), f"{name}_nouns": np.array(nouns)}
    return found
