"""Processes that share a run: devices, memory, and FSDP.

With FSDP (`accelerate launch --config_file configs/accelerate/fsdp.yaml`) each process keeps its part of every weight,
and of its master, average and moments. The model is cut into units that are gathered when they run and freed afterwards
(`torch.distributed.fsdp.fully_shard`). Everything that is stepped is the process' own part, an ordinary tensor; only a
checkpoint is gathered whole, so that it does not tell how many processes wrote it. Where nothing is sharded each
function returns what it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from elastic3d.errors import UserError
from elastic3d.pipelines.memory import GB, free_memory
from elastic3d.training.options import LoopConfig, Precision
from elastic3d.utils.devices import DeviceChoice

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

# That a process waits for the others at most, in place of NCCL's ten minutes: the main one validates and caches by
# itself, for hours with a large model. The others of one that fails are ended by what started them.
PROCESS_TIMEOUT = timedelta(days=1)


def make_accelerator(config: LoopConfig) -> Accelerator:
    """Process group and device as `config` says; starts the run's random numbers."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, set_seed

    # Not every weight gets a gradient in every process: none of its samples may take a block. To look for them costs a
    # walk over the graph and the sum of a flag for each weight: little beside the gradients.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    handlers = [unused, InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)]
    accelerator = Accelerator(cpu=config.device is DeviceChoice.cpu, kwargs_handlers=handlers)
    set_seed(
        config.seed % 2**31, device_specific=True
    )  # NumPy's has 32 bits, and each process adds its index
    return accelerator


@contextmanager
def first_process_first(config: LoopConfig) -> Iterator[None]:
    """The main process runs the block before the others do, which then find what it wrote."""
    from accelerate import PartialState

    with PartialState(cpu=config.device is DeviceChoice.cpu, timeout=PROCESS_TIMEOUT).main_process_first():
        yield


def state_bytes(
    module: nn.Module,
    config: LoopConfig,
    shards: int = 1,
    frozen: nn.Module | None = None,
    offloaded: bool = False,
) -> int:
    """Bytes in each process of weights, gradients, masters, averages and moments; activations come on top.

    Args:
        shards: processes that the state is divided between; the weights are whole in each before that.
        frozen: a model beside it, which stays in the format that it has.
        offloaded: what is divided waits in main memory, so that the device never holds more than the weights.
    """
    half = config.precision is Precision.bf16_master
    size = 2 if half else 4
    state = size + 4 + 8 + (8 if half else 0)  # gradient; average; AdamW's moments; master and its gradient
    weights = size * sum(p.numel() for p in module.parameters())
    trained = state * sum(p.numel() for p in module.parameters() if p.requires_grad)
    beside = sum(p.nbytes for p in frozen.parameters()) if frozen is not None else 0
    return beside + max(weights, 0 if offloaded else (weights + trained) // shards)


def require_memory(
    need: int, module: nn.Module, device: torch.device, frozen: nn.Module | None = None
) -> None:
    """UserError if `need` bytes don't fit on the device, with what is there already of the module, and of a frozen one
    beside it, which can't be sharded."""
    parts = [module] if frozen is None else [module, frozen]
    there = sum(p.nbytes for part in parts for p in part.parameters() if p.device.type == device.type)
    free = free_memory(device) + there
    if need > free:
        shard_it = ", or shard over several GPUs (configs/accelerate/fsdp.yaml)" if frozen is None else ""
        raise UserError(
            f"weights, gradients and optimizer state need {need / GB:.1f} GB of {device.type} memory in each process,"
            f" activations come on top, but {free / GB:.1f} GB are there: take precision=bf16_master{shard_it}"
        )


# ------------------------------------------------------------------------------------------------- FSDP


def wants_sharding(accelerator: Accelerator) -> bool:
    """Whether the launcher asks for FSDP, and several processes share the work; UserError for FSDP version 1."""
    from accelerate.utils import parse_flag_from_env

    if accelerator.num_processes == 1 or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if (version := _options().fsdp_version) != 2:
        raise UserError(f"fsdp_version is {version}, expected 2 as in configs/accelerate/fsdp.yaml")
    return True


def offloads(device: torch.device) -> bool:
    """Whether the launcher asks FSDP to keep in main memory what a process holds of the model, away from `device`."""
    return device.type != "cpu" and isinstance(_options().cpu_offload, CPUOffloadPolicy)


@cache
def _options() -> FullyShardedDataParallelPlugin:
    """What the launcher put into the environment; Accelerate itself does not read it on a CPU."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin()


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard `model` in place, with the main process' weights.

    `Accelerator.prepare` would do it together with an optimizer of the parameters; here masters are stepped.
    """
    options = _options()
    for tensor in (*model.parameters(), *model.buffers()):
        torch.distributed.broadcast(tensor.detach(), 0)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for unit in _units(model):
        again = bool(options.reshard_after_forward)
        fully_shard(unit, mesh=mesh, reshard_after_forward=again, offload_policy=options.cpu_offload)
    fully_shard(model, mesh=mesh, offload_policy=options.cpu_offload)


def _units(model: nn.Module) -> list[list[nn.Module]]:
    """What is gathered together, inner parts first: each element of a list of modules. Routers, which may run
    beside another block, are gathered with the model."""
    units = [
        [element]
        for part in model.modules()
        if type(part) is nn.ModuleList  # parametrizations are in a list of another kind
        for element in part
    ]
    return units[::-1]


@contextmanager
def whole_model(model: nn.Module) -> Iterator[None]:
    """While it lasts every process holds the whole model and may run it without the others. For all to call."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            again = part is not model and bool(_options().reshard_after_forward)
            part.set_reshard_after_forward(again, recurse=False)


def is_sharded(tensor: Tensor) -> bool:
    """Whether processes hold parts of it."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """This process' part of a sharded tensor, the same memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def scattered(whole: Tensor, like: Tensor) -> Tensor:
    """This process' part of a tensor that every process has whole, cut as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    return distribute_tensor(whole.to(mesh.device_type), mesh, like.placements, src_data_rank=None).to_local()


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """The tensor whose part each process holds, cut as `like` is: whole on the main process, empty on the others.

    For all to call, in the same order.
    """
    if not isinstance(like, DTensor):
        return part
    mesh = like.device_mesh
    own = local(part).detach().to(mesh.device_type)
    whole = DTensor.from_local(own, mesh, like.placements, shape=like.shape, stride=like.stride())
    full = whole.full_tensor()
    return full.cpu() if mesh.get_rank() == 0 else full.new_empty(0)


def total_norm(gradients: Sequence[Tensor], sharded: bool) -> Tensor:
    """Euclidean norm of all gradients, of all processes' parts where they are sharded."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if sharded:
        square = norm.square()
        torch.distributed.all_reduce(square)
        norm = square.sqrt()
    return norm
