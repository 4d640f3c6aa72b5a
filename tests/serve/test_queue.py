"""The queue by itself: jobs that are given up, files that are kept, a stop while a batch runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pydantic")
from hunyuan_tiny import tiny_config, write_checkpoint  # noqa: E402
from tiny_pipeline import image, tiny_pipeline  # noqa: E402

from elastic3d.geometry import ensemble, pose  # noqa: E402
from elastic3d.pipelines.generation import load_pipeline  # noqa: E402
from elastic3d.serve import queue as queue_module  # noqa: E402
from elastic3d.serve.config import ServeConfig  # noqa: E402
from elastic3d.serve.models import Models  # noqa: E402
from elastic3d.serve.queue import Job, JobState, MeshQueue, MeshRequest, QueueClosed  # noqa: E402
from elastic3d.utils.devices import DTypeChoice  # noqa: E402

SHORT, LONG = MeshRequest(steps=1, resolution=8), MeshRequest(steps=1000, resolution=8)


@pytest.fixture
def queue() -> Iterator[MeshQueue]:
    with MeshQueue(tiny_pipeline()) as started:
        yield started


def submit(queue: MeshQueue, requests: Sequence[MeshRequest]) -> list[Job]:
    """Jobs that wait at the same time."""
    with queue._changed:
        return [queue.submit(image(), request) for request in requests]


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_jobs_that_are_cancelled_at_once_do_not_end_the_worker(
    queue: MeshQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, each while the batch waits for others."""
    jobs: list[Job] = []

    def linger(_: float) -> None:
        if jobs:
            queue.cancel(jobs.pop())

    clock = SimpleNamespace(sleep=linger, monotonic=time.monotonic, perf_counter=time.perf_counter)
    monkeypatch.setattr(queue_module, "time", clock)
    for _ in range(sys.getrecursionlimit()):
        with queue._changed:
            jobs.append(job := queue.submit(image(), SHORT))
        assert job.finished.wait(60)
    assert job.state is JobState.cancelled
    last = queue.submit(image(), SHORT)
    assert last.finished.wait(60) and last.state is JobState.done


def test_generations_of_an_ensemble_count_for_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "_CELLS", 8)
    sizes: list[int] = []
    pipeline = tiny_pipeline()

    def counted(images: list[object], *args: Any, **options: Any) -> Any:
        sizes.append(len(images) * options["ensemble"])
        return pipeline(images, *args, **options)

    models = Models.single(pipeline)
    models.use = lambda _: nullcontext(counted)  # type: ignore[assignment,return-value,method-assign]
    with MeshQueue(models, batch_size=4) as queue:
        jobs = [queue.submit(image(), SHORT.model_copy(update={"ensemble": 2})) for _ in range(5)]
        assert all(job.finished.wait(60) and job.state is JobState.done for job in jobs)
    assert sum(sizes) == 10 and max(sizes) <= 4


def test_a_batch_is_no_larger_than_memory_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generations fit. A job that needs more alone fails, and its error says what it needs."""
    checkpoint = tiny_config()
    checkpoint["vae"]["params"]["num_latents"] = 2048
    weights = str(write_checkpoint(tmp_path, config=checkpoint))
    config = ServeConfig(model="hunyuan3d2", weights=weights, dtype=DTypeChoice.float32, memory_budget=0.03)
    pipeline, sizes = load_pipeline(replace(config.generate_config(), resolution=8)), []
    sample = pipeline.sample_latents

    def counted(condition: torch.Tensor, seeds: list[int], *args: Any) -> torch.Tensor:
        sizes.append(len(seeds) * args[-1])
        return sample(condition, seeds, *args)

    monkeypatch.setattr(pipeline, "sample_latents", counted)
    request = MeshRequest(steps=2, resolution=8)
    with MeshQueue(pipeline, batch_size=4) as queue:
        for job in submit(queue, [request] * 4):
            assert job.finished.wait(60) and job.state is JobState.done
        assert sizes == [2, 2]
        for more in ({"ensemble": 3}, {"resolution": 128}):
            job = queue.submit(image(), request.model_copy(update=more))
            assert job.finished.wait(60) and "this needs about" in job.error and not job.internal
        assert sizes == [2, 2]


@pytest.mark.parametrize("bad", [0, 2])
def test_an_unexpected_error_of_one_job_is_not_its_batch_mates(
    queue: MeshQueue, caplog: pytest.LogCaptureFixture, bad: int
) -> None:
    with queue._changed:
        jobs = submit(queue, [SHORT] * 3)
        assert jobs[bad].image is not None
        jobs[bad].image.close()  # what reads it raises no UserError
    assert all(job.finished.wait(60) for job in jobs)
    failed = jobs.pop(bad)
    assert failed.internal and failed.error == "the server failed: ValueError"
    assert all(job.state is JobState.done for job in jobs)
    assert [failed.id in record.message for record in caplog.records if record.exc_info] == [True]
    (last,) = submit(queue, [SHORT])
    assert last.finished.wait(60) and last.state is JobState.done


def test_a_mesh_that_can_not_be_kept_is_not_made_again(
    queue: MeshQueue, caplog: pytest.LogCaptureFixture
) -> None:
    with queue._changed:
        jobs = submit(queue, [SHORT] * 3)
        jobs[1].id = "\0"  # of which no file can be named
    assert all(job.finished.wait(60) for job in jobs)
    assert [job.state.value for job in jobs] == ["done", "failed", "done"] and jobs[1].internal
    assert [record.message for record in caplog.records] == ["job \0 failed"]


@pytest.mark.parametrize(("room", "sizes"), [(2, [4, 2, 2]), (0, [4, 2, 1, 1, 2, 1, 1])])
def test_a_batch_that_runs_out_of_memory_is_halved(room: int, sizes: list[int]) -> None:
    tried: list[int] = []
    pipeline = tiny_pipeline()

    def limited(images: list[object], *args: Any, **options: Any) -> Any:
        tried.append(len(images))
        if len(images) > room:
            raise torch.OutOfMemoryError("no memory is left")
        return pipeline(images, *args, **options)

    models = Models.single(pipeline)
    models.use = lambda _: nullcontext(limited)  # type: ignore[assignment,return-value,method-assign]
    with MeshQueue(models) as queue:
        jobs = submit(queue, [SHORT] * 4)
        assert all(job.finished.wait(60) for job in jobs)
    assert tried == sizes
    error = "" if room else "the server failed: OutOfMemoryError"
    assert [job.error for job in jobs] == [error] * 4


def test_a_batch_that_nobody_waits_for_makes_room(queue: MeshQueue) -> None:
    given_up, job = queue.submit(image(), LONG), queue.submit(image(), SHORT)
    until(lambda: given_up.progress > 0)
    queue.cancel(given_up)
    assert job.finished.wait(60) and job.state is JobState.done
    assert given_up.progress < 0.5, "it ended within its sampling"


def _heard(hear: Callable[[str, int, int], None]) -> Models:
    """A model whose progress is heard, after the queue has."""
    pipeline = tiny_pipeline()

    def call(images: list[object], *args: Any, on_progress: Callable[..., None], **options: Any) -> Any:
        def both(*at: Any) -> None:
            on_progress(*at)
            hear(*at)

        return pipeline(images, *args, on_progress=both, **options)

    models = Models.single(pipeline)
    models.use = lambda _: nullcontext(call)  # type: ignore[assignment,return-value,method-assign]
    return models


@pytest.mark.parametrize("more", [{}, {"ensemble": 2}])
def test_progress_covers_decoding(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ensemble, "_CELLS", 8)
    seen: list[tuple[str, float]] = []
    with MeshQueue(_heard(lambda stage, *_: seen.append((stage, jobs[0].progress)))) as queue:
        with queue._changed:
            request = MeshRequest(steps=2, resolution=8, **more)
            jobs = submit(queue, [request] * 2)
        assert all(job.finished.wait(60) and job.state is JobState.done for job in jobs)
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and jobs[0].progress == 1
    assert [share for stage, share in seen if stage == "dit"] == [0.25, 0.5]
    decoding = [share for stage, share in seen if stage == "decode"]
    assert len(decoding) == 2 * (1 + more.get("ensemble", 0)) and 0.5 < decoding[0] < decoding[-1] < 1


def test_an_ensemble_that_nobody_waits_for_is_not_compared_further(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[object] = []
    original = pose.find_pose

    def find_pose(*args: Any) -> Any:
        scored.append(args)
        queue.cancel(job)
        return original(*args)

    monkeypatch.setattr(pose, "find_pose", find_pose)
    with MeshQueue(tiny_pipeline()) as queue:
        with queue._changed:
            job = queue.submit(image(), SHORT.model_copy(update={"ensemble": 2, "combine": "fit"}))
        until(lambda: scored)
        last = queue.submit(image(), SHORT)
        assert last.finished.wait(60) and last.state is JobState.done
    assert job.state is JobState.cancelled and len(scored) == 1


def test_a_stop_cancels_what_waits_and_what_takes_too_long() -> None:
    queue = MeshQueue(tiny_pipeline())
    running, waiting = queue.submit(image(), LONG), queue.submit(image(), SHORT)
    until(lambda: running.progress > 0)
    stopping = threading.Thread(target=queue.stop, args=(0.3,))
    stopping.start()
    assert waiting.finished.wait(60) and waiting.state is JobState.cancelled
    assert running.finished.wait(60) and running.state is JobState.cancelled
    with pytest.raises(QueueClosed, match="the server stops"):
        queue.submit(image(), SHORT)
    stopping.join(60)
    queue.close(600)  # waits no second time
    assert not queue._thread.is_alive() and not queue._folder.exists()
