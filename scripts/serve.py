"""Serve a model over HTTP.

    python scripts/serve.py
    python scripts/serve.py model=hunyuan3d2 weights=FOLDER port=8080 batch_size=4
    python scripts/serve.py runner=ray replicas=2
    curl -F image=@chair.png -F budget=0.5 http://127.0.0.1:8000/v1/meshes -o chair.glb

Listens on this machine alone unless host= says otherwise, which needs a token. /docs describes every endpoint.
"""

from __future__ import annotations

import os
import sys
import threading

from _cli import run

from elastic3d.errors import UserError
from elastic3d.evaluation.options import Runner
from elastic3d.serve.config import ServeConfig


def main(config: ServeConfig) -> int:
    """Load the model, then answer requests until SIGTERM or Ctrl-C."""
    config.token = config.token or os.environ.get("ELASTIC3D_TOKEN", "")
    config.require_token()
    if config.runner is Runner.local or config.port == 0:
        config.require_port()
    try:
        import uvicorn  # noqa: F401

        from elastic3d.serve.application import build_app, serve_here, serve_over_ray
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'elastic3d[serve]'") from error
    if config.runner is Runner.ray:
        with serve_over_ray(config):
            print(f"{config.replicas} replicas on {config.address}", file=sys.stderr)
            threading.Event().wait()  # until SIGTERM or Ctrl-C
    app = build_app(config)
    print(f"{app.state.model} on {config.address}", file=sys.stderr)
    serve_here(app, config)
    return 0


if __name__ == "__main__":
    run(main, ServeConfig, "serve")
