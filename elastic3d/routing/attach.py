"""Put routers on a model and take them off again; their weights as a state dict of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elastic3d.config.routing import RouterConfig
from elastic3d.routing.block import ElasticBlock, Place
from elastic3d.routing.protocol import BlockAdapter, ModelAdapter
from elastic3d.routing.router import build_conditioner, build_router, looks_ahead
from elastic3d.routing.session import RoutingSession

_HANDLE = "_routing"


def attach(model: nn.Module, adapter: ModelAdapter, config: RouterConfig | None = None) -> RoutingSession:
    """Wrap every block of `model` in place, with fresh routers; the session through which they are driven.

    The model keeps its class, its state dict's keys and its modules' names. Raises ValueError where it has
    routers already, or a block that the adapter can't narrow.
    """
    if is_attached(model):
        raise ValueError(f"this {type(model).__name__} has routers already: detach them first")
    config = config or RouterConfig()
    found = _blocks(model, adapter)
    if not found:
        raise ValueError(f"this {type(model).__name__} has no blocks to route")
    session = RoutingSession(config, adapter.family)
    device = next(model.parameters()).device
    deciding = 1 if looks_ahead(config) else len(found)
    session.conditioner = build_conditioner(config, deciding)
    if session.conditioner is not None:
        session.conditioner.to(device)
    start = 0
    for index, (parent, name, block_adapter, block) in enumerate(found):
        if parent is not found[start][0]:
            start = index
        router = None
        if index < deciding:
            streams = len(block_adapter.stream_names)
            router = build_router(config, block_adapter.width(block), streams).to(device)
        place = Place(name, index, range(start, start + len(parent)))
        wrapped = ElasticBlock(block, place, block_adapter, router, session.conditioner, session)
        session.blocks.append(wrapped)
        parent[int(name.rpartition(".")[2])] = wrapped
    handle = model.register_forward_pre_hook(_Enter(session, adapter), with_kwargs=True)
    model.__dict__[_HANDLE] = (session, handle)
    return session


def detach(model: nn.Module) -> None:
    """Take the routers off: the model is what it was before `attach`. ValueError where it has none."""
    session, handle = _attached(model)
    handle.remove()
    for wrapped in session.blocks:
        parent = model.get_submodule(wrapped.name.rpartition(".")[0])
        assert isinstance(parent, nn.ModuleList)
        parent[int(wrapped.name.rpartition(".")[2])] = wrapped.inner
    del model.__dict__[_HANDLE]


def is_attached(model: nn.Module) -> bool:
    """Whether `model` has routers."""
    return _HANDLE in model.__dict__


def session_of(model: nn.Module) -> RoutingSession:
    """The session of a model with routers; ValueError where it has none."""
    return _attached(model)[0]


def router_modules(model: nn.Module) -> nn.ModuleDict:
    """Every router and what they share, as one module: for optimizers, averages and counting."""
    session = session_of(model)
    modules: dict[str, nn.Module] = {
        f"{block.name}.router".replace(".", "/"): block.router
        for block in session.blocks
        if block.router is not None
    }
    modules |= {
        f"{block.name}.updates".replace(".", "/"): block.updates
        for block in session.blocks
        if block.updates is not None
    }
    if session.conditioner is not None:
        modules["conditioner"] = session.conditioner
    return nn.ModuleDict(modules)


def router_state(model: nn.Module) -> dict[str, Tensor]:
    """The routers' weights, `<block>.router.*`, `<block>.updates.*` and `conditioner.*`."""
    return {key.replace("/", "."): value for key, value in router_modules(model).state_dict().items()}


def load_router_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy routers' weights into a model with routers of the same architecture.

    Raises ValueError naming the first keys that are missing, unknown or mis-shaped; nothing is copied then.
    """
    own = router_state(model)
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})"
        for what, keys in (("missing", missing), ("unknown", unknown), ("mis-shaped", shapes))
        if keys
    ]
    if problems:
        raise ValueError(
            f"these routers do not fit this {type(model).__name__}: tensors {'; '.join(problems)}"
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


class _Enter:
    """A forward pre-hook that tells the session of each pass; an object, so that copies of the model copy
    it."""

    def __init__(self, session: RoutingSession, adapter: ModelAdapter) -> None:
        self.session, self.adapter = session, adapter

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.session.settings.elastic:
            self.session.enter(self.adapter.timestep(model, args, kwargs))


def _attached(model: nn.Module) -> tuple[RoutingSession, Any]:
    if not is_attached(model):
        raise ValueError(f"this {type(model).__name__} has no routers: attach them first")
    return model.__dict__[_HANDLE]


def _blocks(
    model: nn.Module, adapter: ModelAdapter
) -> list[tuple[nn.ModuleList, str, BlockAdapter, nn.Module]]:
    """(list, dotted name, adapter, block) of every block in order of execution."""
    found = []
    for list_name, block_adapter in adapter.block_lists(model):
        parent = model.get_submodule(list_name)
        assert isinstance(parent, nn.ModuleList)
        found += [(parent, f"{list_name}.{i}", block_adapter, block) for i, block in enumerate(parent)]
    return found
