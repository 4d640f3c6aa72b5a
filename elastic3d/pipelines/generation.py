"""Many images to many mesh files: what to do, doing it in batches, and the record of it."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import trimesh

from elastic3d.checkpoints.options import PRESETS
from elastic3d.elastic.config import ElasticOptions
from elastic3d.errors import UserError
from elastic3d.evaluation.health import PrintCheck, print_check
from elastic3d.geometry.mesh_io import WRITE_SUFFIXES, check_suffix, read_extras, save_mesh
from elastic3d.geometry.normalize import scale_to, with_up
from elastic3d.models.images import (
    DRAWING,
    IMAGE_SUFFIXES,
    VIEW_NAMES,
    ImageInput,
    save_image,
    without_drawings,
)
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines.assets import check_asset, coloured
from elastic3d.pipelines.call import OnProgress, Result
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.options import (
    DEFAULT_MODEL,
    NO_ROUTERS_NAME,
    AssetConfig,
    GenerateConfig,
    MeshFormat,
    Texture,
    Up,
)
from elastic3d.pipelines.preview import check_routes, draw_routes, route_title, turntable
from elastic3d.pipelines.runtime import find_model
from elastic3d.pipelines.training_free import calibration_file
from elastic3d.utils.files import (
    check_paths,
    file_sha256,
    load_json,
    matching_files,
    name_key,
    printable,
    save_json,
    visible_files,
)
from elastic3d.utils.options import to_dict

if TYPE_CHECKING:
    from elastic3d.pipelines.text_to_image import ImageResult

_log = logging.getLogger(__name__)
Item = TypeVar("Item")

SUMMARY_NAME = "summary.json"
OPTIONS = (
    "quality",
    "steps",
    "guidance",
    "resolution",
    "ensemble",
    "combine",
    "cleanup",
    "foreground",
)  # of the command, for the pipeline
# Options that change nothing of a mesh, or whose part in it is told in another way.
AROUND = {
    *("image", "image_left", "image_back", "image_right", "prompt", "model", "seed", "num_samples"),
    *("output", "format", "preview", "trace", "resume", "batch_size", "runner", "workers", "device"),
    *("low_memory", "compile", "memory_budget"),
}


@dataclass(frozen=True)
class Job:
    """One mesh to make, of an image or of a prompt."""

    image: Path
    seed: int
    output: Path
    prompt: str = ""
    drawn: ImageResult | None = None  # of the prompt
    options: str = field(default="", compare=False)  # as `options_of_mesh`

    @property
    def drawing(self) -> Path:
        """Where the image of the prompt is kept."""
        return self.output.with_name(f"{self.output.stem}_image.png")

    def request_sha256(self, views: Mapping[str, Path]) -> str:
        """SHA-256 (hex) of what is asked for: options, prompt, seed, and the bytes of the images."""
        images = [] if self.prompt else [file_sha256(path) for path in (self.image, *views.values())]
        request = json.dumps([self.options, self.prompt, self.seed, images])
        return hashlib.sha256(request.encode()).hexdigest()

    def source(self, views: Mapping[str, Path]) -> ImageInput:
        """What the mesh is made from, with further views of a file's object."""
        if self.drawn is not None:
            return self.drawn.image
        return {VIEW_NAMES[0]: self.image, **views} if views else self.image


Draw = Callable[[Sequence[Job]], Sequence[Job]]
"""Makes the images of jobs that have a prompt, and keeps them -> the jobs with what was drawn."""


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

    @classmethod
    def of(cls, job: Job, status: str, error: str | None = None) -> Outcome:
        """Of a job."""
        return cls(job.prompt or printable(job.image), printable(job.output), job.seed, status, error)


@dataclass(frozen=True)
class Plan:
    """All jobs of a command; `folder` is where many outputs go, None for a single image's own file."""

    jobs: list[Job]
    folder: Path | None


def plan(config: GenerateConfig) -> Plan:
    """The jobs that `image`, `output`, `seed` and `num_samples` ask for. UserError: a folder without images, `output`
    of the wrong kind, something that would be written over an input or another output, a mesh made otherwise."""
    image, output = Path(config.image), Path(config.output)
    many = image.is_dir() or (glob.has_magic(config.image) and not image.exists())
    inside = not config.prompt and (many or output.is_dir() or config.output.endswith("/"))
    if not inside:
        output = output if config.format is None else _of_format(output, config.format)
        check_suffix(output, WRITE_SUFFIXES)
    pairs, folder = (_into_folder(config, many), output) if inside else ([(image, output)], None)
    several, asked = config.num_samples > 1, options_of_mesh(config)
    jobs = [
        Job(image, config.seed + n, numbered(target, n) if several else target, config.prompt, None, asked)
        for image, target in pairs
        for n in range(config.num_samples)
    ]
    for suffix in {target.suffix for _, target in pairs} if config.asset.texture is Texture.project else ():
        check_asset(config.asset, suffix, config.cleanup.uv)
    meshes = [job.output for job in jobs]
    check_paths(
        config.inputs | {"image": [job.image for job in jobs if not job.prompt]},
        {
            "output": meshes,
            "image of the prompt": [job.drawing for job in jobs if job.prompt],
            "preview": [path.with_suffix(".png") for path in meshes] if config.preview else None,
            "trace": config.trace,
            "summary": folder / SUMMARY_NAME if folder else None,
        },
    )
    if config.resume:
        _check_made_alike(jobs, config, folder)
    return Plan(jobs, folder)


def options_of_mesh(config: GenerateConfig) -> str:
    """The model's place and the options that change a mesh, as JSON."""
    model = find_model(config.model or DEFAULT_MODEL)
    options = {name: value for name, value in to_dict(config).items() if name not in AROUND}
    return json.dumps([str(model.resolve() if model.exists() else model), options])


def _check_made_alike(jobs: Sequence[Job], config: GenerateConfig, folder: Path | None) -> None:
    """UserError if a mesh that is there says, in its file or in the folder's summary, that it was made otherwise."""
    summary = _made(folder / SUMMARY_NAME) if folder else {}
    for job in (job for job in jobs if job.output.exists()):
        own = read_extras(job.output) if job.output.suffix.lower() == ".glb" else {}
        made = own or summary.get(printable(job.output.name), {}).get("metadata", {})
        request = job.request_sha256(config.views)
        if made.get("request_sha256", request) != request:
            raise UserError(
                f"{printable(job.output)} was made with other options, or of another image:"
                " delete it first, or give another output="
            )


def load_pipeline(config: GenerateConfig, meshes: int = 1) -> ImageTo3DPipeline:
    """The model for `meshes` generations, with the options that concern its memory and its routers applied. UserError:
    a missing or broken file, too little memory, options that the model can't honour."""
    calibration = calibration_file(config.calibration) if config.calibration else None
    if config.model in PRESETS:
        from elastic3d.pipelines.published import published_pipeline

        pipeline = published_pipeline(config, min(meshes, config.rows) * config.ensemble)
    else:
        for name in ("weights", "subfolder", "vae_subfolder", "dinov2", "memory_budget"):
            if getattr(config, name):
                raise UserError(f"{name}= is for model={', '.join(PRESETS)}, but model is {config.model!r}")
        routers = {"": True, NO_ROUTERS_NAME: False}.get(config.routers, config.routers)
        model = config.model or DEFAULT_MODEL
        pipeline = ImageTo3DPipeline.from_pretrained(model, config.device, config.dtype, routers=routers)
    if calibration is not None:
        if pipeline.session is not None:
            raise UserError(f"calibration={calibration}: this model has routers, expected routers=none")
        pipeline.calibration = calibration
    if config.low_memory:
        pipeline.use_less_memory()
    if config.compile:
        pipeline.compile()
    return pipeline


def check_options(pipeline: ImageTo3DPipeline, config: GenerateConfig) -> None:
    """UserError of options that this model can't honour, or if routes are to be drawn of the dense model, which they
    run; before a mesh is made."""
    requested = ElasticOptions(**ElasticOptions.of(config))
    given = {"steps": config.steps, "guidance": config.guidance}
    elastic = pipeline.configured(requested, config.quality, **given)[1].elastic
    if config.trace:
        check_routes(config.trace, elastic)


def generate(
    pipeline: ImageTo3DPipeline,
    jobs: Sequence[Job],
    config: GenerateConfig,
    on_outcome: Callable[[Outcome], None],
    on_progress: OnProgress | None = None,
    draw: Draw | None = None,
    alone: bool = False,
) -> None:
    """Do the jobs in batches; each mesh is saved, and its outcome told, as soon as it is there or has failed. The
    unexpected error of a job that is `alone` is raised."""
    options = {name: getattr(config, name) for name in OPTIONS} | ElasticOptions.of(config)
    told: set[str] = set()

    def tell(outcome: Outcome) -> None:
        told.add(outcome.output)
        on_outcome(outcome)

    def failed(job: Job, error: Exception) -> None:
        if isinstance(error, UserError) or alone or printable(job.output) in told:
            raise error  # of an option, so that no mesh can be made, or not of this job
        tell(_lost(job, error))

    def attempt(todo: Sequence[Job]) -> None:
        if not (batch := [job for job in todo if printable(job.output) not in told]):
            return
        batch = batch if draw is None else list(draw(batch))

        def keep(number: int, result: Result) -> None:
            try:
                outcome = _saved(batch[number], result, config)
            except Exception as error:  # of this mesh: the others are there
                failed(batch[number], error)
            else:
                tell(outcome)

        images = [job.source(config.views) for job in batch]
        pipeline(images, [job.seed for job in batch], on_progress=on_progress, on_result=keep, **options)

    for batch in batches(jobs, config, on_outcome):
        in_halves(batch, attempt, failed)


def _lost(job: Job, error: Exception) -> Outcome:
    """The outcome of a job with an unexpected error, whose place is logged."""
    outcome = Outcome.of(job, "failed")
    _log.error("%s failed", outcome.output, exc_info=error)
    outcome.error = f"{outcome.image}: {type(error).__name__}: {error}"
    return outcome


def in_halves(
    batch: Sequence[Item],
    attempt: Callable[[Sequence[Item]], None],
    failed: Callable[[Item, Exception], None],
) -> None:
    """Attempt a batch, and what raises once more in halves: one item may be at fault, or the memory suffice for fewer.
    An item that raises alone is told to `failed`."""
    try:
        attempt(batch)
        return
    except Exception as error:
        if len(batch) == 1:
            failed(batch[0], error)
            return
        if not isinstance(error, UserError):
            _log.warning("a batch of %d failed and is made again in halves: %r", len(batch), error)
    # outside of the handler, whose error keeps the tensors of the failed batch
    half = len(batch) // 2
    for part in (batch[:half], batch[half:]):
        in_halves(part, attempt, failed)


def batches(
    jobs: Sequence[Job], config: GenerateConfig, on_outcome: Callable[[Outcome], None]
) -> list[list[Job]]:
    """What is to do, in batches; with `resume`, jobs whose file is there are told as skipped."""
    done = {job: Outcome.of(job, "skipped") for job in jobs if config.resume and job.output.exists()}
    for outcome in done.values():
        on_outcome(outcome)
    todo = [job for job in jobs if job not in done]
    return [todo[start : start + config.rows] for start in range(0, len(todo), config.rows)]


def _saved(job: Job, result: Result, config: GenerateConfig) -> Outcome:
    """What became of a job, with its mesh saved if there is one."""
    outcome = Outcome.of(job, "ok")
    outcome.metadata, outcome.image_warnings = result.metadata, result.warnings
    result.metadata["request_sha256"] = job.request_sha256(config.views)
    if job.drawn is not None:
        result.metadata["image"] = job.drawn.metadata
    try:
        image = job.source(config.views)
        preview = job.output.with_suffix(".png") if config.preview else None
        mesh, check = finish(result, config.asset, job.output.suffix, image, config.foreground, preview)
        save_mesh(mesh, job.output, extras=result.metadata, name=job.prompt or printable(job.image.stem))
    except UserError as error:
        outcome.status, outcome.error = "failed", str(error)
    else:
        outcome.faces, outcome.watertight = check.faces, check.watertight
        outcome.print_summary, outcome.warnings = check.summary(), check.warnings()
        if texture_warning := result.metadata.get("texture", {}).get("warning"):
            outcome.warnings.append(f"texture=project: {texture_warning}")
    return outcome


def finish(
    result: Result,
    config: AssetConfig,
    suffix: str,
    image: ImageInput,
    foreground: ForegroundConfig | None = None,
    preview: Path | None = None,
) -> tuple[trimesh.Trimesh, PrintCheck]:
    """The mesh as a file that ends in `suffix` holds it; its metadata gets the object `print`, and `texture`.

    `image` is what the mesh was made from, for its colours; `preview` is a PNG to draw of the mesh. Raises
    whatever kept the result from becoming a mesh, and UserError where the image's colours can't be taken.
    """
    mesh = result.mesh
    check = print_check(mesh, config.size_mm, config.min_wall_mm)
    result.metadata["print"] = check.as_dict()
    if config.texture is Texture.project:
        mesh, result.metadata["texture"] = coloured(mesh, image, foreground or ForegroundConfig(), config)
    if preview is not None:  # in its colours, Y up; before the mesh's file, by which `resume` judges
        save_image(turntable(mesh, image=result.image), preview, DRAWING)
    if config.up is not Up.y:
        mesh = with_up(mesh, config.up.value)
    return mesh if config.size_mm is None else scale_to(mesh, config.size_mm, suffix), check


def save_summary(folder: Path, config: GenerateConfig, outcomes: Sequence[Outcome], planned: int) -> None:
    """Write a folder's `summary.json`: the options, how many jobs ended how, one entry a job that was reached.

    A skipped one keeps what an earlier summary says of its mesh.
    """
    path, counts = folder / SUMMARY_NAME, Counter(outcome.status for outcome in outcomes)
    earlier = _made(path) if counts["skipped"] else {}
    items = [asdict(outcome) for outcome in outcomes]
    for item in items:
        if item["status"] == "skipped":
            item |= earlier.get(Path(item["output"]).name, {})
    save_json(
        {
            "options": to_dict(config),
            "counts": {name: counts[name] for name in ("ok", "failed", "skipped")},
            "not_reached": planned - len(outcomes),
            "items": items,
        },
        path,
    )


def _made(path: Path) -> dict[str, dict[str, Any]]:
    """What a summary says of the meshes that were made, by the names of their files; nothing where it is missing,
    broken or something else."""
    try:
        items = load_json(path, {"items": [{"output": str, "status": str, "metadata": dict}]})["items"]
    except UserError:
        return {}
    kept = {item.name for item in fields(Outcome)} - {"output", "status"}
    return {
        Path(item["output"]).name: {name: item[name] for name in kept & item.keys()}
        for item in items
        if item["status"] in ("ok", "skipped")
    }


def save_routes(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw the routes of every mesh that was made, titled by its file, seed and executed share. Where all are there
    already, or failed, there are none, which is warned of."""
    panels = []
    for outcome in outcomes:
        if metadata := outcome.metadata if "routes" in outcome.metadata else None:
            panels.append((route_title(Path(outcome.output).name, metadata), metadata["routes"]))
    if panels:
        draw_routes(panels, path)
    else:
        warnings.warn(f"no mesh was made, so that {printable(path)} is not drawn", stacklevel=1)


def find_images(pattern: str) -> list[Path]:
    """Images in a folder, or files that match a glob; sorted, without drawings such as previews."""
    folder = Path(pattern)
    found = visible_files(folder, False, IMAGE_SUFFIXES) if folder.is_dir() else matching_files(pattern)
    return without_drawings(found, f"image is {printable(pattern)}, which")


def _into_folder(config: GenerateConfig, many: bool) -> list[tuple[Path, Path]]:
    """Each image with its file in the folder `output`.

    The file is `<stem>.<format>`; the image's suffix stays in the name where two images differ in nothing else.
    """
    output, suffix = Path(config.output), (config.format or MeshFormat.glb).value
    if many and config.views:
        name = next(iter(config.views))
        raise UserError(
            f"image_{name} is given, but image is {config.image}, several objects: give one image"
        )
    if output.suffix.lower() in WRITE_SUFFIXES and not output.is_dir():
        raise UserError(f"output is {output}, expected a folder, as image is a folder or a glob")
    if output.exists() and not output.is_dir():
        raise UserError(f"output is {output}, a file, expected a folder")
    images = find_images(config.image) if many else [Path(config.image)]
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
    return [(image, output / f"{name}.{suffix}") for image, name in zip(images, names, strict=True)]


def _of_format(output: Path, format: MeshFormat) -> Path:
    """A single file that `format=` is given for: it gets the suffix where it has none. UserError for another one."""
    if not output.suffix and output.name:
        return output.with_suffix(f".{format.value}")
    if output.suffix.lower() != f".{format.value}":
        raise UserError(
            f"format is {format.value}, but output is {printable(output)}: expected it to end in .{format.value}"
        )
    return output


def numbered(target: Path, number: int) -> Path:
    """`chair.glb` -> `chair_0.glb`, for one of several samples."""
    return target.with_name(f"{target.stem}_{number}{target.suffix}")
