"""Put routers on a model and take them off again; their weights as a state dict and a folder of their own.

The folder has `config.json`, `curves.json` and `model.safetensors`; the base model's is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elastic3d.elastic.block import ElasticBlock
from elastic3d.elastic.config import RouterConfig, RouterCurves, Scope
from elastic3d.elastic.context import RouteSource
from elastic3d.elastic.diffusers_loop import drive, drives
from elastic3d.elastic.families import ModelAdapter, diffusers_blocks, hunyuan21_dit, shape_dit
from elastic3d.elastic.few_step import FewStepLoRA
from elastic3d.elastic.router import Conditioner, Router
from elastic3d.elastic.session import ElasticSession
from elastic3d.errors import UserError
from elastic3d.models.weights import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    find_weights,
    load_config,
    load_strict,
    read_weights,
    save_weights,
)
from elastic3d.utils.files import load_json, save_json
from elastic3d.utils.old_names import WEIGHTS
from elastic3d.utils.options import from_dict, renamed, to_dict

ROUTER_CURVES_NAME = "curves.json"
# What a training, that of the few-step LoRA and a calibration note beside the routers.
ROUTER_RECORDS = ("training.json", "training.csv", "few_step.json", "few_step.csv", "calibration.json")
Architecture = RouterConfig | str | Path | None  # or the folder of trained routers that have one
Source = RouteSource | None
_SESSION = "_elastic"
_FAMILIES = {  # by the name of the model's class, as diffusers is not imported here
    "ShapeDiT": shape_dit.ADAPTER,
    "SkipDiT": hunyuan21_dit.ADAPTER,
    "FluxTransformer2DModel": diffusers_blocks.FLUX,
    "QwenImageTransformer2DModel": diffusers_blocks.QWEN_IMAGE,
}


class Routers(nn.ModuleDict):
    """What `router_modules` returns; errors name it by this class."""


# ---------------------------------------------------------------------------------------------------- on and off


def attach(model: Any, routers: Architecture = None, source: Source = None) -> ElasticSession:
    """Put routers on every block of `model`, in place; the session through which they are driven.

    Its modules stay what they are, and so do its state dict and its parameters.

    Args:
        model: a model of a known family, or a diffusers pipeline around one, which then drives the session itself, as
            does each that shares its transformer and scheduler. One with another scheduler is attached too: it gets
            the session of the transformer.
        routers: an architecture for fresh routers, or a folder of trained ones (None: a fresh default).
        source: decides in the place of routers, of which there are none then.

    Raises:
        ValueError: an unknown model, one that has routers already, or a block that can't be narrowed.
        UserError: a folder of routers that is broken or of another model; the model is left as it was.
    """
    if _is_pipeline(model):
        return _attach_pipeline(model, routers, source)
    adapter = adapter_for(model)
    if find_session(model) is not None:
        raise ValueError(f"this {type(model).__name__} has routers already: detach them first")
    if not isinstance(routers, (str, Path)):
        return _attach(model, adapter, routers or RouterConfig(), source)
    session = _attach(model, adapter, load_router_config(routers, adapter.family), source)
    try:
        path = find_weights(Path(routers))
        load_router_state(model, read_weights(path), str(path))
    except BaseException:
        detach(model)
        raise
    return session


def _attach(model: nn.Module, adapter: ModelAdapter, config: RouterConfig, source: Source) -> ElasticSession:
    """Give every block a forward that asks a fresh router first, and tell the session of every pass of the model."""
    session = ElasticSession(config, adapter, source=source)
    lists = list(adapter.block_lists(model))
    count = sum(len(blocks) for _, _, blocks, _ in lists)
    if not count:
        raise ValueError(f"this {type(model).__name__} has no blocks to route")
    deciding = 0 if source is not None else 1 if config.scope is Scope.step else count
    if deciding:
        session.conditioner = Conditioner(config, deciding)
    for name, kind, blocks, stage in lists:
        for number, (index, inner) in enumerate(zip(stage, blocks, strict=True)):
            block = ElasticBlock(inner, kind, f"{name}.{number}", index, stage, config.ratios)
            if index < deciding:
                block.router = Router(config, kind.width(inner), len(kind.stream_names))
            if config.few_step_rank:
                block.few_step = FewStepLoRA(inner, config.few_step_rank)
            session.blocks.append(block)
    parts: dict[str, nn.Module | None] = {f"{block.name}.router": block.router for block in session.blocks}
    parts |= {f"{block.name}.few_step": block.few_step for block in session.blocks}
    parts |= {"conditioner": session.conditioner}
    found = {name.replace(".", "/"): part for name, part in parts.items() if part is not None}
    session.routers = Routers(found).to(next(model.parameters()).device)
    for block in session.blocks:  # now that none of them has been refused
        block.attach(session.run)
    session.hooks.append(model.register_forward_pre_hook(session.before_forward, with_kwargs=True))
    model.__dict__[_SESSION] = session
    return session


def _attach_pipeline(pipe: Any, routers: Architecture, source: Source) -> ElasticSession:
    """Routers on the transformer of a pipeline of diffusers; another pipeline that shares it is followed too."""
    transformer = pipe.transformer
    session = find_session(transformer)
    if session is not None and routers is None and not drives(pipe, session):
        drive(pipe, session)
        return session
    session = attach(transformer, routers, source)
    try:
        drive(pipe, session)
    except ValueError:
        detach(transformer)
        raise
    return session


def detach(model: Any) -> None:
    """Take the routers off a model or a pipeline: it is what it was before. ValueError where it has none."""
    model = model.transformer if _is_pipeline(model) else model
    session = session_of(model)
    for hook in session.hooks:
        hook.remove()
    for block in session.blocks:
        block.detach()
    del model.__dict__[_SESSION]


def has_routers(model: nn.Module) -> bool:
    """Whether a model has routers, rather than nothing or a policy."""
    session = find_session(model)
    return session is not None and session.conditioner is not None


def find_session(model: nn.Module) -> ElasticSession | None:
    """The session of a model with routers, or a policy; None where it has neither."""
    return model.__dict__.get(_SESSION)


def session_of(model: nn.Module) -> ElasticSession:
    """The session of a model with routers; ValueError where it has none."""
    if (session := find_session(model)) is None:
        raise ValueError(f"this {type(model).__name__} has no routers: attach them first")
    return session


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter of a model's family; ValueError where there is none."""
    for base in type(model).__mro__:
        if base.__name__ in _FAMILIES:
            return _FAMILIES[base.__name__]
    raise ValueError(f"no routing for {type(model).__name__}, expected one of {', '.join(_FAMILIES)}")


def _is_pipeline(model: Any) -> bool:
    return not isinstance(model, nn.Module) and isinstance(getattr(model, "transformer", None), nn.Module)


# ------------------------------------------------------------------------------------------------------- weights


def router_modules(model: nn.Module) -> nn.ModuleDict:
    """Every router and few-step LoRA, and the conditioner that they share: for optimizers, averages and counting."""
    return session_of(model).routers


def router_state(model: nn.Module) -> dict[str, Tensor]:
    """The routers' weights, `<block>.router.*`, `<block>.few_step.*` and `conditioner.*`."""
    return {key.replace("/", "."): value for key, value in router_modules(model).state_dict().items()}


def load_router_state(model: nn.Module, state: Mapping[str, Tensor], source: str = "this state") -> None:
    """Copy routers' weights into a model with routers of the same architecture.

    Raises UserError naming `source` and the first keys that are missing, unknown, mis-shaped or not finite; nothing is
    copied then.
    """
    routers = router_modules(model)
    own = {key.replace("/", "."): key for key in routers.state_dict()}
    todays = {key.replace(*WEIGHTS): value for key, value in state.items()}
    load_strict(routers, {own.get(key, key): value for key, value in todays.items()}, source)


def save_routers(model: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the routers of a model to `folder`, each file whole or not at all; `dtype` as `save_weights` takes it."""
    save_weights(router_state(model), Path(folder) / WEIGHTS_NAME, dtype)
    save_router_config(model, folder)


def holds_routers(folder: Path) -> bool:
    """Whether there are routers in a folder, whole or not; records of a training are none."""
    return any((folder / name).exists() for name in (CONFIG_NAME, WEIGHTS_NAME))


def named_router_folders(model: Path) -> list[Path]:
    """The folders of routers in a model's folder that have names of their own, such as `per_block`."""
    found = [path for path in sorted(model.glob(f"*/{CONFIG_NAME}")) if path.parent.name != "routers"]
    return [path.parent for path in found if str(load_json(path).get("_class_name")).endswith("Routers")]


def remove_routers(folder: Path) -> None:
    """Remove what `save_routers` wrote to a folder, the records of it, and the folder where nothing else is in it."""
    for name in (CONFIG_NAME, ROUTER_CURVES_NAME, WEIGHTS_NAME):
        (folder / name).unlink(missing_ok=True)
    remove_records(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def remove_records(folder: Path) -> None:
    """Remove the records of routers that are none of a folder any more."""
    for name in ROUTER_RECORDS:
        (folder / name).unlink(missing_ok=True)


def save_router_config(model: nn.Module, folder: str | Path) -> None:
    """Write the configuration of a model's routers alone, with the curves, which a calibration changes, in a file of
    their own."""
    session = session_of(model)
    values = {"_class_name": f"{session.adapter.family}Routers"} | to_dict(session.router_config)
    save_json(values.pop("curves"), Path(folder) / ROUTER_CURVES_NAME)
    save_json(values, Path(folder) / CONFIG_NAME)


def load_router_config(folder: str | Path, family: str) -> RouterConfig:
    """The architecture of the routers in `folder`, and their curves, which older versions kept in the same file.
    UserError unless they are of `family`, and for curves in neither file or other ones in each."""
    config: RouterConfig = load_config(Path(folder), RouterConfig, f"{family}Routers")
    path = Path(folder) / ROUTER_CURVES_NAME
    saved = renamed(RouterConfig, load_json(Path(folder) / CONFIG_NAME))
    if path.is_file():
        found = replace(config, curves=from_dict(RouterCurves, load_json(path), str(path)))
        if "curves" in saved and found != config:
            raise UserError(f"{path} has other curves than {CONFIG_NAME}, expected files of one version")
        return found
    if "curves" not in saved:
        raise UserError(f"{folder} has no {ROUTER_CURVES_NAME}, expected the routers' beside {CONFIG_NAME}")
    return config


def load_routers(model: nn.Module, folder: str | Path) -> None:
    """Copy the routers in `folder` into a model with routers of the same architecture.

    Raises UserError for a missing, broken or third-party file, and for routers that do not fit.
    """
    session = session_of(model)
    config = load_router_config(folder, session.adapter.family)
    if config != session.router_config:
        raise UserError(f"{folder} has routers of another architecture ({to_dict(config)})")
    path = find_weights(Path(folder))
    load_router_state(model, read_weights(path), str(path))
