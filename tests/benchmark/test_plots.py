"""Images show what they are given."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from elastic3d.benchmark.report import heat_map, pareto_plot
from elastic3d.evaluation.frontier import INK, PAPER

LABELS = {"iou_paired": "IoU (higher is better)"}


def test_without_times_there_is_no_plot():
    row = {"method": "dense", "batch": 1, "dit_ms_median": None, "iou_paired": 0.5}
    assert pareto_plot([row], 1, LABELS) is None
    assert pareto_plot([row | {"dit_ms_median": 5.0}], 2, LABELS) is None
    assert pareto_plot([row | {"dit_ms_median": 5.0}], 1, LABELS) is not None


def test_the_heat_map_is_darker_where_blocks_run():
    mean = np.zeros((3, 2, 2))
    mean[1, 0, 1] = 1.0
    mean[:, 1] = np.nan  # the unconditional branch did not run
    entry = {"method": "elastic", "budget": 0.5, "steps": 3, "blocks": ["a", "b"], "mean": mean, "std": mean}
    image = np.asarray(heat_map({"run": entry}, cell=10))
    dark = (image == (20, 60, 140)).all(-1)
    assert dark.sum() == 100 and dark[44 + 10 : 44 + 20, 150 + 10 : 150 + 20].all()
    assert heat_map({}) is None


def test_the_heat_map_makes_room_for_long_names():
    """As much ink as there is in the name alone, so nothing of it is cut off."""
    mean, name = np.zeros((3, 2, 1)), "transformer.single_transformer_blocks.13"
    entry = {"method": "", "budget": None, "steps": 3, "blocks": [name], "mean": mean, "std": mean}
    alone = Image.new("RGB", (400, 20), PAPER)
    ImageDraw.Draw(alone).text((10, 10), name, fill=INK, font=ImageFont.load_default(12), anchor="lm")
    image = heat_map({"run": entry})
    assert image is not None
    label = image.crop((0, 44, image.width - 3 * 150 - 1, 56))
    ink = [(np.asarray(each) < 128).all(-1).sum() for each in (label, alone)]
    assert ink[0] == pytest.approx(ink[1], rel=0.1) and ink[1] > 100
