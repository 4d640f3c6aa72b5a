"""Sampling with classifier-free guidance: Euler steps, or Adams-Bashforth ones of second order; and their times.

`integrate` takes all samples of a batch through the same steps. Elastic samples leave out the blocks at different
steps: in a batch each goes on by itself while it can do without them, and waits where it needs them; when all wait, the
blocks run once for all, at the times of each (`_integrate_waiting`). So batches stay whole, and a sample's route is
what it is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from elastic3d.diffusion.options import PipelineConfig, SamplingGrid, Solver
from elastic3d.elastic.context import BOTH_BRANCHES, Branch, Defer
from elastic3d.elastic.rows import put_rows, row_factor, rows_index
from elastic3d.elastic.session import ElasticSession
from elastic3d.errors import UserError

SomeBranches = tuple[Branch, ...]  # the conditional one, or both


class Velocity(Protocol):
    """A DiT: latents (B,N,C), t (B,), condition (B,M,Cc) -> velocity (B,N,C)."""

    def __call__(
        self, latents: Tensor, t: Tensor, condition: Tensor, guidance: Tensor | None = None
    ) -> Tensor: ...


@torch.no_grad()
def sample(
    dit: Velocity,
    condition: Tensor,
    shape: tuple[int, int],
    times: Tensor,
    guidance: float,
    generators: Sequence[torch.Generator],
    **options: Any,
) -> Tensor:
    """Integrate from noise to data: condition (B,M,Cc) -> latents (B,N,C) in fp32, with `shape` = (N, C).

    Each sample's noise comes from its own generator, so that it does not depend on its batch mates. `options` are those
    of `integrate`. ValueError for a generator count other than B.
    """
    if len(generators) != condition.shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {condition.shape[0]}")
    noise = [torch.randn(shape, generator=g, device=g.device, dtype=torch.float32) for g in generators]
    return integrate(dit, condition, torch.stack(noise).to(condition.device), times, guidance, **options)


def integrate(
    dit: Velocity,
    condition: Tensor,
    noise: Tensor,
    times: Tensor,
    guidance: float,
    *,
    solver: Solver = Solver.euler,
    guidance_embed: bool = False,
    sequential: bool = False,
    session: ElasticSession | None = None,
    one_branch: Callable[[float], bool] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Noise (B,N,C), condition (B,M,Cc) -> latents (B,N,C), in S steps along times (S+1,), all of them with gradients.

    Guidance g: v = v_uncond + g (v_cond - v_uncond) (2207.12598), the unconditional branch sees zeros; g = 1
    or less runs the conditional branch alone. A guidance-embedded model takes g as an input and runs one branch.
    `solver` ab2: from the second step on the line through the last two velocities is followed (Adams-Bashforth for
    uneven steps); it calls the model no more often.
    `sequential` runs the branches one after the other: half the memory. `one_branch(t)` says whether the conditional
    branch is enough at a time in [0,1]; None: nowhere. `session` is that of a model with routers: it is given the
    generation, each step and the branches, and says itself where one of them is enough.
    `on_step(i, S)` is called when all samples have done step i.
    """
    times = times.to(noise.device)
    moments, sizes = times.tolist(), times.diff().tolist()
    count = 1 if guidance <= 1.0 or guidance_embed else 2  # of branches
    tokens = torch.stack([condition, torch.zeros_like(condition)][:count])
    if session is not None:
        scale = guidance if count > 1 else None
        session.begin(len(noise), len(sizes), guidance=scale, times=moments[:-1])
        one_branch = session.one_branch
    guided = _Guided(dit, tokens, guidance, guidance_embed, sequential, session, one_branch or _nowhere)
    x = earlier = noise
    try:
        if session is not None and session.defers and len(noise) > 1 and not sequential:
            return _integrate_waiting(guided, noise, times, solver, on_step)
        for step, dt in enumerate(sizes):
            v = along = guided.velocity(x, step, dt, times[step], moments[step])
            if solver is Solver.ab2 and step > 0:
                along = v + dt / (2 * sizes[step - 1]) * (v - earlier)
            x, earlier = x + dt * along, v
            if on_step is not None:
                on_step(step + 1, len(sizes))
    finally:
        if session is not None:
            session.end()
    return x


def _nowhere(t: float) -> bool:
    return False


@dataclass(eq=False)
class _Guided:
    """The velocity of samples under guidance. `tokens` (K,B,M,Cc) are those of the branches, the conditional one first.

    Where one branch is enough, what guidance added when both last ran goes on, faded with 1/t.
    """

    dit: Velocity
    tokens: Tensor
    guidance: float
    embedded: bool
    sequential: bool
    session: ElasticSession | None
    one_branch: Callable[[float], bool]
    added: Tensor | float = 0.0  # by guidance at the time `since`
    since: float = 0.0

    def branches(self, t: float) -> SomeBranches:
        """Those that run at a time."""
        return BOTH_BRANCHES[: 1 if self.one_branch(t) else len(self.tokens)]

    def velocity(self, x: Tensor, step: int, dt: float, t: Tensor, now: float) -> Tensor:
        """That of all samples x (B,N,C) at a step of size dt and its time, on the device (t) and here (`now`)."""
        branches, found = self.branches(now), list[Tensor]()
        for part in [(branch,) for branch in branches] if self.sequential else [branches]:
            if self.session is not None:
                self.session.step(step, dt, part)
            found += self.evaluated(x, t.expand(len(x)), self.tokens[part[0] : part[-1] + 1])
        if len(found) == 1:
            return found[0] + self.since / now * self.added if self.since else found[0]
        added = found[0] - found[1]
        self.added, self.since = (self.guidance - 1) * added, now
        return found[1] + self.guidance * added

    def evaluated(self, x: Tensor, t: Tensor, tokens: Tensor) -> Sequence[Tensor]:
        """One call of the model: x (k,N,C), t (k,), tokens (K,k,M,Cc) of some branches -> their velocities (k,N,C)."""
        copies = len(tokens)
        scale = x.new_full((len(x),), self.guidance, dtype=torch.float32) if self.embedded else None
        v = self.dit(x.repeat(copies, 1, 1), t.repeat(copies), tokens.flatten(0, 1), scale)
        return v.float().chunk(copies)


# ------------------------------------------------------------------------------ samples that do not go step by step


def _integrate_waiting(
    guided: _Guided,
    noise: Tensor,
    times: Tensor,
    solver: Solver,
    on_step: Callable[[int, int], None] | None,
) -> Tensor:
    """As `integrate`, of samples that wait for each other where they need the blocks."""
    path = _Waiting(guided, noise, times, solver)
    while (reached := min(path.done)) < len(path.sizes):
        turn, defer = path.turn()
        groups = path.by_branches(turn)
        if len(groups) > 1 and defer is Defer.unless_all:
            defer = Defer.always  # those that need the blocks wait for the other group too
        for branches, rows in groups.items():
            path.advance(rows, path.velocity(branches, rows, defer))
        for step in range(reached, min(path.done)):
            if on_step is not None:
                on_step(step + 1, len(path.sizes))
    return path.x


@dataclass(eq=False)
class _Waiting:
    """Samples on their way from noise to data, each at a step of its own. What each of them does is what
    `integrate` does with all."""

    guided: _Guided
    x: Tensor  # (B,N,C)
    times: Tensor  # (S+1,)
    solver: Solver

    def __post_init__(self) -> None:
        assert self.guided.session is not None
        self.session = self.guided.session
        self.moments, self.sizes = self.times.tolist(), self.times.diff().tolist()
        self.done, self.waiting = [0] * len(self.x), set[int]()
        # velocities of the step before; what guidance added, at the times `since`
        self.earlier = self.added = torch.zeros_like(self.x)
        self.since = [0.0] * len(self.x)

    def turn(self) -> tuple[list[int], Defer]:
        """The samples that go next, and whether those that need the blocks have to wait."""
        left = [row for row, done in enumerate(self.done) if done < len(self.sizes)]
        asking = [row for row in left if row not in self.waiting]
        if not asking:
            self.waiting.clear()
            return left, Defer.never
        return asking, Defer.always if self.waiting else Defer.unless_all

    def here(self, values: Sequence[float], rows: list[int]) -> list[float]:
        """Of values by step those of some samples' next steps."""
        return [values[self.done[row]] for row in rows]

    def by_branches(self, rows: list[int]) -> dict[SomeBranches, list[int]]:
        """The samples by the branches that run at the times where they are."""
        found: dict[SomeBranches, list[int]] = {}
        for row, t in zip(rows, self.here(self.moments, rows), strict=True):
            found.setdefault(self.guided.branches(t), []).append(row)
        return found

    def velocity(self, branches: SomeBranches, rows: list[int], defer: Defer) -> Tensor:
        """Velocities (k,N,C) of some samples, with the branches in one call."""
        steps, guided = [self.done[row] for row in rows], self.guided
        # a view where all are at one step: a list of indices would be copied to a GPU, which waits for it
        t = self.times[steps] if len(set(steps)) > 1 else self.times[steps[0]].expand(len(rows))
        self.session.step(steps, self.here(self.sizes, rows), branches, rows, defer)
        tokens = guided.tokens[: len(branches)]
        tokens = tokens if len(rows) == tokens.shape[1] else tokens[:, rows]
        index, moments = rows_index(rows, self.x.device), self.here(self.moments, rows)
        found = guided.evaluated(self.x[index], t, tokens)
        if len(found) == 1:
            since = [self.since[row] for row in rows]
            if not any(since):
                return found[0]
            left = [at / t if at else 0.0 for at, t in zip(since, moments, strict=True)]
            return found[0] + row_factor(left, found[0]) * self.added[index]
        added = found[0] - found[1]
        # samples that are deferred come again at the same time
        self.added = put_rows(self.added, index, (guided.guidance - 1) * added)
        for row, moment in zip(rows, moments, strict=True):
            self.since[row] = moment
        return found[1] + guided.guidance * added

    def advance(self, rows: list[int], v: Tensor) -> None:
        """A step along velocities (k,N,C) for those of the samples that are not deferred."""
        if deferred := self.session.deferred:
            v = v[[place for place, row in enumerate(rows) if row not in deferred]]
            rows = [row for row in rows if row not in deferred]
            self.waiting.update(deferred)
        if not rows:
            return
        index, dt, along = rows_index(rows, v.device), self.here(self.sizes, rows), v
        if self.solver is Solver.ab2:
            steps = [self.done[row] for row in rows]
            bend = [d / (2 * self.sizes[i - 1]) if i else 0.0 for i, d in zip(steps, dt, strict=True)]
            along = v + row_factor(bend, v) * (v - self.earlier[index])
            self.earlier = put_rows(self.earlier, index, v)
        self.x = put_rows(self.x, index, self.x[index] + row_factor(dt, v) * along)
        for row in rows:
            self.done[row] += 1


# ------------------------------------------------------------------------------------------------- times of the steps


def timestep_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Sampling times (steps + 1,) from 0 to 1, uniform before the shift."""
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    t = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    return (t / (t + shift * (1 - t))).float()


def endpoint_grid(steps: int, shift: float = 1.0) -> Tensor:
    """Sampling times as Hunyuan3D-2 counts them: `steps` times from 0 to 1, both included, so steps - 1 moves.

    Its scheduler calls the model once more at t = 1 and moves by nothing; that pass is left out here.
    """
    return timestep_grid(max(steps - 1, 1), shift)


def consistency_grid(steps: int, segments: int = 100, train_steps: int = 1000) -> Tensor:
    """Sampling times (steps + 1,) of phased consistency models (2405.18407) as Hunyuan3D-2 turbo takes them.

    The training times i / (train_steps - 1) are cut into `segments`; every N-th segment starts a step. UserError for
    more steps than segments.
    """
    if not 1 <= steps <= segments:
        raise UserError(f"steps is {steps}, expected 1 to {segments} for this consistency model")
    starts = torch.arange(segments, dtype=torch.float64) * (train_steps // segments) - 1
    chosen = (torch.arange(steps, dtype=torch.float64) * segments / steps).floor().long()
    times = starts.clamp_min(0)[chosen] / (train_steps - 1)
    return torch.cat([times, torch.ones(1, dtype=torch.float64)]).float()


def late_start_grid(steps: int, shift: float = 1.0, smallest: float = 0.001) -> Tensor:
    """Sampling times (steps,) as Step1X-3D counts them: `steps` noise levels from 1 to 0.001, then 0.

    Its first step moves nothing, so that the second starts from pure noise at its own time: that pass is left out here.
    diffusers' scheduler shifts the smallest level twice: first alone, then with the others.
    """
    smallest = shift * smallest / (1 + (shift - 1) * smallest)
    sigma = torch.linspace(1.0, smallest, steps, dtype=torch.float64)[min(1, steps - 1) :]
    t = 1 - torch.cat([sigma, torch.zeros(1, dtype=torch.float64)])
    return (t / (t + shift * (1 - t))).float()


def moves(config: PipelineConfig, steps: int) -> int:
    """How often a model is moved in `steps` steps, which is what routers, few-step LoRA and policies count as steps."""
    return len(sampling_times(config, steps)) - 1


def sampling_times(config: PipelineConfig, steps: int) -> Tensor:
    """The times (moves + 1,) of `steps` steps in a model's own grid."""
    if config.grid is SamplingGrid.endpoint:
        return endpoint_grid(steps, config.shift)
    if config.grid is SamplingGrid.consistency:
        return consistency_grid(steps, config.segments)
    if config.grid is SamplingGrid.late_start:
        return late_start_grid(steps, config.shift)
    return timestep_grid(steps, config.shift)
