"""Names in files of this repository that older versions wrote, and what they are today: of options, of values, of
weights, of a benchmark's results. Nothing else knows them; `options.from_dict` reads such files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# By the class that has the option, which its subclasses share; None: gone with what it was for.
OPTIONS: dict[str, dict[str, str | None]] = {
    "RouterConfig": {
        "variant": None,
        "lookahead": "scope",
        "trend": "damping",
        "trends": "dampings",
        "forecast_times": "damping_times",
        "asked": "requested_budgets",
        "told": "calibrated_budgets",
        "urgency": "gate_bias",
    },
    "ImageEncoderConfig": {"picture_size": "prepared_size"},
    "StageConfig": {"updates": "few_step"},
    "ShapeFewStepConfig": {"min_calls": "min_nfe", "max_calls": "max_nfe"},
    "ImageStageConfig": {"sample_pictures": "sample_images", "val_pictures": "val_images"},
    "RoutingConfig": {"recalled": "simulated_steps"},
    "ImageRoutingConfig": {"picture": "image"},
}
GROUPED = {
    "RouterConfig": "curves"
}  # by class: the group with what older versions saved among its other options
# Options that are gone with all but one of their values: what that one meant is what happens today.
KEPT = {"variant": "light"}
VALUES = {("branches", "together"): "shared", ("stage", "updates"): "few_step"}
WEIGHTS = (".updates.", ".few_step.")  # in the names of routers' tensors
RESULTS: dict[str, str | None] = {"pictures": "images"}


def todays_stage(record: Mapping[str, Any]) -> Any:
    """The stage of a saved training; once the routers of images were told from those of shapes by a backbone alone."""
    stage, image = record.get("stage"), record.get("image")
    stage = VALUES.get(("stage", str(stage)), stage)
    routes_images = stage == "router" and isinstance(image, Mapping) and image.get("backbone")
    return "image_router" if routes_images else stage


def todays_results(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a benchmark wrote about its run, by today's names."""
    return {RESULTS.get(name) or name: value for name, value in about.items()}
