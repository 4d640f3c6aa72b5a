"""The one training loop. A stage says what is trained on what; the loop does the rest."""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.errors import UserError
from elastic3d.models.weights import load_strict
from elastic3d.pipelines.memory import GB
from elastic3d.training.checkpoint import (
    Checkpoint,
    changed_options,
    check_latents,
    clear_unfinished,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    starting_point,
)
from elastic3d.training.datasets import Batch, Items, micro_batches
from elastic3d.training.distributed import (
    gathered,
    make_accelerator,
    offloads,
    require_memory,
    shard,
    state_bytes,
    wants_sharding,
    whole_model,
)
from elastic3d.training.journal import Journal
from elastic3d.training.optim import Average, MasterOptimizer, learning_rate
from elastic3d.training.options import LoopConfig, Precision, Schedule
from elastic3d.utils.claims import sole_use
from elastic3d.utils.options import to_dict

# Options that change nothing of what is learned: a resumed run may have others.
INCIDENTAL = (
    "scale",  # of latents, which `check_latents` compares
    "runs",
    "device",
    "workers",
    "max_minutes",
    "resume",
    "log_every",
    "save_every",
    "keep",
)
STOPPING = (signal.SIGTERM, signal.SIGINT)
REPEATED_S = 3.0  # torchrun passes a signal on to processes that may have had it already, as by Ctrl-C
MAX_BAD_STEPS = 20  # in a row without a finite gradient: the run is lost


class Stage(ABC):
    """What one kind of training brings to the loop.

    `objective` holds the model; its `forward(batch)` gives the mean loss over the batch, a scalar, and
    detached scalars to record. It draws no random numbers: noise comes with the batch, so that neither the
    number of processes nor a resume changes a result. Parameters that need no gradient are left alone. The
    other methods see averaged weights.
    """

    objective: nn.Module
    frozen: nn.Module | None = None  # a model beside the objective, which runs it and does not train it
    items: Items  # the training data
    record: dict[str, Any]  # plain values to keep with the run, such as the version and size of its data

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Scalars on held-out data."""

    def rate_factor(self, name: str) -> float:
        """Learning rate of a parameter over the run's."""
        return 1.0

    def samples(self) -> dict[str, np.ndarray]:
        """Images (H,W,3) uint8 by name."""
        return {}


@dataclass
class Outcome:
    """How a run ended: `reason` is `finished`, `time`, or the name of the signal that stopped it."""

    step: int
    reason: str
    checkpoint: Path | None


def train(stage: Stage, config: LoopConfig, folder: Path, record: Mapping[str, Any] | None = None) -> Outcome:
    """Train until `config.steps`, the time limit, or a signal (SIGTERM, SIGINT); always leaves a checkpoint.

    Args:
        folder: the run's own; gets checkpoints/, metrics.jsonl, tensorboard/, samples/.
        record: plain values (configuration, data version) to keep in every checkpoint.

    Raises:
        UserError: a batch that the processes can't share, a run that diverged, a checkpoint that does not
        fit, a folder that another process trains in.
    """
    with stop_signals() as signals, ExitStack() as claims:
        run = _Run(stage, config, folder, {**(record or {}), "data": stage.record}, claims)
        try:
            return run.go(signals)
        finally:
            run.journal.close()


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Names of the SIGTERM and SIGINT that arrived inside the block; a second one, later than at once, acts as it did
    before."""
    arrived: list[str] = []
    first: dict[signal.Signals, float] = {}
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: object) -> None:
        caught, now = signal.Signals(number), time.monotonic()
        if now - first.setdefault(caught, now) > REPEATED_S:
            signal.signal(caught, before[caught])
            signal.raise_signal(caught)
        elif caught.name not in arrived:
            arrived.append(caught.name)

    for caught in STOPPING:
        before[caught] = signal.signal(caught, note)
    try:
        yield arrived
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


class _Run:
    def __init__(
        self, stage: Stage, config: LoopConfig, folder: Path, record: dict[str, Any], claims: ExitStack
    ) -> None:
        """`claims`: what keeps other processes from the folder, left with the run."""
        self.stage, self.config, self.folder, self.record = stage, config, folder, record
        self.started = time.monotonic()
        self.accelerator = accelerator = make_accelerator(config)
        self.notes: list[str] = []
        self._prepare()
        if accelerator.is_main_process:
            claims.enter_context(sole_use(folder))
        found = self._find()
        if sharded := wants_sharding(accelerator):
            shard(stage.objective, accelerator)
        # now all have the main process' weights
        self.model = stage.objective if sharded else accelerator.prepare_model(stage.objective)
        trainable = {n: p for n, p in stage.objective.named_parameters() if p.requires_grad}
        self.optimizer = MasterOptimizer(trainable, config, stage.rate_factor)
        self.average = Average(self.optimizer.masters, config.ema)
        self.notes = [
            f"{sum(p.numel() for p in trainable.values()) / 1e6:.2f} M parameters",
            *(f"{name} {value}" for name, value in stage.record.items() if name != "scale"),  # long
            *self.notes,
        ]
        if self.optimizer.sharded:
            self.notes.append(f"{sum(p.numel() for p in self.optimizer.shards) / 1e6:.2f} M in this process")
        self.step = self._restore(found)
        main = accelerator.is_main_process
        self.journal = Journal(folder, self.step, config.steps, main, title=folder.name)
        self.journal.say(f"{folder}: {', '.join(self.notes)}")
        self.saved: Path | None = None

    def _prepare(self) -> None:
        config, objective, processes = self.config, self.stage.objective, self.accelerator.num_processes
        config.micro_batch(processes)  # refuses what can't be shared
        frozen, sharded = self.stage.frozen, wants_sharding(self.accelerator)
        if frozen is not None and sharded:
            raise UserError(
                f"stage={config.stage.name} can't be sharded, as each process keeps its frozen model whole: launch it"
                " without configs/accelerate/fsdp.yaml"
            )
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(objective)
        device = self.accelerator.device
        offloaded = sharded and offloads(device)
        need = state_bytes(objective, config, processes if sharded else 1, frozen, offloaded)
        require_memory(need, objective, device, frozen)
        self.notes.append(f"{need / GB:.2g} GB in this process before activations")
        objective.to(device)
        if config.precision is Precision.bf16_master:
            for parameter in objective.parameters():
                parameter.data = parameter.data.bfloat16()
        if config.compile:
            compile_blocks(objective)

    def go(self, signals: list[str]) -> Outcome:
        config, accelerator = self.config, self.accelerator
        own, processes = accelerator.process_index, accelerator.num_processes
        window: list[dict[str, Tensor]] = []
        bad_steps, reason = 0, "finished"
        self._look(*self._missed_looks())
        clock, clock_step = time.monotonic(), self.step
        for batches in micro_batches(self.stage.items, config, self.step, own, processes):
            rate = learning_rate(self.step, config)
            window += self._backward(batches)
            norm = self.optimizer.step(rate)
            self.average.update(self.optimizer.masters, self.step)
            self.step += 1
            window[-1]["gradient_norm"] = norm
            bad_steps = 0 if norm.isfinite() else bad_steps + 1
            if bad_steps == MAX_BAD_STEPS:
                raise UserError(
                    f"the run diverged: no finite gradient in the {bad_steps} steps up to {self.step}"
                )
            self.journal.advance(self.step)
            if self._due(config.log_every):
                seconds = (time.monotonic() - clock) / (self.step - clock_step)
                values = self._averaged(window) | {"learning_rate": rate, "seconds_per_step": seconds}
                self.journal.scalars(self.step, values)
                window.clear()
                clock, clock_step = time.monotonic(), self.step
            reason = self._stop_reason(signals)
            if reason or self._due(config.save_every):
                self._save()
            self._look(*self._due_looks())  # an error of it costs no step
            if reason:
                break
        outcome = Outcome(self.step, reason or "finished", self.saved)
        where = f", checkpoint {outcome.checkpoint}" if outcome.checkpoint else ""
        if reason and reason != "finished":
            where += "; the same command goes on from there"
        self.journal.say(f"stopped after step {outcome.step} of {config.steps} ({outcome.reason}){where}")
        return outcome

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _backward(self, batches: list[Batch]) -> list[dict[str, Tensor]]:
        metrics = []
        for batch in batches:
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            with self._autocast():
                loss, values = self.model(batch)
            self.accelerator.backward(loss / len(batches))
            self.optimizer.collect()
            metrics.append({"loss": loss.detach(), **values})
        return metrics

    def _autocast(self) -> torch.autocast:
        enabled = self.config.precision is Precision.bf16_autocast
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def _averaged(self, window: list[dict[str, Tensor]]) -> dict[str, float]:
        """Means over the steps since the last record and over the processes."""
        from accelerate.utils import gather_object

        # a process may have no sample of some kind, and then no value of it
        names = sorted(set(gather_object(sorted({name for values in window for name in values}))))
        found = [[values[name].float() for values in window if name in values] for name in names]
        none = torch.zeros((), device=self.accelerator.device)
        sums = [torch.stack([*each, none]).sum() for each in found]
        counts = [none + len(each) for each in found]
        total, count = self.accelerator.reduce(torch.stack([torch.stack(sums), torch.stack(counts)]), "sum")
        return dict(zip(names, (total / count).tolist(), strict=True))

    def _due_looks(self) -> tuple[bool, bool]:
        """Whether validation and images are due after this step."""
        validate, draw = self.config.validate_every, self.config.sample_every
        last = self.step == self.config.steps
        return bool(validate) and (last or self._due(validate)), bool(draw) and (last or self._due(draw))

    def _missed_looks(self) -> tuple[bool, bool]:
        """Those that were due after the step that the run goes on from, and were interrupted; the same in every
        process."""
        due = self._due_looks() if self.step else (False, False)
        done = self.journal.looks(self.step)
        missed = torch.tensor([float(a and not b) for a, b in zip(due, done, strict=True)])
        # the main process alone knows what is done; it may have come further where another one looks
        missed *= self.accelerator.is_main_process
        validate, draw = self.accelerator.reduce(missed.to(self.accelerator.device), "sum").tolist()
        return bool(validate), bool(draw)

    def _look(self, validate: bool, draw: bool) -> None:
        """Validation and images, with averaged weights, on the main process."""
        if not (validate or draw):
            return
        with self.average.applied(self.optimizer.shards), whole_model(self.stage.objective):
            if self.accelerator.is_main_process:
                self._look_now(validate, draw)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _look_now(self, validate: bool, draw: bool) -> None:
        self.stage.objective.eval()
        with self._autocast():
            if validate:
                values = self.stage.validate()
                self.journal.scalars(self.step, values)
                shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
                self.journal.say(f"step {self.step}: {shown}")
            if draw:
                self.journal.images(self.step, self.stage.samples())
        self.stage.objective.train()

    def _stop_reason(self, signals: list[str]) -> str:
        """Why to stop after this step, the same in every process; empty to go on."""
        if self.step >= self.config.steps:
            return "finished"
        minutes = (time.monotonic() - self.started) / 60
        timeout = bool(self.config.max_minutes) and minutes >= self.config.max_minutes
        own = {each.name: each.name in signals for each in STOPPING} | {"time": timeout}
        found = torch.tensor(list(own.values()), dtype=torch.float32, device=self.accelerator.device)
        counts = self.accelerator.reduce(found, "sum").tolist()
        return next((reason for reason, count in zip(own, counts, strict=True) if count), "")

    # ------------------------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        checkpoint = Checkpoint(self.step, self._tensors(), self.record)
        if self.accelerator.is_main_process:
            self.saved = save_checkpoint(self.folder / "checkpoints", checkpoint, self.config.keep)
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint holds, by file; every process has to call it, the main one gets it."""
        optimizer, trained = self.optimizer, set(self.optimizer.names)
        state = self.stage.objective.state_dict()
        fixed = {name: gathered(value, value) for name, value in state.items() if name not in trained}
        return {
            "model": {**fixed, **optimizer.whole(optimizer.masters)},
            "average": {**fixed, **optimizer.whole(self.average.values)},
            "optimizer": optimizer.state_tensors(),
        }

    def _find(self) -> Checkpoint | None:
        """What the run starts from, its weights in the model already: its newest checkpoint, or another's averages."""
        folder = self.folder / "checkpoints"
        if self.accelerator.is_main_process:
            clear_unfinished(folder)
        path, passed_over = newest_checkpoint(folder)
        self.notes += [f"passed over: {reason}" for reason in passed_over]
        if path is None:
            if self.config.init_from is None:
                return None
            path = self.config.init_from
            checkpoint, advice = self._begun(path)
        else:
            checkpoint = self._resumed(path)
            advice = "give the options that it was trained with, or another name= for a new run"
        try:
            load_strict(self.stage.objective, checkpoint.part("model"), str(path))
        except UserError as error:
            raise UserError(f"{error}: {advice}") from error
        return checkpoint

    def _begun(self, path: Path) -> tuple[Checkpoint, str]:
        """The first checkpoint of a run that starts from `init_from`, and what to do where that does not fit."""
        own = self.stage.objective.state_dict()
        start = starting_point(path, own)
        average = {name: own[name] for name in self.config.init_new if name in own} | start.part("average")
        parts = {"model": average, "average": average, "optimizer": dict[str, Tensor]()}
        if start.stage in (None, self.config.stage.name):
            advice = "it is of another architecture: give the options that it was trained with, another init_from=,"
        else:
            advice = f"it is of stage={start.stage}, expected stage={self.config.stage.name}: give another init_from=,"
        return Checkpoint(0, parts, source=str(path)), f"{advice} or leave it out"

    def _resumed(self, path: Path) -> Checkpoint:
        if not self.config.resume:
            raise UserError(f"{path} exists: take another name= or go on with resume=true")
        checkpoint = load_checkpoint(path)
        if checkpoint.step > self.config.steps:
            raise UserError(f"{path} is beyond steps={self.config.steps}")
        check_latents(checkpoint, self.stage.record)
        began = f", begun from {self.config.init_from}" if self.config.init_from else ""
        self.notes.append(f"going on from {path}{began}")
        # every other schedule comes to its end with the last step
        is_constant = self.config.schedule is Schedule.constant
        incidental = (*INCIDENTAL, "steps") if is_constant else INCIDENTAL
        for name, now in (("config", to_dict(self.config)), ("data", self.stage.record)):
            before = checkpoint.values.get(name)
            changed = changed_options(before, now) if isinstance(before, Mapping) else ()
            self.notes += [each for each in changed if each.partition(" ")[0] not in incidental]
        return checkpoint

    def _restore(self, checkpoint: Checkpoint | None) -> int:
        """Masters, averages and moments from a checkpoint -> its step."""
        if checkpoint is None:
            return 0
        try:
            self.optimizer.fill(self.optimizer.masters, checkpoint.part("model"))
            self.optimizer.fill(self.average.values, checkpoint.part("average"))
            self.optimizer.load_state_tensors(checkpoint.part("optimizer"))
        except ValueError as error:
            raise UserError(f"{checkpoint.source} does not fit: {error}") from error
        return checkpoint.step


def compile_blocks(module: nn.Module) -> None:
    """Compile every block, a child of a `ModuleList`, for itself: all of a kind share one short compilation."""
    blocks = [block for part in module.modules() if isinstance(part, nn.ModuleList) for block in part]
    if not blocks:
        raise UserError(f"compile: {type(module).__name__} has no list of blocks")
    for block in blocks:
        block.compile()


def enable_gradient_checkpointing(module: nn.Module) -> None:
    """Turn on `gradient_checkpointing` in every part that has the switch; UserError if none has."""
    parts = [part for part in module.modules() if hasattr(part, "gradient_checkpointing")]
    if not parts:
        raise UserError(f"gradient_checkpointing: {type(module).__name__} can't recompute its blocks")
    for part in parts:
        part.gradient_checkpointing = True  # type: ignore[assignment]
