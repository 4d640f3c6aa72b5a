"""The queue by itself."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("pydantic")
from tiny_pipeline import image, tiny_pipeline  # noqa: E402

from elastic3d.serve import queue as queue_module  # noqa: E402
from elastic3d.serve.queue import Job, JobState, MeshQueue, MeshRequest  # noqa: E402

SHORT = MeshRequest(steps=1, resolution=8)


@pytest.fixture
def queue() -> Iterator[MeshQueue]:
    with MeshQueue(tiny_pipeline()) as started:
        yield started


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
