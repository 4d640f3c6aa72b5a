"""The models of a benchmark of pictures: the elastic one, the plain one, and others of its routers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from elastic3d.adapters import detach
from elastic3d.benchmark.images.options import ImageBenchmarkConfig
from elastic3d.benchmark.methods import DENSE, MAIN
from elastic3d.config.routing import ElasticConfig
from elastic3d.models.weights import find_weights
from elastic3d.pipelines.image_loading import weight_files
from elastic3d.pipelines.options import DEFAULT_IMAGE_MODEL
from elastic3d.pipelines.text_to_image import ROUTERS_NAME, TextToImagePipeline
from elastic3d.routing.session import RoutingSession
from elastic3d.utils.files import file_sha256


@dataclass(frozen=True)
class Defaults:
    """What a pipeline does where nothing is asked for."""

    steps: int
    guidance: float
    resolution: int
    shift: float
    elastic: ElasticConfig = field(default_factory=ElasticConfig)


@dataclass(frozen=True)
class ImageModel:
    """A pipeline as a `Subject` of the planner."""

    pipeline: TextToImagePipeline
    weights_sha256: str
    dense_sha256: str

    @property
    def config(self) -> Defaults:
        """Steps, guidance, pixels a side, timestep shift."""
        backbone = self.pipeline.backbone
        steps, guidance = backbone.default_sampling()
        return Defaults(steps, guidance, backbone.default_size, backbone.pipe.scheduler.config.shift)

    @property
    def dit(self) -> nn.Module:
        """The transformer."""
        return self.pipeline.backbone.transformer

    @property
    def session(self) -> RoutingSession | None:
        """Of its routers."""
        return self.pipeline.session


def load_image_models(config: ImageBenchmarkConfig, repository: Path) -> dict[str, ImageModel]:
    """`model` with its routers, `dense` without (the stock class, nothing attached), and a variant for each folder.

    Args:
        repository: where the bundled model is.

    Raises:
        UserError: a folder that holds no pipeline or routers, or such as do not fit.
    """
    folder = Path(config.weights) if config.weights else repository / DEFAULT_IMAGE_MODEL

    def load(routers: str | None) -> TextToImagePipeline:
        return TextToImagePipeline.from_pretrained(
            config.backbone, folder, routers, device=config.device, dtype=config.dtype
        )

    def digest(routers: Path | None) -> str:
        return file_sha256(*weight_files(folder), *([find_weights(routers)] if routers else []))

    plain = load(None)
    if plain.session is not None:
        detach(plain.backbone.pipe)
    dense = digest(None)
    models = {DENSE: ImageModel(plain, dense, dense)}
    own = Path(config.routers) if config.routers else folder / ROUTERS_NAME
    has_routers = bool(config.routers) or own.is_dir()
    models[MAIN] = (
        ImageModel(load(str(own)), digest(own), dense) if has_routers else ImageModel(plain, dense, dense)
    )
    for name, path in config.variants.items():
        models[name] = ImageModel(load(path), digest(Path(path)), dense)
    return models
