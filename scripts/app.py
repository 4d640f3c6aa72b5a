"""A page to drop an image on.

    python scripts/app.py
    python scripts/app.py model=hunyuan3d2 weights=FOLDER port=8080
    python scripts/app.py host=0.0.0.0 token=SECRET

Opens on this machine alone unless host= says otherwise, which needs a token: visitors log in as `elastic3d` with it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from _cli import run

from elastic3d.errors import UserError
from elastic3d.pipelines.options import DEFAULT_IMAGE_MODEL, DEFAULT_MODEL, BackboneName, GenerateConfig
from elastic3d.serve.config import ServeConfig

REPOSITORY = Path(__file__).resolve().parent.parent


def main(config: ServeConfig) -> int:
    """Load the models, then serve the page until SIGTERM or Ctrl-C."""
    config.token = config.token or os.environ.get("ELASTIC3D_TOKEN", "")
    config.require_token()
    try:
        from elastic3d.serve import app
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install 'elastic3d[app]'") from error
    from elastic3d.pipelines.hunyuan3d import load_pipeline
    from elastic3d.pipelines.text_to_image import TextToImagePipeline
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
    images = None

    def draw(prompt: str, seed: int):  # type: ignore[no-untyped-def]
        nonlocal images
        if images is None:  # loaded with the first prompt
            folder = REPOSITORY / DEFAULT_IMAGE_MODEL
            images = TextToImagePipeline.from_pretrained(BackboneName.small, folder, device=config.device)
        return images([prompt], [seed])[0].image

    with MeshQueue(pipeline, config.queue, config.batch_size, config.keep_s) as queue:
        page = app.build_app(queue, draw)
        print(f"{pipeline.config.model} on http://{config.host}:{config.port}", file=sys.stderr)
        app.launch(
            page,
            server_name=config.host,
            server_port=config.port,
            auth=("elastic3d", config.token) if config.token else None,
            max_file_size=int(config.max_megabytes * 1e6),
            quiet=True,
        )
    return 0


if __name__ == "__main__":
    run(main, ServeConfig, "app")
