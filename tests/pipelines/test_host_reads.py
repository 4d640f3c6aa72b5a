"""How often a generation would wait for a GPU: what reads a tensor on the host, counted where there is no GPU."""

from collections import Counter
from typing import Any

import pytest
import torch
from tiny_pipeline import image, tiny_pipeline
from torch.overrides import TorchFunctionMode

from elastic3d.elastic import attach
from elastic3d.elastic.config import BlockCacheConfig, CacheRule, RouterConfig, Scope
from elastic3d.geometry.decode import decode_field
from elastic3d.geometry.options import DecodeConfig
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline

READS = {
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "numpy",
    "cpu",
    "nonzero",
    "masked_select",
}
COPIES = {"tensor", "as_tensor", "new_tensor"}


class HostReads(TorchFunctionMode):
    """Counts calls that read a tensor on the host, and those that would copy one from there."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS | COPIES:
            self.found[name] += 1
        if name == "__getitem__" and isinstance(args[1], list):  # copied to where the tensor is
            self.found["list"] += 1
        return func(*args, **(kwargs or {}))

    @property
    def reads(self) -> int:
        return sum(count for name, count in self.found.items() if name in READS)


def elastic_pipeline(scope: Scope) -> ImageTo3DPipeline:
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    attach(pipeline.dit, RouterConfig(scope=scope))
    return pipeline


def reads_of_steps(pipeline: ImageTo3DPipeline, samples: int, **options: Any) -> list[int]:
    """Host reads of each sampling step but the first, which also begins the generation."""
    with HostReads() as mode:
        at: list[int] = []
        pipeline(
            [image()] * samples,
            resolution=8,
            steps=6,
            on_progress=lambda stage, *_: stage == "dit" and at.append(mode.reads),
            **options,
        )
    return [b - a for a, b in zip(at, at[1:], strict=False)]


@pytest.mark.parametrize("samples", [1, 3])
def test_a_step_that_decides_for_all_blocks_reads_once(samples: int) -> None:
    pipeline = elastic_pipeline(Scope.step)
    found = reads_of_steps(pipeline, samples, shared=True)
    assert len(found) == 5 and max(found) <= 1, "one decision a step"


def test_a_dense_step_reads_nothing() -> None:
    assert set(reads_of_steps(elastic_pipeline(Scope.step), 2, elastic=False)) == {0}
    assert set(reads_of_steps(tiny_pipeline(), 2)) == {0}


def test_a_step_of_a_compiled_few_step_plan_reads_and_copies_nothing() -> None:
    pipeline = tiny_pipeline()
    config = RouterConfig(few_step_rank=2, few_step_guidance=2.0, guided_times=[0.1, 0.5])
    attach(pipeline.dit, config)
    pipeline.compile(backend="eager", disable=True)
    with HostReads() as mode:
        at: list[Counter[str]] = []
        told = [image()] * 2, 0
        pipeline(
            *told,
            resolution=8,
            steps=6,
            budget=1,
            on_progress=lambda stage, *_: stage == "dit" and at.append(mode.found.copy()),
        )
    assert pipeline.session is not None and pipeline.session.guided
    assert at[-1] == at[0], "five steps, some with one branch after two"


def test_routers_of_every_block_read_once_each() -> None:
    pipeline = elastic_pipeline(Scope.block)
    assert pipeline.session is not None
    assert max(reads_of_steps(pipeline, 2, shared=True)) <= len(pipeline.session.blocks)


def test_a_forecast_by_time_reads_no_more() -> None:
    pipeline = elastic_pipeline(Scope.step)
    cache = BlockCacheConfig(
        rule=CacheRule.age, longest=2, skipped_reuse=True, times=[0.0, 1.0], dampings=[0.5, 1.0]
    )
    assert max(reads_of_steps(pipeline, 2, shared=True, cache=cache)) <= 1


def test_the_field_is_read_once_a_pass_however_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the decoder's own modules, as on a GPU."""
    pipeline = tiny_pipeline()
    decoder = pipeline.vae.geo_decoder
    monkeypatch.setattr(decoder, "prepare", lambda *parts, often, found=decoder.prepare: found(*parts))
    with torch.no_grad():
        tokens = pipeline.vae.decode(torch.randn(1, 8, 7, generator=torch.Generator().manual_seed(0)))
    counts = []
    for max_points in (1 << 20, 500):
        with HostReads() as mode:
            decode_field(
                pipeline.vae.field(tokens),
                DecodeConfig(resolution=24, coarse_resolution=12, max_points=max_points),
            )
        counts.append(mode.reads)
    assert counts[0] == counts[1] > 0
