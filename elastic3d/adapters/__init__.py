"""Block families, each adapted to the routing protocol; `attach` finds the one that fits a model.

    from elastic3d.adapters import attach, detach

    session = attach(model)                 # fresh routers
    session = attach(model, "routers/")     # trained ones, saved by `save_routers`
    detach(model)                           # the base model again

`model` may also be a pipeline of diffusers: its transformer gets the routers, and its loop drives the session.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from elastic3d.adapters.diffusers_pipeline import drive, release
from elastic3d.adapters.storage import load_router_config, load_routers, save_routers
from elastic3d.config.routing import RouterConfig
from elastic3d.models.initialise import without_random_weights
from elastic3d.routing.attach import attach as attach_with
from elastic3d.routing.attach import detach as detach_from
from elastic3d.routing.attach import is_attached, session_of
from elastic3d.routing.protocol import ModelAdapter
from elastic3d.routing.session import RoutingSession

__all__ = ["adapter_for", "attach", "detach", "is_attached", "load_routers", "save_routers", "session_of"]

_FAMILIES = {
    "ShapeDiT": ("elastic3d.adapters.shape_dit", "ShapeDiTAdapter"),
    "SkipDiT": ("elastic3d.adapters.skip_dit", "SkipDiTAdapter"),
    "FluxTransformer2DModel": ("elastic3d.adapters.flux", "FluxAdapter"),
    "QwenImageTransformer2DModel": ("elastic3d.adapters.qwen_image", "QwenImageAdapter"),
}


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter of a model's family; ValueError where there is none."""
    for base in type(model).__mro__:
        if base.__name__ in _FAMILIES:
            module, name = _FAMILIES[base.__name__]
            return getattr(importlib.import_module(module), name)()
    raise ValueError(f"no routing for {type(model).__name__}, expected one of {', '.join(_FAMILIES)}")


def attach(model: Any, routers: RouterConfig | str | Path | None = None) -> RoutingSession:
    """Put routers on every block of `model`, in place; the session through which they are driven.

    Args:
        model: a model of a known family, or a diffusers pipeline around one, which then drives the session itself.
        routers: an architecture for fresh routers, or a folder of trained ones (None: a fresh default).

    Raises:
        ValueError: an unknown model, or one that has routers already.
        UserError: a folder of routers that is broken or of another model; the model is left as it was.
    """
    if _is_pipeline(model):
        session = attach(model.transformer, routers)
        drive(model, session)
        return session
    adapter = adapter_for(model)
    if not isinstance(routers, (str, Path)):
        return attach_with(model, adapter, routers)
    with without_random_weights():
        session = attach_with(model, adapter, load_router_config(Path(routers), adapter.family))
    try:
        load_routers(model, Path(routers))
    except BaseException:
        detach_from(model)
        raise
    return session


def detach(model: Any) -> None:
    """Take the routers off a model or a pipeline: it is what it was before. ValueError where it has none."""
    if _is_pipeline(model):
        detach_from(model.transformer)
        release(model)
    else:
        detach_from(model)


def _is_pipeline(model: Any) -> bool:
    return not isinstance(model, nn.Module) and isinstance(getattr(model, "transformer", None), nn.Module)
