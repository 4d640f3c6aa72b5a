"""FSDP as `accelerate launch` with the shipped configuration starts it, on two processes without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from elastic3d.checkpoints.options import ImportConfig
from elastic3d.errors import UserError
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.pipelines.published import import_checkpoint
from elastic3d.training.checkpoint import load_checkpoint
from elastic3d.training.distributed import _options, offloads, wants_sharding
from elastic3d.training.journal import read_metrics
from elastic3d.training.latents import build_cache
from elastic3d.training.optim import MasterOptimizer
from elastic3d.training.options import LoopConfig, OptimizerName, Precision, Schedule, StageName, TrainConfig
from elastic3d.training.shape_flow import RouterTrainConfig
from tests.training.test_hunyuan3d_routers import WITH_ENCODER, config_for, publish, with_sharp_points
from tests.training.test_loop import ROOT, group_of, run, start
from tests.training.tiny import add_views, dit_config, tiny_vae


def launcher_environment(config: str) -> dict[str, str]:
    """What `accelerate launch --config_file` adds to the environment to ask for FSDP."""
    parsed = launch_command_parser().parse_args(["--config_file", str(ROOT / config), "scripts/train.py"])
    arguments = _validate_launch_command(parsed)[0]
    assert arguments.use_fsdp
    added = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in added.items() if "FSDP" in name}


def launch(*configs: TrainConfig) -> list[str]:
    """The runs in two processes -> what each of them said."""
    group = group_of(2) | launcher_environment("configs/accelerate/fsdp.yaml")
    processes = [
        start(*configs, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true", **group)
        for rank in range(2)
    ]
    said = [process.wait(280) for process in processes]
    assert [process.process.exitcode for process in processes] == [0, 0], "\n".join(said)
    return said


COMPARED = ("step", "loss", "gradient_norm", "share", "val/share_at_0.5", "val/error_at_0.5", "val/flow")
CASES = {"dit": (Precision.fp32, 1e-4), "routers": (Precision.bf16_master, 3e-2)}  # all weights learn; few do


def case_config(root: Path, case: str, name: str, **changes: object) -> TrainConfig:
    """A run over four steps."""
    of_case = config_for if case == "routers" else dit_config
    options = dict(name=f"{case}-{name}", schedule=Schedule.constant, steps=4, save_every=2, validate_every=4)
    config = of_case(root / case, **(dict(precision=CASES[case][0]) | options | changes))
    if isinstance(config, RouterTrainConfig):  # moments of predicted errors are each process' own
        config.routing.min_steps = config.routing.max_steps = 1
    return config


def publish_case(prepared: Path, case: str) -> None:
    """The folder `prepared/case`: an autoencoder or a tiny checkpoint, and the cache of its latents."""
    root = prepared / case
    root.mkdir()
    for name in ("prepared", "train.txt", "val.txt"):
        (root / name).symlink_to(prepared / name)
    if case == "dit":
        torch.manual_seed(0)
        ShapeVAE(tiny_vae()).save_pretrained(root / "vae")
    else:
        weights, output = str(root / "weights"), str(root / "model")
        publish(root / "weights", "hunyuan3d2")
        import_checkpoint(
            ImportConfig(model="hunyuan3d2", weights=weights, output=output, vae_subfolder=WITH_ENCODER)
        )
    config = case_config(prepared, case, "cache", stage=StageName.cache)
    build_cache(config if case == "dit" else with_sharp_points(config))


def last_tensors(config: TrainConfig) -> dict[str, dict[str, torch.Tensor]]:
    """What the last checkpoint holds."""
    return load_checkpoint(config.folder / "checkpoints" / "step-00000004").tensors


def test_sharded_runs_equal_unsharded_ones(prepared: Path) -> None:
    """Two processes with FSDP against one with two micro-batches; each goes on where the other stopped."""
    add_views(prepared)
    sharded: list[TrainConfig] = []
    for case in CASES:
        publish_case(prepared, case)
        run(case_config(prepared, case, "alone", accumulate=2))
        run(case_config(prepared, case, "grown", accumulate=2, steps=2, validate_every=0))
        sharded += [
            case_config(prepared, case, "shrunk", steps=2, validate_every=0),
            case_config(prepared, case, "grown"),
        ]
    said = launch(*sharded)
    for config in sharded:
        [line] = [
            line for line in said[0].splitlines() if f"{config.name}: " in line and " M in this" in line
        ]
        whole, own = (float(line.split(f" M {what}")[0].split()[-1]) for what in ("parameters", "in this"))
        assert own == pytest.approx(whole / 2, abs=0.02)
    for case, (_, tolerance) in CASES.items():
        whole, parts = (last_tensors(case_config(prepared, case, name)) for name in ("alone", "grown"))
        for part, tensors in whole.items():
            assert tensors.keys() == parts[part].keys()
            for name, tensor in tensors.items():
                torch.testing.assert_close(parts[part][name], tensor, rtol=tolerance, atol=tolerance)
        run(case_config(prepared, case, "shrunk", accumulate=2))
        wanted = read_metrics(case_config(prepared, case, "alone").folder / "metrics.jsonl")
        for name in ("shrunk", "grown"):
            found = read_metrics(case_config(prepared, case, name).folder / "metrics.jsonl")
            for a, b in zip(found, wanted, strict=True):
                told = {k: v for k, v in b.items() if k in COMPARED}
                assert {k: a[k] for k in told} == pytest.approx(told, rel=tolerance, abs=tolerance)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_muon_is_refused(group: None) -> None:
    model = fully_shard(torch.nn.Linear(4, 4), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UserError, match="optimizer=adamw"):
        MasterOptimizer(dict(model.named_parameters()), LoopConfig(optimizer=OptimizerName.muon))


def test_version_1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    _options.cache_clear()
    with pytest.raises(UserError, match="fsdp_version is 1, expected 2"):
        wants_sharding(SimpleNamespace(num_processes=2))  # type: ignore[arg-type]
    _options.cache_clear()
    assert not wants_sharding(SimpleNamespace(num_processes=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [False, True])
def test_offloading_to_main_memory_is_told(monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    for name, value in launcher_environment("configs/accelerate/fsdp.yaml").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", str(asked).lower())
    _options.cache_clear()
    assert offloads(torch.device("cuda")) is asked
    assert not offloads(torch.device("cpu"))
    _options.cache_clear()
