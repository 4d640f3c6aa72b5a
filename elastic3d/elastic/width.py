"""Nested-prefix MLPs: masked in training, sliced at inference, with the same numbers (E-DiT; slimmable networks)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from elastic3d.elastic.families import MLPSite

Forward = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])


def prefix_length(hidden: int, ratio: float) -> int:
    """Hidden units of the prefix at `ratio` of the full width; at least one."""
    return max(1, round(hidden * ratio))


def prefix_mask(width: Tensor, hidden: int, ratios: Sequence[float]) -> Tensor:
    """One-hot widths (B,K) -> mask (B,hidden): 1 on the units of the taken prefix, with `width`'s gradient.

    A unit in the segment between widths k - 1 and k is on where width k or a larger one is taken.
    """
    at_least = width.flip(-1).cumsum(-1).flip(-1)
    ends = torch.tensor([0, *(prefix_length(hidden, ratio) for ratio in ratios)], device=width.device)
    return at_least.repeat_interleave(ends.diff(), dim=-1, output_size=hidden)


@contextmanager
def masked(
    block: nn.Module, sites: Sequence[MLPSite], width: Tensor, ratios: Sequence[float]
) -> Iterator[None]:
    """While it lasts, hidden units of `block`'s MLPs are multiplied by the mask of the one-hot widths
    (B,K)."""
    handles = []
    for site in sites:
        mask = prefix_mask(width, site.hidden, ratios)
        if site.fc2_offset:
            mask = torch.cat([mask.new_ones(len(mask), site.fc2_offset), mask], dim=-1)
        hook = functools.partial(_multiply, mask[:, None])
        handles.append(block.get_submodule(site.fc2).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _multiply(mask: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return args[0] * mask.to(args[0].dtype)


@dataclass(eq=False, repr=False)
class NarrowBlocks:
    """A block at each of its widths. Copies own no memory: every weight is the block's own, or a view of it.

    A view of columns has a stride, which matrix products take as they take a contiguous weight.
    """

    block: nn.Module
    full: Forward  # what runs the block at full width
    sites: Sequence[MLPSite]
    ratios: Sequence[float]
    compile_arguments: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._forward = self.full
        self._copies: dict[int, tuple[tuple[int, ...], Forward]] = {}

    def compile(self, arguments: dict[str, Any] | None) -> None:
        """Compile what runs the block, at every width; None: not."""
        self.compile_arguments = arguments
        self.full = self._forward if arguments is None else torch.compile(self._forward, **arguments)
        self.forget()

    def at(self, width: int) -> Forward:
        """What runs the block at width number `width`.

        Raises ValueError where a site is no plain `nn.Linear` (an unmerged LoRA, a quantised layer).
        """
        if width == len(self.ratios) - 1 or not self.sites:
            return self.full
        linears = [self._linear(name) for site in self.sites for name in (site.fc1, site.fc2)]
        learns = torch.is_grad_enabled() and any(linear.weight.requires_grad for linear in linears)
        if learns or any(is_parametrized(linear) for linear in linears):  # of this pass alone
            return self._copy(self.ratios[width])
        storage = tuple(linear.weight.data_ptr() for linear in linears)
        if width not in self._copies or self._copies[width][0] != storage:  # moved, cast or loaded anew
            self._copies[width] = (storage, self._copy(self.ratios[width]))
        return self._copies[width][1]

    def forget(self) -> None:
        """Drop the copies; they are made anew when they are needed."""
        self._copies.clear()

    def _linear(self, name: str) -> nn.Linear:
        linear = self.block.get_submodule(name)
        if type(linear) is not nn.Linear and not is_parametrized(linear):
            raise ValueError(f"{name} is a {type(linear).__name__}, expected nn.Linear: run with width=false")
        if (
            "forward" in linear.__dict__
        ):  # it computes with other weights than are stored, as layerwise casting does
            raise ValueError(f"a hook replaced the forward of {name}: run with width=false")
        return cast(nn.Linear, linear)

    def _copy(self, ratio: float) -> Forward:
        parts, units = {}, {site: prefix_length(site.hidden, ratio) for site in self.sites}
        for site, count in units.items():
            fc1, fc2 = self._linear(site.fc1), self._linear(site.fc2)
            rows, columns = site.fc1_offset + count, site.fc2_offset + count
            bias = None if fc1.bias is None else fc1.bias[:rows]
            parts[site.fc1] = linear_around(fc1.weight[:rows], bias)
            parts[site.fc2] = linear_around(fc2.weight[:, :columns], fc2.bias)
        narrow = with_modules(self.block, parts)
        for site, count in units.items():
            if site.attribute is not None:
                setattr(narrow, site.attribute, count)
        if self.compile_arguments is not None:
            return torch.compile(narrow.forward, **self.compile_arguments)
        return narrow.forward


def _shallow(module: nn.Module) -> nn.Module:
    """A module of its own that shares parameters and children."""
    twin = object.__new__(type(module))  # copy.copy would call the class, which FSDP replaces
    twin.__dict__.update(module.__dict__)
    twin._modules = dict(module._modules)
    for name in ("forward", "compile"):
        twin.__dict__.pop(name, None)
    twin._compiled_call_impl = None
    return twin


def with_modules(block: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A twin of a block with other modules at some dotted names; it shares all else with the block."""
    if "_hf_hook" in block.__dict__ or "_diffusers_hook" in block.__dict__:  # they are bound to the original
        raise ValueError(f"a hook replaced the forward of {type(block).__name__}: run with width=false")
    twin = _shallow(block)
    copied = {"": twin}
    for name, module in parts.items():
        *above, last = name.split(".")
        path, parent = "", twin
        for step in above:
            path += f".{step}"
            if path not in copied:
                child = parent._modules[step]
                assert child is not None
                if "forward" in child.__dict__:  # it is bound to the original, whose weights are wide
                    raise ValueError(
                        f"a hook replaced the forward of {type(child).__name__}: run with width=false"
                    )
                copied[path] = parent._modules[step] = _shallow(child)
            parent = copied[path]
        parent._modules[last] = module
    return twin


def linear_around(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around existing tensors. One with a gradient is no parameter of it: what it is made of learns."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        linear._parameters.pop(name)
        if torch.is_grad_enabled() and tensor.requires_grad:
            setattr(linear, name, tensor)
        else:
            setattr(linear, name, nn.Parameter(tensor.detach(), requires_grad=False))
    return linear


def stays_eager(function: Function) -> Function:
    """As `torch.compiler.disable(recursive=False)`, which imports the compiler (half a second) at decoration."""
    kept: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # so nobody compiles
            return function(*args, **kwargs)
        if not kept:
            kept.append(torch.compiler.disable(function, recursive=False))
        return kept[0](*args, **kwargs)

    return call  # type: ignore[return-value]
