"""Routers on disk: a folder of their own with `config.json` and `model.safetensors`.

Here and not in `routing`, which knows no files; the base model's folder is not touched.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from elastic3d.config.routing import RouterConfig
from elastic3d.errors import UserError
from elastic3d.models.weights import CONFIG_NAME, WEIGHTS_NAME, all_finite, find_weights, load_config
from elastic3d.routing.attach import load_router_state, router_state, session_of
from elastic3d.utils.options import to_dict
from elastic3d.utils.structured import save_json
from elastic3d.utils.tensors import read_weights, save_weights


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

    Raises UserError for a missing, broken or foreign file, and for routers that do not fit.
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
