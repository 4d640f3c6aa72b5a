"""A model, its queue and the HTTP API around them, on this machine or as replicas of a Ray Serve deployment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI

from elastic3d.pipelines.generation import load_pipeline
from elastic3d.pipelines.runtime import resolve_device
from elastic3d.serve.api import create_app
from elastic3d.serve.config import ServeConfig
from elastic3d.serve.metrics import Metrics
from elastic3d.serve.queue import MeshQueue
from elastic3d.utils.clusters import join_cluster

PROXY_START_S = "60"  # Ray gives its proxy 5 s to start, which a busy machine exceeds


def build_app(config: ServeConfig) -> FastAPI:
    """Load the model and put the API in front of it; the app closes the queue."""
    pipeline = load_pipeline(config.generate_config())
    metrics = Metrics()
    queue = MeshQueue(pipeline, config.queue, config.batch_size, config.keep_s, metrics.observer())
    return create_app(queue, config, metrics)


@contextmanager
def serve_over_ray(config: ServeConfig) -> Iterator[None]:
    """The same app as `config.replicas` replicas, each with a model of its own, while the context lasts.

    Requests are spread over the replicas. Ray joins the cluster of RAY_ADDRESS, else it starts one on this machine; a
    replica takes a GPU where it uses one.

    Raises:
        UserError: Ray is not installed.
    """
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", PROXY_START_S)
    gpu = resolve_device(config.device).type == "cuda"
    ray, started = join_cluster(None if gpu else config.replicas + 1, "ray,serve")
    from ray import serve

    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        made: Any = serve.deployment(serve.ingress(lambda: build_app(config))())
        replica = made.options(
            name="meshes",
            num_replicas=config.replicas,
            max_ongoing_requests=config.queue,
            graceful_shutdown_timeout_s=config.stop_s,
            ray_actor_options={"num_cpus": 1, "num_gpus": int(gpu)},
        )
        serve.run(replica.bind(), name="elastic3d", route_prefix="/")
        yield
    finally:
        serve.shutdown()  # requests that run are finished
        if started:
            ray.shutdown()
