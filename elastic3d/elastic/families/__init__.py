"""Block families: how each kind of block is called, cut to a sub-batch, narrowed and counted."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from torch import Tensor, nn

from elastic3d.elastic.rows import Rows


@dataclass(frozen=True)
class MLPSite:
    """An MLP inside a block whose hidden units can be cut to a prefix.

    `fc1` and `fc2` are dotted names of `nn.Linear`s; where these are fused with other projections, the hidden units are
    the last outputs of `fc1` and the last inputs of `fc2`. `attribute` is the block's own integer attribute that states
    the hidden width, if its forward reads one.
    """

    fc1: str
    fc2: str
    hidden: int
    attribute: str | None = None


@dataclass(frozen=True)
class BlockFlops:
    """FLOPs of one sample's pass through a block (2 a multiply-add, matrix products only).

    `mlp` is the part that shrinks with the MLP's width, `fixed` the rest.
    """

    fixed: int
    mlp: int

    @property
    def dense(self) -> int:
        """The whole block at full width."""
        return self.fixed + self.mlp

    def at(self, ratio: float) -> float:
        """The block with its MLP at a share of the full width."""
        return self.fixed + ratio * self.mlp


@dataclass(frozen=True)
class BlockCall:
    """One call of a block: every argument by name, and which of them are token streams (B,L,D)."""

    arguments: Mapping[str, Any]
    streams: tuple[Tensor, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each stream."""
        return tuple(stream.shape[1] for stream in self.streams)


@dataclass(frozen=True)
class BlockAdapter(ABC):
    """One kind of block. Most of it follows from the names in the signature of the block's `forward`.

    stream_names: of the token streams (B,L,D), in the order in which routing sees them; output: dotted name of a
    linear layer that puts out a token's channels (D); mlp: those of the two of the MLP that is narrowed; returns: the
    streams' order in the block's return value, a tuple, None for a block that returns one tensor; per_sample: further
    arguments whose first axis is the batch, such as the modulation vector (B,D), None values are allowed; mlp_width:
    the block's own attribute that states the MLP's hidden width, which its first layer has beside other projections.
    """

    stream_names: tuple[str, ...]
    output: str
    mlp: tuple[str, str]
    returns: tuple[str, ...] | None = None
    per_sample: tuple[str, ...] = ()
    mlp_width: str | None = None

    def bind(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockCall:
        """The call with its arguments by name, however they were passed."""
        return self._call({**dict(zip(_parameters(type(block).forward), args, strict=False)), **kwargs})

    def _call(self, arguments: Mapping[str, Any]) -> BlockCall:
        return BlockCall(arguments, tuple(arguments[name] for name in self.stream_names))

    def take(self, call: BlockCall, rows: Rows) -> BlockCall:
        """The call for a sub-batch."""
        arguments = dict(call.arguments)
        for name in (*self.stream_names, *self.per_sample):
            if arguments.get(name) is not None:
                arguments[name] = arguments[name][rows]
        return self._call(arguments)

    def seen(self, call: BlockCall) -> tuple[Tensor, ...]:
        """What a router sees of the streams, of which it takes the mean token."""
        return call.streams

    def run(self, forward: Callable[..., Any], call: BlockCall) -> tuple[Tensor, ...]:
        """Run the block; its output streams in the order of `stream_names`."""
        return self.unpack(forward(**call.arguments))

    def unpack(self, output: Any) -> tuple[Tensor, ...]:
        """What the block returns as streams."""
        if self.returns is None:
            return (output,)
        by_name = dict(zip(self.returns, output, strict=True))
        return tuple(by_name[name] for name in self.stream_names)

    def pack(self, streams: tuple[Tensor, ...]) -> Any:
        """Streams as the block itself would return them."""
        if self.returns is None:
            return streams[0]
        by_name = dict(zip(self.stream_names, streams, strict=True))
        return tuple(by_name[name] for name in self.returns)

    def width(self, block: nn.Module) -> int:
        """Channels of a token (D)."""
        return cast(nn.Linear, block.get_submodule(self.output)).out_features

    def mlp_site(self, block: nn.Module) -> MLPSite | None:
        """The MLP that a router may narrow, None where there is none; ValueError where it has no plain prefix."""
        own = self.mlp_width  # the first layer may be a LoRA's around one
        hidden = getattr(block, own) if own else block.get_submodule(self.mlp[0]).out_features
        return MLPSite(*self.mlp, cast(int, hidden), own)

    def mlp_flops(self, block: nn.Module) -> int:
        """FLOPs of a token in the MLP at full width."""
        site = self.mlp_site(block)
        return 0 if site is None else 4 * self.width(block) * site.hidden

    @abstractmethod
    def flops(self, block: nn.Module, lengths: Sequence[int]) -> BlockFlops:
        """FLOPs of one sample with `lengths` tokens in each stream."""


class DoubleStreamAdapter(BlockAdapter):
    """A block that keeps two streams separate, of which the MLP of the first is narrowed (as in E-DiT's code)."""

    def flops(self, block: nn.Module, lengths: Sequence[int]) -> BlockFlops:
        """FLOPs of one sample: image and text tokens, or latents and condition."""
        D, (image, text) = self.width(block), lengths
        modulation, mlp = 2 * (2 * D * 6 * D), self.mlp_flops(block)  # of both streams, once a sample
        return BlockFlops(modulation + attention_flops(D, image + text) + text * mlp, image * mlp)


class SingleStreamAdapter(BlockAdapter):
    """A block that has all tokens as one sequence; its MLP is fused with the attention's projections."""

    def flops(self, block: nn.Module, lengths: Sequence[int]) -> BlockFlops:
        """FLOPs of one sample."""
        D, tokens = self.width(block), sum(lengths)
        modulation = 2 * D * 3 * D
        return BlockFlops(modulation + attention_flops(D, tokens), tokens * self.mlp_flops(block))


@dataclass(frozen=True)
class ModelAdapter:
    """One family of models: which modules are its blocks, and how its forward pass is given the time.

    `lists`: dotted names of the model's `nn.ModuleList`s of blocks in order of execution, each with its adapter;
    `time`: the argument with the time (B,) in [0,1], at a `position` among all; `noise_at_one`: it runs as in
    diffusers, from 1 to 0.
    """

    family: str
    lists: tuple[tuple[str, BlockAdapter], ...]
    time: str
    position: int
    noise_at_one: bool = False

    def block_lists(self, model: nn.Module) -> Iterator[tuple[str, BlockAdapter, list[nn.Module], range]]:
        """Of each list: its name, its adapter, its blocks, and their numbers in the model."""
        start = 0
        for name, kind in self.lists:
            blocks = list(model.get_submodule(name).children())
            yield name, kind, blocks, range(start, start + len(blocks))
            start += len(blocks)

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The time (B,), 0 = noise, one value per batch row, from the arguments of the model's forward pass."""
        t = kwargs[self.time] if self.time in kwargs else args[self.position]
        return 1 - t.float() if self.noise_at_one else t


@lru_cache(maxsize=64)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def attention_flops(width: int, tokens: int) -> int:
    """Projections to queries, keys, values and output; scores, and their product with the values."""
    return 2 * tokens * 4 * width**2 + 4 * tokens**2 * width


def block_flops(model: nn.Module, adapter: ModelAdapter, lengths: Sequence[int]) -> list[BlockFlops]:
    """FLOPs of each block in one dense pass of one sample with `lengths` tokens in its streams.

    Embeddings and the final layer are left out: they are always executed, and less than a block's worth. Reads shapes
    alone: the model may lie on the meta device. A block of one stream sees all tokens.
    """
    found = []
    for _, kind, blocks, _ in adapter.block_lists(model):
        own = lengths if len(kind.stream_names) == len(lengths) else [sum(lengths)]
        found += [kind.flops(block, own) for block in blocks]
    return found


def dense_flops(model: nn.Module, adapter: ModelAdapter, lengths: Sequence[int]) -> int:
    """FLOPs of all of them."""
    return sum(block.dense for block in block_flops(model, adapter, lengths))
