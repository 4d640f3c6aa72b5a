"""Muon (2502.16982) that is as fast on processors without bf16 as elsewhere."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from elastic3d.pipelines.runtime import fast_bfloat16

MOMENTUM = 0.95


class Muon(torch.optim.Muon):
    """PyTorch's, with updates scaled to the size of AdamW's; in fp32 where bf16 products are emulated.

    PyTorch's own makes every update orthogonal in bf16. Without bf16 in hardware that takes most of a training step.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all matrices (M,N), from their gradients."""
        if closure or all(fast_bfloat16(p.device) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        for group in self.param_groups:
            for matrix in group["params"]:
                if (gradient := matrix.grad) is not None:
                    moment = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(gradient))
                    moment.lerp_(gradient, 1 - group["momentum"])
                    nesterov = gradient.lerp(moment, group["momentum"])
                    update = orthogonal(nesterov, group["ns_coefficients"], group["ns_steps"], group["eps"])
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(matrix.shape)))
        return None


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """A matrix (M,N) with its singular values brought near 1, by Newton-Schulz steps in its own number format."""
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
