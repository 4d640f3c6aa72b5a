"""Meshes from images: the models, what was made so far, and its scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from elastic3d.benchmark.config import MeshBenchmarkConfig
from elastic3d.benchmark.methods import DENSE, EULER, MAIN, Case, Job, Model, Planner, Run, after
from elastic3d.benchmark.rows import average, bounds
from elastic3d.benchmark.task import Scores, Task
from elastic3d.diffusion.options import SamplingGrid, Solver
from elastic3d.diffusion.sampler import sampling_times
from elastic3d.elastic import attach, detach
from elastic3d.errors import UserError
from elastic3d.evaluation.items import Item, find_meshes, spread
from elastic3d.evaluation.options import Align, UpAxis
from elastic3d.evaluation.runner import score_all
from elastic3d.evaluation.statistics import Row
from elastic3d.geometry.decode import node_points
from elastic3d.geometry.mesh_io import load_mesh, save_mesh
from elastic3d.models.images import IMAGE_SUFFIXES, prepare
from elastic3d.models.options import ForegroundConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.weights import CONFIG_NAME, find_weights
from elastic3d.pipelines.image_to_3d import PIPELINE_NAME, ImageTo3DPipeline
from elastic3d.pipelines.options import DEFAULT_MODEL
from elastic3d.training.journal import mesh_image, on_white
from elastic3d.utils.files import file_sha256, visible_files
from elastic3d.utils.structured import Maybe, load_json, save_json

TRUTH, REFERENCE, SAME_STEPS, FLOOR = "truth", "reference", "same_steps", "floor"
QUICK_CELLS = 32
F_DROP = 0.01  # of an F-score, that the speed target allows
SHEET_SIDE = 160
_sha256 = cache(file_sha256)
_RECORD = {"status": str, "error": Maybe(str), "image_sha256": str, "metadata": dict}


class MeshTask(Task):
    """The `Task` of meshes. Kept as `<output>/runs/<run>/seed-<s>/<image>.glb`, each beside its record."""

    noun, plural = "mesh", "meshes"
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

    def __init__(self, config: MeshBenchmarkConfig, repository: Path) -> None:
        """UserError for an option, a folder, an image or a model that can't be used."""
        images = spread(self.find_items(config.images), config.limit)
        self.truth = pair_truth(config.gt, images)
        planner = Planner(config, load_models(config, repository))
        for image in images:  # raises where one can't be used
            prepare(image, ForegroundConfig(), planner.models[MAIN].pipeline.encoder)
        self._dense_inside: tuple[Tensor, Tensor] | None = None  # of the quick phase
        super().__init__(planner, images, config.timing_images, {"resolution": config.resolution})

    def find_items(self, path: Path) -> list[Any]:
        """Images of a folder by name. UserError: no folder, no image, or two that differ in their suffix alone."""
        if not path.is_dir():
            raise UserError(f"{path} is no folder, expected one of images ({', '.join(IMAGE_SUFFIXES)})")
        files = visible_files(path, recursive=False)
        found = [each for each in files if each.suffix.lower() in IMAGE_SUFFIXES]
        if not found:
            raise UserError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        stem, count = Counter(each.stem for each in found).most_common(1)[0]
        if count > 1:
            raise UserError(f"{path} has several images named {stem}, expected different names")
        return found

    # ---------------------------------------------------------------------------------------------- making

    def mesh(self, run: Run, job: Job) -> Path:
        """Where a mesh is, or would be."""
        return self.config.output / "runs" / run.name / f"seed-{job.seed}" / f"{job.name}.glb"

    def record(self, run: Run, job: Job) -> dict[str, Any] | None:
        """What was noted of a mesh; None where it is still to be made, from this very image."""
        path = self.mesh(run, job)
        if not path.with_suffix(".json").is_file():
            return None
        record: dict[str, Any] = load_json(path.with_suffix(".json"), _RECORD)
        is_whole = record["status"] == "failed" or path.is_file()
        return record if is_whole and record["image_sha256"] == _sha256(job.item) else None

    def make(self, run: Run, jobs: Sequence[Job]) -> None:
        """Make and keep meshes, or the reasons why there are none; a record is written last."""
        for job, result in zip(jobs, self.produced(run, jobs), strict=True):
            path, failed = self.mesh(run, job), result.error is not None
            if failed:
                path.unlink(missing_ok=True)
            else:
                save_mesh(result.mesh, path, extras=result.metadata, name=job.name)
            record = {
                "status": "failed" if failed else "ok",
                "error": str(result.error) if failed else None,
                "image_sha256": _sha256(job.item),
                "metadata": result.metadata,
            }
            save_json(record, path.with_suffix(".json"))

    def condition_of(self, run: Run, jobs: Sequence[Job]) -> Tensor:
        """Condition tokens (B,M,Cc)."""
        pipeline = self.model(run).pipeline
        images = [prepare(job.item, ForegroundConfig(), pipeline.encoder) for job in jobs]
        return pipeline.encode(images)

    def latents(self, run: Run, condition: Tensor, seeds: list[int]) -> Tensor:
        """Latents (B,N,C) of the DiT."""
        pipeline, guidance = self.model(run).pipeline, self.planner.guidance(run.model)
        return pipeline.sample_latents(condition, seeds, run.steps, guidance, run.settings)

    def latent_scores(self, run: Run, found: Tensor, dense: Tensor) -> dict[str, float]:
        """Mean IoU of the shapes on a grid of 32 cells a side."""
        if self._dense_inside is None or self._dense_inside[0] is not dense:
            self._dense_inside = dense, self._inside(run, dense)
        a, b = self._inside(run, found), self._dense_inside[1]
        return {"iou_dense": float(((a & b).sum(1) / (a | b).sum(1).clamp_min(1)).mean())}

    @torch.no_grad()
    def _inside(self, run: Run, latents: Tensor) -> Tensor:
        """Which nodes of the grid are inside (B,P)."""
        pipeline = self.model(run).pipeline
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
                    block.running()

    # ---------------------------------------------------------------------------------------------- scores

    def score(self, runs: Sequence[Run]) -> Scores:
        """Each run whose meshes are all made, against ground truth, the reference and the dense model in as many steps;
        also the seed floor. A failed mesh has the scores of an empty one."""
        planner, done = self.planner, [run for run in runs if not self.missing(run)]
        reference, groups = planner.reference(), dict[tuple[str, str], list[Item]]()
        for run in done:
            if self.truth:
                groups[run.name, TRUTH] = self._items(run, TRUTH, [self.truth[job.name] for job in self.jobs])
            for kind, other in ((REFERENCE, reference), (SAME_STEPS, planner.dense(run.steps))):
                if other in done:
                    groups[run.name, kind] = self._items(
                        run, kind, [self.mesh(other, job) for job in self.jobs]
                    )
        if reference in done and len(self.config.seeds) > 1:
            others = [
                self.mesh(reference, Job(job.item, after(self.config.seeds, job.seed))) for job in self.jobs
            ]
            pairs = self._items(reference, FLOOR, others)
            groups[reference.name, FLOOR] = [Item(pair.name, pair.gt, pair.pred) for pair in pairs]
        rows = self._scored(groups)
        return Scores(rows, {REFERENCE: rows.pop((reference.name, FLOOR), [])})

    def _items(self, run: Run, kind: str, others: Sequence[Path]) -> list[Item]:
        """Items named `<run>/<kind>/seed-<s>/<image>`; a file that is not there is an absent side."""
        found = []
        for job, other in zip(self.jobs, others, strict=True):
            pred, gt = ((path,) if path.is_file() else () for path in (self.mesh(run, job), other))
            found.append(Item(f"{run.name}/{kind}/seed-{job.seed}/{job.name}", pred, gt))
        return found

    def _scored(self, groups: dict[tuple[str, str], list[Item]]) -> dict[tuple[str, str], list[Row]]:
        """Score all items, those with the ground truth and those between meshes each by their protocol; a mesh is its
        own perfect copy."""
        protocol, rows = self.config.protocol, dict[str, Row]()
        between = replace(
            protocol, views=0, surface_health=False, near_points=0, align=Align.none, pred_up=UpAxis.y
        )
        for name, rules in ((TRUTH, protocol), ("paired", between)):
            of_kind = [group for (_, kind), group in groups.items() if (kind == TRUTH) == (name == TRUTH)]
            items = [item for group in of_kind for item in group if not item.pred or item.pred != item.gt]
            journal = self.config.output / f"scores-{name}.jsonl"
            with tqdm(total=len(items), desc=f"scores, {name}", unit="pair", dynamic_ncols=True) as bar:
                found = score_all(
                    items, rules, workers=self.config.workers, journal=journal, on_row=lambda row: bar.update()
                )  # fmt: skip
            rows |= {row["name"]: row for row in found}
        same = {"status": "ok", "error": None, "chamfer_l1": 0.0, "volume_iou": 1.0}
        return {
            key: [{**rows.get(i.name, same), "name": "/".join(i.name.split("/")[-2:])} for i in group]
            for key, group in groups.items()
        }

    def columns(self, run: Run, scores: Scores) -> dict[str, Any]:
        """Scores against the reference, the dense model in as many steps, and ground truth; the seed floor, of which
        a mesh that failed is no measure."""
        paired, same, truth = (
            scores.rows.get((run.name, kind), []) for kind in (REFERENCE, SAME_STEPS, TRUTH)
        )
        found = _pair(paired, "paired")
        found |= bounds(paired, "chamfer_l1", "chamfer_l1_paired", self.config.bootstrap)
        found |= _pair(same, "same_steps")
        dense = scores.rows.get((self.planner.dense(self.planner.baseline_steps).name, TRUTH), [])
        for threshold in self.config.protocol.thresholds:
            name = f"f_score@{threshold:g}"
            own, full = average(truth, name), average(dense, name)
            found |= {name: own, f"{name}_drop": None if own is None or not full else 1 - own / full}
        floor = [row for row in scores.floors[REFERENCE] if row["status"] == "ok"]
        return found | _pair(truth, "truth") | _pair(floor, "seed_floor")

    def holds(self, row: Row) -> bool | None:
        """In the baseline's steps: nearer to dense than another seed is, and F-scores down by at most 1 %."""
        distance, floor = row["chamfer_l1_same_steps"], row["chamfer_l1_seed_floor"]
        drops = [row.get(f"f_score@{threshold}_drop") for threshold in ("0.02", "0.05")]
        if distance is None or floor is None or row["steps"] != self.planner.baseline_steps:
            return None
        return distance < floor and all(drop is None or drop <= F_DROP for drop in drops)

    # ---------------------------------------------------------------------------------------------- report

    def about(self) -> dict[str, Any]:
        """How many images."""
        return {"images": len(self.items)}

    def sheet(self, cases: Sequence[Case]) -> tuple[list[str], list[list[NDArray[np.uint8]]]] | None:
        """A row an image: input, dense, elastic at each budget, ground truth."""
        images, seed = spread(self.items, self.config.sheet_images), self.config.seeds[0]
        runs = {n: run for n, run in self.shown(cases).items() if self.record(run, Job(images[0], seed))}
        if not runs or not self.config.sheet_images:
            return None
        rows = []
        for image in images:
            with Image.open(image) as opened:
                fitted = opened.convert("RGBA").resize((SHEET_SIDE, SHEET_SIDE))
            paths = [self.mesh(run, Job(image, seed)) for run in runs.values()]
            paths += [self.truth[image.stem]] if self.truth else []
            meshes = [load_mesh(path) if path.is_file() else None for path in paths]  # white where one failed
            rows.append([on_white(np.asarray(fitted)), *(mesh_image(m, SHEET_SIDE) for m in meshes)])
        return ["input", *runs, *(["ground truth"] if self.truth else [])], rows


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


def load_models(config: MeshBenchmarkConfig, repository: Path) -> dict[str, Model]:
    """Every pipeline by name: `model`, `dense` without routers, `euler` (dense, in equal Euler steps, where that
    differs), variants. `repository` is where the bundled model is. UserError for a folder that holds no model or
    routers, or such as do not fit `model`."""

    def load(path: Path) -> ImageTo3DPipeline:
        return ImageTo3DPipeline.from_pretrained(path, config.device, config.dtype, dial=False)

    def variant(path: Path) -> ImageTo3DPipeline:
        """The model in a folder of its own; or `main` with another DiT; or with its own and other routers."""
        if (path / PIPELINE_NAME).is_file():
            return load(path)
        if not (path / CONFIG_NAME).is_file():
            raise UserError(
                f"{path} has neither {PIPELINE_NAME} nor {CONFIG_NAME}: it holds no model and no routers"
            )
        is_routers = str(load_json(path / CONFIG_NAME).get("_class_name", "")).endswith("Routers")
        base = folder / "dit" if is_routers else path
        dit = ShapeDiT.from_pretrained(base, next(main.dit.parameters()).dtype, main.device)
        if is_routers:
            attach(dit, path)
        digest = file_sha256(find_weights(folder / "vae"), find_weights(base), find_weights(path))
        return ImageTo3DPipeline(main.vae, dit, main.encoder, main.config, digest)

    folder = repository / DEFAULT_MODEL if config.model in ("", "default") else Path(config.model)
    main = dense = load(folder)
    if config.dense or main.session is not None:
        dense = load(Path(config.dense or folder))
        if dense.session is not None:
            detach(dense.dit)
    found = {MAIN: main, DENSE: dense}
    plain = replace(main.config, solver=Solver.euler, shift=1.0, grid=SamplingGrid.uniform)
    if plain != main.config:
        found[EULER] = ImageTo3DPipeline(dense.vae, dense.dit, dense.encoder, plain, dense.dense_sha256)
    found |= {name: variant(Path(path)) for name, path in config.variants.items()}
    models = {}
    for name, each in found.items():
        c, digests = each.config, (each.weights_sha256, each.dense_sha256)
        sampler = c.shift, c.solver.value
        models[name] = Model(each, each.dit, c.steps, c.guidance, c.resolution, sampler, *digests, c.elastic)
    return models
