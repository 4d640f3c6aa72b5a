"""AdamW on fp32 masters, averaged weights, learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from elastic3d.config.train import LoopConfig, Schedule

Lists = list[Tensor]


def learning_rate(step: int, config: LoopConfig) -> float:
    """Learning rate of step `step`, 0 for the first: warm-up, then the schedule; no other state."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    left = max(config.steps - step, 0)
    if config.schedule is Schedule.constant:
        share = 1.0
    elif config.schedule is Schedule.trapezoid:
        share = min(1.0, left / max(config.decay_steps, 1))
    else:
        share = left / max(config.steps - config.warmup, 1)
        if config.schedule is Schedule.cosine:
            share = 0.5 - 0.5 * math.cos(math.pi * share)
    return config.learning_rate * share


class MasterAdamW:
    """AdamW (1711.05101) that steps fp32 masters of parameters in any floating-point format.

    A bf16 weight can't hold the small steps of training: three of its digits are lost to rounding. So
    gradients are gathered in fp32, masters are stepped, and their rounded values copied into the model. An
    fp32 parameter is its own master. Vectors and scalars (biases, norms) do not decay.

    Args:
        parameters: trainable parameters by name; the names key the saved state.
        config: betas and weight decay.
        factor: learning rate of a parameter, by name, over the run's.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: LoopConfig,
        factor: Callable[[str], float] = lambda _: 1.0,
    ) -> None:
        if not parameters:
            raise ValueError("there is no parameter to train")
        self.names = list(parameters)
        self.parameters: Lists = list(parameters.values())
        self.masters = [p if p.dtype is torch.float32 else p.detach().float() for p in self.parameters]
        for master in self.masters:
            master.requires_grad_()
        groups: dict[tuple[float, float], Lists] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            decay = config.weight_decay if master.ndim > 1 else 0.0
            groups.setdefault((factor(name), decay), []).append(master)
        fused = all(master.device.type in ("cpu", "cuda") for master in self.masters)
        self._adamw = torch.optim.AdamW(
            [{"params": group, "weight_decay": decay, "factor": f} for (f, decay), group in groups.items()],
            betas=(config.beta1, config.beta2),
            fused=fused,
        )

    def collect(self) -> None:
        """Add the model's gradients to the masters' and clear them; call it after each backward pass."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is master or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def step(self, rate: float, clip: float) -> Tensor:
        """One update with the collected gradients, which are cleared -> their norm before clipping, in fp32.

        Where the norm is not finite nothing is updated.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.masters, clip or math.inf)
        if norm.isfinite():
            for group in self._adamw.param_groups:
                group["lr"] = rate * group["factor"]
            self._adamw.step()
            self.write_back()
        self._adamw.zero_grad()
        return norm

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the masters, rounded, into the model."""
        pairs = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p is not m]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts, keyed `<parameter>/<what>`."""
        state = self._adamw.state
        return {
            f"{name}/{key}": value
            for name, master in zip(self.names, self.masters, strict=True)
            for key, value in state.get(master, {}).items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state_tensors`; ValueError if a state belongs to no parameter or lacks a moment."""
        found = {key.rpartition("/")[0] for key in tensors}
        if strangers := found - set(self.names):
            raise ValueError(f"the optimizer state has unknown parameters, first {min(strangers)}")
        for name, master in zip(self.names, self.masters, strict=True):
            if name not in found:  # never had a gradient
                continue
            keys = [f"{name}/{key}" for key in ("step", "exp_avg", "exp_avg_sq")]
            if missing := [key for key in keys if key not in tensors]:
                raise ValueError(f"the optimizer state lacks {missing[0]}")
            step, *moments = (tensors[key].clone() for key in keys)
            moments = [moment.to(master.device) for moment in moments]
            self._adamw.state[master] = {"step": step, "exp_avg": moments[0], "exp_avg_sq": moments[1]}


class Average:
    """Exponential moving average of masters, in fp32; early steps count more, so that it starts soon."""

    def __init__(self, masters: Lists, decay: float) -> None:
        self.decay = decay
        self.values = [master.detach().clone() for master in masters]

    def decay_at(self, step: int) -> float:
        """min(decay, (1 + step) / (10 + step)), the usual warm-up."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, masters: Lists, step: int) -> None:
        """Move towards the masters after step `step` (the first is 0)."""
        torch._foreach_lerp_(self.values, [m.detach() for m in masters], 1 - self.decay_at(step))

    @contextmanager
    def applied(self, parameters: Lists) -> Iterator[None]:
        """The model carries the averaged weights inside the block and its own afterwards."""
        kept = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, self.values)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, kept)
