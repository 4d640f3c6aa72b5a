"""Stock pipelines of diffusers with routers: driven by their own loops, saved and loaded as ever."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from elastic3d.elastic import attach, detach
from elastic3d.elastic.config import (
    BlockCacheConfig,
    Branches,
    CacheRule,
    ElasticConfig,
    RouterConfig,
    Scope,
)
from elastic3d.elastic.trace import NOT_RUN, trace_share

diffusers = pytest.importorskip("diffusers")

MIXED = RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0)


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def flux_pipeline(kind=diffusers.FluxPipeline, vae=None):
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=6, pooled_projection_dim=6, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = kind(scheduler, vae, None, None, None, None, randomised(transformer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(
    pipe,
    seeds=(0, 1),
    true_cfg: float | None = 1.0,
    steps: int = 4,
    dtype: torch.dtype = torch.float32,
    **options,
):
    torch.manual_seed(1)
    embeds = {"prompt_embeds": torch.randn(2, 5, 6), "pooled_prompt_embeds": torch.randn(2, 6)}
    if true_cfg is not None:
        options["true_cfg_scale"] = true_cfg
    if true_cfg is not None and true_cfg > 1:
        embeds |= {
            "negative_prompt_embeds": torch.randn(2, 5, 6),
            "negative_pooled_prompt_embeds": torch.randn(2, 6),
        }
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        **{name: value[list(seeds)].to(dtype) for name, value in embeds.items()},
        height=48, width=48, num_inference_steps=steps, generator=generators,
        output_type="latent", return_dict=False, **options,
    )[0]  # fmt: skip


def qwen_pipeline():
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=6, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.QwenImagePipeline(scheduler, None, None, None, randomised(transformer))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def qwen(pipe):
    torch.manual_seed(1)
    mask = torch.ones(1, 5, dtype=torch.long)
    return pipe(
        prompt_embeds=torch.randn(1, 5, 6), prompt_embeds_mask=mask, negative_prompt_embeds=torch.randn(1, 3, 6),
        negative_prompt_embeds_mask=mask[:, :3], true_cfg_scale=3.0, height=48, width=48, num_inference_steps=4,
        generator=torch.Generator().manual_seed(0), output_type="latent", return_dict=False,
    )[0]  # fmt: skip


@pytest.mark.parametrize("build, run, branches", [(flux_pipeline, flux, 1), (qwen_pipeline, qwen, 2)])
def test_a_stock_pipeline_runs_unchanged(build, run, branches):
    pipe = build()
    dense = run(pipe)
    keys = list(pipe.transformer.state_dict())
    session = attach(pipe)  # every block runs at the start
    assert torch.equal(run(pipe), dense)
    assert (session.trace.actions != -2).flatten(2).any(-1).sum() == 4 * branches
    assert trace_share(session.trace).tolist() == pytest.approx([1.0] * len(dense))
    session.settings = ElasticConfig(elastic=False)
    assert torch.equal(run(pipe), dense)
    assert list(pipe.transformer.state_dict()) == keys
    detach(pipe)
    assert torch.equal(run(pipe), dense) and not pipe.transformer._forward_hooks


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16])
def test_routers_do_not_see_what_fills_a_prompt_up(number):
    """A prompt alone, and the same one beside a longer one or filled up for training."""
    pipe = qwen_pipeline()
    model = pipe.transformer.to(number)
    session = attach(model, replace(MIXED, scope=Scope.block))
    image, text = torch.randn(1, 9, 4).to(number), torch.randn(1, 3, 6).to(number)
    gates = []
    for length, padding in ((3, 0.0), (5, 0.0), (64, 9.0)):
        filled = torch.nn.functional.pad(text, (0, 0, 0, length - 3), value=padding)
        session.begin(1, 1)
        session.step(0, 1.0, (0,))
        with torch.no_grad():
            model(
                hidden_states=image, encoder_hidden_states=filled, timestep=torch.tensor([0.4]),
                encoder_hidden_states_mask=None if length == 3 else torch.arange(length)[None] < 3,
                img_shapes=[[(1, 3, 3)]],
            )  # fmt: skip
        decisions = session.current.decisions
        gates.append(torch.stack([decisions[index].keep_prob for index in sorted(decisions)]))
    for padded in gates[1:]:
        torch.testing.assert_close(padded, gates[0], rtol=0, atol=1e-5 if number is torch.float32 else 2e-2)


def test_branches_samples_and_generations_stay_separate():
    pipe = flux_pipeline()
    session = attach(pipe, MIXED)
    session.settings = ElasticConfig(cache=BlockCacheConfig(rule=CacheRule.band, band=0.5))
    both = flux(pipe, true_cfg=3.0)
    actions = session.trace.actions
    assert actions.shape == (4, 2, 2, 3) and (actions == -1).any() and not (actions == -2).any()
    assert torch.equal(flux(pipe, true_cfg=3.0), both)
    for seed in (0, 1):
        torch.testing.assert_close(flux(pipe, (seed,), 3.0)[0], both[seed], rtol=1e-3, atol=1e-4)
        assert torch.equal(session.trace.actions[:, :, 0], actions[:, :, seed])


def test_a_generation_of_one_step_has_all_its_branches():
    """Nothing says before its second pass that there is one."""
    pipe = flux_pipeline()
    session = attach(pipe, MIXED)
    for branches in (2, 1, 1, 2, 2):
        flux(pipe, true_cfg=2.0 * branches - 1, steps=1)
        announced = (session.trace.actions > NOT_RUN).all(-1)
        assert announced[0].tolist() == [[True] * 2, [branches == 2] * 2]
    flux(pipe, true_cfg=3.0, steps=2)
    assert (session.trace.actions > NOT_RUN).all() and session.cache is None


def test_the_step_size_is_the_schedulers():
    pipe, seen = flux_pipeline(), []
    session = attach(pipe)
    step = session.step
    session.step = lambda index, dt, branches: (seen.append((index, dt)), step(index, dt, branches))
    flux(pipe)
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert sum(dt for _, dt in seen) == pytest.approx(1.0, abs=1e-3)


def test_a_pass_outside_the_loop_raises():
    pipe = flux_pipeline()
    session = attach(pipe)
    inputs = {
        "hidden_states": torch.randn(1, 9, 4), "encoder_hidden_states": torch.randn(1, 5, 6),
        "pooled_projections": torch.randn(1, 6), "timestep": torch.rand(1), "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    with pytest.raises(ValueError, match="outside the pipeline's loop"):
        pipe.transformer(**inputs)
    session.begin(1, 1)
    session.step(0, 1.0, (0,))
    pipe.transformer(**inputs)
    bare = attach(flux_pipeline().transformer)
    assert bare.driver is None


def test_base_weights_save_and_load_as_ever(tmp_path):
    pipe = flux_pipeline()
    dense = flux(pipe)
    attach(pipe, MIXED)
    pipe.transformer.save_pretrained(tmp_path)
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    detach(pipe)
    pipe.transformer = again
    assert torch.equal(flux(pipe), dense)


def test_offload_style_hooks_and_repeated_block_compilation():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    pipe = flux_pipeline()
    session = attach(pipe, replace(MIXED, widths=1))  # each is a graph
    plain = flux(pipe)
    add_hook_to_module(pipe.transformer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert torch.equal(flux(pipe), plain)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert all(block.forward is not block._base for block in session.blocks)
    torch.testing.assert_close(flux(pipe), plain, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_what_can_not_be_narrowed_or_cut_raises():
    from diffusers.models.attention import FeedForward

    pipe = flux_pipeline()
    gated = FeedForward(32, 32, activation_fn="geglu")
    blocks = pipe.transformer.transformer_blocks
    blocks.append(copy.deepcopy(blocks[0]))
    blocks[-1].ff = gated
    dense = flux(pipe)
    with pytest.raises(ValueError, match="ff has a GEGLU activation, expected GELU"):
        attach(pipe)
    assert torch.equal(flux(pipe), dense)  # the blocks before it were left alone too
    other = flux_pipeline()
    session = attach(other, MIXED)
    with pytest.raises(ValueError, match="joint_attention_kwargs has things, which can't be cut"):
        call = session.blocks[0].adapter
        bound = call.bind(session.blocks[0].inner, (torch.zeros(2, 3, 32), torch.zeros(2, 3, 32), torch.zeros(2, 32)),
                          {"joint_attention_kwargs": {"things": [1]}})  # fmt: skip
        call.take(bound, slice(0, 1))


REUSING = RouterConfig(
    initial_keep=0.2, head_std=0.0, widths=1, scope=Scope.step, branches=Branches.shared, longest=8
)


def image_to_image(steps: int = 6):
    """A FluxImg2ImgPipeline, and a function that runs it on image 0 or 1."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), norm_num_groups=1, latent_channels=1, shift_factor=0.0, scaling_factor=1.0
    )
    pipe = flux_pipeline(diffusers.FluxImg2ImgPipeline, vae)

    def run(number: int, strength: float, callback=None):
        image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        g = torch.Generator().manual_seed(1)
        return pipe(
            image=image, strength=strength, prompt_embeds=torch.randn(1, 5, 6, generator=g),
            pooled_prompt_embeds=torch.randn(1, 6, generator=g), height=8, width=8, num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0), output_type="latent", return_dict=False,
            callback_on_step_end=callback,
        )[0]  # fmt: skip

    return pipe, run


class Stop(Exception):
    pass


@pytest.mark.parametrize("how", ["interrupt", "exception"])
def test_nothing_of_a_cancelled_generation_is_left(how):
    pipe, run = image_to_image()
    session = attach(pipe, REUSING)
    session.settings.budget = 0.5
    right = run(0, 0.5)
    assert (session.trace.actions == -1).any() and session.cache is None

    def cancel(pipeline, step, time, values):
        if step == 2:
            if how == "exception":
                raise Stop
            pipeline._interrupt = True
        return values

    with pytest.raises(Stop) if how == "exception" else nullcontext():
        run(1, 1.0, cancel)
    assert torch.equal(run(0, 0.5), right)


def test_a_pass_that_fails_ends_its_generation():
    pipe = flux_pipeline()
    session = attach(pipe, REUSING)
    handle = pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flux(pipe)
    assert session.cache is None
    handle.remove()
    assert flux(pipe).isfinite().all()


@pytest.mark.parametrize("own_scheduler", [False, True])
def test_a_pipeline_that_shares_the_transformer_takes_its_routes_too(own_scheduler):
    pipe = flux_pipeline()
    session = attach(pipe, REUSING)
    session.settings.budget = 0.5
    right, actions = flux(pipe), session.trace.actions
    parts = dict(pipe.components)
    if own_scheduler:
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    other = diffusers.FluxPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    if own_scheduler:
        with pytest.raises(ValueError, match="pipeline with a scheduler of its own"):
            flux(other)
        assert attach(other) is session
    assert torch.equal(flux(other), right) and torch.equal(session.trace.actions, actions)
    assert torch.equal(flux(pipe), right) and (actions == -1).any()


def test_a_pipeline_that_names_no_branches_runs_with_routers():
    pipe = flux_pipeline(diffusers.FluxKontextPipeline)
    session = attach(pipe, REUSING)
    session.settings.budget = 0.5
    assert flux(pipe, true_cfg=3.0, max_area=48 * 48, _auto_resize=False).isfinite().all()
    actions = session.trace.actions
    assert (actions == -1).any() and torch.equal(actions[:, 0], actions[:, 1]) and not (actions == -2).any()


def test_a_scheduler_that_does_not_know_its_step_is_refused_by_name():
    pipe = flux_pipeline()
    pipe.scheduler = diffusers.DDPMScheduler()
    with pytest.raises(ValueError, match="FluxPipeline can't have routers: its DDPMScheduler has no"):
        attach(pipe)
    attach(pipe.transformer)  # left as it was


def test_layerwise_casting_stores_the_model_in_eight_bits_and_leaves_the_routers():
    pipe = flux_pipeline()
    session = attach(pipe, REUSING)
    session.settings.budget = 0.5
    plain = flux(pipe)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype is torch.float8_e4m3fn
    found = flux(pipe)
    assert (session.trace.actions == -1).any()
    assert 0 < (found - plain).square().mean() < 0.05 * plain.square().mean()
    detach(pipe)
    attach(pipe, MIXED)
    with pytest.raises(ValueError, match="run with width=false"):
        flux(pipe)
