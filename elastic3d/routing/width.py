"""Nested-prefix MLPs: masked in training, sliced at inference, with the same numbers (E-DiT; slimmable
networks)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from elastic3d.routing.protocol import MLPSite


def prefix_length(hidden: int, ratio: float) -> int:
    """Hidden units of the prefix at `ratio` of the full width; at least one."""
    return max(1, round(hidden * ratio))


def prefix_mask(width: Tensor, hidden: int, ratios: Sequence[float]) -> Tensor:
    """One-hot widths (B,K) -> mask (B,hidden): 1 on the units of the taken prefix, with `width`'s gradient.

    A unit in the segment between widths k - 1 and k is on where width k or a larger one is taken.
    """
    at_least = width.flip(-1).cumsum(-1).flip(-1)
    ends = [prefix_length(hidden, ratio) for ratio in ratios]
    segments = torch.tensor(
        [end - start for start, end in zip([0, *ends], ends, strict=False)], device=width.device
    )
    return at_least.repeat_interleave(segments, dim=-1, output_size=hidden)


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
        handles.append(block.get_submodule(site.fc2).register_forward_pre_hook(_multiply(mask[:, None])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _multiply(mask: Tensor):  # type: ignore[no-untyped-def]  # a forward pre-hook
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return args[0] * mask.to(args[0].dtype)

    return hook


class NarrowBlocks:
    """Copies of a block with narrower MLPs. They own no memory: every weight is the block's own, or a view of
    it.

    A view of columns has a stride, which matrix products take as they take a contiguous weight.
    """

    def __init__(self, block: nn.Module, sites: Sequence[MLPSite], ratios: Sequence[float]) -> None:
        self.block, self.sites, self.ratios = block, tuple(sites), tuple(ratios)
        self.compile_arguments: dict[str, object] | None = None
        self._copies: dict[int, tuple[tuple[int, ...], nn.Module]] = {}

    def at(self, width: int) -> nn.Module:
        """The block at width number `width`; the block itself at full width.

        Raises ValueError where a site is no plain `nn.Linear` (an unmerged LoRA, a quantised layer).
        """
        if width == len(self.ratios) - 1 or not self.sites:
            return self.block
        linears = [self._linear(name) for site in self.sites for name in (site.fc1, site.fc2)]
        if any(is_parametrized(linear) for linear in linears):  # the weight is computed anew at each access
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
        return cast(nn.Linear, linear)

    def _copy(self, ratio: float) -> nn.Module:
        narrow = _shallow(self.block)
        for site in self.sites:
            units = prefix_length(site.hidden, ratio)
            fc1, fc2 = self._linear(site.fc1), self._linear(site.fc2)
            rows, columns = site.fc1_offset + units, site.fc2_offset + units
            bias = None if fc1.bias is None else fc1.bias.detach()[:rows]
            _replace(narrow, site.fc1, _view(fc1.weight.detach()[:rows], bias))
            _replace(narrow, site.fc2, _view(fc2.weight.detach()[:, :columns], fc2.bias))
            if site.attribute is not None:
                setattr(narrow, site.attribute, units)
        if self.compile_arguments is not None:
            narrow.compile(**self.compile_arguments)
        return narrow


def _shallow(module: nn.Module) -> nn.Module:
    """A module of its own that shares parameters and children."""
    if "forward" in module.__dict__:  # it is bound to the original, whose weights are wide
        raise ValueError(f"a hook replaced the forward of {type(module).__name__}: run with width=false")
    twin = object.__new__(type(module))  # copy.copy would call the class, which FSDP replaces
    twin.__dict__.update(module.__dict__)
    twin._modules = dict(module._modules)
    twin._compiled_call_impl = None
    return twin


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at a dotted name below `root`, with shallow copies of the modules on the way."""
    parent, *rest = name.split(".", 1)
    if not rest:
        root._modules[parent] = module
        return
    child = root._modules[parent]
    assert child is not None
    if "_twin" not in child.__dict__:  # another site may have copied it already
        child = _shallow(child)
        child.__dict__["_twin"] = True
        root._modules[parent] = child
    _replace(child, rest[0], module)


def _view(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around existing tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
