"""A folder of images spread over a Ray cluster: one model a worker, batches of jobs in turn, files on a shared disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from elastic3d.errors import UserError
from elastic3d.pipelines.generation import Job, Outcome, batches, check_options, generate, load_pipeline
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.options import GenerateConfig
from elastic3d.pipelines.runtime import resolve_device
from elastic3d.utils.clusters import join_cluster, work_in

_DIED = "the process that made it died (out of memory, or a crash in a native library)"


class Worker:
    """A model in a process of its own, loaded for the first batch: its errors are then those of a batch. Relative paths
    are those of `folder`."""

    def __init__(self, config: GenerateConfig, folder: str | Path = ".") -> None:
        work_in(folder)
        self._config = config
        self._pipeline: ImageTo3DPipeline | None = None

    def make(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcomes of jobs, their files written. UserError as `load_pipeline` and `check_options`."""
        if self._pipeline is None:
            self._pipeline = load_pipeline(self._config, self._config.rows)
            check_options(self._pipeline, self._config)
        outcomes: list[Outcome] = []
        generate(self._pipeline, jobs, self._config, outcomes.append)
        return outcomes


def generate_over_ray(
    jobs: Sequence[Job], config: GenerateConfig, on_outcome: Callable[[Outcome], None]
) -> None:
    """As `generate`, over the cluster of RAY_ADDRESS, or a local one of `config.workers` workers.

    Batches are those of one process, so the meshes are the same; outcomes are told as they are ready. With `resume`,
    what is there already is skipped before any model is loaded. A worker that dies costs its batch, as failed outcomes.

    Raises:
        UserError: Ray is not installed; or as `load_pipeline`.
    """
    todo = batches(jobs, config, on_outcome)
    if not todo:
        return
    ray, started = join_cluster(config.workers)
    gpus = int(resolve_device(config.device).type == "cuda")
    kind = ray.remote(num_cpus=1, num_gpus=gpus)(Worker)
    try:
        for outcome in _spread(ray, kind, todo, config):
            on_outcome(outcome)
    finally:
        if started:
            ray.shutdown()


def _spread(ray: Any, kind: Any, todo: list[list[Job]], config: GenerateConfig) -> Iterator[Outcome]:
    """Each worker has one batch at a time; another takes the place of one that died."""
    waiting, folder = iter(todo), Path.cwd()
    running: dict[Any, tuple[Any, list[Job]]] = {}
    for batch in [batch for _, batch in zip(range(config.workers), waiting, strict=False)]:
        worker = kind.remote(config, folder)
        running[worker.make.remote(batch)] = (worker, batch)
    while running:
        finished, _ = ray.wait(list(running), num_returns=1)
        worker, batch = running.pop(finished[0])
        try:
            outcomes = ray.get(finished[0])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):  # of an option: no batch could be made
                raise error.cause from error
            raise
        except (  # OutOfMemoryError: killed by Ray itself, before the system runs out
            ray.exceptions.RayActorError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.NodeDiedError,
        ):
            outcomes = [Outcome.of(job, "failed", _DIED) for job in batch]
            worker = kind.remote(config, folder)
        yield from outcomes
        for batch in waiting:
            running[worker.make.remote(batch)] = (worker, batch)
            break
        del worker  # the last handle of one without a batch: its place is free for one that waits for it
