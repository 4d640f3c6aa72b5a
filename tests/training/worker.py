"""What a process of a test's own does: runs of `scripts/train.py`, with nothing imported that they do not need."""

import os
import sys
from pathlib import Path

import accelerate  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401

from elastic3d.training.options import TrainConfig
from elastic3d.training.shape_flow import RouterTrainConfig  # noqa: F401
from elastic3d.training.stages import run_stage


def work(configs: list[TrainConfig], environment: dict[str, str], said: Path) -> None:
    """The runs, one after the other; what they say goes to a file."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    for config in configs:
        if code := run_stage(config):
            sys.exit(code)
