"""A page to drop an image on.

    python scripts/app.py
    python scripts/app.py model=hunyuan3d2 weights=FOLDER port=8080
    python scripts/app.py models=[hunyuan3d2,models/mine]
    python scripts/app.py host=0.0.0.0 token=SECRET

Opens on this machine alone unless host= says otherwise, which needs a token: visitors log in as `elastic3d` with it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from _cli import run

from elastic3d.errors import UserError
from elastic3d.pipelines.options import DEFAULT_IMAGE_MODEL, DEFAULT_MODEL
from elastic3d.serve.config import AppConfig

if TYPE_CHECKING:
    from PIL import Image

    from elastic3d.serve.models import Models


def main(config: AppConfig) -> int:
    """Load the first model, then serve the page until SIGTERM or Ctrl-C; files of visits go with it."""
    config.token = config.token or os.environ.get("ELASTIC3D_TOKEN", "")
    config.require_token()
    config.require_port()
    with tempfile.TemporaryDirectory(prefix="elastic3d-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            from elastic3d.serve import app
        except ImportError as error:
            raise UserError(f"{error.name} is missing: pip install 'elastic3d[app]'") from error
        from elastic3d.pipelines.text_to_3d import known_nouns
        from elastic3d.serve.queue import MeshQueue

        models, nouns = find_models(config), known_nouns()
        with MeshQueue(models, config.queue, config.rows, config.keep_s) as queue:
            page = app.build_app(queue, Drawer(config, nouns), nouns, config)
            app.launch(
                page,
                server_name=config.host,
                server_port=config.port,
                auth=("elastic3d", config.token) if config.token else None,
                max_file_size=int(config.max_megabytes * 1e6),
                quiet=True,
                prevent_thread_lock=True,
            )
            print(f"{models.names[0]} on {config.address}", file=sys.stderr)
            try:
                threading.Event().wait()  # until SIGTERM or Ctrl-C
            finally:
                page.close()
    return 0


def find_models(config: AppConfig) -> Models:
    """The model that is named, loaded, and those that can be chosen instead."""
    from elastic3d.checkpoints.options import PRESETS
    from elastic3d.pipelines.generation import load_pipeline
    from elastic3d.pipelines.runtime import find_model
    from elastic3d.serve.models import Models

    first, wanted = config.generate_config(), [config.generate_config() for _ in config.models]
    for one, name in zip(wanted, config.models, strict=True):
        if name not in PRESETS and not find_model(name).is_dir():
            raise UserError(f"models has {name}, expected a folder or one of {', '.join(PRESETS)}")
        one.model, one.weights, one.routers = str(find_model(name)), "", ""
        one.memory_budget = one.memory_budget if name in PRESETS else None
    loaders = {Path(one.model or DEFAULT_MODEL).name: partial(load_pipeline, one) for one in [first, *wanted]}
    if len(loaders) < 1 + len(wanted):
        raise UserError(f"models={config.models}: two models have one name, expected different ones")
    return Models(loaders)


class Drawer:
    """Images of prompts, by a model that is loaded with the first one."""

    def __init__(self, config: AppConfig, nouns: list[str]) -> None:
        from elastic3d.pipelines.text_to_image import TextToImagePipeline

        self._load = partial(TextToImagePipeline.from_pretrained, device=config.device, dtype=config.dtype)
        self._pipeline: TextToImagePipeline | None = None
        self._loading = threading.Lock()
        self._nouns = nouns

    def __call__(self, prompt: str, seed: int) -> tuple[Image.Image, str | None]:
        """The image, and what is wrong with the prompt."""
        from elastic3d.pipelines.text_to_3d import prompt_warning

        with self._loading:  # once, whoever asks meanwhile
            if self._pipeline is None:
                self._pipeline = self._load(DEFAULT_IMAGE_MODEL)
        return self._pipeline([prompt], [seed])[0].image, prompt_warning(prompt, self._nouns)


if __name__ == "__main__":
    run(main, AppConfig, "app")
