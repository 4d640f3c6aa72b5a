"""Sampling with classifier-free guidance: Euler steps, or Adams-Bashforth ones of second order.

Elastic samples leave out the blocks at different steps. In a batch each goes on by itself while it can do without
them, and waits where it needs them; when all wait, the blocks run once for all, at the times of each. So batches stay
whole, and a sample's route is what it is alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from elastic3d.diffusion.flow import timestep_grid
from elastic3d.diffusion.options import Solver
from elastic3d.elastic.context import BOTH_BRANCHES, Branch, Defer
from elastic3d.elastic.session import ElasticSession

SomeBranches = tuple[Branch, ...]  # the conditional one, or both


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
    **options: Any,
) -> Tensor:
    """Integrate from noise to data: condition (B,M,Cc) -> latents (B,N,C) in fp32, with `shape` = (N, C).

    Each sample's noise comes from its own generator. `options` are those of `integrate`. Raises ValueError for fewer
    than one step or a generator count other than B.
    """
    if len(generators) != condition.shape[0]:
        raise ValueError(f"{len(generators)} generators for a batch of {condition.shape[0]}")
    noise = initial_noise(shape, generators, condition.device)
    return integrate(dit, condition, noise, steps, guidance, **options)


def integrate(
    dit: Velocity,
    condition: Tensor,
    noise: Tensor,
    steps: int,
    guidance: float,
    *,
    shift: float = 1.0,
    guidance_embed: bool = False,
    times: Tensor | None = None,
    solver: Solver = Solver.euler,
    sequential: bool = False,
    session: ElasticSession | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Integrate from given noise (B,N,C): condition (B,M,Cc) -> latents (B,N,C). Gradients go back through all steps.

    Guidance g: v = v_uncond + g (v_cond - v_uncond) (2207.12598), the unconditional branch sees zeros; g = 1
    runs the conditional branch alone. A guidance-embedded model takes g as an input and runs one branch.
    `times` (S+1,) replaces the grid that `steps` and `shift` give. `solver` ab2: from the second step on the line
    through the last two velocities is followed (Adams-Bashforth for uneven steps); it calls the model no more often.
    `sequential` runs the branches one after the other: half the memory. `session` is that of a model with routers: it
    is told of the generation, of each step and of the branches, and says where one of them is enough.
    `on_step(i, steps)` is called when all samples have done step i.
    """
    times = timestep_grid(steps, shift) if times is None else times
    path = _Path(noise, times, solver)
    guided = _Guided(dit, condition, guidance, guidance_embed, sequential, session)
    waits = False
    if session is not None:
        scale = guidance if len(guided.branches) > 1 else None
        session.begin(len(noise), len(path.sizes), guidance=scale, times=path.moments[:-1])
        waits = session.defers and len(noise) > 1 and not sequential
    try:
        while (reached := min(path.done)) < len(path.sizes):
            turn, defer = path.turn(waits)
            groups = guided.by_branches(path, turn)
            if len(groups) > 1 and defer is Defer.unless_all:
                defer = Defer.always  # those that need the blocks wait for the other group too
            for branches, rows in groups.items():
                v = guided.velocity(path, branches, rows, defer)
                path.advance(rows, v, session.deferred if session is not None else ())
            for step in range(reached, min(path.done)):
                if on_step is not None:
                    on_step(step + 1, len(path.sizes))
    finally:
        if session is not None:
            session.end()
    return path.x


class _Path:
    """Samples on their way from noise to data, each at a step of its own."""

    def __init__(self, x: Tensor, times: Tensor, solver: Solver) -> None:
        self.x, self.solver = x, solver
        self.times, self.moments, self.sizes = times.to(x.device), times.tolist(), times.diff().tolist()
        self.done = [0] * len(x)
        self.waiting: set[int] = set()
        self._earlier = torch.zeros_like(x)  # velocities of the step before

    def turn(self, waits: bool) -> tuple[list[int], Defer]:
        """The samples that go next, and whether those that need the blocks have to wait."""
        left = [row for row, done in enumerate(self.done) if done < len(self.sizes)]
        asking = [row for row in left if row not in self.waiting]
        if not waits or not asking:
            self.waiting.clear()
            return left, Defer.never
        return asking, Defer.always if self.waiting else Defer.unless_all

    def here(self, values: Sequence[float], rows: Sequence[int]) -> list[float]:
        """Of values by step those of some samples' next steps."""
        return [values[self.done[row]] for row in rows]

    def state(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Latents (k,N,C) and times (k,) of some samples."""
        steps = [self.done[row] for row in rows]
        if len(set(steps)) == 1:  # a view: a list of indices would be copied to a GPU, which waits for it
            return _some(self.x, rows), self.times[steps[0]].expand(len(rows))
        return _some(self.x, rows), self.times[steps]

    def advance(self, rows: list[int], v: Tensor, deferred: Collection[int]) -> None:
        """A step along velocities (k,N,C) for those of the samples that are not deferred."""
        if deferred:
            v = v[[place for place, row in enumerate(rows) if row not in deferred]]
            rows = [row for row in rows if row not in deferred]
            self.waiting.update(deferred)
        if not rows:
            return
        dt, along = self.here(self.sizes, rows), v
        if self.solver is Solver.ab2:
            steps = [self.done[row] for row in rows]
            bend = [d / (2 * self.sizes[i - 1]) if i else 0.0 for i, d in zip(steps, dt, strict=True)]
            along = v + _each(bend, v) * (v - _some(self._earlier, rows))
            self._earlier = _put(self._earlier, rows, v)
        self.x = _put(self.x, rows, _some(self.x, rows) + _each(dt, v) * along)
        for row in rows:
            self.done[row] += 1


class _Guided:
    """A DiT under guidance, called for samples that are each at a step of its own.

    Where one branch is enough, what guidance added when both last ran goes on, faded with 1/t.
    """

    def __init__(
        self,
        dit: Velocity,
        condition: Tensor,
        guidance: float,
        embedded: bool,
        sequential: bool,
        session: ElasticSession | None,
    ) -> None:
        self.dit, self.guidance, self.session, self.sequential = dit, guidance, session, sequential
        self.branches: SomeBranches = BOTH_BRANCHES[: 1 if guidance == 1.0 or embedded else 2]
        self.tokens = torch.stack([condition, torch.zeros_like(condition)][: len(self.branches)])
        self.scale = torch.full((len(condition),), guidance, device=condition.device) if embedded else None
        self._added: Tensor | None = None  # by guidance (B,N,C)
        self._since = [0.0] * len(condition)  # at these times

    def by_branches(self, path: _Path, rows: list[int]) -> dict[SomeBranches, list[int]]:
        """The samples by the branches that run at the times where they are."""
        found: dict[SomeBranches, list[int]] = {}
        for row, t in zip(rows, path.here(path.moments, rows), strict=True):
            alone = self.session is not None and self.session.one_branch(t)
            found.setdefault(self.branches[:1] if alone else self.branches, []).append(row)
        return found

    def velocity(self, path: _Path, branches: SomeBranches, rows: list[int], defer: Defer) -> Tensor:
        """Velocities (k,N,C) of some samples, with the branches in one call or in turn."""
        x, t = path.state(rows)
        scale = None if self.scale is None else _some(self.scale, rows)
        found: list[Tensor] = []
        for part in [(branch,) for branch in branches] if self.sequential else [branches]:
            if self.session is not None:
                steps, sizes = [path.done[row] for row in rows], path.here(path.sizes, rows)
                self.session.step(steps, sizes, part, rows, defer)
            tokens, copies = self.tokens[part[0] : part[-1] + 1], len(part)
            tokens = tokens if len(rows) == tokens.shape[1] else tokens[:, rows]
            v = self.dit(x.repeat(copies, 1, 1), t.repeat(copies), tokens.flatten(0, 1), scale)
            found += v.float().chunk(copies)
        moments = path.here(path.moments, rows)
        if len(found) == 1:
            return self._go_on(found[0], rows, moments)
        added = found[0] - found[1]
        if self.session is not None and self.session.guided:
            self._keep((self.guidance - 1) * added, rows, moments)
        return found[1] + self.guidance * added

    def _keep(self, added: Tensor, rows: list[int], moments: list[float]) -> None:
        """Note what guidance adds to samples; those that are deferred come once more at the same time."""
        if self._added is None:
            self._added = added.new_zeros(len(self._since), *added.shape[1:])
        self._added = _put(self._added, rows, added)
        for row, t in zip(rows, moments, strict=True):
            self._since[row] = t

    def _go_on(self, v: Tensor, rows: list[int], moments: list[float]) -> Tensor:
        """Velocities of one branch with what is left of guidance."""
        left = [
            self._since[row] / t if self._since[row] else 0.0 for row, t in zip(rows, moments, strict=True)
        ]
        if self._added is None or not any(left):
            return v
        return v + v.new_tensor(left)[:, None, None] * self._added[rows]


def _each(values: list[float], like: Tensor) -> Tensor | float:
    """A factor for each sample (k,1,1); a number where all have the same, which needs no copy to a GPU."""
    return values[0] if len(set(values)) == 1 else like.new_tensor(values)[:, None, None]


def _some(whole: Tensor, rows: list[int]) -> Tensor:
    """Some samples (k,...) of (B,...)."""
    return whole if len(rows) == len(whole) else whole[rows]


def _put(whole: Tensor, rows: list[int], part: Tensor) -> Tensor:
    """(B,...) with some samples exchanged. A new tensor: gradients need the old one."""
    if len(rows) == len(whole):
        return part
    return whole.index_copy(0, torch.tensor(rows, device=whole.device), part)
