"""Stock pipelines of diffusers drive the session: the scheduler knows the step, the order of passes the branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elastic3d.elastic.context import Branch
from elastic3d.elastic.session import ElasticSession

_ROUNDING = 2**-8  # of a time in bf16


class PipelineDriver:
    """Announces each pass of a transformer to its session.

    Every pipeline that shares the scheduler is followed, also one that nobody named. A generation is a new set of
    timesteps in the scheduler, which each pipeline makes when it is called, so that nothing of a cancelled one is left.
    It begins at the step that comes first, which is a later one with an image to start from (`strength` below 1).
    Within a step the conditional branch runs first, as in all pipelines of FLUX and Qwen-Image.
    """

    def __init__(self, session: ElasticSession) -> None:
        self.session = session
        self.pipelines: list[Any] = []
        self._timesteps: Tensor | None = None  # of the running generation
        self._first = 0  # its first step in the scheduler
        self._times: list[float] = []  # from there on
        self._step, self._passes, self._branches = -1, 0, 1

    def announce(self, t: Tensor) -> Tensor:
        """Tell the session of a pass at times t (B,), 0 = noise -> the times as the scheduler has them: the pipeline
        rounds them to its number format. ValueError where no scheduler is at that time."""
        scheduler, found = self._scheduler_at(1 - float(t[0]))
        step = found - self._first
        again = step < self._step or (step == self._step and self._passes == len(Branch))
        before = self.session.trace
        new = scheduler.timesteps is not self._timesteps or before is None or before.samples != len(t)
        if new or again:
            self._timesteps, self._first = scheduler.timesteps, found
            self._times = times_of(scheduler)[found:]
            if len(set(self._times)) < len(self._times):
                raise ValueError(f"{type(scheduler).__name__} visits a timestep twice: unsupported")
            self._step, self._branches, step = -1, 1, 0
            self.session.begin(len(t), len(self._times), times=self._times)
        self._passes = self._passes + 1 if step == self._step else 1
        self._branches, self._step = max(self._branches, self._passes), step
        dt = abs(float(scheduler.sigmas[found] - scheduler.sigmas[found + 1]))
        self.session.step(step, dt, (Branch(self._passes - 1),))
        return torch.full_like(t, self._times[step])

    def after(self, transformer: Any, args: Any, output: Any) -> None:
        """A pass is over: what a generation remembers goes with its last pass, or with one that failed. In the first
        step nobody knows of a second branch yet: a generation of one step may last until the next begins."""
        if self._timesteps is None:
            return
        last = self._step == len(self._times) - 1 and self._passes == self._branches
        if output is None or (last and (self._step > 0 or self._passes == len(Branch))):
            self.session.end()
            self._timesteps = None
        if (output is None or last) and hasattr(transformer, "_hf_hook"):  # it may leave the device now
            self.session.forget()

    def _scheduler_at(self, noise: float) -> tuple[Any, int]:
        """The scheduler that is at a share of noise, and its step; of several the one that was followed last."""
        found = None
        for pipeline in self.pipelines:
            scheduler = pipeline.scheduler
            step = step_at(scheduler, noise)
            if step is not None and (found is None or scheduler.timesteps is self._timesteps):
                found = scheduler, step
        if found is None:
            raise ValueError(
                "a forward pass outside the pipeline's loop: call session.step before it, or attach(pipeline) where a"
                " pipeline with a scheduler of its own shares this transformer"
            )
        return found


def times_of(scheduler: Any) -> list[float]:
    """The times in [0,1] of a scheduler's steps, 0 = noise."""
    total = scheduler.config.num_train_timesteps
    return [1 - time / total for time in scheduler.timesteps.flatten().tolist()]


def step_at(scheduler: Any, noise: float) -> int | None:
    """The step of a scheduler that is at a share of noise, rounded to bf16; None where it is at another."""
    time, times = noise * scheduler.config.num_train_timesteps, scheduler.timesteps.flatten()
    found = scheduler.step_index
    if getattr(scheduler, "num_inference_steps", None) is None:  # never used yet
        return None
    if found is None:
        found = scheduler.begin_index
    if found is None:
        found = int((times - time).abs().argmin())
    near = found < len(times) and abs(float(times[found]) - time) <= 1 + _ROUNDING * time
    return found if near else None


def drive(pipeline: Any, session: ElasticSession) -> None:
    """Let the loop of a pipeline, and of each that shares its transformer and its scheduler, drive `session`.

    ValueError, naming the pipeline, where its scheduler does not say which step it is at.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    for name in ("step_index", "begin_index", "timesteps", "sigmas"):
        if not hasattr(scheduler, name):
            kind = type(scheduler).__name__
            raise ValueError(f"{type(pipeline).__name__} can't have routers: its {kind} has no {name}")
    if session.driver is None:
        session.driver = driver = PipelineDriver(session)
        session.hooks.append(pipeline.transformer.register_forward_hook(driver.after, always_call=True))
    if not drives(pipeline, session):
        session.driver.pipelines.append(pipeline)


def drives(pipeline: Any, session: ElasticSession) -> bool:
    """Whether the loop of a pipeline drives `session` already."""
    return session.driver is not None and any(known is pipeline for known in session.driver.pipelines)
