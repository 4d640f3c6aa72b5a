"""Prompts from the captions of shapes that no model was trained on: a text file, one a line, for benchmarks.

data/prompts/image-small.txt is what `held_out_prompts` gives for the views of the validation and test splits:

    source = ShapeViews(prepared, read_split([val, test]), ImageStageConfig(), limit=0, seed=0)
    write_prompts(held_out_prompts(source, 256, fits), path)  # fits: at most as many tokens as the model reads
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from elastic3d.errors import UserError
from elastic3d.training.image_data import ImageSource
from elastic3d.utils.files import atomic_path

SIDE = 64  # pixels at which a view's colour is named


def write_prompts(prompts: Sequence[str], path: Path) -> None:
    """One a line."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")


def held_out_prompts(
    source: ImageSource, count: int, fits: Callable[[str], bool] = lambda prompt: True
) -> list[str]:
    """So many different captions: of every group, in a random but fixed order, the longest that fits of one view.

    Raises:
        UserError: the source has fewer.
    """
    found: dict[str, None] = {}
    generator = np.random.default_rng(0)
    for index in generator.permutation(len(source)).tolist():
        images = source.load(index, SIDE)
        captions = images[int(generator.integers(len(images)))].captions
        fitting = [caption for caption in sorted(captions, key=len, reverse=True) if fits(caption)]
        if fitting:
            found[fitting[0]] = None
        if len(found) == count:
            return list(found)
    raise UserError(f"there are only {len(found)} different captions, expected {count}")
