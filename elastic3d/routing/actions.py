"""From what a router decides to what is done: a block runs, is skipped, adds an earlier residual, or waits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from elastic3d.config.routing import RouterConfig
from elastic3d.routing.cache import ResidualCache
from elastic3d.routing.decision import RouteDecision
from elastic3d.routing.passes import Hold, Pass
from elastic3d.routing.trace import REUSED, SKIPPED


def actions_of(
    current: Pass,
    decision: RouteDecision,
    ages: Sequence[int],
    drift: Tensor | None,
    cache: ResidualCache | None,
    config: RouterConfig,
) -> list[int]:
    """The action of each row of a pass, on the host.

    ages: steps since what a row would reuse was computed, 0 without; drift: change (B,) of its input since then.
    """
    actions = []
    drifts = drift.tolist() if drift is not None else [0.0] * len(ages)
    for age, p, width, keep, change in zip(ages, *decision.on_host(), drifts, strict=True):
        if (
            config.longest and cache is not None and not age
        ):  # these routers choose between a block and its forecast
            actions.append(config.widths)
        elif cache is not None and cache.reuse(age, p, config.threshold, change):
            actions.append(REUSED)
        else:
            actions.append(1 + int(width) if keep else SKIPPED)
    return _without_held(current, actions)


def _without_held(current: Pass, actions: list[int]) -> list[int]:
    """The same, but samples of which a row should run, and which have to wait, are skipped and noted."""
    if current.hold is Hold.never or (current.hold is Hold.unless_all and min(actions) > SKIPPED):
        return actions
    samples = [sample for _, sample in current.rows]
    current.held = {s for s, action in zip(samples, actions, strict=True) if action > SKIPPED}
    return [SKIPPED if s in current.held else action for s, action in zip(samples, actions, strict=True)]
