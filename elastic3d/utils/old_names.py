"""Names of older versions and what they are today: of options, of values, of weights, of a benchmark's results.

Nothing else knows the old names. What an older version saved is read under today's, and a command line that has an old
one is told the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, TypeVar

Value = TypeVar("Value")

# By the class that has the option, which its subclasses share; None: gone with what it was for.
OPTIONS: dict[str, dict[str, str | None]] = {
    "RouterConfig": {
        "lookahead": "scope",
        "trend": "damping",
        "trends": "dampings",
        "forecast_times": "damping_times",
        "asked": "requested_budgets",
        "told": "calibrated_budgets",
        "urgency": "gate_bias",
        "updates": "few_step_rank",
        "updates_calls": "few_step_nfe",
        "updates_steps": "few_step_max_steps",
        "updates_guidance": "few_step_guidance",
    },
    "BlockCacheConfig": {
        "trend": "damping",
        "trends": "dampings",
        "closed_reuse": "skipped_reuse",
        "drift": None,
        "probe_stride": None,
    },
    "ElasticConfig": {"updates": "few_step"},
    "ImageEncoderConfig": {"picture_size": "prepared_size"},
    "StageConfig": {"updates": "few_step"},
    "FewStepStageConfig": {"min_calls": "min_nfe", "max_calls": "max_nfe"},
    "ImageStageConfig": {"sample_pictures": "sample_images", "val_pictures": "val_images"},
    "RoutingConfig": {"recalled": "simulated_steps"},
    "ImageRoutingConfig": {"picture": "image"},
    "ImageBlockRouterConfig": {"picture": "image"},
}
VALUES = {
    "branches": {"apart": "separate", "together": "shared"},
    "stage": {"updates": "few_step"},
}
RESULTS: dict[str, str | None] = {"pictures": "images"}


def todays_options(config_class: type[Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a configuration by the names that its options have today."""
    names: dict[str, str | None] = {}
    for each in config_class.__mro__:
        names |= OPTIONS.get(each.__name__, {})
    return {
        new: todays_value(new, value)
        for old, value in saved.items()
        if (new := names.get(old, old)) is not None
    }


def todays_value(option: str, value: Any) -> Any:
    """The value of an option as it is written today."""
    return VALUES.get(option, {}).get(value, value) if isinstance(value, str) else value


def todays_names(option: str) -> set[str]:
    """What a dotted name of an option may be today; the name itself where no part of it is an old one."""
    tables = (*OPTIONS.values(), RESULTS)
    parts = [{new for names in tables if (new := names.get(part))} or {part} for part in option.split(".")]
    return {".".join(each) for each in product(*parts)}


def todays_stage(record: Mapping[str, Any]) -> Any:
    """The stage of a saved training; once the routers of images were told from those of shapes by a backbone alone."""
    stage, image = todays_value("stage", record.get("stage")), record.get("image")
    routes_images = stage == "router" and isinstance(image, Mapping) and image.get("backbone")
    return "image_router" if routes_images else stage


def todays_weights(state: Mapping[str, Value]) -> dict[str, Value]:
    """Weights of routers by the names that they have today."""
    return {name.replace(".updates.", ".few_step."): value for name, value in state.items()}


def todays_results(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a benchmark wrote about its run, by today's names."""
    return {RESULTS.get(name) or name: value for name, value in about.items()}
