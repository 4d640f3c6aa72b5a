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
    if session is not None:
        scale = guidance if len(guided.branches) > 1 else None
        session.begin(len(noise), path.steps, guidance=scale, times=path.moments[:-1])
    waits = session is not None and session.defers and len(noise) > 1 and not sequential
    try:
        while path.unfinished:
            before, (turn, defer) = path.reached, path.turn(waits)
            groups = guided.by_branches(path, turn)
            if len(groups) > 1 and defer is Defer.unless_all:
                defer = Defer.always  # those that need the blocks wait for the other group too
            for branches, rows in groups.items():
                v = guided.velocity(path, branches, rows, defer)
                path.advance(rows, v, session.deferred if session is not None else frozenset())
            for step in range(before, path.reached):
                if on_step is not None:
                    on_step(step + 1, path.steps)
    finally:
        if session is not None:
            session.end()
    return path.x


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
        two = guidance != 1.0 and not embedded
        self.branches: SomeBranches = BOTH_BRANCHES if two else BOTH_BRANCHES[:1]
        self.tokens = torch.cat([condition, torch.zeros_like(condition)]) if two else condition
        self.scale = torch.full((len(condition),), guidance, device=condition.device) if embedded else None
        self._added: Tensor | None = None  # by guidance (B,N,C)
        self._since = [0.0] * len(condition)  # at these times

    def by_branches(self, path: _Path, rows: list[int]) -> dict[SomeBranches, list[int]]:
        """The samples by the branches that run at the times where they are."""
        found: dict[SomeBranches, list[int]] = {}
        for row in rows:
            alone = self.session is not None and self.session.one_branch(path.moments[path.done[row]])
            found.setdefault(self.branches[:1] if alone else self.branches, []).append(row)
        return found

    def velocity(self, path: _Path, branches: SomeBranches, rows: list[int], defer: Defer) -> Tensor:
        """Velocities (k,N,C) of some samples, with the branches in one call or in turn."""
        x, t = path.state(rows)
        scale = None if self.scale is None else self.scale[rows]
        tokens = self.tokens.unflatten(0, (len(self.branches), -1))
        if len(rows) < tokens.shape[1]:
            tokens = tokens[:, rows]
        room = 1 if self.sequential else len(self.branches)
        found: list[Tensor] = []
        for part in [(branch,) for branch in branches] if self.sequential else [branches]:
            if self.session is not None:
                done = [path.done[row] for row in rows]
                self.session.step(done, path.step_sizes(rows), part, rows, defer, room)
            some, copies = tokens[part[0] : part[-1] + 1].flatten(0, 1), len(part)
            v = self.dit(x.repeat(copies, 1, 1), t.repeat(copies), some, scale).float()
            found += v.chunk(copies)
        if len(found) == 1:
            return self._go_on(path, rows, found[0])
        self._keep(path, rows, (self.guidance - 1) * (found[0] - found[1]))
        return found[1] + self.guidance * (found[0] - found[1])

    def _go_on(self, path: _Path, rows: list[int], v: Tensor) -> Tensor:
        """Velocities of one branch with what is left of guidance."""
        left = [self._since[row] / path.moments[path.done[row]] if self._since[row] else 0.0 for row in rows]
        if self._added is None or not any(left):
            return v
        return v + v.new_tensor(left)[:, None, None] * self._added[rows]

    def _keep(self, path: _Path, rows: list[int], added: Tensor) -> None:
        """Note what guidance adds to samples that are not held."""
        if self.session is None or not self.session.guided:
            return
        kept = [place for place, row in enumerate(rows) if row not in self.session.deferred]
        rows = [rows[place] for place in kept]
        if rows:
            whole = (
                added.new_zeros(len(self._since), *added.shape[1:]) if self._added is None else self._added
            )
            self._added = _put(whole, rows, added[kept])
        for row in rows:
            self._since[row] = path.moments[path.done[row]]


class _Path:
    """Samples on their way from noise to data, each at a step of its own."""

    def __init__(self, x: Tensor, times: Tensor, solver: Solver) -> None:
        self.x, self.solver = x, solver
        self.times, self.moments, self.sizes = times.to(x.device), times.tolist(), times.diff().tolist()
        self.steps = len(self.sizes)
        self.done = [0] * len(x)
        self.waiting: set[int] = set()
        self._earlier = torch.zeros_like(x)  # velocities of the step before

    @property
    def reached(self) -> int:
        """Steps that all samples have done."""
        return min(self.done)

    @property
    def unfinished(self) -> list[int]:
        """Samples with steps to go."""
        return [row for row, done in enumerate(self.done) if done < self.steps]

    def turn(self, waits: bool) -> tuple[list[int], Defer]:
        """The samples that go next, and whether those that need the blocks have to wait."""
        left = self.unfinished
        asking = [row for row in left if row not in self.waiting]
        if not waits or not asking:
            self.waiting.clear()
            return left, Defer.never
        return asking, Defer.always if self.waiting else Defer.unless_all

    def step_sizes(self, rows: Sequence[int]) -> list[float]:
        """dt of each of some samples' next step."""
        return [self.sizes[self.done[row]] for row in rows]

    def state(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Latents (k,N,C) and times (k,) of some samples."""
        x = self.x if len(rows) == len(self.x) else self.x[rows]
        steps = [self.done[row] for row in rows]
        if len(set(steps)) == 1:  # a view: a list of indices would be copied to a GPU, which waits for it
            return x, self.times[steps[0]].expand(len(rows))
        return x, self.times[steps]

    def advance(self, rows: list[int], v: Tensor, deferred: Collection[int]) -> None:
        """A step along velocities (k,N,C) for those of the samples that are not held."""
        if deferred:
            v = v[[place for place, row in enumerate(rows) if row not in deferred]]
            rows = [row for row in rows if row not in deferred]
        self.waiting.update(deferred)
        if not rows:
            return
        dt = self.step_sizes(rows)
        along = v
        if self.solver is Solver.ab2:
            steps = [self.done[row] for row in rows]
            bend = [d / (2 * self.sizes[i - 1]) if i else 0.0 for i, d in zip(steps, dt, strict=True)]
            along = v + _each(bend, v) * (v - _some(self._earlier, rows))
            self._earlier = _put(self._earlier, rows, v)
        self.x = _put(self.x, rows, _some(self.x, rows) + _each(dt, v) * along)
        for row in rows:
            self.done[row] += 1


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
