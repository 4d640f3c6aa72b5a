"""The models of a benchmark: the elastic one, its dense self, and variants of either."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from elastic3d.benchmark.methods import DENSE, EULER, MAIN
from elastic3d.benchmark.options import BenchmarkConfig
from elastic3d.diffusion.options import SamplingGrid, Solver
from elastic3d.elastic import attach
from elastic3d.errors import UserError
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.weights import CONFIG_NAME, find_weights
from elastic3d.pipelines.image_to_3d import PIPELINE_NAME, ImageTo3DPipeline
from elastic3d.pipelines.options import DEFAULT_MODEL
from elastic3d.utils.files import file_sha256
from elastic3d.utils.structured import load_json

Models = dict[str, ImageTo3DPipeline]


def load_models(config: BenchmarkConfig, repository: Path) -> Models:
    """Every pipeline by name: `model`, `dense`, `euler` (dense, in equal Euler steps, where that differs), variants.

    Args:
        repository: where the bundled model is.

    Raises:
        UserError: a folder that holds no model or routers, or such as do not fit `model`.
    """
    folder = repository / DEFAULT_MODEL if config.model in ("", "default") else Path(config.model)
    main = ImageTo3DPipeline.from_pretrained(folder, config.device, config.dtype, dial=False)
    models = {MAIN: main, DENSE: main}
    if config.dense:
        models[DENSE] = ImageTo3DPipeline.from_pretrained(
            config.dense, config.device, config.dtype, dial=False
        )
    plain = replace(main.config, solver=Solver.euler, shift=1.0, grid=SamplingGrid.uniform)
    if plain != main.config:
        dense = models[DENSE]
        models[EULER] = ImageTo3DPipeline(dense.vae, dense.dit, dense.encoder, plain, dense.dense_sha256)
    for name, path in config.variants.items():
        models[name] = _variant(Path(path), main, folder, config)
    return models


def _variant(path: Path, main: ImageTo3DPipeline, folder: Path, config: BenchmarkConfig) -> ImageTo3DPipeline:
    """The model in a folder of its own; or `main` with another DiT; or with its own and other routers."""
    if (path / PIPELINE_NAME).is_file():
        return ImageTo3DPipeline.from_pretrained(path, config.device, config.dtype, dial=False)
    if not (path / CONFIG_NAME).is_file():
        raise UserError(
            f"{path} has neither {PIPELINE_NAME} nor {CONFIG_NAME}: it holds no model and no routers"
        )
    is_routers = str(load_json(path / CONFIG_NAME).get("_class_name", "")).endswith("Routers")
    base = folder / "dit" if is_routers else path
    dit = ShapeDiT.from_pretrained(base, next(main.dit.parameters()).dtype, main.device)
    if is_routers:
        attach(dit, path)
    digest = file_sha256(find_weights(folder / "vae"), find_weights(base), find_weights(path))
    return ImageTo3DPipeline(main.vae, dit, main.encoder, main.config, digest)
