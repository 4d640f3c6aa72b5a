"""The queue by itself: jobs that are given up, files that are kept, a stop while a batch runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("pydantic")
from tiny_pipeline import image, tiny_pipeline  # noqa: E402

from elastic3d.serve import queue as queue_module  # noqa: E402
from elastic3d.serve.models import Models  # noqa: E402
from elastic3d.serve.queue import Job, JobState, MeshQueue, MeshRequest, QueueClosed  # noqa: E402

SHORT, LONG = MeshRequest(steps=1, resolution=8), MeshRequest(steps=1000, resolution=8)


@pytest.fixture
def queue() -> Iterator[MeshQueue]:
    with MeshQueue(tiny_pipeline()) as started:
        yield started


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


def test_generations_of_an_ensemble_count_for_the_batch() -> None:
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


def test_a_batch_that_nobody_waits_for_makes_room(queue: MeshQueue) -> None:
    given_up, job = queue.submit(image(), LONG), queue.submit(image(), SHORT)
    until(lambda: given_up.progress > 0)
    queue.cancel(given_up)
    assert job.finished.wait(60) and job.state is JobState.done
    assert given_up.progress < 0.5, "it ended within its sampling"


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
