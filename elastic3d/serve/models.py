"""Several models, one of them in memory at a time."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from elastic3d.diffusion.dial import Dial
from elastic3d.diffusion.options import PipelineConfig, Quality
from elastic3d.elastic.config import ElasticOptions
from elastic3d.errors import UserError
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline

Load = Callable[[], ImageTo3DPipeline]


@dataclass(frozen=True)
class ModelInfo:
    """What is told of a model, whether or not it is in memory; `elastic`: it has routers; `border`: of its images;
    `budget`: that of its default steps where none is asked for."""

    name: str
    config: PipelineConfig
    elastic: bool
    dial: Dial | None
    weights_sha256: str | None
    border: float
    budget: float

    @classmethod
    def of(cls, pipeline: ImageTo3DPipeline) -> ModelInfo:
        """Of a loaded model."""
        config, elastic = pipeline.config, pipeline.session is not None
        runs = pipeline.configured(ElasticOptions(), steps=config.steps)[1].elastic
        budget, border = runs.budget if runs.elastic else 1.0, pipeline.encoder.config.border
        return cls(config.model, config, elastic, pipeline.dial, pipeline.weights_sha256, border, budget)

    @property
    def defaults(self) -> dict[str, float | str | None]:
        """Options of a request that runs as one without options: with a dial its default row, else steps and budget."""
        config, dialled = self.config, self.dial is not None
        return {
            "quality": Quality.default.name if dialled else None,
            "steps": None if dialled else config.steps,
            "budget": None if dialled else self.budget,
            "guidance": config.guidance,
            "resolution": config.resolution,
        }


class Models:
    """Models by name, loaded when they are asked for; the one before is dropped first.

    Args:
        loaders: the first one is loaded at once; a name is what a caller chooses by.
    """

    def __init__(self, loaders: Mapping[str, Load]) -> None:
        self._loaders = dict(loaders)
        self._lock = threading.RLock()
        self._loaded: tuple[str, ImageTo3DPipeline] | None = None
        self._infos: dict[str, ModelInfo] = {}
        with self.use(""):
            pass

    @classmethod
    def single(cls, pipeline: ImageTo3DPipeline) -> Models:
        """One model, loaded already."""
        return cls({pipeline.config.model: lambda: pipeline})

    @property
    def names(self) -> tuple[str, ...]:
        """What can be chosen, the default first."""
        return tuple(self._loaders)

    def check(self, name: str) -> str:
        """The name, or that of the default for an empty one. UserError for any other."""
        if name and name not in self._loaders:
            raise UserError(f"model is {name!r:.80}, expected one of {', '.join(self._loaders)}")
        return name or self.names[0]

    def info(self, name: str = "") -> ModelInfo:
        """Of a model, which is loaded for it once. UserError as `use`."""
        name = self.check(name)
        if name not in self._infos:
            with self.use(name):
                pass
        return self._infos[name]

    @contextmanager
    def use(self, name: str) -> Iterator[ImageTo3DPipeline]:
        """The model in memory, for one caller at a time. UserError for an unknown name, or whatever loading raises."""
        name = self.check(name)
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                self._loaded = None
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self._loaded = (name, self._loaders[name]())
                self._infos[name] = ModelInfo.of(self._loaded[1])
            yield self._loaded[1]
