"""A model, its queue and the HTTP API around them, on this machine or as replicas of a Ray Serve deployment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from elastic3d.errors import UserError
from elastic3d.pipelines.options import GenerateConfig
from elastic3d.pipelines.published import load_pipeline
from elastic3d.serve.api import create_app
from elastic3d.serve.config import ServeConfig
from elastic3d.serve.metrics import Metrics
from elastic3d.serve.queue import MeshQueue

PROXY_START_S = "60"  # Ray gives its proxy 5 s to start, which a busy machine exceeds


def build_app(config: ServeConfig, default: Path) -> FastAPI:
    """Load the model (`default` where none is named) and put the API in front of it; the app closes the queue."""
    wanted = GenerateConfig(
        image="-",
        output="-",
        model=config.model,
        weights=config.weights,
        routers=config.routers,
        device=config.device,
        dtype=config.dtype,
    )
    pipeline = load_pipeline(wanted, default, 1)
    metrics = Metrics()
    queue = MeshQueue(pipeline, config.queue, config.batch_size, config.keep_s, metrics.observer())
    return create_app(queue, config, metrics)


def serve_over_ray(config: ServeConfig, default: Path, block: bool = True) -> None:
    """The same app as `config.replicas` replicas, each with a model of its own; requests are spread over them.

    Ray joins the cluster of RAY_ADDRESS, else it starts one on this machine; a replica takes a GPU where it uses one.

    Args:
        block: return when the server ends; False: when it answers (`ray.serve.shutdown` ends it).

    Raises:
        UserError: Ray is not installed.
    """
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", PROXY_START_S)
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise UserError("runner=ray needs Ray: pip install 'elastic3d[ray,serve]'") from error
    from elastic3d.pipelines.runtime import resolve_device

    gpu = resolve_device(config.device).type == "cuda"
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, num_cpus=None if gpu else config.replicas + 1)
    serve.start(http_options={"host": config.host, "port": config.port})
    folder = default.resolve()
    made: Any = serve.deployment(serve.ingress(lambda: build_app(config, folder))())
    replica = made.options(
        name="meshes",
        num_replicas=config.replicas,
        max_ongoing_requests=config.queue,
        graceful_shutdown_timeout_s=config.stop_s,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(gpu)},
    )
    serve.run(replica.bind(), name="elastic3d", route_prefix="/", blocking=block)
