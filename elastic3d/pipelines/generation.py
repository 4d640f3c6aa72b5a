"""Many images to many mesh files: what to do, doing it in batches, and the record of it."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from elastic3d.checkpoints.options import PRESETS
from elastic3d.elastic.config import ElasticOptions
from elastic3d.errors import UserError
from elastic3d.geometry.mesh_io import WRITE_SUFFIXES, check_suffix, save_mesh
from elastic3d.models.images import IMAGE_SUFFIXES
from elastic3d.pipelines.assets import check_asset, finish
from elastic3d.pipelines.image_to_3d import ImageInput, ImageTo3DPipeline, Result
from elastic3d.pipelines.options import GenerateConfig, MeshFormat
from elastic3d.pipelines.preview import turntable
from elastic3d.pipelines.progress import OnProgress
from elastic3d.pipelines.published import views_of
from elastic3d.pipelines.routes import draw_routes, route_title
from elastic3d.utils.files import atomic_path, matching_files, name_key, printable, visible_files
from elastic3d.utils.options import to_dict
from elastic3d.utils.paths import check_distinct
from elastic3d.utils.structured import save_json

SUMMARY_NAME = "summary.json"


@dataclass(frozen=True)
class Job:
    """One mesh to make, of an image or of a prompt."""

    image: Path
    seed: int
    output: Path
    prompt: str = ""

    @property
    def subject(self) -> str:
        """What it is made of, for records."""
        return self.prompt or printable(self.image)

    @property
    def drawing(self) -> Path:
        """Where the image of the prompt is kept."""
        return self.output.with_name(f"{self.output.stem}_image.png")

    @property
    def name(self) -> str:
        """Of the mesh in its file."""
        return self.prompt or printable(self.image.stem)


@dataclass(frozen=True)
class Drawn:
    """The image of a job's prompt, with its metadata."""

    image: Image.Image
    metadata: dict[str, Any]


Draw = Callable[[Sequence[Job]], Sequence[Drawn]]


@dataclass
class Outcome:
    """What became of a job: `ok`, `failed` with its error, or `skipped` as its file was there."""

    image: str
    output: str
    seed: int
    status: str
    error: str | None = None
    faces: int | None = None
    watertight: bool | None = None
    print_summary: str = ""
    warnings: list[str] = field(default_factory=list)
    image_warnings: list[str] = field(default_factory=list)
    """Of the image, told before anything was made of it."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All jobs of a command; `folder` is where many outputs go, None for a single image's own file."""

    jobs: list[Job]
    folder: Path | None


def plan(config: GenerateConfig) -> Plan:
    """The jobs that `image`, `output`, `seed` and `num_samples` ask for.

    Raises:
        UserError: no image is there, `output` is of the wrong kind, or something would be written over an input or
            another output.
    """
    found = _plan(config)
    for suffix in {job.output.suffix for job in found.jobs}:
        check_asset(config.asset, suffix, config.cleanup.uv)
    meshes = [job.output for job in found.jobs]
    check_distinct(
        {"image": [job.image for job in found.jobs if not job.prompt], **_named_views(config)},
        {
            "output": meshes,
            "image of the prompt": [job.drawing for job in found.jobs if job.prompt],
            "preview": [path.with_suffix(".png") for path in meshes] if config.preview else None,
            "trace": config.trace,
            "summary": found.folder / SUMMARY_NAME if found.folder else None,
        },
    )
    return found


def _named_views(config: GenerateConfig) -> dict[str, str]:
    return {f"image_{name}": path for name, path in config.views.items()}


def _plan(config: GenerateConfig) -> Plan:
    """As `plan`, whatever the files are."""
    output = Path(config.output)
    if config.prompt:
        check_suffix(output, WRITE_SUFFIXES)
        numbers = range(config.num_samples)
        targets = [_numbered(output, n, config.num_samples) for n in numbers]
        return Plan([Job(Path(), config.seed + n, targets[n], config.prompt) for n in numbers], None)
    single = Path(config.image)
    many = single.is_dir() or (glob.has_magic(config.image) and not single.exists())
    if not many and not single.exists():
        raise UserError(f"there is no file {printable(single)}")
    if many and config.views:
        name = next(iter(config.views))
        raise UserError(
            f"image_{name} is given, but image is {config.image}, several objects: give one image"
        )
    if many or output.is_dir() or config.output.endswith("/"):
        if output.suffix.lower() in WRITE_SUFFIXES and not output.is_dir():
            raise UserError(f"output is {output}, expected a folder, as image is a folder or a glob")
        if output.exists() and not output.is_dir():
            raise UserError(f"output is {output}, a file, expected a folder")
        images = find_images(config.image) if many else [single]
        targets = _targets(images, output, config.format)
        folder: Path | None = output
    else:
        check_suffix(output, WRITE_SUFFIXES)
        images, targets, folder = [single], [output], None
    jobs = [
        Job(image, config.seed + n, _numbered(target, n, config.num_samples))
        for image, target in zip(images, targets, strict=True)
        for n in range(config.num_samples)
    ]
    return Plan(jobs, folder)


def generate(
    pipeline: ImageTo3DPipeline,
    jobs: Sequence[Job],
    config: GenerateConfig,
    on_outcome: Callable[[Outcome], None],
    on_progress: OnProgress | None = None,
    draw: Draw | None = None,
) -> None:
    """Do the jobs in batches; each mesh is saved, and its outcome told, as soon as it is there or has failed.

    `draw` makes the images of jobs that have a prompt.
    """
    todo = []
    for job in jobs:
        if config.resume and job.output.exists():
            on_outcome(Outcome(job.subject, printable(job.output), job.seed, "skipped"))
        else:
            todo.append(job)
    for start in range(0, len(todo), config.rows):
        batch = todo[start : start + config.rows]
        drawn = draw(batch) if draw is not None else []
        images: list[ImageInput] = [image.image for image in drawn]
        images = images or [views_of(job.image, config) for job in batch]

        def keep(
            number: int,
            result: Result,
            batch: Sequence[Job] = batch,
            drawn: Sequence[Drawn] = drawn,
            images: Sequence[ImageInput] = images,
        ) -> None:
            if drawn:
                result.metadata["image"] = drawn[number].metadata
            on_outcome(_save(batch[number], result, config, images[number]))

        for job, image in zip(batch, drawn, strict=False):  # none where there is no prompt
            with atomic_path(job.drawing) as temporary:
                image.image.save(temporary)
        pipeline(
            images,
            [job.seed for job in batch],
            quality=config.quality,
            steps=config.steps,
            guidance=config.guidance,
            resolution=config.resolution,
            cleanup=config.cleanup,
            foreground=config.foreground,
            on_progress=on_progress,
            on_result=keep,
            **ElasticOptions.of(config),
        )


def save_summary(path: Path, config: GenerateConfig, outcomes: Sequence[Outcome], planned: int) -> None:
    """Write `summary.json`: the options, how many jobs ended how, one entry a job that was reached."""
    counts = Counter(outcome.status for outcome in outcomes)
    save_json(
        {
            "options": to_dict(config),
            "counts": {name: counts[name] for name in ("ok", "failed", "skipped")},
            "not_reached": planned - len(outcomes),
            "items": [asdict(outcome) for outcome in outcomes],
        },
        path,
    )


def save_routes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw the routes of every mesh that was made, titled by its file, seed and executed share.

    Raises:
        UserError: none was made elastically.
    """
    panels = []
    for outcome in outcomes:
        if metadata := outcome.metadata if "routes" in outcome.metadata else None:
            panels.append((route_title(Path(outcome.output).name, metadata), metadata["routes"]))
    draw_routes(panels, path)


def _save(job: Job, result: Result, config: GenerateConfig, image: ImageInput) -> Outcome:
    outcome = Outcome(job.subject, printable(job.output), job.seed, "ok", metadata=result.metadata)
    outcome.image_warnings = result.warnings
    try:
        frontal = config.model in PRESETS
        mesh, check = finish(result, config.asset, job.output.suffix, image, config.foreground, frontal)
        save_mesh(mesh, job.output, extras=result.metadata, name=job.name)
        if config.preview:
            with atomic_path(job.output.with_suffix(".png")) as temporary:
                turntable(result.mesh, image=result.image).save(temporary)
    except UserError as error:
        outcome.status, outcome.error = "failed", str(error)
        return outcome
    outcome.faces, outcome.watertight = check.faces, check.watertight
    outcome.print_summary, outcome.warnings = check.summary(), check.warnings()
    if texture_warning := result.metadata.get("texture", {}).get("warning"):
        outcome.warnings.append(f"texture=project: {texture_warning}")
    return outcome


def find_images(pattern: str) -> list[Path]:
    """Images in a folder, or files that match a glob; sorted."""
    folder = Path(pattern)
    if folder.is_dir():
        files = visible_files(folder, recursive=False)
        found = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    else:
        found = matching_files(pattern)
    if not found:
        kinds = f" ({', '.join(IMAGE_SUFFIXES)})" if folder.is_dir() else ""
        raise UserError(f"image is {printable(pattern)}, which holds no image{kinds}")
    return found


def _targets(images: Sequence[Path], folder: Path, kind: MeshFormat) -> list[Path]:
    """`folder/<stem>.<kind>`; the suffix stays in the name where two images differ in nothing else."""
    stems = Counter(name_key(image.stem) for image in images)
    names = [
        image.stem if stems[name_key(image.stem)] == 1 else image.name.replace(".", "_") for image in images
    ]
    repeated = [name for name, count in Counter(map(name_key, names)).items() if count > 1]
    if repeated:
        raise UserError(
            f"image matches several images named {printable(repeated[0])}, expected names that differ in more than"
            " upper and lower case"
        )
    return [folder / f"{name}.{kind.value}" for name in names]


def _numbered(target: Path, number: int, total: int) -> Path:
    return target if total == 1 else target.with_name(f"{target.stem}_{number}{target.suffix}")
