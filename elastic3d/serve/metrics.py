"""Counters of a server for Prometheus."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from elastic3d.serve.queue import Job, Observer

ENDPOINTS = ("/v1/meshes", "/v1/jobs", "/v1/models", "/generate", "/send", "/status", "/healthz", "/metrics")
SECONDS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Requests, jobs and batches, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "elastic3d_requests", "Answered requests", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "elastic3d_request_seconds", "Time to the answer", ["path"], buckets=SECONDS, registry=registry
        )
        self._jobs = Counter("elastic3d_jobs", "Ended jobs", ["state"], registry=registry)
        self._sizes = Histogram(
            "elastic3d_batch_size", "Jobs in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self._generation = Histogram(
            "elastic3d_batch_seconds", "Time of a batch", buckets=SECONDS, registry=registry
        )
        self._waiting = Gauge("elastic3d_jobs_waiting", "Jobs that have not begun", registry=registry)
        self._running = Gauge("elastic3d_jobs_running", "Jobs of the running batch", registry=registry)

    def observer(self) -> Observer:
        """For the queue."""
        return Observer(batch=self._batch, ended=self._ended)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request was answered; unknown paths count as one, so that clients can't add counters."""
        name = next((known for known in ENDPOINTS if path == known or path.startswith(f"{known}/")), "other")
        self._requests.labels(name, str(status)).inc()
        self._seconds.labels(name).observe(seconds)

    def exposition(self, waiting: int, running: int) -> tuple[bytes, str]:
        """The text format and its content type."""
        self._waiting.set(waiting)
        self._running.set(running)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _batch(self, size: int, seconds: float) -> None:
        self._sizes.observe(size)
        self._generation.observe(seconds)

    def _ended(self, job: Job) -> None:
        self._jobs.labels(job.state.value).inc()
