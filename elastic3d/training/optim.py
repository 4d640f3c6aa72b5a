"""AdamW and Muon on fp32 masters, averaged weights, learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elastic3d.errors import UserError
from elastic3d.pipelines.runtime import fast_bfloat16
from elastic3d.training.distributed import gathered, is_sharded, local, scattered, total_norm
from elastic3d.training.options import LoopConfig, OptimizerName, Schedule

Lists = list[Tensor]
BETAS = (0.9, 0.99)  # of AdamW; 0.999 would still remember the warm-up at the end of a short run
MOMENTUM = 0.95  # of Muon
MAX_NORM = 1.0  # of a gradient, which is scaled down to it


def learning_rate(step: int, config: LoopConfig) -> float:
    """Learning rate of step `step`, 0 for the first: warm-up, then the schedule; no other state.

    A trapezoid whose decay is longer than what is left after the warm-up begins to decay at its end.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    left = max(config.steps - step, 0)
    if config.schedule is Schedule.constant:
        share = 1.0
    elif config.schedule is Schedule.trapezoid:
        share = min(1.0, left / max(min(config.decay_steps, config.steps - config.warmup), 1))
    else:
        share = left / max(config.steps - config.warmup, 1)
        if config.schedule is Schedule.cosine:
            share = 0.5 - 0.5 * math.cos(math.pi * share)
    return config.learning_rate * share


class Muon(torch.optim.Muon):
    """PyTorch's (2502.16982), with updates scaled to the size of AdamW's; in fp32 where bf16 products are emulated.

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


class MasterOptimizer:
    """AdamW (1711.05101), or with Muon (2502.16982), that steps fp32 masters of parameters in any float format.

    A bf16 weight can't hold the small steps of training: three of its digits are lost to rounding. So
    gradients are gathered in fp32, masters are stepped, and their rounded values copied into the model. An
    fp32 parameter is its own master. Vectors and scalars (biases, norms) do not decay.

    Muon steps the matrices inside blocks, with updates scaled to the size of AdamW's, so that one learning rate
    serves both; embeddings, the output layer, vectors and scalars stay with AdamW.

    Of sharded parameters a process steps its own part (`shards`); what is saved is whole.

    Args:
        parameters: trainable parameters by name; the names key the saved state.
        config: optimizer and weight decay.
        factor: learning rate of a parameter, by name, over the run's.

    Raises:
        UserError: Muon for sharded parameters.
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
        self.sharded = any(is_sharded(parameter) for parameter in self.parameters)
        if self.sharded and config.optimizer is OptimizerName.muon:
            raise UserError("optimizer=muon needs whole matrices, which FSDP shards: take optimizer=adamw")
        self.shards: Lists = [local(parameter) for parameter in self.parameters]
        self.masters = [p if p.dtype is torch.float32 else p.detach().float() for p in self.shards]
        for master in self.masters:
            master.requires_grad_()
        groups: dict[tuple[bool, float, float], Lists] = {}
        for name, master in zip(self.names, self.masters, strict=True):
            decay = config.weight_decay if master.ndim > 1 else 0.0
            muon = config.optimizer is OptimizerName.muon and master.ndim == 2 and _in_block(name)
            groups.setdefault((muon, factor(name), decay), []).append(master)
        chosen: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for (muon, rate_factor, decay), group in groups.items():
            chosen[muon].append({"params": group, "weight_decay": decay, "factor": rate_factor})
        self._optimizers: list[torch.optim.Optimizer] = []
        if chosen[False]:
            fused = all(master.device.type in ("cpu", "cuda") for master in self.masters)
            self._optimizers.append(torch.optim.AdamW(chosen[False], betas=BETAS, fused=fused))
        if chosen[True]:
            self._optimizers.append(Muon(chosen[True]))
        self._of = {
            master: optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for master in group["params"]
        }

    def collect(self) -> None:
        """Add the model's gradients to the masters' and clear them; call it after each backward pass."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter is master or parameter.grad is None:
                continue
            gradient = local(parameter.grad)
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad += gradient
            parameter.grad = None

    def step(self, rate: float, clip: float = MAX_NORM) -> Tensor:
        """One update with the collected gradients, which are cleared -> their norm before clipping, in fp32.

        Where the norm is not finite nothing is updated.
        """
        norm = total_norm([m.grad for m in self.masters if m.grad is not None], self.sharded)
        torch.nn.utils.clip_grads_with_norm_(self.masters, clip or math.inf, norm)
        if norm.isfinite():
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["factor"]
                optimizer.step()
            pairs = [(p, m) for p, m in zip(self.shards, self.masters, strict=True) if p is not m]
            if pairs:  # the masters, rounded, into the model
                with torch.no_grad():
                    torch._foreach_copy_([p for p, _ in pairs], [m for _, m in pairs])
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        return norm

    def whole(self, values: Lists) -> dict[str, Tensor]:
        """By name, the whole of values that are kept for each parameter, such as the masters (see `gathered`)."""
        rows = zip(self.names, values, self.parameters, strict=True)
        return {name: gathered(value, parameter) for name, value, parameter in rows}

    @torch.no_grad()
    def fill(self, values: Lists, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `whole`, into `values`; ValueError if one is missing, mis-shaped or not finite."""
        for name, value, parameter in zip(self.names, values, self.parameters, strict=True):
            if name not in tensors:
                raise ValueError(f"the weights lack {name}")
            check_tensor(name, tensors[name], parameter.shape)
            value.copy_(scattered(tensors[name], parameter))

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts, keyed `<parameter>/<what>` (see `gathered`)."""
        return {
            f"{name}/{key}": value if key == "step" else gathered(value, parameter)
            for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True)
            for key, value in self._of[master].state.get(master, {}).items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `state_tensors`.

        Raises:
            ValueError: a state belongs to no parameter, lacks a moment, or has one that is mis-shaped or not finite:
                the fused optimizers would write beyond it.
        """
        found = {key.rpartition("/")[0] for key in tensors}
        if strangers := found - set(self.names):
            raise ValueError(f"the optimizer state has unknown parameters, first {min(strangers)}")
        for name, master, parameter in zip(self.names, self.masters, self.parameters, strict=True):
            if name not in found:  # never had a gradient
                continue
            optimizer = self._of[master]
            wanted = MOMENTS[type(optimizer)]
            if missing := [f"{name}/{key}" for key in wanted if f"{name}/{key}" not in tensors]:
                raise ValueError(f"the optimizer state lacks {missing[0]}")
            state = {key: tensors[f"{name}/{key}"].clone() for key in wanted}
            for key, value in state.items():
                check_tensor(f"{name}/{key}", value, () if key == "step" else parameter.shape)
            # the fused kernel reads the count of steps where the parameter is, others on the CPU
            place = master.device if optimizer.defaults.get("fused") else torch.device("cpu")
            optimizer.state[master] = {
                key: value.to(place) if key == "step" else scattered(value, parameter).to(master.device)
                for key, value in state.items()
            }


MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum_buffer",),
}


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """ValueError unless a tensor from a file has this shape and finite floating-point values."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise ValueError(f"{name} has values that are no finite numbers")


def _in_block(name: str) -> bool:
    """Whether a parameter belongs to an element of a list of modules: a block."""
    return any(part.isdigit() for part in name.split(".")[:-2])


class Average:
    """Exponential moving average of masters, in fp32; early steps count more, so that it starts soon."""

    def __init__(self, masters: Lists, decay: float) -> None:
        self.decay = decay
        self.values = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, masters: Lists, step: int) -> None:
        """Move towards the masters after step `step` (the first is 0), with the usual warm-up of the decay."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [m.detach() for m in masters], 1 - decay)

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
