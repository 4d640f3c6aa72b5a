"""What timing, controls and rows need to know of whatever is made: meshes from pictures, or pictures from prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from elastic3d.benchmark.methods import Planner, Run
from elastic3d.benchmark.options import BenchmarkOptions
from elastic3d.routing.passes import RouteSource

if TYPE_CHECKING:
    from elastic3d.benchmark.controls import Controls


class Job(Protocol):
    """One thing to make by each run: an item (a picture, a prompt) and a seed."""

    @property
    def seed(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...


class Records(Protocol):
    """What was made so far."""

    def record(self, run: Run, job: Any) -> dict[str, Any] | None:
        """`status`, `error` and `receipt`; None where it is still to be made."""
        ...


class Place(Protocol):
    """Makes things, and knows what has to be made."""

    planner: Planner
    controls: Controls

    @property
    def config(self) -> BenchmarkOptions: ...

    @property
    def store(self) -> Records: ...

    @property
    def jobs(self) -> Sequence[Any]: ...

    def timing_jobs(self) -> Sequence[Any]:
        """The jobs that times are taken with."""
        ...

    def timing_facts(self) -> list[Any]:
        """What else makes times comparable."""
        ...

    def calibration_jobs(self) -> Sequence[Any]:
        """The jobs that static and timestep routes are found on."""
        ...

    def neighbour(self, job: Any) -> Any:
        """The job of the next item, with the same seed."""
        ...

    def routes_of(self, run: Run, job: Any) -> dict[str, Any]:
        """The `routes` in the receipt of a job, which is done where need be."""
        ...

    def ready(self, run: Run) -> AbstractContextManager[None]:
        """While it lasts, the model is set up for a run."""
        ...

    def condition_of(self, run: Run, jobs: Sequence[Any]) -> Any:
        """What the DiT is told of the jobs' items."""
        ...

    def sample(self, run: Run, condition: Any, jobs: Sequence[Any], source: RouteSource | None) -> Tensor:
        """The DiT alone; returns when a GPU is done."""
        ...

    def produce(self, run: Run, jobs: Sequence[Any], source: RouteSource | None) -> Any:
        """All that a user waits for, as one batch."""
        ...

    def velocity_error(self, jobs: Sequence[Any]) -> Callable[[Tensor], float]:
        """Fixed routes (I,) -> relative squared error of the guided velocity."""
        ...
