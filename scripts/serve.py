"""Serve a model over HTTP.

    python scripts/serve.py
    python scripts/serve.py model=hunyuan3d2 weights=FOLDER port=8080 batch_size=4
    curl -F image=@chair.png -F budget=0.5 http://127.0.0.1:8000/v1/meshes -o chair.glb

Listens on this machine alone unless host= says otherwise, which needs a token. /docs describes every endpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from _cli import run

from elastic3d.errors import UserError
from elastic3d.pipelines.options import DEFAULT_MODEL, GenerateConfig
from elastic3d.serve.config import ServeConfig

REPOSITORY = Path(__file__).resolve().parent.parent


def main(config: ServeConfig) -> int:
    """Load the model, then answer requests until SIGTERM or Ctrl-C."""
    config.token = config.token or os.environ.get("ELASTIC3D_TOKEN", "")
    config.require_token()
    try:
        import uvicorn

        from elastic3d.serve.api import create_app
        from elastic3d.serve.metrics import Metrics
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'elastic3d[serve]'") from error
    from elastic3d.pipelines.hunyuan3d import load_pipeline
    from elastic3d.serve.queue import MeshQueue

    wanted = GenerateConfig(
        image="-",
        output="-",
        model=config.model,
        weights=config.weights,
        routers=config.routers,
        device=config.device,
        dtype=config.dtype,
    )
    pipeline = load_pipeline(wanted, REPOSITORY / DEFAULT_MODEL, 1)
    metrics = Metrics()
    with MeshQueue(pipeline, config.queue, config.batch_size, config.keep_s, metrics.observer()) as queue:
        app = create_app(queue, config, metrics)
        print(f"{pipeline.config.model} on http://{config.host}:{config.port}", file=sys.stderr)
        uvicorn.run(
            app, host=config.host, port=config.port, log_level="warning", timeout_graceful_shutdown=60
        )
    return 0


if __name__ == "__main__":
    run(main, ServeConfig, "serve")
