"""One model at a time, many callers: a bounded queue whose waiting jobs are generated in batches.

A sample does not depend on its batch mates, so a job's mesh is the one that it would have had alone.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from elastic3d.errors import UserError
from elastic3d.geometry.mesh_io import save_mesh
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines.assets import check_asset
from elastic3d.pipelines.call import Result
from elastic3d.pipelines.generation import finish, in_halves
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.options import AssetConfig, Texture, Up
from elastic3d.serve.models import Models

LINGER_S = 0.01  # how long a batch waits for others that arrive together
SHARES = {"dit": (0.0, 0.5), "decode": (0.5, 0.45)}  # of the progress: where a stage begins, and its share
GIVE_UP_S = 5.0  # that a batch has to notice that nobody waits for it
ID_BYTES = 16
_log = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many jobs wait as may."""


class QueueClosed(QueueFull):
    """No job is taken any more."""


class _GivenUp(Exception):
    """Every job of the batch that runs was cancelled."""


class JobState(str, Enum):
    """Where a job is; the last three are final."""

    queued = "queued"
    running = "running"
    done = "done"
    failed = "failed"
    cancelled = "cancelled"


FINAL = (JobState.done, JobState.failed, JobState.cancelled)


class MeshRequest(BaseModel):
    """What a job asks for, by the names that `scripts/gen_mesh.py` has; what is left out is the model's default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the noise")
    quality: Literal["fast", "default", "best"] | None = Field(
        default=None, description="a point of the model's dial, in the place of a budget"
    )
    steps: int | None = Field(default=None, ge=1, le=1000, description="sampling steps")
    guidance: float | None = Field(default=None, ge=0, le=100, description="classifier-free guidance scale")
    resolution: int | None = Field(
        default=None, ge=8, le=512, description="grid cells a side of the decoding"
    )
    ensemble: int = Field(
        default=1, ge=1, le=16, description="generations, of which one mesh is made; see combine"
    )
    combine: Literal["mean", "fit"] = Field(
        default="mean", description="of an ensemble: the mean shape, or the one that fits the image best"
    )
    max_faces: int | None = Field(
        default=None, ge=4, le=10_000_000, description="decimate to this many faces"
    )
    elastic: bool | None = Field(default=None, description="let the routers decide; false: the dense model")
    budget: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the dense FLOPs to execute; with steps, of that many steps",
    )
    tolerance: int | None = Field(
        default=None, ge=0, le=255, description="largest difference within a plain background"
    )
    border: float | None = Field(
        default=None, ge=0, le=0.9, description="free share of the square around the object"
    )
    format: Literal["glb", "ply", "obj", "stl"] = Field(default="glb", description="file format of the mesh")
    size_mm: float | None = Field(default=None, ge=1e-3, le=1e6, description="longest side in millimetres")
    up: Literal["y", "z"] = Field(default="y", description="axis that points up in the file")
    texture: Literal["none", "project"] = Field(
        default="none", description="project: the image's colours on the mesh"
    )
    model: str = Field(default="", description="one of the server's models; empty: the default")

    @property
    def asset(self) -> AssetConfig:
        """What the file holds."""
        return AssetConfig(size_mm=self.size_mm, up=Up(self.up), texture=Texture(self.texture))

    @property
    def foreground(self) -> ForegroundConfig:
        """How the object is cut out."""
        return ForegroundConfig(**self.model_dump(include={"tolerance", "border"}, exclude_none=True))

    def options(self) -> dict[str, Any]:
        """The arguments of the pipeline that a batch has to share."""
        own = {"seed", "format", "size_mm", "up", "texture", "model", "tolerance", "border"}
        return self.model_dump(exclude=own, exclude_none=True) | {"foreground": self.foreground}


def sentence(errors: Sequence[Any]) -> str:
    """What pydantic says of the first value that is wrong."""
    first = errors[0]
    name = ".".join(str(part) for part in first["loc"])[:80]
    given = first.get("input")
    shown = f" is {given!r:.80}" if isinstance(given, str | int | float | bool) else ""
    if first["type"] == "extra_forbidden":
        return f"there is no option {name}: GET /docs lists them"
    if first["type"] == "json_invalid":
        return f"the request is no valid JSON: {first['ctx']['error']:.120}"
    if first["type"].startswith("model_"):
        return f"{name or 'the request'} is no JSON object, expected one"
    return f"{name or 'the request'}{shown}: {first['msg'][0].lower()}{first['msg'][1:]}"


@dataclass
class Job:
    """One image on its way to a mesh file."""

    id: str
    request: MeshRequest
    image: Image.Image | None  # dropped as soon as the job has ended
    held: bool = False  # its caller cancels it
    ended: float | None = None
    state: JobState = JobState.queued
    progress: float = 0.0
    error: str = ""
    internal: bool = False  # the error is the server's, not that of the request
    file: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    finished: threading.Event = field(default_factory=threading.Event)

    def describe(self) -> dict[str, Any]:
        """As JSON shows it."""
        shown = {"id": self.id, "state": self.state.value, "progress": round(self.progress, 3)}
        ended = {"error": self.error, "metadata": self.metadata}
        return shown | {name: value for name, value in ended.items() if value}


@dataclass
class Observer:
    """What the queue tells of its work; every function may be called from the worker's thread."""

    batch: Callable[[int, float], None] = lambda size, seconds: None
    ended: Callable[[Job], None] = lambda job: None


class MeshQueue:
    """Generates the meshes of jobs in a thread of its own; a context manager.

    Args:
        models: shared by all jobs, or the one pipeline; nobody else may call it meanwhile.
        capacity: jobs that may wait; one more raises `QueueFull`.
        batch_size: jobs with equal options that are generated at a time.
        keep_s: seconds for which the file of a finished job is kept.
    """

    def __init__(
        self,
        models: Models | ImageTo3DPipeline,
        capacity: int = 64,
        batch_size: int = 8,
        keep_s: float = 600.0,
        observer: Observer | None = None,
    ) -> None:
        self.models = models if isinstance(models, Models) else Models.single(models)
        self.capacity, self.batch_size, self.keep_s = capacity, batch_size, keep_s
        self._observer = observer or Observer()
        self._folder = Path(tempfile.mkdtemp(prefix="elastic3d-"))
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closed, self._deadline = False, 0.0
        self._thread = threading.Thread(target=self._work, name="elastic3d-generation", daemon=True)
        self._thread.start()

    def __enter__(self) -> MeshQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- for callers

    def submit(self, image: Image.Image, request: MeshRequest, held: bool = False) -> Job:
        """Queue an image. With `held`, its file stays until the caller cancels it, however long that is.

        Raises:
            QueueFull: too many wait. QueueClosed: the queue stops.
            UserError: colours in an STL, or an unknown model.
        """
        self.models.check(request.model)
        check_asset(request.asset, f".{request.format}", uv=False)
        job = Job(secrets.token_urlsafe(ID_BYTES), request, image, held)
        with self._changed:
            self._drop_old()
            self.check_room()
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def check_room(self) -> None:
        """Raise what `submit` would for one more job, QueueFull or QueueClosed: before an upload is unpacked for it."""
        with self._changed:
            if self._closed:
                raise QueueClosed("the server stops")
            if len(self._waiting) >= self.capacity:
                raise QueueFull(
                    f"{len(self._waiting)} jobs wait already, expected fewer than {self.capacity}"
                )

    def find(self, id: str) -> Job | None:
        """A job that is known still."""
        with self._changed:
            self._drop_old()
            return self._jobs.get(id)

    def cancel(self, job: Job) -> None:
        """Give a job up: what waits never starts, what runs goes on for others of its batch alone, files go."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            self._jobs.pop(job.id, None)
            if job.state not in FINAL:
                self._end(job, JobState.cancelled)
            elif job.file is not None:
                job.file.unlink(missing_ok=True)

    @property
    def closed(self) -> bool:
        """Whether no job is taken any more."""
        return self._closed

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs of the batch that is being generated."""
        return len(self._running)

    def stop(self, timeout_s: float = 60.0) -> None:
        """Take no more jobs, cancel those that wait, finish the batch that runs, or give it up after `timeout_s` of the
        first call. Files stay."""
        with self._changed:
            if not self._closed:
                self._closed, self._deadline = True, time.monotonic() + timeout_s
            for job in self._waiting:
                self._end(job, JobState.cancelled)
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        with self._changed:
            for job in self._running:
                if job.state not in FINAL:
                    self._end(job, JobState.cancelled)
        self._thread.join(GIVE_UP_S)

    def close(self, timeout_s: float = 60.0) -> None:
        """Stop, and remove all files."""
        self.stop(timeout_s)
        shutil.rmtree(self._folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------ the worker

    def _work(self) -> None:
        while batch := self._next_batch():
            started = time.perf_counter()
            try:
                with self.models.use(batch[0].request.model) as pipeline:
                    in_halves(batch, partial(self._attempt, pipeline), self._broke)
            except (
                Exception
            ) as error:  # the model can't be loaded: one batch must not take the others with it
                for job in batch:
                    if job.state not in FINAL:
                        self._broke(job, error)
            finally:
                with self._changed:
                    self._running = []
                self._observer.batch(len(batch), time.perf_counter() - started)

    def _next_batch(self) -> list[Job]:
        """Jobs with the options of the one that waits longest; empty once the queue is closed."""
        batch: list[Job] = []
        while not batch and not self._closed:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait(1.0)
                    self._drop_old()
            time.sleep(LINGER_S)
            with self._changed:  # where all may be cancelled by now
                first = self._waiting[0].request if self._waiting else MeshRequest()
                alike = [job for job in self._waiting if _batched_by(job.request) == _batched_by(first)]
                batch = alike[: max(self.batch_size // first.ensemble, 1)]
                for job in batch:
                    self._waiting.remove(job)
                    job.state = JobState.running
                self._running = batch
        return batch

    def _attempt(self, pipeline: ImageTo3DPipeline, batch: Sequence[Job]) -> None:
        """The meshes of jobs, or their errors."""

        def on_progress(stage: str, done: int, total: int) -> None:
            if all(job.state in FINAL for job in batch):
                raise _GivenUp
            first, share = SHARES.get(stage, (0.0, 0.0))
            for job in batch if share else ():
                job.progress = first + share * done / total

        kept = [(job, image) for job in batch if (image := job.image) is not None]  # the rest is cancelled
        if not kept:
            return
        try:
            results = pipeline(
                [image for _, image in kept],
                seed=[job.request.seed for job, _ in kept],
                on_progress=on_progress,
                **batch[0].request.options(),
            )
        except _GivenUp:
            return
        for (job, image), result in zip(kept, results, strict=True):
            try:
                self._keep(job, result, image)
            except Exception as error:  # of this mesh: the others are there
                self._broke(job, error)

    def _keep(self, job: Job, result: Result, image: Image.Image) -> None:
        if job.state in FINAL:  # given up meanwhile
            return
        wanted = job.request
        path = self._folder / f"{job.id}.{wanted.format}"
        mesh, _ = finish(result, wanted.asset, path.suffix, image, wanted.foreground)
        try:
            save_mesh(mesh, path, extras=result.metadata, name="mesh")
        except UserError as error:
            _log.error("%s", error)
            reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else None
            self._fail(job, f"the server can't keep the mesh: {reason or 'its disk failed'}", internal=True)
            return
        job.file, job.metadata = path, result.metadata
        self._end_with(job, JobState.done)

    def _broke(self, job: Job, error: Exception) -> None:
        if isinstance(error, UserError):  # an option, or more memory than there is
            self._fail(job, str(error))
            return
        _log.error("job %s failed", job.id, exc_info=error)
        self._fail(job, f"the server failed: {type(error).__name__}", internal=True)

    def _fail(self, job: Job, error: str, internal: bool = False) -> None:
        job.error, job.internal = error, internal
        self._end_with(job, JobState.failed)

    def _end_with(self, job: Job, state: JobState) -> None:
        with self._changed:
            if job.state is JobState.cancelled:
                if job.file is not None:
                    job.file.unlink(missing_ok=True)
                return
            self._end(job, state)

    def _end(self, job: Job, state: JobState) -> None:
        job.state, job.image, job.ended = state, None, time.monotonic()
        job.progress = 1.0 if state is JobState.done else job.progress
        job.finished.set()
        self._observer.ended(job)

    def _drop_old(self) -> None:
        now = time.monotonic()
        for id, job in list(self._jobs.items()):
            if not job.held and job.ended is not None and now - job.ended > self.keep_s:
                if job.file is not None:
                    job.file.unlink(missing_ok=True)
                del self._jobs[id]


def _batched_by(request: MeshRequest) -> tuple[str, dict[str, Any]]:
    """What the jobs of a batch have in common."""
    return request.model, request.options()
