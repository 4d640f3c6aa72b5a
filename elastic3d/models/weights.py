"""Models on disk: a folder with `config.json` and `model.safetensors`, loaded strictly or not at all."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from elastic3d.errors import UserError
from elastic3d.utils.options import from_dict, to_dict
from elastic3d.utils.structured import load_json, save_json
from elastic3d.utils.tensors import PICKLE_SUFFIXES, Stored, read_weights, save_weights, tensor_heads

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_CLASS_KEY = "_class_name"

Model = TypeVar("Model", bound="PretrainedMixin")


class PretrainedMixin:
    """`from_pretrained` and `save_pretrained` for an `nn.Module` that is built from its `config` alone."""

    config_class: ClassVar[type[Any]]
    config: Any

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Model:
        """The model saved in `folder`, in evaluation mode.

        Args:
            dtype: of the parameters; None is fp32, whatever the file holds. Buffers keep the model's own.
            device: None is the CPU.

        Raises:
            UserError: a missing, broken or third-party file; weights that do not fit the architecture or are not
                finite.
        """
        folder = Path(folder)
        config = load_config(folder, cls.config_class, cls.__name__)
        path = find_weights(folder)
        check_size(cls, config, folder)
        model = cls(config)  # type: ignore[call-arg]
        assert isinstance(model, nn.Module)
        load_strict(model, read_weights(path), str(path))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype or torch.float32)
        return model.to(device or "cpu").eval()

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `model.safetensors` to `folder`, each whole or not at all.

        Args:
            dtype: of the floating-point weights in the file; None keeps the model's.
        """
        assert isinstance(self, nn.Module)
        folder = Path(folder)
        save_weights(self.state_dict(), folder / WEIGHTS_NAME, dtype)
        save_json({_CLASS_KEY: type(self).__name__, **to_dict(self.config)}, folder / CONFIG_NAME)


def load_config(folder: Path, config_class: type[Any], class_name: str) -> Any:
    """The configuration in `folder/config.json`, which must be of a `class_name`."""
    if not folder.exists():
        raise UserError(f"there is no folder {folder}, expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}")
    path = folder / CONFIG_NAME
    values = load_json(path)
    found = values.pop(_CLASS_KEY, class_name)
    if found != class_name:
        raise UserError(f"{path} describes a {found}, expected a {class_name}")
    return from_dict(config_class, values, str(path))


def find_weights(folder: Path) -> Path:
    """`folder/model.safetensors`; UserError if it is missing, also where only a pickle is there."""
    path = folder / WEIGHTS_NAME
    if path.is_file():
        return path
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}, expected one with {CONFIG_NAME} and {WEIGHTS_NAME}")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UserError(f"{folder} has {pickles[0]}, a pickle that could run code; expected {WEIGHTS_NAME}")
    raise UserError(f"there is no file {path}")


def check_size(kind: type[Any], config: Any, folder: Path) -> None:
    """Whether `folder/model.safetensors` holds the weights of `kind(config)`, before anything is allocated for them.

    A hostile `config.json` may describe a model of any size: it is built on the meta device, and only as long as it
    has no more weights than the file.

    Raises:
        UserError: the configuration describes no model, or another than that of the file.
    """
    path = folder / WEIGHTS_NAME
    heads = tensor_heads(path)
    try:
        with _no_more_weights_than(heads, f"{folder / CONFIG_NAME}"), torch.device("meta"), _NoFills():
            model = kind(config)
    except UserError:
        raise
    except Exception as error:  # whatever sizes that make no sense run into
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / CONFIG_NAME} describes no {kind.__name__}: {reason}") from error
    check_fit(model, heads, str(path))


class _NoFills(TorchFunctionMode):
    """Initialisation does nothing: on the meta device there is nothing to fill, and trying loads torch's compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def _no_more_weights_than(heads: Mapping[str, Stored], source: str) -> Iterator[None]:
    """UserError as soon as this thread builds modules with twice the weights (some are set twice) of a file."""
    thread, most = threading.get_ident(), 2 * sum(head.numel for head in heads.values())
    left = [2 * len(heads) + 16, most + (1 << 16)]

    def count(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or threading.get_ident() != thread:
            return
        left[0] -= 1
        left[1] -= parameter.numel()
        if min(left) < 0:
            raise UserError(
                f"{source} describes a larger model than that of {WEIGHTS_NAME}, which has {len(heads)} tensors of"
                f" {most // 2:,} values"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
    """Copy `state` into `model`; every key and shape must agree and every value be finite.

    Args:
        assign: let the model take the tensors themselves, with their dtype and device; for one that was built on
            the meta device.

    Raises:
        UserError: as `check_fit`; also naming the first tensor that is not finite.
    """
    check_fit(model, state, source)
    floats = {name: value for name, value in state.items() if value.is_floating_point()}
    small = [name for name, value in floats.items() if value.itemsize < 2]
    if small:
        raise UserError(
            f"{source} has tensors of type {state[small[0]].dtype}, first {small[0]}; expected 16 bits or more"
        )
    bad = [name for name, value in floats.items() if not all_finite(value)]
    if bad:
        raise UserError(f"{source} has NaN or infinite values in {len(bad)} tensors, first in {bad[0]}")
    model.load_state_dict(dict(state), strict=True, assign=assign)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. The least and the largest say so, 30 times sooner than a mask in fp16."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    return bool(torch.stack(values.aminmax()).isfinite().all())


def check_fit(model: nn.Module, state: Mapping[str, Tensor] | Mapping[str, Stored], source: str) -> None:
    """Whether every key and shape of `state` agrees with `model`'s; no value is read.

    Raises:
        UserError: naming the first keys that are missing, unknown or mis-shaped, and how many there are.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for what, names in (("missing", missing), ("unknown", unknown), ("mis-shaped", shapes))
        if names
    ]
    if problems:
        raise UserError(f"{source} does not fit {type(model).__name__}: tensors {'; '.join(problems)}")


def __getattr__(name: str) -> Any:
    """`load_hunyuan3d` is found here too; its module needs the models, which need this one."""
    if name in ("load_hunyuan3d", "load_hunyuan3d_vae"):
        return getattr(importlib.import_module("elastic3d.checkpoints.hunyuan3d"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
