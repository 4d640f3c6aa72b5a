"""The loop on a tiny VAE: the same losses however a run is cut, shared or interrupted."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from elastic3d.errors import UserError
from elastic3d.training import loop
from elastic3d.training.checkpoint import load_checkpoint, newest_checkpoint
from elastic3d.training.distributed import make_accelerator, state_bytes
from elastic3d.training.journal import read_metrics
from elastic3d.training.loop import compile_blocks, enable_gradient_checkpointing, stop_signals, train
from elastic3d.training.options import LoopConfig, Precision, Schedule, TrainConfig
from elastic3d.training.stages import build_stage, run_stage
from elastic3d.utils.devices import DeviceChoice
from tests.processes import CONTEXT
from tests.training import worker
from tests.training.tiny import vae_config

ROOT = Path(__file__).resolve().parents[2]


def losses(config: TrainConfig) -> dict[int, float]:
    return {
        int(line["step"]): line["loss"]
        for line in read_metrics(config.folder / "metrics.jsonl")
        if "loss" in line
    }


def run(config: TrainConfig) -> dict[int, float]:
    assert run_stage(config) == 0
    return losses(config)


@dataclass
class Started:
    """Runs in a process of their own, and the file that gets what it says."""

    process: multiprocessing.Process
    said: Path

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 60) -> str:
        """Until it ends; what it said."""
        self.process.join(seconds)
        return self.said.read_text()


def start(*configs: TrainConfig, **environment: str) -> Started:
    """The runs, one after the other in a process of their own."""
    configs[0].runs.mkdir(exist_ok=True)
    said = configs[0].runs / f"{configs[0].name}-{environment.get('RANK', '0')}.log"
    process = CONTEXT.Process(target=worker.work, args=(configs, environment, said))
    process.start()
    return Started(process, said)


def group_of(size: int) -> dict[str, str]:
    """What processes that share a run find in their environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return dict(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def start_two(*configs: TrainConfig) -> list[Started]:
    """The runs, shared by two processes."""
    group = group_of(2)
    return [
        start(*configs, RANK=str(rank), LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true", **group)
        for rank in range(2)
    ]


def wait_for_end(processes: list[Started]) -> None:
    try:
        for process in processes:
            said = process.wait(120)
            assert process.process.exitcode == 0, said
    finally:
        for process in processes:  # two that wait for each other would not let the tests end
            process.process.kill()


def wait_for(condition, started: Started, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert started.process.is_alive(), started.said.read_text()
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_run_leaves_its_record(prepared):
    config = vae_config(prepared, validate_every=3, sample_every=6)
    found = run(config)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    lines = read_metrics(config.folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "val/volume_iou" in line] == [3, 6]
    assert {"loss", "field", "kl", "gradient_norm", "learning_rate", "seconds_per_step"} <= set(lines[0])
    assert (config.folder / "samples" / "reconstruction-00000006.png").is_file()
    assert list((config.folder / "tensorboard").iterdir())
    state = load_checkpoint(config.folder / "checkpoints" / "step-00000006").values
    assert state["data"] == {"train_shapes": 5, "train_missing": 1, "val_shapes": 1}
    assert state["config"]["vae"]["model"]["num_latents"] == 8


def test_a_killed_run_resumes_bitwise(prepared):
    whole, cut = (
        vae_config(prepared, name=name, precision=Precision.bf16_master, save_every=2)
        for name in ("whole", "cut")
    )
    torch.set_num_threads(1)
    expected = run(whole)
    process = start(cut)
    wait_for(lambda: (cut.folder / "checkpoints" / "step-00000002").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(cut) == expected
    a, b = (load_checkpoint(c.folder / "checkpoints" / "step-00000006") for c in (whole, cut))
    for part, tensors in a.tensors.items():
        assert all(torch.equal(tensor, b.tensors[part][name]) for name, tensor in tensors.items()), part


def test_two_processes_equal_one_with_the_whole_batch(prepared):
    precisions = {Precision.fp32: 1e-4, Precision.bf16_master: 3e-2}
    alone = [vae_config(prepared, name=f"alone-{p.name}", precision=p) for p in precisions]
    both = [vae_config(prepared, name=f"both-{p.name}", precision=p) for p in precisions]
    processes = start_two(*both)
    expected = [run(config) for config in alone]
    wait_for_end(processes)
    for config, wanted, tolerance in zip(both, expected, precisions.values(), strict=True):
        assert losses(config) == pytest.approx(wanted, rel=tolerance)


def test_accumulation_equals_the_whole_batch(prepared):
    expected = run(vae_config(prepared, name="whole"))
    assert run(vae_config(prepared, name="parts", accumulate=2)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("precision", [Precision.bf16_master, Precision.bf16_autocast])
def test_bf16_is_close_to_fp32(prepared, precision):
    expected = run(vae_config(prepared, name="fp32"))
    assert run(vae_config(prepared, name="bf16", precision=precision)) == pytest.approx(expected, rel=0.1)


def test_learns_one_shape(prepared):
    (prepared / "train.txt").write_text("balls/ball3\n")
    (prepared / "val.txt").write_text("balls/ball3\n")
    config = vae_config(prepared, steps=80, learning_rate=1e-2, warmup=10, log_every=40, save_every=80)
    config.validate_every, config.ema = 80, 0.9
    run(config)
    last = read_metrics(config.folder / "metrics.jsonl")[-1]
    assert last["val/volume_iou"] > 0.85


def test_a_run_is_for_one_process_and_sigterm_ends_it_with_a_checkpoint(prepared):
    config = vae_config(prepared, steps=100_000, save_every=100_000)
    process = start(config)
    wait_for(lambda: losses(config), process)
    with pytest.raises(UserError, match="tiny is in use by another process"):
        run_stage(config)  # which would take away what the first is about to write
    process.send_signal(signal.SIGTERM)
    said = process.wait()
    assert process.process.exitcode == 143, said
    assert "SIGTERM" in said
    [checkpoint] = (config.folder / "checkpoints").iterdir()
    assert load_checkpoint(checkpoint).step == max(losses(config))


def test_an_error_of_validation_or_drawing_costs_no_step(prepared, monkeypatch):
    config = vae_config(prepared, sample_every=3)
    stage = build_stage(config)
    monkeypatch.setattr(stage, "samples", lambda: stage.items.shapes.require(["balls/absent"]))
    with pytest.raises(UserError, match="balls/absent"):
        train(stage, config, config.folder)
    assert newest_checkpoint(config.folder / "checkpoints")[0].name == "step-00000003"


@pytest.mark.parametrize(("steps", "part"), [(6, "validate"), (7, "validate"), (6, "samples")])
def test_what_was_interrupted_after_the_last_checkpoint_is_made_up_for(prepared, monkeypatch, steps, part):
    """Of the last step too, after which nothing is left to train."""
    config = vae_config(prepared, steps=steps, validate_every=6, sample_every=6, schedule=Schedule.constant)
    stage = build_stage(config)
    monkeypatch.setattr(stage, part, lambda: stage.items.shapes.require(["balls/absent"]))
    with pytest.raises(UserError, match="balls/absent"):
        train(stage, config, config.folder)

    def looks() -> list[float]:
        assert len(list((config.folder / "samples").iterdir())) == steps - 5
        return [
            line["step"] for line in read_metrics(config.folder / "metrics.jsonl") if "val/volume_iou" in line
        ]

    run(config)
    assert looks() == list(range(6, steps + 1))
    run(config)
    assert looks() == list(range(6, steps + 1)), "what was looked at once is not looked at again"


def test_the_time_limit_ends_with_a_checkpoint(prepared):
    config = vae_config(prepared, steps=100_000, save_every=100_000, max_minutes=0.5 / 60)
    run(config)
    [checkpoint] = (config.folder / "checkpoints").iterdir()
    assert load_checkpoint(checkpoint).step == max(losses(config)) < 100_000


def test_a_finished_run_has_nothing_to_do_and_can_be_prolonged(prepared):
    run(vae_config(prepared, schedule=Schedule.constant))
    before = losses(vae_config(prepared))
    assert run(vae_config(prepared, schedule=Schedule.constant)) == before
    assert len(run(vae_config(prepared, schedule=Schedule.constant, steps=8))) == 8


def test_a_half_written_checkpoint_is_passed_over(prepared, capfd):
    config = vae_config(prepared)
    expected = run(config)
    (config.folder / "checkpoints" / "step-00000006" / "average.safetensors").unlink()
    assert run(config) == expected
    assert "average.safetensors is missing" in capfd.readouterr().err


def test_starts_from_averaged_weights(prepared):
    config = vae_config(prepared)
    run(config)
    checkpoint = config.folder / "checkpoints" / "step-00000006"
    second = vae_config(prepared, name="second", steps=1, learning_rate=0.0, init_from=checkpoint)
    run(second)
    average = load_checkpoint(checkpoint).tensors["average"]
    started = load_checkpoint(second.folder / "checkpoints" / "step-00000001").tensors["model"]
    assert all(torch.equal(tensor, started[name]) for name, tensor in average.items())


def test_a_larger_model_starts_from_a_smaller_one(prepared):
    config = vae_config(prepared, learning_rate=0.0)
    run(config)
    checkpoint = config.folder / "checkpoints" / "step-00000006"
    larger = vae_config(prepared, name="larger", steps=1, learning_rate=0.0, init_from=checkpoint)
    larger.vae.model.decoder_layers = 2
    with pytest.raises(UserError, match="15 missing"):
        run_stage(larger)
    new = [name for name in build_stage(larger).objective.state_dict() if ".transformer.resblocks.1." in name]
    assert len(new) == 15
    run(replace(larger, init_new=new))
    average = load_checkpoint(checkpoint).tensors["average"]
    started = load_checkpoint(larger.folder / "checkpoints" / "step-00000001").tensors["model"]
    assert all(torch.equal(tensor, started[name]) for name, tensor in average.items())
    assert set(started) - set(average) == set(new)


def test_mistakes(prepared):
    run(vae_config(prepared))
    for changes, message in (
        (dict(resume=False), "exists: take another name"),
        (dict(steps=5), "is beyond steps=5"),
        (dict(gradient_checkpointing=True), "can't recompute its blocks"),
        (
            dict(init_from=Path("nowhere"), name="fresh"),
            "init_from=nowhere does not exist, expected a checkpoint",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run_stage(vae_config(prepared, **changes))


def test_a_run_that_goes_on_with_other_options_says_so(prepared, capsys):
    config = vae_config(prepared)
    run(config)
    capsys.readouterr()
    run(replace(config, save_every=1))
    assert " was " not in capsys.readouterr().err
    run(replace(config, steps=config.steps + 1, schedule=Schedule.constant))
    said = capsys.readouterr().err
    assert "schedule was cosine" in said and "steps was " not in said
    changed = replace(config.vae, kl_weight=0.5)
    run(replace(config, steps=config.steps + 2, learning_rate=1e-5, vae=changed))
    said = capsys.readouterr().err
    assert (
        f"learning_rate was {config.learning_rate}" in said
        and f"vae.kl_weight was {config.vae.kl_weight}" in said
    )
    assert f"steps was {config.steps + 1}" in said, "the cosine ends later, and so is another at every step"


def test_a_run_that_goes_on_with_other_data_says_so(prepared, capsys):
    config = vae_config(prepared)
    run(config)
    (prepared / "train.txt").write_text("balls/ball0\nballs/ball1\n")
    capsys.readouterr()
    run(replace(config, steps=config.steps + 1))
    assert "train_shapes was 5" in capsys.readouterr().err


def test_another_architecture_is_refused(prepared):
    config = vae_config(prepared)
    run(config)
    config.vae.model.width = 48
    with pytest.raises(UserError, match="does not fit"):
        run_stage(config)


def test_a_seed_of_more_bits_than_numpy_takes():
    make_accelerator(LoopConfig(seed=2**63 - 1, device=DeviceChoice.cpu))


def test_a_run_that_diverges_stops(prepared):
    config = vae_config(prepared, steps=100)
    stage = build_stage(config)
    with torch.no_grad():
        next(stage.objective.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="diverged"):
        train(stage, config, config.folder)


def test_too_little_memory_is_said_before_the_first_step(prepared, monkeypatch):
    config = vae_config(prepared, precision=Precision.bf16_master)
    stage = build_stage(config)
    count = sum(p.numel() for p in stage.objective.parameters())
    assert state_bytes(stage.objective, config) == count * (2 + 2 + 4 + 8 + 8)
    assert state_bytes(stage.objective, config, shards=4) == count * 24 // 4
    assert state_bytes(stage.objective, config, shards=4, offloaded=True) == count * 2
    stage.objective.requires_grad_(False)
    assert state_bytes(stage.objective, config) == count * 2
    stage.objective.requires_grad_(True)
    monkeypatch.setattr("elastic3d.training.distributed.free_memory", lambda device: 0)
    with pytest.raises(UserError, match=r"need 0.\d GB of cpu memory .*precision=bf16_master.*fsdp.yaml"):
        train(stage, config, config.folder)
    assert not config.folder.exists()


def test_metrics_of_a_killed_process_can_be_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_a_signal_that_arrives_twice_at_once_is_one_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as arrived:
        for _ in range(2):  # of the terminal, and passed on by torchrun
            os.kill(os.getpid(), signal.SIGTERM)
        assert arrived == ["SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_acts_as_it_did_before(monkeypatch):
    monkeypatch.setattr(loop, "REPEATED_S", 0.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), stop_signals() as arrived:
            signal.raise_signal(signal.SIGINT)
            assert arrived == ["SIGINT"]
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_gradient_checkpointing_switch():
    part = torch.nn.Identity()
    part.gradient_checkpointing = False
    enable_gradient_checkpointing(torch.nn.Sequential(part))
    assert part.gradient_checkpointing is True


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiling_changes_speed_alone(prepared, monkeypatch, backend):
    """Forward and backward are graphs in any case; the default backend makes C++ of them too, which takes long."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain = run(vae_config(prepared, steps=3))
    compiled = run(vae_config(prepared, name="compiled", steps=3, compile=True))
    assert compiled == pytest.approx(plain, rel=1e-4)
    with pytest.raises(UserError, match="Linear has no list of blocks"):
        compile_blocks(torch.nn.Linear(1, 1))
