"""What users do to a pipeline after `attach`: LoRAs, and parts that wait in main memory for their turn."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_images import save_tiny_flux

from elastic3d.elastic import attach, detach, save_routers
from elastic3d.elastic.config import ElasticConfig, RouterConfig
from elastic3d.errors import UserError
from elastic3d.pipelines.options import BackboneName
from elastic3d.pipelines.text_to_image import TextToImagePipeline, load_backbone

diffusers = pytest.importorskip("diffusers")
MIXED = RouterConfig(initial_keep=0.7, initial_width_bias=0, head_std=3.0)


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return save_tiny_flux(tmp_path_factory.mktemp("published") / "flux")


def load(folder: Path):
    return load_backbone(BackboneName.flux, folder, torch.device("cpu"), torch.float32).pipe


def latents(pipe) -> torch.Tensor:
    return pipe(
        "a chair", width=32, height=16, num_inference_steps=3, generator=torch.Generator().manual_seed(0),
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip


def lora_file(folder: Path, output: Path) -> Path:
    """A random LoRA of rank 2 on attention and on the MLPs of both kinds of blocks."""
    from peft import LoraConfig

    pipe = load(folder)
    targets = ["to_q", "proj_mlp", "proj_out", "net.0.proj", "net.2"]
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    torch.manual_seed(0)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(output, transformer_lora_layers=state)
    return output / "pytorch_lora_weights.safetensors"


def test_a_lora_that_is_loaded_after_attach_counts(flux, tmp_path):
    pytest.importorskip("peft")
    file = lora_file(flux, tmp_path)
    plain = load(flux)
    before = latents(plain)
    plain.load_lora_weights(file.parent, weight_name=file.name)
    wanted = latents(plain)
    assert not torch.allclose(wanted, before, atol=1e-2)
    pipe = load(flux)
    torch.manual_seed(0)
    session = attach(pipe, MIXED)
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    session.settings = ElasticConfig(elastic=False)
    torch.testing.assert_close(latents(pipe), wanted, rtol=1e-3, atol=1e-4)
    session.settings = ElasticConfig(width=False)  # an unmerged LoRA can't be narrowed
    unmerged = latents(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(latents(pipe), unmerged, rtol=1e-3, atol=1e-4)
    session.settings = ElasticConfig()
    assert latents(pipe).isfinite().all()
    detach(pipe)
    torch.testing.assert_close(latents(pipe), wanted, rtol=1e-3, atol=1e-4)


def test_the_pipeline_merges_a_lora(flux, tmp_path):
    pytest.importorskip("peft")
    file = lora_file(flux, tmp_path)
    pipe = load(flux)
    attach(pipe, MIXED)
    save_routers(pipe.transformer, tmp_path / "routers")
    options = dict(routers=tmp_path / "routers", device="cpu", dtype="float32")
    without = TextToImagePipeline.from_pretrained(BackboneName.flux, flux, **options)
    with_lora = TextToImagePipeline.from_pretrained(BackboneName.flux, flux, lora=file, **options)
    found = [p(["a chair"], [0], steps=2, size=(16, 16), budget=0.5)[0] for p in (without, with_lora)]
    assert found[0].image.tobytes() != found[1].image.tobytes()
    assert found[0].metadata["weights_sha256"] != found[1].metadata["weights_sha256"]
    file.write_bytes(b"x" * 64)
    with pytest.raises(UserError, match="can't be loaded as a LoRA"):
        TextToImagePipeline.from_pretrained(BackboneName.flux, flux, lora=file, **options)


def test_a_lora_without_peft_is_one_sentence(flux, tmp_path, monkeypatch):
    monkeypatch.setattr("elastic3d.pipelines.image_loading.find_spec", lambda name: None)
    with pytest.raises(UserError, match="lora= needs peft"):
        TextToImagePipeline.from_pretrained(
            BackboneName.flux, flux, lora=tmp_path / "x.safetensors", device="cpu"
        )


def test_hooks_that_move_the_transformer_in_and_out(flux):
    from accelerate import cpu_offload_with_hook

    pipe = load(flux)
    torch.manual_seed(0)
    session = attach(pipe, replace(MIXED, few_step_rank=2))
    plain = latents(pipe)
    assert any(block._adapted is not None for block in session.blocks)
    _, hook = cpu_offload_with_hook(pipe.transformer, "cpu")
    assert torch.equal(latents(pipe), plain)
    hook.offload()
    assert all(block._adapted is None for block in session.blocks)  # they would stay in memory
    assert torch.equal(latents(pipe), plain)
    hook.remove()
    assert torch.equal(latents(pipe), plain)
