"""Block families, each adapted to the routing protocol; `attach` finds the one that fits a model.

from elastic3d.adapters import attach, detach

session = attach(model)                 # fresh routers
session = attach(model, "routers/")     # trained ones, saved by `save_routers`
detach(model)                           # the base model again
"""

from __future__ import annotations

import importlib
from pathlib import Path

from torch import nn

from elastic3d.adapters.storage import load_router_config, load_routers, save_routers
from elastic3d.config.routing import RouterConfig
from elastic3d.routing.attach import attach as attach_with
from elastic3d.routing.attach import detach, is_attached, session_of
from elastic3d.routing.protocol import ModelAdapter
from elastic3d.routing.session import RoutingSession

__all__ = ["adapter_for", "attach", "detach", "is_attached", "load_routers", "save_routers", "session_of"]

_FAMILIES = {
    "ShapeDiT": ("elastic3d.adapters.shape_dit", "ShapeDiTAdapter"),
}


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter of a model's family; ValueError where there is none."""
    for base in type(model).__mro__:
        if base.__name__ in _FAMILIES:
            module, name = _FAMILIES[base.__name__]
            return getattr(importlib.import_module(module), name)()
    raise ValueError(f"no routing for {type(model).__name__}, expected one of {', '.join(_FAMILIES)}")


def attach(model: nn.Module, routers: RouterConfig | str | Path | None = None) -> RoutingSession:
    """Put routers on every block of `model`, in place; the session through which they are driven.

    Args:
        routers: an architecture for fresh routers, or a folder of trained ones (None: a fresh default).

    Raises:
        ValueError: an unknown model, or one that has routers already.
        UserError: a folder of routers that is broken or of another model; the model is left as it was.
    """
    adapter = adapter_for(model)
    if not isinstance(routers, (str, Path)):
        return attach_with(model, adapter, routers)
    session = attach_with(model, adapter, load_router_config(Path(routers), adapter.family))
    try:
        load_routers(model, Path(routers))
    except BaseException:
        detach(model)
        raise
    return session
