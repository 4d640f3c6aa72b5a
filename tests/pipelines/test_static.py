"""The static DiT gives what the DiT gives, compiled with few graphs, never with the weights of another generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_dial import load, save_dialled
from tiny_pipeline import image, tiny_pipeline
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import fresh_cache

from elastic3d.diffusion.options import Quality
from elastic3d.diffusion.sampler import timestep_grid
from elastic3d.elastic import attach, detach
from elastic3d.elastic.config import Branches, ElasticConfig, RouterConfig, Scope
from elastic3d.elastic.session import ElasticSession
from elastic3d.errors import UserError
from elastic3d.models.options import SkipDiTConfig
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.pipelines import static as module
from elastic3d.pipelines.generation import load_pipeline
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.options import GenerateConfig
from elastic3d.pipelines.static import CompiledDiT, StaticDiT, compile_arguments

ROUTERS = RouterConfig(
    scope=Scope.step, branches=Branches.shared, widths=1, longest=4, initial_keep=0.95, few_step_rank=2,
    few_step_nfe=6.0, few_step_max_steps=6, few_step_guidance=2.0, guided_times=[0.05, 0.4],
)  # fmt: skip
FEW, FEWER, DENSE = {"steps": 5, "budget": 1}, {"steps": 3, "budget": 1}, {"elastic": False}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
UNCOMPILED = {"backend": "eager", "disable": True}  # the twin as it is
Kept = tuple[Tensor, list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def learn(session: ElasticSession, seed: int = 0) -> None:
    """Fresh LoRAs change nothing; these do, at each coarseness otherwise."""
    torch.manual_seed(seed)
    for block in session.blocks:
        assert block.few_step is not None
        for part in block.few_step.parts.values():
            nn.init.normal_(part.get_parameter("up"), std=0.05)
            nn.init.normal_(part.get_parameter("slope"), std=0.3)


def routed() -> ImageTo3DPipeline:
    """Without a static DiT at first: blocks, routers and LoRA as they are. Each block makes a graph take longer."""
    pipeline = tiny_pipeline(blocks=1)
    learn(attach(pipeline.dit, ROUTERS))
    pipeline.static = None
    return pipeline


def made(pipeline: ImageTo3DPipeline, samples: int = 2, **options: Any) -> Kept:
    """Latents (B,N,C) of a batch, and all metadata but the times."""
    images = [image(x=20 + 5 * i) for i in range(samples)]
    results = pipeline(images, list(range(samples)), resolution=8, **options)
    for result in results:
        assert result.metadata.pop("ms")["dit"] > 0
    return torch.stack([result.latents for result in results]), [r.metadata for r in results]


def same(found: Kept, expected: Kept) -> bool:
    """Whether latents are close; metadata must be the same."""
    assert found[1] == expected[1]
    return torch.allclose(found[0], expected[0], **CLOSE)


def test_it_needs_no_compiler() -> None:
    pipeline = routed()
    rows = [DENSE, FEW, FEWER, {"steps": 5, "budget": 0.5}]
    expected = [made(pipeline, **row) for row in rows]
    pipeline.static = StaticDiT(pipeline.dit)
    for row, wanted in zip(rows, expected, strict=True):
        assert same(made(pipeline, **row), wanted)
    assert tiny_pipeline().static is not None, "it is the default"


class OtherLinear(nn.Linear):
    """As of somebody else's library."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.1 * super().forward(x)


def test_hooks_and_exchanged_modules_are_not_passed_over() -> None:
    pipeline, heard = routed(), list[str]()
    pipeline.static = StaticDiT(pipeline.dit)
    plain = made(pipeline, **FEW)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        for part in (pipeline.dit, pipeline.dit.single_blocks[0]):
            handle = getattr(part, register)(lambda *_, name=register: heard.append(name))
            found = made(pipeline, **FEW)
            handle.remove()
            assert heard and same(plain, found)
            heard.clear()
    old = pipeline.dit.latent_in
    other = OtherLinear(old.in_features, old.out_features)
    other.load_state_dict(old.state_dict())
    pipeline.dit.latent_in = other
    found, pipeline.static = made(pipeline, **FEW), None
    assert same(found, made(pipeline, **FEW)) and not torch.allclose(found[0], plain[0], **CLOSE)


def test_who_listens_to_blocks_hears_a_compiled_model_too() -> None:
    """As a calibration does, of the dense model."""
    pipeline, heard = routed(), list[str]()
    pipeline.compile(**UNCOMPILED)
    expected = made(pipeline, **DENSE)
    handle = pipeline.dit.single_blocks[0].register_forward_hook(lambda *_: heard.append("block"))
    assert same(made(pipeline, **DENSE), expected) and heard
    handle.remove()
    heard.clear()
    made(pipeline, **DENSE)
    assert not heard


def test_weights_that_are_exchanged_are_seen() -> None:
    pipeline = routed()
    pipeline.static = StaticDiT(pipeline.dit)
    before = made(pipeline, **FEW)
    larger = {name: 1.1 * value for name, value in pipeline.dit.state_dict().items()}
    pipeline.dit.load_state_dict(larger, assign=True)
    found, pipeline.static = made(pipeline, **FEW), None
    assert same(found, made(pipeline, **FEW)) and not same(found, before)


def test_two_graphs_serve_every_number_of_steps_and_the_dense_model() -> None:
    pipeline, counter = routed(), CompileCounter()
    rows = [DENSE, FEW, FEWER, DENSE, FEW]
    expected = [made(pipeline, **row) for row in rows]
    assert not torch.allclose(expected[1][0], expected[2][0], atol=1e-3)
    assert expected[1][1][0]["updated"]
    branches = {len(step) for step in expected[1][1][0]["routes"]["actions"]}
    assert branches == {1, 2}, "both shapes of a batch are there"
    pipeline.compile(backend=counter)
    graphs = []
    for row, wanted in zip(rows, expected, strict=True):
        assert same(made(pipeline, **row), wanted)
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2, 2], "both branches, one branch, and no more"


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_by_other_backends(backend: str) -> None:
    pipeline = routed()
    rows = [DENSE, FEW, FEWER]
    expected = [made(pipeline, **row) for row in rows]
    pipeline.compile(backend=backend)
    for row, wanted in zip(rows, expected, strict=True):
        assert same(made(pipeline, **row), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_rows_of_a_dial(tmp_path: Path) -> None:
    pipeline = load(save_dialled(tmp_path / "model"))
    pipeline.static = None
    expected = {quality: made(pipeline, quality=quality) for quality in Quality}
    pipeline.compile(**UNCOMPILED)
    for quality, wanted in expected.items():
        found = made(pipeline, quality=quality)
        assert same(found, wanted)
        share = found[1][0]["flops_executed"] / found[1][0]["flops_dense"]
        assert share == pytest.approx(found[1][0]["dial"]["cost"])
    assert found[1][0]["flops_routers"] > 0, "best has routers that decide"


def test_who_decides_is_asked_as_before() -> None:
    pipeline, counter = routed(), CompileCounter()
    options = {"steps": 5, "budget": 0.5}, {"steps": 5, "budget": 1, "few_step": False}
    expected = [made(pipeline, **each) for each in options]
    pipeline.compile(backend=counter)
    for each, wanted in zip(options, expected, strict=True):
        found = made(pipeline, **each)
        assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]
    plain = tiny_pipeline()
    wanted = made(plain, steps=6, budget=0.5)
    plain.compile(backend=counter)
    found = made(plain, steps=6, budget=0.5)
    assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1] and "policy" in found[1][0]
    assert counter.frame_count == 0
    plain.compile(**UNCOMPILED)
    assert same(made(plain), made(tiny_pipeline())), "the dense model of a session without a LoRA"
    assert plain._without_routers().static is None, "its DiT is another one"


def test_what_else_decides_is_not_static() -> None:
    session = routed().session
    assert session is not None
    session.settings = ElasticConfig(budget=1)
    session.begin(1, 5, guidance=2.0)
    assert session.every_block
    for settings in (ElasticConfig(budget=0.9), ElasticConfig(budget=1, cache=ROUTERS.cache())):
        session.settings = settings
        assert not session.every_block
    with session.dense():
        assert session.every_block
    session.settings = ElasticConfig(budget=1)
    session.router_config = RouterConfig(few_step_rank=2, trained_steps=[2, 6])
    assert not session.every_block, "routers of each block decide whatever the budget"


def test_routers_that_would_skip_are_not_asked_where_every_block_runs() -> None:
    pipeline = tiny_pipeline()
    session = attach(pipeline.dit, replace(ROUTERS, initial_keep=0.1))
    learn(session)
    static, pipeline.static = pipeline.static, None
    found = made(pipeline, **FEW)
    assert made(pipeline, steps=5, budget=0.5)[1][0]["flops_routers"] > found[1][0]["flops_routers"] == 0
    actions = [action for step in found[1][0]["routes"]["actions"] for branch in step for action in branch]
    assert set(actions) == {"1"}
    pipeline.static = static
    assert same(made(pipeline, **FEW), found) and session.coarseness is not None


def overwriting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend whose graphs put out the same memory each time, as CUDA graphs do."""
    memory: list[Tensor] = []

    def run(*args: Any) -> tuple[Tensor, ...]:
        found = graph.forward(*args)
        if not memory:
            memory.extend(out.clone() for out in found)
        for place, out in zip(memory, found, strict=True):
            place.copy_(out)
        return tuple(memory)

    return run


def test_outputs_are_kept_though_the_next_pass_overwrites_them() -> None:
    pipeline = routed()
    expected = made(pipeline, **FEW)
    pipeline.compile(backend=overwriting)
    assert same(made(pipeline, **FEW), expected)
    dit, session = pipeline.static, pipeline.session
    assert dit is not None and session is not None
    inputs = torch.randn(4, 8, 7), torch.rand(4), torch.randn(4, 4, pipeline.dit.config.condition_channels)
    with torch.no_grad(), session.dense():
        assert dit.begin(inputs[2][:2], timestep_grid(2), 1.0) is dit
        before = dit(*inputs)
        kept = before.clone()
        dit(2 * inputs[0], *inputs[1:])
    assert torch.equal(before, kept)


def test_weights_are_shared_but_those_that_the_lora_changes() -> None:
    pipeline = routed()
    pipeline.compile(**UNCOMPILED)
    made(pipeline, **DENSE)
    assert pipeline.static is not None and pipeline.session is not None
    twin, own = pipeline.static.twin, dict(pipeline.dit.named_parameters())
    assert all(parameter is own[name] for name, parameter in twin.named_parameters())
    made(pipeline, **FEW)
    adapted = {
        f"{block.name}.{name.replace('/', '.')}.weight"
        for block in pipeline.session.blocks
        if block.few_step is not None
        for name in block.few_step.parts
    }
    separate = {name for name, parameter in twin.named_parameters() if parameter is not own[name]}
    assert separate == adapted
    places = {name: twin.get_parameter(name).data_ptr() for name in adapted}
    made(pipeline, **FEWER)
    made(pipeline, **DENSE)
    assert pipeline.static.twin is twin
    assert places == {name: twin.get_parameter(name).data_ptr() for name in adapted}, "graphs know them"
    assert all(torch.equal(twin.get_parameter(name), own[name]) for name in own)
    assert all(block._adapted is None for block in pipeline.session.blocks), "no second copy"


def test_what_changes_between_generations_is_seen() -> None:
    pipeline = routed()
    pipeline.compile(**UNCOMPILED)
    made(pipeline, **FEW)

    def check(*rows: dict[str, Any]) -> Tensor:
        """The same as without a static DiT."""
        static, pipeline.static = pipeline.static, None
        expected = [made(pipeline, **row) for row in rows]
        pipeline.static = static
        for row, wanted in zip(rows, expected, strict=True):
            assert same(made(pipeline, **row), wanted)
        return expected[-1][0]

    assert pipeline.session is not None
    before = check(DENSE, FEW)
    learn(pipeline.session, 1)
    assert not torch.equal(before, after := check(FEW)), "another LoRA"
    with torch.no_grad():
        pipeline.dit.double_blocks[0].img_mlp[0].weight.mul_(1.5)
        pipeline.dit.latent_in.weight.mul_(1.5)
    assert not torch.equal(after, after := check(DENSE, FEW)), "other weights"
    pipeline.dit.double_blocks[0].img_mlp[0].weight.data += 0.1  # as a LoRA is merged
    assert not torch.equal(after, check(DENSE, FEW)), "the tensor's version stays"
    pipeline.dit.double()
    check(FEW, DENSE)
    detach(pipeline.dit)
    check({"steps": 3})
    learn(attach(pipeline.dit, ROUTERS), 2)
    check(FEW, DENSE)


def test_many_shapes_run_without_a_graph_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SHAPES", 1)
    pipeline, counter = routed(), CompileCounter()
    expected = made(pipeline, **FEW)
    pipeline.compile(backend=counter)
    assert same(made(pipeline, **FEW), expected) and counter.frame_count == 1


def test_blocks_with_long_skips_and_no_static_plan_of_experts() -> None:
    sizes = {"in_channels": 4, "condition_channels": 6, "width": 32, "heads": 2, "blocks": 5}
    torch.manual_seed(0)
    dit = SkipDiT(SkipDiTConfig(**sizes, expert_blocks=0, num_latents=10, condition_tokens=5)).eval()
    session = attach(dit, ROUTERS)
    learn(session)
    for block in session.blocks:
        if block.few_step is not None and "skip_linear" in block.few_step.parts:
            nn.init.zeros_(block.few_step.parts["skip_linear"].get_parameter("up"))  # it is never trained
    session.settings = ElasticConfig(budget=1)
    inputs = torch.randn(2, 10, 4), torch.full((2,), 0.5), torch.randn(2, 5, 6)
    times, compiled, found = timestep_grid(3), CompiledDiT(dit, UNCOMPILED), []
    for call in (dit, compiled):
        if call is dit:
            session.begin(2, 3, guidance=2.0, times=times.tolist()[:-1])
        else:
            assert compiled.begin(inputs[2], times, 2.0) is compiled
        for step, branches in enumerate([(0,), (0, 1), (0,)]):
            session.step(step, 1 / 3, branches)
            with torch.no_grad():
                out = call(*(each.repeat(len(branches), *[1] * (each.ndim - 1)) for each in inputs))
        found.append((out, session.trace))
    torch.testing.assert_close(found[0][0], found[1][0], **CLOSE)
    assert torch.equal(found[0][1].actions, found[1][1].actions) and found[0][1].flops == found[1][1].flops
    experts = SkipDiT(SkipDiTConfig(**sizes, expert_blocks=1, experts=3, condition_tokens=5))
    with pytest.raises(UserError, match="the experts of this model decide"):
        CompiledDiT(experts, UNCOMPILED)


def test_a_model_that_moves_is_not_static() -> None:
    pipeline = tiny_pipeline()
    pipeline.compile(**UNCOMPILED)
    pipeline.use_less_memory()
    assert pipeline.static is None
    with pytest.raises(UserError, match="low_memory moves the weights"):
        pipeline.compile(**UNCOMPILED)
    with pytest.raises(UserError, match=r"compile is true, expected false with low_memory=true"):
        GenerateConfig(image="a.png", output="a.glb", compile=True, low_memory=True)


def test_a_missing_compiler_is_one_sentence_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through the options of gen_mesh.py."""
    tiny_pipeline().save_pretrained(tmp_path)
    config = GenerateConfig(image="a.png", output="a.glb", model=str(tmp_path), compile=True)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with (
        fresh_cache(),
        pytest.raises(UserError, match=r"compile is true, but .* this cpu: .*no-such-compiler") as error,
    ):
        load_pipeline(config)
    assert "\n" not in str(error.value)


def test_a_gpu_gets_cuda_graphs() -> None:
    assert compile_arguments(torch.device("cuda"))["mode"] == "reduce-overhead"
    assert "mode" not in compile_arguments(torch.device("cpu"))
    own = compile_arguments(torch.device("cuda"), options={"max_autotune": True}, dynamic=True)
    assert "mode" not in own and own["options"] == {"max_autotune": True} and own["dynamic"]
