"""Calibrates the training-free policy of a model: dense generations of a handful of images, or of prompts, and what
their blocks add."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic3d.diffusion.dial import DIAL_NAME, IMAGES, MESHES, Dial, Kind, named_row, parse_dial, save_dial
from elastic3d.diffusion.options import Quality
from elastic3d.elastic.attachment import adapter_for, find_session
from elastic3d.elastic.cache import Streams
from elastic3d.elastic.config import ElasticConfig
from elastic3d.elastic.diffusers_loop import step_at, times_of
from elastic3d.elastic.families import BlockAdapter
from elastic3d.elastic.training_free import CALIBRATION_NAME, Array, Calibration, Series
from elastic3d.errors import UserError
from elastic3d.evaluation.items import spread
from elastic3d.models.images import prepare
from elastic3d.models.options import ForegroundConfig
from elastic3d.pipelines.generation import find_images, load_pipeline
from elastic3d.pipelines.options import (
    DEFAULT_IMAGE_MODEL,
    NO_ROUTERS_NAME,
    CalibratePolicyConfig,
    GenerateConfig,
    parse_size,
)
from elastic3d.pipelines.published import calibration_home
from elastic3d.pipelines.runtime import find_model
from elastic3d.pipelines.text_to_image import TextToImagePipeline, check_prompt, read_prompts
from elastic3d.pipelines.training_free import describe, save_calibration
from elastic3d.utils.files import load_json, printable

DENSE = ElasticConfig(elastic=False)
TOKENS = 64  # of each stream, spread evenly, that moments are taken of


def calibrate_policy(
    config: CalibratePolicyConfig, on_sample: Callable[[int, int], None] = lambda *_: None
) -> tuple[Path, Calibration]:
    """Generate the samples densely and write what was found -> its file, and the calibration.

    `on_sample(done, samples)` is called with each. A dial beside the file loses its rows of the plan, with a warning:
    they were measured with the calibration before.

    Raises:
        UserError: no image, no prompt, a model that can't be loaded, generations of fewer than three steps, a broken
            dial beside the file.
    """
    path = target_file(config)
    dial = _dial_of_plan(path, IMAGES if config.prompts else MESHES)
    found = (_of_images if config.prompts else _of_meshes)(config, on_sample)
    if dial is not None:
        save_dial(without_plan(dial), path.parent)
        warnings.warn(
            f"the rows of the plan are gone from {printable(path.parent / DIAL_NAME)}, as they were measured with the"
            " calibration before: scripts/benchmark.py and scripts/make_dial.py make new ones",
            stacklevel=2,
        )
    save_calibration(found, path)
    return path, found


def _dial_of_plan(path: Path, kind: Kind) -> Dial | None:
    """The dial that a calibration in this file belongs to; None where there is none, or none with rows of the plan."""
    place = path.parent / DIAL_NAME
    if path.name != CALIBRATION_NAME or not place.is_file():
        return None
    dial = parse_dial(load_json(place, kind.shape), printable(place), kind)
    return dial if any(row.planned for row in dial.rows) else None


def without_plan(dial: Dial) -> Dial | None:
    """A dial without its rows of the plan; None where the others have no row of each name."""
    rows = [
        (row, values) for row, values in zip(dial.rows, dial.values["rows"], strict=True) if not row.planned
    ]
    others = [row for row, _ in rows]
    named = {each.name: named_row(others, each, dial.scores) for each in Quality if others}
    names = {name: row.cost for name, row in named.items() if row is not None}
    if len(names) < len(Quality):
        return None
    return replace(dial, values={**dial.values, "rows": [values for _, values in rows], "names": names})


def target_file(config: CalibratePolicyConfig) -> Path:
    """The file that is written."""
    if config.output.endswith(".json"):
        return Path(config.output)
    if config.output:
        return Path(config.output) / CALIBRATION_NAME
    if config.prompts:
        return find_model(config.weights or DEFAULT_IMAGE_MODEL) / CALIBRATION_NAME
    return calibration_home(_mesh_options(config)) / CALIBRATION_NAME


def _of_meshes(config: CalibratePolicyConfig, on_sample: Callable[[int, int], None]) -> Calibration:
    images = spread(find_images(config.image), config.samples)
    pipeline = load_pipeline(_mesh_options(config))
    steps = pipeline.config.steps if config.steps is None else config.steps
    guidance = pipeline.config.guidance if config.guidance is None else config.guidance
    condition = pipeline.encode([prepare(image, ForegroundConfig(), pipeline.encoder) for image in images])

    def generate(number: int) -> Tensor:
        one, seeds = condition[number : number + 1], [config.seed + number]
        return pipeline.sample_latents(one, seeds, steps, guidance, DENSE)

    return calibrate(pipeline.dit, generate, len(images), guidance, on_sample)


def _of_images(config: CalibratePolicyConfig, on_sample: Callable[[int, int], None]) -> Calibration:
    prompts = spread(read_prompts(Path(config.prompts)), config.samples)
    pipeline = TextToImagePipeline.from_pretrained(
        config.backbone, config.weights or DEFAULT_IMAGE_MODEL, NO_ROUTERS_NAME,
        device=config.device, dtype=config.dtype, offload=config.offload,
    )  # fmt: skip
    for prompt in prompts:
        check_prompt(prompt, pipeline.backbone)
    settings = pipeline.settings_of(config.steps, config.guidance, parse_size(config.size))

    def generate(number: int) -> Tensor:
        text = pipeline.encode(prompts[number : number + 1])
        rest = pipeline.backbone.guidance_arguments(settings.guidance, 1)
        return pipeline.sample(text, rest, [config.seed + number], settings)

    transformer, scheduler = pipeline.backbone.transformer, pipeline.backbone.pipe.scheduler
    return calibrate(transformer, generate, len(prompts), settings.guidance, on_sample, scheduler)


def _mesh_options(config: CalibratePolicyConfig) -> GenerateConfig:
    """The model's options as a generation has them, without routers and without a calibration of earlier."""
    names = [
        "image",
        "model",
        "weights",
        "subfolder",
        "vae_subfolder",
        "dinov2",
        "device",
        "dtype",
        "low_memory",
    ]
    given = {name: getattr(config, name) for name in names}
    return GenerateConfig(**given, output="-", routers=NO_ROUTERS_NAME)


# ---------------------------------------------------------------------------------------------- measuring


def calibrate(
    model: nn.Module,
    generate: Callable[[int], Any],
    samples: int,
    guidance: float = 1.0,
    on_sample: Callable[[int, int], None] = lambda *_: None,
    scheduler: Any = None,
) -> Calibration:
    """The calibration of a model, from `samples` dense generations.

    `generate` makes the one sample of a number; `guidance` is the scale that the branches are combined with, where
    there are two; `on_sample(done, samples)` is called after each; `scheduler`: as in `recorded`. UserError:
    generations of fewer than three steps, or values that are not finite.
    """
    times, totals, result, changes = np.zeros(0), dict[Series, Array](), np.zeros(0), np.zeros(0)
    for number in range(samples):
        with recorded(model, scheduler) as notes:
            generate(number)
        on_sample(number + 1, samples)
        times = np.array(notes.times)
        moments = notes.moments()
        totals = {series: totals.get(series, 0.0) + moment / samples for series, moment in moments.items()}
        result = (result if number else 0.0) + notes.result(guidance) / samples
        changes = (changes if number else 0.0) + notes.changes() / samples
    about = {"model": describe(model), "samples": samples, "steps": len(times), "guidance": guidance}
    return Calibration(times, totals, result, changes, about)


@dataclass
class Notes:
    """What a dense generation of one sample did: for each step its time, and for each pass of it what each list added
    to its rows. The conditional branch's row comes first."""

    times: list[float] = field(default_factory=list)
    added: list[list[dict[Series, Tensor]]] = field(default_factory=list)  # (rows,d) each
    inputs: list[Tensor] = field(default_factory=list)  # of the first pass of each step (B,L,D)

    def note(self, time: float, added: dict[Series, Tensor], tokens: Tensor) -> None:
        """A pass is over."""
        if not self.times or time != self.times[-1]:
            self.times.append(time)
            self.added.append([])
            self.inputs.append(tokens)
        self.added[-1].append(added)

    def moments(self) -> dict[Series, Array]:
        """Second moments (S,S) of each series, of a sample and branch."""
        if len(self.times) < 3:
            raise UserError(
                f"a generation has {len(self.times)} steps, expected at least 3 to calibrate a policy on"
            )
        found: dict[Series, Array] = defaultdict(lambda: np.zeros((len(self.times),) * 2))
        branches = list(zip(*self.added, strict=True))  # the passes of each, whose texts may differ in length
        for passes in branches:
            for series in passes[0]:
                values = torch.stack([each[series] for each in passes])
                found[series] += second_moments(values) / len(branches)
        if not all(np.isfinite(moment).all() for moment in found.values()):
            raise UserError("a generation has values that are not finite: try dtype=float32")
        return dict(found)

    def result(self, guidance: float) -> Array:
        """Second moments (S,S) of what each list adds to its first stream, with the branches combined as guidance
        does; their sum."""
        found = np.zeros((len(self.times),) * 2)
        for series in [each for each in self.added[0][0] if each[1] == 0]:
            rows = torch.stack([torch.cat([each[series] for each in passes]) for passes in self.added])
            # of one branch alone this is the branch itself
            found += second_moments(rows[:, -1:] + guidance * (rows[:, :1] - rows[:, -1:]))
        return found

    def changes(self) -> Array:
        """Relative changes (S,) of the input."""
        before: list[Tensor | None] = [None, *self.inputs[:-1]]
        return np.array([relative_change(*pair) for pair in zip(before, self.inputs, strict=True)])


@contextmanager
def recorded(model: nn.Module, scheduler: Any = None) -> Iterator[Notes]:
    """While it lasts, a model is the dense one, and what its lists of blocks add at each step is noted. `scheduler`: of
    a pipeline of diffusers, which rounds the times that the model is called with to its number format."""
    adapter, notes = adapter_for(model), Notes()
    with recording(model) as lists:

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            time = float(adapter.timestep(args, kwargs)[0])
            if scheduler is not None and (step := step_at(scheduler, 1 - time)) is not None:
                time = times_of(scheduler)[step]
            added = {
                (each.first, number): some(stream).flatten(1).float().cpu()
                for each in lists
                for number, stream in enumerate(each.added)
            }
            notes.note(time, added, some(lists[0].entered[0]).float().cpu())

        handle = model.register_forward_hook(after, with_kwargs=True)
        try:
            yield notes
        finally:
            handle.remove()


@dataclass(eq=False)
class ListRecord:
    """What came into a list of blocks in the newest pass, and what they added together, each (B,L,D) a stream."""

    kind: BlockAdapter
    first: int  # the number of its first block
    entered: Streams = ()
    added: Streams = ()

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the first block."""
        self.entered = self.kind.bind(block, args, kwargs).streams

    def leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook of the last block."""
        pairs = zip(self.entered, self.kind.unpack(output), strict=True)
        self.added = tuple((y - x).detach() for x, y in pairs)


@contextmanager
def recording(model: nn.Module) -> Iterator[list[ListRecord]]:
    """While it lasts, a model is the dense one, and what each of its lists of blocks adds is noted."""
    lists: list[ListRecord] = []
    with ExitStack() as stack:
        if (session := find_session(model)) is not None:
            stack.enter_context(session.dense())
        start = 0
        for name, kind in adapter_for(model).lists:
            blocks = list(model.get_submodule(name).children())
            record = ListRecord(kind, start)
            stack.callback(blocks[0].register_forward_pre_hook(record.enter, with_kwargs=True).remove)
            stack.callback(blocks[-1].register_forward_hook(record.leave).remove)
            lists.append(record)
            start += len(blocks)
        yield lists


def relative_change(before: Tensor | None, now: Tensor) -> float:
    """Squared distance over the squared norm; 0 of nothing."""
    if before is None:
        return 0.0
    return float((now - before).float().square().sum() / before.float().square().sum().clamp_min(1e-30))


def second_moments(values: Tensor) -> Array:
    """Values (S,B,d) -> (S,S), of a sample."""
    found: Array = torch.einsum("sbd,tbd->st", values.double(), values.double()).numpy() / values.shape[1]
    return found


def some(stream: Tensor, count: int = TOKENS) -> Tensor:
    """`count` tokens of a stream (B,L,D), spread evenly; all where there are fewer."""
    length = stream.shape[1]
    picked: Sequence[int] = [i * length // count for i in range(count)] if length > count else range(length)
    return stream[:, list(picked)]
