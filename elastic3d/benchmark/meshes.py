"""Meshes from images: the models, how they are made, and their scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from elastic3d.benchmark.config import MeshBenchmarkConfig
from elastic3d.benchmark.methods import DENSE, EULER, MAIN, Job, Model, Planner, Run
from elastic3d.benchmark.report import average, bounds
from elastic3d.benchmark.task import SHEET_SIDE, Pixels, Scores, Task
from elastic3d.diffusion.options import SamplingGrid, Solver
from elastic3d.diffusion.sampler import moves, sampling_times
from elastic3d.errors import UserError
from elastic3d.evaluation.items import Item, find_meshes, spread
from elastic3d.evaluation.options import Align, ProtocolConfig, UpAxis
from elastic3d.evaluation.runner import score_all
from elastic3d.evaluation.statistics import Row
from elastic3d.geometry.decode import node_points
from elastic3d.geometry.mesh_io import load_mesh, save_mesh
from elastic3d.models.images import IMAGE_SUFFIXES, load_image, prepare
from elastic3d.models.options import ForegroundConfig
from elastic3d.models.weights import CONFIG_NAME, find_weights
from elastic3d.pipelines.generation import find_images
from elastic3d.pipelines.image_to_3d import PIPELINE_NAME, ImageTo3DPipeline
from elastic3d.pipelines.options import DEFAULT_MODEL
from elastic3d.pipelines.runtime import find_model, load_dit
from elastic3d.training.journal import mesh_image, on_white
from elastic3d.utils.files import file_sha256, load_json

TRUTH, REFERENCE, SAME_STEPS, FLOOR = "truth", "reference", "same_steps", "floor"
QUICK_CELLS = 32
F_DROP = 0.01  # of an F-score, that the speed target allows


class MeshTask(Task):
    """The `Task` of meshes."""

    noun, plural, inputs, suffix = "mesh", "meshes", "images", ".glb"
    table = {
        "chamfer_l1_same_steps": "Chamfer-L1 to dense, same steps", "iou_same_steps": "IoU to dense, same steps",
        "chamfer_l1_paired": "Chamfer-L1 to reference", "iou_paired": "IoU to reference",
        "f_score@0.02": "F@0.02", "f_score@0.05": "F@0.05",
    }  # fmt: skip
    plot = {
        "chamfer_l1_paired": "Chamfer-L1 to the reference (lower is better)",
        "iou_paired": "IoU with the reference (higher is better)",
        "f_score@0.02": "F@0.02 to ground truth (higher is better)",
    }
    losses = {
        "chamfer_l1_paired": REFERENCE, "iou_paired": REFERENCE,
        "f_score@0.02": "", "f_score@0.05": "", "chamfer_l1_truth": "",
    }  # fmt: skip
    compared = ((REFERENCE, "chamfer_l1"), (TRUTH, "f_score@0.02"))

    config: MeshBenchmarkConfig

    def __init__(self, config: MeshBenchmarkConfig) -> None:
        """UserError for an option, a folder, an image or a model that can't be used."""
        images = spread(self.find_items(config.images), config.limit)
        self.truth = pair_truth(config.gt, images)
        planner = Planner(config, load_models(config))
        for image in images:  # raises where one can't be used
            prepare(image, ForegroundConfig(), planner.models[MAIN].pipeline.encoder)
        self._inside = lru_cache(2)(self._nodes_inside)  # those of the dense model are asked for again
        super().__init__(planner, images, {"resolution": config.resolution})

    def find_items(self, path: Path) -> list[Any]:
        """Images of a folder by name. UserError: no folder, no image, or two that differ in their suffix alone."""
        if not path.is_dir():
            raise UserError(f"{path} is no folder, expected one of images ({', '.join(IMAGE_SUFFIXES)})")
        found = find_images(str(path))
        stem, count = Counter(each.stem for each in found).most_common(1)[0]
        if count > 1:
            raise UserError(f"{path} has several images named {stem}, expected different names")
        return found

    def save(self, result: Any, path: Path) -> None:
        """Write the mesh with its metadata; of one that failed nothing stays."""
        if result.error is None:
            save_mesh(result.mesh, path, extras=result.metadata, name=path.stem)
        else:
            path.unlink(missing_ok=True)

    def condition_of(self, run: Run, jobs: Sequence[Job]) -> Tensor:
        """Condition tokens (B,M,Cc)."""
        pipeline = self.model(run).pipeline
        images = [prepare(job.item, ForegroundConfig(), pipeline.encoder) for job in jobs]
        return pipeline.encode(images)

    def sample(self, run: Run, condition: Tensor, jobs: Sequence[Job]) -> Tensor:
        """Latents (B,N,C) of the DiT."""
        seeds = [job.seed for job in jobs]
        pipeline, guidance = self.model(run).pipeline, self.planner.guidance(run.model)
        return pipeline.sample_latents(condition, seeds, run.steps, guidance, run.settings)

    def latent_scores(self, run: Run, found: Tensor, dense: Tensor) -> dict[str, float]:
        """Mean IoU of the shapes on a grid of 32 cells a side."""
        pipeline = self.model(run).pipeline
        b, a = self._inside(pipeline, dense), self._inside(pipeline, found)
        return {"iou_dense": float(((a & b).sum(1) / (a | b).sum(1).clamp_min(1)).mean())}

    @torch.no_grad()
    def _nodes_inside(self, pipeline: ImageTo3DPipeline, latents: Tensor) -> Tensor:
        """Which nodes of the grid are inside (B,P)."""
        points = node_points(torch.arange((QUICK_CELLS + 1) ** 3), QUICK_CELLS, pipeline.config.box)
        points, vae = points[None].to(latents.device), pipeline.vae
        return torch.stack([vae.query(points, vae.decode(each[None]))[0] > 0 for each in latents])

    def warm_up(self, run: Run) -> None:
        """The few-step LoRA is merged before a clock starts: a model with the same settings does it once."""
        model = self.model(run)
        session, times = model.session, sampling_times(model.pipeline.config, run.steps)[:-1].tolist()
        if session is not None and run.settings.elastic:
            session.settings = run.settings
            session.coarsen(len(times), run.settings.budget, self.planner.guidance(run.model), times)
            with torch.no_grad():
                for block in session.blocks:
                    block.refresh(session.coarseness)
                    block.adapted(session.coarseness)

    def score(self, runs: Sequence[Run]) -> Scores:
        """Each run whose meshes are all made, against ground truth, the reference and the dense model in as many steps;
        also the seed floor: the reference against that of the seed before. A failed mesh has the scores of an empty
        one."""
        planner, seeds = self.planner, self.config.seeds
        done, truth, paired = [run for run in runs if not self.missing(run)], list[Item](), list[Item]()
        for run in done:
            if self.truth:
                truth += self._items(run, TRUTH, [self.truth[job.name] for job in self.jobs])
            for kind, other in ((REFERENCE, planner.reference), (SAME_STEPS, planner.dense(run.steps))):
                if other in done:
                    paired += self._items(run, kind, [self.path(other, job) for job in self.jobs])
            if run == planner.reference and len(seeds) > 1:
                before = [replace(job, seed=seeds[seeds.index(job.seed) - 1]) for job in self.jobs]
                paired += self._items(run, FLOOR, [self.path(run, job) for job in before])
        protocol, scores = self.config.protocol, Scores()
        between = replace(
            protocol, views=0, surface_health=False, near_points=0, align=Align.none, pred_up=UpAxis.y
        )
        for row in self._scored(truth, TRUTH, protocol) + self._scored(paired, "paired", between):
            name, kind, row["name"] = row["name"].split("/", 2)
            scores.rows[name, kind].append(row)
        return scores

    def _items(self, run: Run, kind: str, others: Sequence[Path]) -> list[Item]:
        """Items named `<run>/<kind>/seed-<s>/<image>`; a file that is not there is an absent side."""
        found = []
        for job, other in zip(self.jobs, others, strict=True):
            pred, gt = ((path,) if path.is_file() else () for path in (self.path(run, job), other))
            found.append(Item(f"{run.name}/{kind}/seed-{job.seed}/{job.name}", pred, gt))
        return found

    def _scored(self, items: Sequence[Item], title: str, rules: ProtocolConfig) -> list[Row]:
        """Rows of items; a mesh is its own perfect copy."""
        todo, path = [i for i in items if i.pred != i.gt or not i.pred], f"scores-{title}.jsonl"
        with tqdm(total=len(todo), desc=f"scores, {title}", unit="pair", dynamic_ncols=True) as bar:
            found = score_all(
                todo, rules, workers=self.config.workers, journal=self.config.output / path,
                on_row=lambda row: bar.update(),
            )  # fmt: skip
        rows = {row["name"]: row for row in found}
        same: Row = {"status": "ok", "error": None, "chamfer_l1": 0.0, "volume_iou": 1.0}
        return [rows.get(item.name, same | {"name": item.name}) for item in items]

    def columns(self, run: Run, scores: Scores) -> dict[str, Any]:
        """Scores against the reference, the dense model in as many steps, and ground truth; the seed floor, of which
        a mesh that failed is no measure."""
        paired, same, truth = (scores.rows[run.name, kind] for kind in (REFERENCE, SAME_STEPS, TRUTH))
        found = _pair(paired, "paired") | bounds(paired, "chamfer_l1", "chamfer_l1_paired")
        found |= _pair(same, "same_steps")
        dense = scores.rows[self.planner.baseline.name, TRUTH]
        for threshold in self.config.protocol.thresholds:
            name = f"f_score@{threshold:g}"
            own, full = average(truth, name), average(dense, name)
            found |= {name: own, f"{name}_drop": None if own is None or not full else 1 - own / full}
        floor = [row for row in scores.rows[self.planner.reference.name, FLOOR] if row["status"] == "ok"]
        return found | _pair(truth, "truth") | _pair(floor, "seed_floor")

    def holds(self, row: Row) -> bool | None:
        """In the baseline's steps: nearer to dense than another seed is, and F-scores down by at most 1 %."""
        distance, floor = row["chamfer_l1_same_steps"], row["chamfer_l1_seed_floor"]
        drops = [row.get(f"f_score@{threshold}_drop") for threshold in ("0.02", "0.05")]
        if distance is None or floor is None or row["steps"] != self.planner.baseline_steps:
            return None
        return distance < floor and all(drop is None or drop <= F_DROP for drop in drops)

    def image(self, path: Path) -> Pixels:
        """A view of the mesh; white where it failed."""
        return mesh_image(load_mesh(path) if path.is_file() else None, SHEET_SIDE)

    def given(self, jobs: Sequence[Job]) -> dict[str, list[Pixels]]:
        """The images, and the true shapes where they are known."""
        inputs = [load_image(job.item).resize((SHEET_SIDE, SHEET_SIDE)) for job in jobs]
        columns = {"input": [on_white(np.asarray(image)) for image in inputs]}
        if self.truth:
            columns["ground truth"] = [self.image(self.truth[job.name]) for job in jobs]
        return columns


def _pair(rows: Sequence[Row], suffix: str) -> dict[str, float | None]:
    return {f"chamfer_l1_{suffix}": average(rows, "chamfer_l1"), f"iou_{suffix}": average(rows, "volume_iou")}


def pair_truth(folder: Path | None, images: Sequence[Path]) -> dict[str, Path]:
    """Ground truth mesh of each image by its name; empty where there is no folder of them. UserError for an image
    without a mesh, or with several."""
    if folder is None:
        return {}
    meshes = find_meshes(folder)
    for image in images:
        found = meshes.get(image.stem, [])
        if len(found) != 1:
            raise UserError(f"gt={folder} has {len(found)} meshes named {image.stem}, expected one")
    return {image.stem: meshes[image.stem][0] for image in images}


def load_models(config: MeshBenchmarkConfig) -> dict[str, Model]:
    """Every pipeline by name: `model`, `dense` without routers, `euler` (dense, in equal Euler steps, where that
    differs), variants. UserError for a folder that holds no model or routers, or such as do not fit `model`."""
    load = partial(ImageTo3DPipeline.from_pretrained, device=config.device, dtype=config.dtype, dial=False)

    def variant(path: Path) -> ImageTo3DPipeline:
        """The model in a folder of its own; or `main` with other routers, or with another DiT."""
        if (path / PIPELINE_NAME).is_file():
            return load(path)
        if not (path / CONFIG_NAME).is_file():
            raise UserError(f"{path} has neither {PIPELINE_NAME} nor {CONFIG_NAME}: no model and no routers")
        if str(load_json(path / CONFIG_NAME).get("_class_name", "")).endswith("Routers"):
            return load(folder, routers=path)
        dit = load_dit(path, next(main.dit.parameters()).dtype, main.device)
        digest = file_sha256(find_weights(folder / "vae"), find_weights(path))
        return ImageTo3DPipeline(main.vae, dit, main.encoder, main.config, digest)

    folder = find_model(DEFAULT_MODEL if config.model in ("", "default") else config.model)
    main = dense = load(folder)
    if config.dense or main.session is not None:
        dense = load(Path(config.dense or folder), routers=False)
    found = {MAIN: main, DENSE: dense}
    plain = replace(main.config, solver=Solver.euler, shift=1.0, grid=SamplingGrid.uniform)
    if plain != main.config:
        found[EULER] = ImageTo3DPipeline(dense.vae, dense.dit, dense.encoder, plain, dense.dense_sha256)
    found |= {name: variant(Path(path)) for name, path in config.variants.items()}
    models = {}
    for name, each in found.items():
        c, digests = each.config, (each.weights_sha256, each.dense_sha256)
        sampler = c.shift, c.solver.value, c.grid.value, c.segments, c.box
        runs = c.elastic, partial(moves, c)
        models[name] = Model(each, each.dit, c.steps, c.guidance, c.resolution, sampler, *digests, *runs)
    return models
