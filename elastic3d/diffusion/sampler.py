"""Sampling with classifier-free guidance: Euler steps, or Adams-Bashforth ones of second order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from elastic3d.config.generate import Solver
from elastic3d.diffusion.flow import timestep_grid
from elastic3d.routing.passes import BOTH_BRANCHES, Branch
from elastic3d.routing.session import RoutingSession


class Velocity(Protocol):
    """A DiT: latents (B,N,C), t (B,), condition (B,M,Cc) -> velocity (B,N,C)."""

    def __call__(
        self, latents: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None
    ) -> Tensor: ...


def initial_noise(
    shape: tuple[int, int], generators: Sequence[torch.Generator], device: torch.device
) -> Tensor:
    """Standard normal (B, *shape), sample b from generator b alone, so that it does not depend on its
    batch mates."""
    noise = [torch.randn(shape, generator=g, device=g.device) for g in generators]
    return torch.stack(noise).to(device)


@torch.no_grad()
def sample(
    dit: Velocity,
    condition: Tensor,
    shape: tuple[int, int],
    steps: int,
    guidance: float,
    generators: Sequence[torch.Generator],
    *,
    shift: float = 1.0,
    guidance_embed: bool = False,
    times: Tensor | None = None,
    solver: Solver = Solver.euler,
    sequential: bool = False,
    session: RoutingSession | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Integrate from noise to data: condition (B,M,Cc) -> latents (B,N,C) in fp32, with `shape` = (N, C).

    Guidance g: v = v_uncond + g (v_cond - v_uncond) (2207.12598), the unconditional branch sees zeros; g = 1
    runs the conditional branch alone. A guidance-embedded model takes g as an input and runs one branch.
    `times` (S+1,) replaces the grid that `steps` and `shift` give. `solver` ab2: from the second step on the line
    through the last two velocities is followed (Adams-Bashforth for uneven steps); it calls the model no more often.
    `sequential` runs the branches one after the other:
    half the memory. `session` is that of a model with routers: it is told of the generation, of each step and of the
    branches.
    `on_step(i, steps)` is called after step i. Raises ValueError for fewer than one step or a generator count
    other than B.
    """
    if len(generators) != condition.shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {condition.shape[0]}")
    times = timestep_grid(steps, shift) if times is None else times
    steps = len(times) - 1
    x = initial_noise(shape, generators, condition.device)
    passes = _passes(condition, guidance != 1.0 and not guidance_embed, sequential)
    scale = torch.full((condition.shape[0],), guidance, device=x.device) if guidance_embed else None
    if session is not None:
        session.begin(len(generators), steps)
    earlier: tuple[float, Tensor] | None = None  # step size and velocity of the step before
    for i in range(steps):
        dt = (times[i + 1] - times[i]).item()
        velocities: list[Tensor] = []
        for branches, tokens in passes:
            if session is not None:
                session.step(i, dt, branches)
            t = times[i].to(x.device).expand(tokens.shape[0])
            found = dit(x.repeat(len(branches), 1, 1), t, tokens, scale).float()
            velocities += found.chunk(len(branches))
        v = velocities[0]
        if len(velocities) > 1:
            v = velocities[1] + guidance * (v - velocities[1])
        x = x + dt * (v if earlier is None else v + dt / (2 * earlier[0]) * (v - earlier[1]))
        if solver is Solver.ab2:
            earlier = dt, v
        if on_step is not None:
            on_step(i + 1, steps)
    if session is not None:
        session.end()
    return x


def _passes(condition: Tensor, guided: bool, sequential: bool) -> list[tuple[tuple[Branch, ...], Tensor]]:
    """The calls of a step: branches, and the condition (branches * B,M,Cc) of each."""
    if not guided:
        return [((Branch.conditional,), condition)]
    zeros = torch.zeros_like(condition)
    if sequential:
        return [((Branch.conditional,), condition), ((Branch.unconditional,), zeros)]
    return [(BOTH_BRANCHES, torch.cat([condition, zeros]))]
