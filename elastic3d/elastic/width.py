"""Nested-prefix MLPs: masked in training, sliced at inference, with the same numbers (E-DiT; slimmable networks)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from elastic3d.elastic.families import MLPSite


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
def masked(block: nn.Module, site: MLPSite, width: Tensor, ratios: Sequence[float]) -> Iterator[None]:
    """While it lasts, hidden units of `block`'s MLP are multiplied by the mask of the one-hot widths (B,K)."""
    fc2 = block.get_submodule(site.fc2)
    others = cast(int, fc2.in_features) - site.hidden
    mask = nn.functional.pad(prefix_mask(width, site.hidden, ratios), (others, 0), value=1.0)
    with fc2.register_forward_pre_hook(partial(_multiply, mask[:, None])):
        yield


def _multiply(mask: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    return args[0] * mask.to(args[0].dtype)


@contextmanager
def sliced(block: nn.Module, site: MLPSite, ratio: float) -> Iterator[None]:
    """While it lasts, `block`'s MLP has a prefix of its hidden units: views of the weights, which own no memory.

    A view of columns has a stride, which matrix products take as they take a contiguous weight.
    """
    units = prefix_length(site.hidden, ratio)
    fc1, fc2 = (plain_linear(block, name, "width=false") for name in (site.fc1, site.fc2))
    rows, columns = (size - site.hidden + units for size in (fc1.out_features, fc2.in_features))
    views = {f"{site.fc1}.weight": fc1.weight[:rows], f"{site.fc2}.weight": fc2.weight[:, :columns]}
    if fc1.bias is not None:
        views[f"{site.fc1}.bias"] = fc1.bias[:rows]
    try:
        if site.attribute is not None:
            setattr(block, site.attribute, units)
        with exchanged(block, views):
            yield
    finally:
        if site.attribute is not None:
            setattr(block, site.attribute, site.hidden)


@contextmanager
def exchanged(block: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, other tensors stand in for the parameters of a block at these dotted names.

    As `torch.func.functional_call`, which would go through the block's forward: that is where routers decide.
    """
    paths = [name.rpartition(".") for name in tensors]
    places: list[tuple[dict[str, Any], str]]
    places = [(block.get_submodule(path)._parameters, name) for path, _, name in paths]
    own = [parameters[name] for parameters, name in places]
    try:
        for (parameters, name), tensor in zip(places, tensors.values(), strict=True):
            parameters[name] = tensor
        yield
    finally:
        for (parameters, name), parameter in zip(places, own, strict=True):
            parameters[name] = parameter


def plain_linear(block: nn.Module, name: str, without: str) -> nn.Linear:
    """The linear layer of a block at a dotted name; ValueError, naming the option `without` which it works, for any
    other layer (an unmerged LoRA, a quantised one), and where a hook brings the weights that are computed with."""
    linear = block.get_submodule(name)
    if type(linear) is not nn.Linear:
        raise ValueError(f"{name} is a {type(linear).__name__}, expected nn.Linear: run with {without}")
    for part, marks in ((linear, ("forward",)), (block, ("_hf_hook", "_diffusers_hook"))):
        if any(mark in part.__dict__ for mark in marks):
            raise ValueError(f"a hook replaced the forward of {type(part).__name__}: run with {without}")
    return linear
