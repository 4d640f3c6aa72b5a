"""A model, its queue and the HTTP API around them, on this machine or as replicas of a Ray Serve deployment."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from elastic3d.pipelines.generation import load_pipeline
from elastic3d.pipelines.runtime import resolve_device
from elastic3d.serve.api import create_app
from elastic3d.serve.config import ServeConfig
from elastic3d.serve.metrics import Metrics
from elastic3d.serve.queue import MeshQueue
from elastic3d.utils.clusters import join_cluster, work_in

ANSWER_S = 5  # that requests have to be answered once the last batch is over
SPARE_REQUESTS = 100  # at a time beside those of jobs, for the queue to refuse: Ray holds back any more
APPLICATION = "elastic3d"  # of Ray Serve
PROXY_START_S = "60"  # Ray gives its proxy 5 s to start, which a busy machine exceeds


def build_app(config: ServeConfig) -> FastAPI:
    """Load the model and put the API in front of it; the app closes the queue."""
    # it warns of forms that can't be read, which is answered
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    pipeline = load_pipeline(config.generate_config())
    metrics = Metrics()
    queue = MeshQueue(pipeline, config.queue, config.rows, config.keep_s, metrics.observer())
    return create_app(queue, config, metrics)


def serve_here(app: FastAPI, config: ServeConfig) -> None:
    """Answer requests until SIGTERM or Ctrl-C. Then jobs that wait are cancelled, the batch that runs has `stop_s` to
    end, and uvicorn raises the signal again: the KeyboardInterrupt of its handler leaves this function."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # beside uvicorn's own wait for the requests whose jobs end by it
            threading.Thread(target=app.state.queue.stop, args=(config.stop_s,), daemon=True).start()
            await super().shutdown(sockets)

    wait_s = math.ceil(config.stop_s) + ANSWER_S
    # its warnings are of requests that are no HTTP or ask for a WebSocket, which are answered
    settings = uvicorn.Config(
        app, host=config.host, port=config.port, log_level="error", timeout_graceful_shutdown=wait_s
    )
    Server(settings).run()


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

    folder = Path.cwd()

    def build() -> FastAPI:
        work_in(folder)
        return build_app(config)

    serve.start(http_options={"host": config.host, "port": config.port})
    try:
        made: Any = serve.deployment(serve.ingress(build)())
        replica = made.options(
            name="meshes",
            num_replicas=config.replicas,
            max_ongoing_requests=config.queue + config.rows + SPARE_REQUESTS,
            graceful_shutdown_timeout_s=config.stop_s,
            ray_actor_options={"num_cpus": 1, "num_gpus": int(gpu)},
        )
        serve.run(replica.bind(), name=APPLICATION, route_prefix="/")
        yield
    finally:
        if started and not os.environ.get("RAY_ADDRESS"):
            serve.shutdown()  # requests that run are finished
        else:  # other applications of the cluster stay
            with suppress(TimeoutError):  # Ray waits for 60 s, and goes on to end it
                serve.delete(APPLICATION)
        if started:
            ray.shutdown()
