"""The small model's two predictions: sampler and training agree on what its output is."""

import pytest
import torch

from elastic3d.diffusion.flow import interpolate, velocity
from elastic3d.elastic.attachment import attach, save_routers
from elastic3d.elastic.config import RouterConfig
from elastic3d.errors import UserError
from elastic3d.pipelines.pixel_flux import (
    LEAST_NOISE,
    SETTINGS_NAME,
    PixelFluxPipeline,
    PixelModelConfig,
    Prediction,
    SmallBackbone,
    build_transformer,
    load_pixel_flux,
    save_pixel_flux,
)
from elastic3d.pipelines.text_to_image import TextToImagePipeline
from elastic3d.utils.files import load_json
from elastic3d.utils.options import from_dict
from tests.tiny_images import save_tiny_small

CONFIG = dict(
    size=16, patch=8, text_length=6, width=32, heads=2, double_blocks=1, single_blocks=1, name="tiny"
)


class Oracle(torch.nn.Module):
    """Knows the image, and says what such a model should say."""

    def __init__(self, transformer, predicts, data, noise):
        super().__init__()
        self.inner, self.predicts, self.data, self.noise = transformer, predicts, data, noise
        self.config, self.dtype, self.device = transformer.config, torch.float32, torch.device("cpu")

    def forward(self, **_):
        return (self.data if self.predicts is Prediction.clean else self.noise - self.data,)


@pytest.fixture(params=Prediction)
def known(request):
    config = PixelModelConfig(**CONFIG, predicts=request.param)
    data, noise = torch.rand(2, 4, 192) * 2 - 1, torch.randn(2, 4, 192)
    oracle = Oracle(build_transformer(config), request.param, data, noise)
    pipe = PixelFluxPipeline.build(config, build_transformer(config), None)
    text = {"prompt_embeds": torch.randn(2, 6, 384), "pooled_prompt_embeds": torch.randn(2, 384)}
    return SmallBackbone(pipe), oracle, data, noise, text


def test_velocity_of_the_right_answer_is_the_target(known):
    backbone, oracle, data, noise, text = known
    t = torch.tensor([0.0, 0.9])
    found = backbone.velocity(oracle, interpolate(noise, data, t), t, text, (16, 16), 1.0)
    torch.testing.assert_close(found, velocity(noise, data), rtol=1e-4, atol=1e-4)


def test_velocity_near_the_data_stays_bounded(known):
    backbone, oracle, data, noise, text = known
    t = torch.tensor([0.9999, 1.0])
    found = backbone.velocity(oracle, interpolate(noise, data, t), t, text, (16, 16), 1.0)
    assert found.abs().max() <= (data - noise).abs().max() + 1e-3 < 1 / LEAST_NOISE


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_sampler_reaches_what_the_model_predicts(known, steps):
    backbone, oracle, data, noise, text = known
    pipe = backbone.pipe
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    sample = noise
    for t in pipe.scheduler.timesteps:
        sample = pipe.scheduler.step(oracle()[0], t, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, data, rtol=1e-4, atol=1e-4)


def test_samples_keep_the_models_precision(known):
    scheduler = known[0].pipe.scheduler
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    sample = torch.randn(1, 4, 192).bfloat16()
    assert scheduler.step(sample, scheduler.timesteps[0], sample)[0].dtype is torch.bfloat16


def test_prediction_is_kept_with_the_model(tmp_path):
    config = PixelModelConfig(**CONFIG, predicts=Prediction.velocity)
    save_pixel_flux(config, build_transformer(config), tmp_path, torch.float32)
    found = load_pixel_flux(tmp_path, torch.device("cpu"), torch.float32, encoders=False)
    assert found.settings == config


def test_a_model_saved_over_another_keeps_nothing_of_it(tmp_path):
    folder = save_tiny_small(tmp_path)
    pipe = load_pixel_flux(folder, torch.device("cpu"), torch.float32, encoders=False)
    attach(pipe.transformer, RouterConfig())
    for name in ("routers", "per_block"):
        save_routers(pipe.transformer, folder / name)
    (folder / "training_free.json").write_text("{}")
    (folder / "dial.json").write_text("{}")
    with pytest.raises(UserError, match="dial.json has no 'dense'"):
        TextToImagePipeline.from_pretrained("small", folder, device="cpu")
    (folder / "dial.json").unlink()
    assert TextToImagePipeline.from_pretrained("small", folder, device="cpu").session is not None
    save_tiny_small(tmp_path)  # the same weights: they are this one's
    assert (folder / "per_block/config.json").is_file()
    assert TextToImagePipeline.from_pretrained("small", folder, device="cpu").session is not None
    config = from_dict(PixelModelConfig, load_json(folder / SETTINGS_NAME))
    pipe.transformer.proj_out.bias.data += 1
    (folder / "dial.json").write_text("{}")  # of what was there before
    save_pixel_flux(config, pipe.transformer, folder, torch.float32)
    assert TextToImagePipeline.from_pretrained("small", folder, device="cpu").session is None
    assert not any((folder / name).exists() for name in ("routers", "per_block", "training_free.json"))


def test_weights_are_narrow_and_pixels_are_not(tmp_path):
    folder = save_tiny_small(tmp_path)
    images, seen = {}, []
    for dtype in (torch.float32, torch.bfloat16):
        pipe = load_pixel_flux(folder, torch.device("cpu"), dtype)
        assert pipe.transformer.dtype is dtype
        pipe.transformer.x_embedder.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
        text = SmallBackbone(pipe).encode_prompts(["a chair"])
        generator = torch.Generator().manual_seed(0)
        images[dtype] = pipe(
            **text, num_inference_steps=3, generator=generator, output_type="latent", return_dict=False
        )[0]
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3
    wide, narrow = images.values()
    assert narrow.dtype is torch.float32
    assert 0 < (wide - narrow).square().mean() < 0.05 * wide.square().mean()
