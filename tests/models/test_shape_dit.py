import pytest
import torch
from torch import nn

from elastic3d.models.options import DiTConfig
from elastic3d.models.shape_dit import ShapeDiT


def tiny(**changes) -> ShapeDiT:
    torch.manual_seed(0)
    defaults = {"in_channels": 4, "condition_channels": 6, "width": 32, "heads": 2, "double_blocks": 1,
                "single_blocks": 2}  # fmt: skip
    model = ShapeDiT(DiTConfig(**(defaults | changes)))
    for name, parameter in model.named_parameters():  # adaLN-zero would hide most of the network
        if name.endswith("weight") and parameter.abs().sum() == 0:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(batch: int = 3):
    torch.manual_seed(1)
    return torch.randn(batch, 10, 4), torch.rand(batch), torch.randn(batch, 5, 6)


def test_velocity_has_the_shape_of_the_latents():
    assert tiny()(*inputs()).shape == (3, 10, 4)


def test_an_untrained_model_predicts_zero():
    model = ShapeDiT(DiTConfig(in_channels=4, condition_channels=6, width=32, heads=2))
    assert model(*inputs()).abs().max() == 0


def test_latents_are_a_set():
    latents, t, condition = inputs()
    order = torch.randperm(10)
    with torch.no_grad():
        plain, permuted = (tiny()(x, t, condition) for x in (latents, latents[:, order]))
    torch.testing.assert_close(plain[:, order], permuted, rtol=1e-4, atol=1e-5)


def test_condition_time_and_batch_mates():
    model = tiny()
    latents, t, condition = inputs()
    with torch.no_grad():
        base = model(latents, t, condition)
        assert (model(latents, t, condition * 2) - base).abs().max() > 1e-5
        assert (model(latents, t * 0.5, condition) - base).abs().max() > 1e-5
        alone = model(latents[1:2], t[1:2], condition[1:2])
    torch.testing.assert_close(base[1:2], alone, rtol=1e-4, atol=1e-5)


def test_anchors_can_be_embedded_in_octaves():
    model = tiny(point_freqs=3)
    assert set(model.state_dict()) - set(tiny().state_dict()) == {"point_in.weight"}
    latents, t, condition = inputs()
    with torch.no_grad():
        base = model(latents, t, condition)
        model.point_in.weight.zero_()
        assert (model(latents, t, condition) - base).abs().max() > 1e-5


def test_the_pooled_condition_can_modulate_the_blocks():
    model = tiny(pooled_condition=True, double_blocks=0, single_blocks=0)
    assert set(model.state_dict()) - set(tiny(double_blocks=0, single_blocks=0).state_dict()) == {
        "pooled_in.weight"
    }
    latents, t, condition = inputs()
    with torch.no_grad():  # without blocks there is no other way from the condition to the latents
        base = model(latents, t, condition)
        torch.testing.assert_close(model(latents, t, condition.flip(1)), base)
        assert (model(latents, t, condition * 2) - base).abs().max() > 1e-5


@pytest.mark.parametrize("gelu_tanh", [False, True])
def test_gelu_is_exact_or_approximate_in_every_block(gelu_tanh):
    kinds = [call.approximate for call in tiny(gelu_tanh=gelu_tanh).modules() if isinstance(call, nn.GELU)]
    kinds += [block.gelu for block in tiny(gelu_tanh=gelu_tanh).single_blocks]
    assert kinds == ["tanh" if gelu_tanh else "none"] * 4
    with torch.no_grad():
        found, official = (tiny(gelu_tanh=kind)(*inputs()) for kind in (gelu_tanh, True))
    assert torch.equal(found, official) == gelu_tanh


def test_keys_are_those_of_the_published_checkpoints():
    keys = set(tiny(guidance_embed=True).state_dict())
    stream = ["mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2"]
    expected = {
        f"double_blocks.0.{s}_{m}.{p}" for s in ("img", "txt") for m in stream for p in ("weight", "bias")
    }
    expected |= {
        f"double_blocks.0.{s}_attn.norm.{n}_norm.scale" for s in ("img", "txt") for n in ("query", "key")
    }
    for i in range(2):
        expected |= {f"single_blocks.{i}.{m}.{p}" for m in ("linear1", "linear2", "modulation.lin")
                     for p in ("weight", "bias")}  # fmt: skip
        expected |= {f"single_blocks.{i}.norm.{n}_norm.scale" for n in ("query", "key")}
    for m in ("latent_in", "cond_in", "final_layer.linear", "final_layer.adaLN_modulation.1", "time_in.in_layer",
              "time_in.out_layer", "guidance_in.in_layer", "guidance_in.out_layer"):  # fmt: skip
        expected |= {f"{m}.weight", f"{m}.bias"}
    assert keys == expected


def test_guidance_is_given_exactly_where_the_model_embeds_it():
    latents, t, condition = inputs()
    scale = torch.full((3,), 5.0)
    with pytest.raises(ValueError, match="takes no guidance scale"):
        tiny()(latents, t, condition, scale)
    model = tiny(guidance_embed=True)
    with pytest.raises(ValueError, match="needs a guidance scale"):
        model(latents, t, condition)
    with torch.no_grad():
        assert (
            model(latents, t, condition, scale) - model(latents, t, condition, scale / 5)
        ).abs().max() > 1e-6


def test_gradient_checkpointing_changes_nothing():
    model = tiny().train()
    grads = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(*inputs()).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_width_must_fit_the_heads():
    with pytest.raises(ValueError, match="width 30 is no multiple of heads 4"):
        DiTConfig(width=30, heads=4)


def test_in_bf16_a_sample_does_not_depend_on_its_batch_at_the_size_that_ships():
    """Where one branch of guidance runs, a single image is a batch of one: its matrices have other strides. AMX adds up
    long products in another order for another number of rows, which moves a few values to the next bf16 number."""
    most = 1e-5 if torch.cpu.get_capabilities().get("amx_bf16") else 1e-8
    torch.manual_seed(0)
    config = DiTConfig(double_blocks=2, single_blocks=2, width=256, heads=4, num_latents=128)
    model = ShapeDiT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model = model.to(torch.bfloat16)
    latents, t, condition = torch.randn(3, 128, config.in_channels), torch.rand(3), torch.randn(3, 49, 768)
    with torch.no_grad():
        together = model(latents, t, condition).float()
        for b in range(3):
            alone = model(latents[b : b + 1], t[b : b + 1], condition[b : b + 1]).float()[0]
            assert (alone - together[b]).square().sum() < most * together[b].square().sum()
