"""Put routers on a model and take them off again; their weights as a state dict and a folder of their own.

The folder has `config.json` and `model.safetensors`; the base model's is not touched.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic3d.elastic.block import ElasticBlock, Place
from elastic3d.elastic.compiling import stays_eager
from elastic3d.elastic.config import RouterConfig, RouterVariant
from elastic3d.elastic.diffusers_loop import drive
from elastic3d.elastic.family import BlockAdapter, ModelAdapter
from elastic3d.elastic.router import build_conditioner, build_router, decides_per_step
from elastic3d.elastic.session import ElasticSession
from elastic3d.errors import UserError
from elastic3d.models.weights import CONFIG_NAME, WEIGHTS_NAME, all_finite, find_weights, load_config
from elastic3d.utils.options import to_dict
from elastic3d.utils.structured import save_json
from elastic3d.utils.tensors import read_weights, save_weights

_HANDLE = "_elastic"
_FAMILIES = {
    "ShapeDiT": ("elastic3d.elastic.families.shape_dit", "ShapeDiTAdapter"),
    "SkipDiT": ("elastic3d.elastic.families.hunyuan21_dit", "SkipDiTAdapter"),
    "FluxTransformer2DModel": ("elastic3d.elastic.families.flux", "FluxAdapter"),
    "QwenImageTransformer2DModel": ("elastic3d.elastic.families.qwen_image", "QwenImageAdapter"),
}


def attach_with(
    model: nn.Module, adapter: ModelAdapter, config: RouterConfig | None = None
) -> ElasticSession:
    """Give every block of `model` a forward that asks a fresh router first; the session through which they are driven.

    Its modules stay what they are, and so do its state dict and its parameters. Raises ValueError where it has
    routers already, or a block that the adapter can't narrow.
    """
    if is_attached(model):
        raise ValueError(f"this {type(model).__name__} has routers already: detach them first")
    config = config or RouterConfig()
    found = _blocks(model, adapter)
    if not found:
        raise ValueError(f"this {type(model).__name__} has no blocks to route")
    session = ElasticSession(config, adapter.family)
    device = next(model.parameters()).device
    deciding = 1 if decides_per_step(config) else len(found)
    if config.variant is RouterVariant.none:
        deciding = 0
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
        session.blocks.append(ElasticBlock(block, place, block_adapter, router, session))
    handle = model.register_forward_pre_hook(_Enter(session, adapter), with_kwargs=True)
    model.__dict__[_HANDLE] = (session, handle)
    return session


def detach(model: Any) -> None:
    """Take the routers off a model or a pipeline: it is what it was before. ValueError where it has none."""
    if _is_pipeline(model):
        detach(model.transformer)
        return
    session, handle = _attached(model)
    handle.remove()
    if session.driver is not None:
        session.driver.hook.remove()
    for block in session.blocks:
        block.detach()
    del model.__dict__[_HANDLE]


def is_attached(model: nn.Module) -> bool:
    """Whether `model` has routers."""
    return _HANDLE in model.__dict__


def session_of(model: nn.Module) -> ElasticSession:
    """The session of a model with routers; ValueError where it has none."""
    return _attached(model)[0]


def router_modules(model: nn.Module) -> nn.ModuleDict:
    """Every router and what they share, as one module: for optimizers, averages and counting."""
    return nn.ModuleDict({name.replace(".", "/"): part for name, part in session_of(model).parts.items()})


def router_state(model: nn.Module) -> dict[str, Tensor]:
    """The routers' weights, `<block>.router.*`, `<block>.few_step.*` and `conditioner.*`."""
    return {key.replace("/", "."): value for key, value in router_modules(model).state_dict().items()}


def todays_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Routers' weights as an older version saved them, too, by today's names."""
    return {key.replace(".updates.", ".few_step."): tensor for key, tensor in state.items()}


def load_router_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy routers' weights into a model with routers of the same architecture.

    Raises ValueError naming the first keys that are missing, unknown or mis-shaped; nothing is copied then.
    """
    own, state = router_state(model), todays_keys(state)
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

    def __init__(self, session: ElasticSession, adapter: ModelAdapter) -> None:
        self.session, self.adapter = session, adapter

    @stays_eager
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.session.settings.elastic:
            self.session.enter(self.adapter.timestep(model, args, kwargs))


def _attached(model: nn.Module) -> tuple[ElasticSession, Any]:
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


def save_routers(model: nn.Module, folder: str | Path) -> None:
    """Write the routers of a model to `folder`, each file whole or not at all."""
    save_weights(router_state(model), Path(folder) / WEIGHTS_NAME)
    save_router_config(model, folder)


def save_router_config(model: nn.Module, folder: str | Path) -> None:
    """Write the configuration of a model's routers alone: what a calibration changes."""
    session = session_of(model)
    save_json(
        {"_class_name": class_name(session.family), **to_dict(session.router_config)},
        Path(folder) / CONFIG_NAME,
    )


def load_router_config(folder: str | Path, family: str) -> RouterConfig:
    """The architecture of the routers in `folder`; UserError unless they are of `family`."""
    return load_config(Path(folder), RouterConfig, class_name(family))


def load_routers(model: nn.Module, folder: str | Path) -> None:
    """Copy the routers in `folder` into a model with routers of the same architecture.

    Raises UserError for a missing, broken or third-party file, and for routers that do not fit.
    """
    session, path = session_of(model), find_weights(Path(folder))
    config = load_router_config(folder, session.family)
    if config != session.router_config:
        raise UserError(f"{folder} has routers of another architecture ({to_dict(config)})")
    state = read_weights(path)
    bad = [name for name, value in state.items() if not all_finite(value)]
    if bad:
        raise UserError(f"{path} has NaN or infinite values in {len(bad)} tensors, first in {bad[0]}")
    try:
        load_router_state(model, state)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def class_name(family: str) -> str:
    """What `config.json` calls routers of a family."""
    return f"{family}Routers"


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter of a model's family; ValueError where there is none."""
    for base in type(model).__mro__:
        if base.__name__ in _FAMILIES:
            module, name = _FAMILIES[base.__name__]
            return getattr(importlib.import_module(module), name)()
    raise ValueError(f"no routing for {type(model).__name__}, expected one of {', '.join(_FAMILIES)}")


def attach(model: Any, routers: RouterConfig | str | Path | None = None) -> ElasticSession:
    """Put routers on every block of `model`, in place; the session through which they are driven.

    Args:
        model: a model of a known family, or a diffusers pipeline around one, which then drives the session itself, as
            does each that shares its transformer and scheduler. One with another scheduler is attached too: it gets
            the session of the transformer.
        routers: an architecture for fresh routers, or a folder of trained ones (None: a fresh default).

    Raises:
        ValueError: an unknown model, or one that has routers already.
        UserError: a folder of routers that is broken or of another model; the model is left as it was.
    """
    if _is_pipeline(model):
        if is_attached(model.transformer) and routers is None:
            session = session_of(model.transformer)
            if session.driver is None or all(known is not model for known in session.driver.pipelines):
                drive(model, session)
                return session
        session = attach(model.transformer, routers)
        try:
            drive(model, session)
        except ValueError:
            detach(model.transformer)
            raise
        return session
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


def _is_pipeline(model: Any) -> bool:
    return not isinstance(model, nn.Module) and isinstance(getattr(model, "transformer", None), nn.Module)
