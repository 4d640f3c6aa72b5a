"""Models on disk: a folder with `config.json` and `model.safetensors`, loaded strictly or not at all; tensor files."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from elastic3d.errors import UserError
from elastic3d.utils.files import atomic_path, check_file, load_json, printable, save_json
from elastic3d.utils.options import from_dict, to_dict

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_CLASS_KEY = "_class_name"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Number formats that arithmetic here is defined for; float8 is not.
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
# A matrix `x` (M,N) in 8 bits has its rows' scales (M,1) beside it, as compressed-tensors names them.
_SCALE = "_scale"
_MAGIC = {
    b"PK\x03\x04": "a pickle",  # torch.save since 1.6: a zip archive around a pickle
    b"\x80": "a pickle",
    b"version https://git-lfs": "a Git LFS pointer, so `git lfs pull` is needed",
}

Model = TypeVar("Model", bound="PretrainedMixin")


class PretrainedMixin:
    """`from_pretrained` and `save_pretrained` for an `nn.Module` that is built from its `config` alone.

    Whatever tensors it has are in its `state_dict`.
    """

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
            dtype: of the floating-point weights; None is fp32, whatever the file holds.
            device: None is the CPU.

        Raises:
            UserError: a missing, broken or third-party file; weights that do not fit or are not finite.
        """
        folder = Path(folder)
        config = load_config(folder, cls.config_class, cls.__name__)
        path = find_weights(folder)
        state = read_weights(path)
        values = sum(tensor.numel() for tensor in state.values())
        model = empty_model(cls, config, str(folder / CONFIG_NAME), values)
        return fill(model, state, str(path), dtype, device)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write `config.json` and `model.safetensors` to `folder`, each whole or not at all.

        Args:
            dtype: of the floating-point weights in the file (see `save_weights`); None keeps the model's.
        """
        assert isinstance(self, nn.Module)
        folder = Path(folder)
        save_weights(self.state_dict(), folder / WEIGHTS_NAME, dtype)
        save_json({_CLASS_KEY: type(self).__name__, **to_dict(self.config)}, folder / CONFIG_NAME)


def load_config(folder: Path, config_class: type[Any], class_name: str) -> Any:
    """The configuration in `folder/config.json`, which must be of a `class_name`."""
    if not folder.is_dir():
        raise UserError(_why_no_folder(folder))
    values = load_json(path := folder / CONFIG_NAME)
    found = values.pop(_CLASS_KEY, class_name)
    if found != class_name:
        raise UserError(f"{path} describes a {found}, expected a {class_name}")
    return from_dict(config_class, values, str(path))


def find_weights(folder: Path) -> Path:
    """`folder/model.safetensors`; UserError if it is missing, also where only a pickle is there."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(_why_no_weights(folder))
    return path


def _why_no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return _why_no_folder(folder)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        return f"{folder} has {pickles[0]}, a pickle that could run code; expected {WEIGHTS_NAME}"
    return f"there is no file {folder / WEIGHTS_NAME}"


def _why_no_folder(folder: Path) -> str:
    found, wanted = f"there is no folder {folder}", "one"
    if folder.exists():
        found, wanted = f"{folder} is a file", "a folder"
    return f"{found}, expected {wanted} with {CONFIG_NAME} and {WEIGHTS_NAME}"


def empty_model(kind: Any, config: Any, source: str = "", most: float = math.inf) -> Any:
    """`kind(config)` on the meta device: its names and shapes, and no memory.

    Args:
        source: the config.json, for error messages.
        most: values in the file of its weights. A hostile config.json may describe a model of any size: building ends
            where the file is too small for it.

    Raises:
        UserError: the configuration describes no model, or a larger one than the file's.
    """
    try:
        with torch.device("meta"), _Blueprint(source, most):
            return kind(config)
    except UserError:
        raise
    except Exception as error:  # whatever sizes that make no sense run into
        raise UserError(f"{source} describes no {kind.__name__}: {' '.join(str(error).split())}") from error


def plain_twin(model: Any) -> Any:
    """A model around the same parameters, without what is attached to the first one."""
    twin = empty_model(type(model), model.config)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return twin.eval()


class _Blueprint(TorchFunctionMode):
    """Initialisation does nothing: on the meta device there is nothing to fill, and trying loads torch's compiler."""

    def __init__(self, source: str, most: float) -> None:
        super().__init__()
        self.source, self.most = source, most
        self.left = 4 * most + (1 << 16)  # some tensors are made twice, or are no weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_) or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        result = func(*args, **kwargs)
        self.left -= result.numel() if isinstance(result, Tensor) else 0
        if self.left < 0:
            than = f"that of {WEIGHTS_NAME}, which has {self.most:,} values"
            raise UserError(f"{self.source} describes a larger model than {than}")
        return result


def fill(
    model: Any,
    state: Mapping[str, Tensor],
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """An empty model with weights of its own, in evaluation mode; arguments and errors as `from_pretrained`.

    What does not fit is told before anything is converted. Tensors are copied: those of a mapped file lie where they
    happen to be in it, and are read again whenever memory is short.
    """
    check_fit(model.state_dict(), state, f"{source} does not fit {type(model).__name__}")
    floats = dtype or torch.float32
    placed = {
        name: value.to(device or "cpu", floats if value.is_floating_point() else None, copy=True)
        for name, value in state.items()
    }
    _check_finite(placed, source)
    model.load_state_dict(placed, assign=True)
    return model.eval()


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into `model`; every key and shape must agree and every value be finite.

    Raises:
        UserError: as `check_fit`; also naming the first tensor that is not finite.
    """
    check_fit(model.state_dict(), state, f"{source} does not fit {type(model).__name__}")
    _check_finite(state, source)
    model.load_state_dict(state)


def _check_finite(state: Mapping[str, Tensor], source: str) -> None:
    if bad := [name for name, value in state.items() if not all_finite(value)]:
        raise UserError(f"{source} has NaN or infinite values in {len(bad)} tensors, first in {bad[0]}")


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. The least and the largest say so, 30 times sooner than a mask in fp16."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    return bool(torch.stack(values.aminmax()).isfinite().all())


def check_fit(own: Mapping[str, Any], state: Mapping[str, Any], what: str) -> None:
    """Compare names and shapes of `state` with those of `own`; no value is read. UserError: `what`, and the first
    tensors that are missing, unknown or mis-shaped, and how many there are."""
    wanted, found = ({name: tuple(each.shape) for name, each in some.items()} for some in (own, state))
    if found != wanted:
        raise UserError(f"{what}: tensors {_misfit(wanted, found)}")


def _misfit(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """How shapes by name differ, as `check_fit` tells it."""
    differences = {
        "missing": [name for name in wanted if name not in found],
        "unknown": [name for name in found if name not in wanted],
        "mis-shaped": [
            f"{name} {found[name]} instead of {shape}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ],
    }
    return "; ".join(
        f"{len(names)} {problem} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for problem, names in differences.items()
        if names
    )


# ------------------------------------------------------------------------------------------------ safetensors files


@dataclass(frozen=True)
class Stored:
    """What the head of a file says of one tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, BF16, ...

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def open_tensors(path: Path, names: Collection[str] = ()) -> Any:
    """A safetensors file, mapped, not read: a `safetensors.safe_open` for PyTorch.

    Args:
        names: of tensors that must be there.

    Raises:
        UserError: naming the file: it is missing, truncated, something else, of a number format such as float8, or
            lacks a tensor.
    """
    check_file(path, "a safetensors file")
    try:
        file = safe_open(path, "pt")
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(_why_unreadable(path, error)) from error
    if not dtypes.keys() >= set(names) or not set(dtypes.values()) <= set(_DTYPES):
        raise UserError(_why_unusable(path, dtypes, names))
    return file


def tensor_heads(path: Path) -> dict[str, Stored]:
    """Shape and number format of every tensor of a safetensors file, from its head alone; errors as `open_tensors`."""
    with open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: Stored(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def read_weights(path: Path, names: Collection[str] = ()) -> dict[str, Tensor]:
    """Every tensor of a safetensors file on the CPU, 8-bit matrices in fp32; arguments and errors as `open_tensors`."""
    with open_tensors(path, names) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    packed = [
        name for name, tensor in tensors.items() if tensor.dtype is torch.int8 and name + _SCALE in tensors
    ]
    return _unpacked(tensors, packed, path) if packed else tensors


def _unpacked(tensors: dict[str, Tensor], packed: Collection[str], path: Path) -> dict[str, Tensor]:
    """`packed` matrices in fp32, without their scales."""
    for name in packed:
        matrix, scale = tensors[name], tensors.pop(name + _SCALE)
        rows = [*matrix.shape[:1], 1]
        if list(scale.shape) != rows or not scale.is_floating_point():
            found = f"scales of {name} of the shape {list(scale.shape)} in {scale.dtype}"
            raise UserError(
                f"{printable(path)} has {found}, expected floating-point ones of the shape {rows}"
            )
        tensors[name] = matrix * scale.float()
    return tensors


def save_weights(state: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors to a safetensors file, whole or not at all.

    Args:
        dtype: of the floating-point tensors; None keeps their own. int8 keeps matrices (M,N) in 8 bits a value, with a
            scale for each row, and everything else in bf16: half the size of bf16.
    """
    tensors = {}
    for name, tensor in state.items():
        if dtype is torch.int8 and tensor.ndim == 2 and tensor.is_floating_point():
            matrix = tensor.detach().to("cpu", torch.float32)
            scale = (matrix.abs().amax(dim=1, keepdim=True) / 127).clamp(min=torch.finfo().tiny)
            tensors[name], tensors[name + _SCALE] = (matrix / scale).round().to(torch.int8), scale
            continue
        floats = torch.bfloat16 if dtype is torch.int8 else dtype
        kept = tensor.dtype if floats is None or not tensor.is_floating_point() else floats
        tensors[name] = tensor.detach().to("cpu", kept).contiguous().clone()
    with atomic_path(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # what it makes of an error of the operating system
            raise OSError(str(error)) from error
        temporary.chmod(mode)  # save_file would leave it readable by its owner alone


def _why_unusable(path: Path, dtypes: Mapping[str, str], names: Collection[str]) -> str:
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            wanted = ", ".join(_DTYPES)
            return f"{printable(path)} has tensors of type {dtype}, first {name}; expected one of {wanted}"
    lacking = next(name for name in names if name not in dtypes)
    return f"{printable(path)} has no tensor {lacking!r}, expected {', '.join(sorted(names))}"


def _why_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(32)
    for magic, kind in _MAGIC.items():
        if head.startswith(magic) or (path.suffix in PICKLE_SUFFIXES and kind == "a pickle"):
            return f"{printable(path)} is {kind}, expected a safetensors file"
    return f"{printable(path)} is truncated or no safetensors file ({error})"
