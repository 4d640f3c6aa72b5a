"""Who is told what while a batch of meshes is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OnStep = Callable[[int, int], None]
OnProgress = Callable[[str, int, int], None]
"""on_progress(stage, done, total); the stages are those of the metadata's `ms`: condition (images), dit (sampling
steps), decode (levels of the grid, over all meshes), cleanup (meshes)."""
OnResult = Callable[[int, Any], None]
"""on_result(number in the batch, result), as soon as it is known, failures included."""


@dataclass(frozen=True)
class Listeners:
    """The callbacks of one call; those that are None hear nothing."""

    on_step: OnStep | None = None
    on_progress: OnProgress | None = None
    on_result: OnResult | None = None

    def at(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` of a stage are done."""
        if stage == "dit" and self.on_step is not None:
            self.on_step(done, total)
        if self.on_progress is not None:
            self.on_progress(stage, done, total)

    def ready(self, number: int, result: Any) -> None:
        """Nothing will change in this result."""
        if self.on_result is not None:
            self.on_result(number, result)
