"""Stock pipelines of diffusers drive the session: `cache_context` names the branch, the scheduler knows the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from elastic3d.routing.passes import Branch
from elastic3d.routing.session import RoutingSession

_BRANCHES = {"cond": Branch.conditional, "uncond": Branch.unconditional}


class PipelineDriver:
    """Announces each forward pass of a pipeline's transformer to its session."""

    def __init__(self, pipeline: Any, session: RoutingSession) -> None:
        self.pipeline, self.session = pipeline, session
        self.cache_context = pipeline.transformer.cache_context
        self.branch: Branch | None = None
        self._last = (-1, -1)  # step and branch of the newest pass

    @contextmanager
    def context(self, name: str, **details: Any) -> Iterator[None]:
        """Stands in for the transformer's own `cache_context`. ValueError for a branch that is no guidance branch."""
        if name not in _BRANCHES:
            raise ValueError(f"a cache context named {name!r}, expected one of {', '.join(_BRANCHES)}")
        self.branch = _BRANCHES[name]
        inner: AbstractContextManager[None] = self.cache_context(name, **details)
        try:
            with inner:
                yield
        finally:
            self.branch = None

    def announce(self, batch: int) -> None:
        """Tell the session of a pass of `batch` rows. ValueError where the pipeline does not say what it is doing."""
        time = getattr(self.pipeline, "_current_timestep", None)
        if self.branch is None or time is None:
            raise ValueError("a forward pass outside the pipeline's loop: call session.step before it")
        times = self.pipeline.scheduler.timesteps.flatten().tolist()
        if len(set(times)) < len(times):
            raise ValueError(f"{type(self.pipeline.scheduler).__name__} visits a timestep twice: unsupported")
        index = times.index(float(time))
        now = (index, self.branch)
        if now == (0, Branch.conditional) or now <= self._last or not self.session.samples:
            self.session.begin(batch, len(times))
        self._last = (index, self.branch)
        sigmas = self.pipeline.scheduler.sigmas
        self.session.step(index, abs(float(sigmas[index] - sigmas[index + 1])), (self.branch,))


def drive(pipeline: Any, session: RoutingSession) -> None:
    """Let a pipeline's loop drive `session`; ValueError for a pipeline whose transformer names no branches."""
    if not hasattr(pipeline.transformer, "cache_context") or not hasattr(pipeline, "scheduler"):
        raise ValueError(f"{type(pipeline).__name__} does not tell its steps and branches")
    driver = PipelineDriver(pipeline, session)
    session.announcer = driver.announce
    pipeline.transformer.__dict__["cache_context"] = driver.context


def release(pipeline: Any) -> None:
    """Undo `drive`."""
    pipeline.transformer.__dict__.pop("cache_context", None)
