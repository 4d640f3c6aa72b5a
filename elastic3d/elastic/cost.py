"""FLOPs of a decision, of a recorded generation, and of dense passes. Two a multiply-add, matrix products
only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from elastic3d.elastic.family import BlockFlops, ModelAdapter
from elastic3d.elastic.router import RouteDecision
from elastic3d.elastic.trace import NOT_RUN, Trace


def decision_flops(decision: RouteDecision, block: BlockFlops, ratios: tuple[float, ...]) -> Tensor:
    """Executed FLOPs (B,) of one block: hard values, straight-through gradients to gates and widths."""
    ratio = decision.hard_width() @ decision.width_prob.new_tensor(ratios)
    return decision.hard_keep() * (block.fixed + block.mlp * ratio)


def executed_share(
    decisions: Sequence[RouteDecision], blocks: Sequence[BlockFlops], ratios: tuple[float, ...]
) -> Tensor:
    """Executed share (B,) of the dense blocks' FLOPs in one pass, with straight-through gradients."""
    dense = sum(block.dense for block in blocks)
    shares = [decision_flops(d, block, ratios) / dense for d, block in zip(decisions, blocks, strict=True)]
    return torch.stack(shares).sum(dim=0)


def block_flops(model: nn.Module, adapter: ModelAdapter, lengths: Sequence[int]) -> list[BlockFlops]:
    """FLOPs of each block in one dense pass of one sample with `lengths` tokens in its streams.

    Reads shapes alone: the model may lie on the meta device. A block of one stream sees all tokens.
    """
    found = []
    for name, block_adapter in adapter.lists:
        streams = len(block_adapter.stream_names)
        own = lengths if streams == len(lengths) else [sum(lengths)]
        found += [block_adapter.flops(block, own) for block in model.get_submodule(name).children()]
    return found


def dense_flops(model: nn.Module, adapter: ModelAdapter, lengths: Sequence[int]) -> int:
    """FLOPs of all of them."""
    return sum(block.dense for block in block_flops(model, adapter, lengths))


def trace_flops(trace: Trace) -> Tensor:
    """Executed FLOPs (S,2,B,I) fp64 of the blocks; a reused residual costs none. Routers are not in it."""
    actions = trace.actions.long()
    table = torch.zeros(len(trace.blocks), 3 + len(trace.ratios), dtype=torch.float64)
    for index, block in trace.flops.items():
        table[index, 3:] = torch.tensor([block.at(ratio) for ratio in trace.ratios], dtype=torch.float64)
    return table[torch.arange(len(trace.blocks)), actions + 2]


def trace_dense_flops(trace: Trace) -> Tensor:
    """FLOPs (S,2,B,I) fp64 that the dense blocks would have spent on the same passes, and on the branch that the dense
    model runs beside them."""
    dense = torch.tensor([trace.flops[i].dense if i in trace.flops else 0 for i in range(len(trace.blocks))])
    ran = trace.actions != NOT_RUN
    return (ran[:, :1].expand_as(ran) if trace.one_branch else ran).double() * dense.double()


def trace_router_flops(trace: Trace) -> Tensor:
    """FLOPs (S,2,B,I) fp64 of the routers themselves."""
    routers = torch.tensor([trace.router_flops.get(i, 0) for i in range(len(trace.blocks))])
    return (trace.actions != NOT_RUN).double() * routers.double()


def trace_share(trace: Trace) -> Tensor:
    """Executed share (B,) of the dense blocks' FLOPs of each sample, over all steps and branches."""
    return trace_flops(trace).sum((0, 1, 3)) / trace_dense_flops(trace).sum((0, 1, 3))
