"""What a process of a test's own does: runs of `scripts/train.py`, with nothing imported that they do not need."""

import os
import sys
from pathlib import Path

import accelerate  # noqa: F401
import torch
import torch.utils.tensorboard  # noqa: F401

from elastic3d.training.distributed import PROCESS_TIMEOUT, first_process_first, make_accelerator
from elastic3d.training.options import LoopConfig, TrainConfig
from elastic3d.training.shape_flow import RouterTrainConfig  # noqa: F401
from elastic3d.training.stages import run_stage
from elastic3d.utils.devices import DeviceChoice


def work(configs: list[TrainConfig], environment: dict[str, str], said: Path) -> None:
    """The runs, one after the other; what they say goes to a file."""
    _begin(environment, said)
    for config in configs:
        if code := run_stage(config):
            sys.exit(code)


def wait_long(begins: str, environment: dict[str, str], said: Path) -> None:
    """The processes of a run wait for each other for `PROCESS_TIMEOUT`, whichever call makes their group."""
    _begin(environment, said)
    config = LoopConfig(device=DeviceChoice.cpu)
    if begins == "first":
        with first_process_first(config):
            pass
    make_accelerator(config)
    group = torch.distributed.distributed_c10d._get_default_group()
    assert group._get_backend(torch.device("cpu")).options._timeout == PROCESS_TIMEOUT


def _begin(environment: dict[str, str], said: Path) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
