"""Options of training the routers' low-rank updates (`scripts/train.py stage=updates`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from elastic3d.config.base import check_range, option
from elastic3d.config.routing import MIN_BUDGET


@dataclass(kw_only=True)
class UpdatesStageConfig:
    """Updates of a model's blocks for generations with few calls, learned through whole generations."""

    model: Path = option(Path("data/pretrained/shape-small"), "folder of a pipeline with trained routers")
    rank: int = option(32, "rank of the updates")
    continued: bool = option(
        False,
        "start from the updates that the model has, instead of fresh ones; a larger rank adds directions",
    )
    guidance: bool = option(
        False, "learn the pipeline's guidance too: generations with updates run the conditional branch alone"
    )
    guided_times: list[float] = option(
        [], "with it: first and last time between which both branches run all the same; empty: nowhere"
    )
    min_calls: float = option(3.0, "fewest calls of the model in a generation: its steps times its budget")
    max_calls: float = option(8.0, "most of them")
    used_calls: float | None = option(
        None, "stage=export: calls up to which the updates will be used; null: max_calls"
    )
    min_steps: int = option(4, "fewest sampling steps")
    max_steps: int = option(25, "most of them")
    whole: float = option(
        0.0,
        "share of the batches that run every block in each step: in as many steps as calls, a budget of 1",
    )
    reference_steps: int = option(60, "sampling steps of the dense results that are to be reached")
    pairs: int = option(8192, "pairs of a picture and noise, whose dense results are kept in memory")
    floor: float = option(
        1e-3,
        "relative squared error below which little is to be gained; the loss is the logarithm of what is above",
    )
    anchor_weight: float = option(
        1.0, "weight of the anchors' channels over the others': errors there cost a mesh the most"
    )
    val_shapes: int = option(28, "validation shapes that are generated")

    def __post_init__(self) -> None:
        check_range("updates.rank", self.rank, 1, 4096)
        if self.guided_times and not self.guidance:
            raise ValueError(
                f"updates.guided_times is {self.guided_times}, expected none: updates.guidance is false"
            )
        check_range("updates.min_calls", self.min_calls, 1, 1000)
        check_range("updates.max_calls", self.max_calls, self.min_calls, 1000)
        if self.used_calls is not None:
            check_range("updates.used_calls", self.used_calls, 0.1, 1000)
        check_range("updates.min_steps", self.min_steps, 1, 1000)
        check_range("updates.max_steps", self.max_steps, self.min_steps, 1000)
        check_range("updates.whole", self.whole, 0, 1)
        if self.whole and not self.whole_steps:
            raise ValueError(
                f"updates.whole is {self.whole:g}, expected 0: no number of steps is between {self.min_calls:g} and"
                f" {min(self.max_calls, self.max_steps):g}"
            )
        if self.max_steps * MIN_BUDGET > self.max_calls:
            raise ValueError(
                f"updates.max_steps is {self.max_steps}, expected at most {int(self.max_calls / MIN_BUDGET)}:"
                f" the smallest budget, {MIN_BUDGET:g}, leaves more than {self.max_calls:g} calls"
            )
        check_range("updates.reference_steps", self.reference_steps, self.max_steps, 10_000)
        check_range("updates.pairs", self.pairs, 1, 1 << 30)
        check_range("updates.anchor_weight", self.anchor_weight, 0, 1e6)
        check_range("updates.floor", self.floor, 1e-9, 1)
        check_range("updates.val_shapes", self.val_shapes, 1, 1 << 16)

    @property
    def whole_steps(self) -> range:
        """Numbers of steps that a generation with every block has."""
        return range(math.ceil(self.min_calls), int(min(self.max_calls, self.max_steps)) + 1)
