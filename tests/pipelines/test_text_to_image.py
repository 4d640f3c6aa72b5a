"""Stock pipelines from folders in the published layout: elastic, reproducible, strict about what they are given."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_images import save_tiny_flux, save_tiny_qwen

from elastic3d.elastic import attach, detach, save_routers
from elastic3d.elastic.config import RouterConfig
from elastic3d.errors import UserError
from elastic3d.pipelines.calibration import calibrate_policy
from elastic3d.pipelines.options import BackboneName, CalibratePolicyConfig
from elastic3d.pipelines.text_to_image import TextToImagePipeline, check_prompt, read_prompts
from elastic3d.utils.devices import DeviceChoice, DTypeChoice

MIXED = RouterConfig(initial_keep=0.5, initial_width_bias=0, head_std=3.0)
SIZES = {BackboneName.flux: (32, 16), BackboneName.qwen_image: (16, 8)}
FAMILIES = list(SIZES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[BackboneName, Path]:
    """Tiny pipelines, saved once; nothing changes them."""
    root = tmp_path_factory.mktemp("published")
    return {
        BackboneName.flux: save_tiny_flux(root / "FLUX.1-tiny"),
        BackboneName.qwen_image: save_tiny_qwen(root / "Qwen-Image-tiny"),
    }


def load(name: BackboneName, folder: Path, routers: Path | None = None) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(name, folder, routers, device="cpu", dtype="float32")


def mixed_routers(name: BackboneName, folder: Path, output: Path) -> Path:
    pipeline = load(name, folder)
    torch.manual_seed(0)
    attach(pipeline.backbone.pipe, MIXED)
    save_routers(pipeline.backbone.transformer, output)
    return output


@pytest.mark.parametrize("name", FAMILIES, ids=lambda name: name.name)
def test_a_prompt_becomes_images_with_metadata(name, folders, tmp_path):
    routers = mixed_routers(name, folders[name], tmp_path / "routers")
    pipeline = load(name, folders[name], routers)
    options = dict(steps=2, guidance=3.0, size=SIZES[name])
    seen = []
    dense = pipeline(["a chair"], [3], elastic=False, on_step=lambda i, n: seen.append((i, n)), **options)[0]
    assert dense.image.size == SIZES[name] and dense.image.mode == "RGB" and seen == [(1, 2), (2, 2)]
    assert (
        dense.metadata["flops_executed"] == dense.metadata["flops_dense"] > 0
        and "routes" not in dense.metadata
    )
    both = pipeline(["a chair", "a red cup"], [3, 4], budget=0.5, **options)
    metadata = both[0].metadata
    assert metadata["prompt"] == "a chair" and metadata["seed"] == 3 and metadata["budget"] == 0.5
    assert metadata["flops_executed"] < metadata["flops_dense"] and len(metadata["weights_sha256"]) == 64
    assert set(metadata["ms"]) == {"condition", "dit", "decode"}
    branches = 1 if name is BackboneName.flux else 2
    assert [len(step) for step in metadata["routes"]["actions"]] == [branches] * 2
    json.dumps(metadata)
    again = pipeline(["a chair", "a red cup"], [3, 4], budget=0.5, **options)
    assert [r.image.tobytes() for r in again] == [r.image.tobytes() for r in both]
    assert both[0].image.tobytes() != both[1].image.tobytes()


@pytest.mark.parametrize("name", FAMILIES, ids=lambda name: name.name)
def test_dense_images_are_those_of_the_stock_pipeline(name, folders):
    import diffusers

    pipeline = load(name, folders[name])
    found = pipeline(["a chair"], [1], steps=2, guidance=4.0, size=SIZES[name])[0]
    stock = getattr(diffusers, pipeline.backbone.pipeline_class).from_pretrained(folders[name])
    stock.set_progress_bar_config(disable=True)
    guidance = (
        {"guidance_scale": 4.0}
        if name is BackboneName.flux
        else {"true_cfg_scale": 4.0, "negative_prompt": " "}
    )
    width, height = SIZES[name]
    image = stock(
        "a chair", width=width, height=height, num_inference_steps=2, generator=[torch.Generator().manual_seed(1)],
        **guidance,
    ).images[0]  # fmt: skip
    assert image.tobytes() == found.image.tobytes()
    with pytest.raises(UserError, match="budget is 0.5, expected at least 0.75 in 2 steps"):
        pipeline(["a chair"], [1], steps=2, budget=0.5)


def test_a_long_prompt_is_read_to_its_end(folders):
    """QwenImagePipeline cuts prompts at 512 tokens where it is not told otherwise."""
    pipeline = load(BackboneName.qwen_image, folders[BackboneName.qwen_image])
    seen = []

    def note(module, args, kwargs):
        seen.append(kwargs["encoder_hidden_states"].shape[1])

    handle = pipeline.backbone.transformer.register_forward_pre_hook(note, with_kwargs=True)
    prompt, size = "chair " * 100, SIZES[BackboneName.qwen_image]
    pipeline([prompt], [0], steps=2, guidance=1.0, size=size)
    handle.remove()
    assert seen[0] >= pipeline.backbone.count_tokens(prompt) > 512


def test_each_branch_counts_its_own_text(folders, tmp_path):
    """The negative prompt is shorter; with and without a budget the dense FLOPs are the same."""
    folder, prompt = folders[BackboneName.qwen_image], "a round blue table with three thin legs of dark wood"
    options = dict(steps=4, guidance=3.0, size=SIZES[BackboneName.qwen_image])
    plain = load(BackboneName.qwen_image, folder)
    routed = load(BackboneName.qwen_image, folder, mixed_routers(BackboneName.qwen_image, folder, tmp_path))
    dense, half, own = (
        pipeline([prompt], [0], **options, **elastic)[0].metadata
        for pipeline, elastic in ((plain, {"elastic": False}), (plain, {"budget": 0.5}), (routed, {}))
    )
    assert dense["flops_dense"] == half["flops_dense"] == own["flops_dense"] == 2 * half["flops_executed"]


def test_a_calibration_in_bf16_has_the_times_of_its_generations(folders, tmp_path):
    """The transformer is called with rounded times."""
    name, half = BackboneName.flux, DTypeChoice.bfloat16
    (tmp_path / "prompts.txt").write_text("a chair\n")
    path, _ = calibrate_policy(
        CalibratePolicyConfig(
            backbone=name, weights=str(folders[name]), prompts=str(tmp_path / "prompts.txt"), samples=1, steps=6,
            size="32x16", output=str(tmp_path), device=DeviceChoice.cpu, dtype=half,
        )
    )  # fmt: skip
    pipeline = TextToImagePipeline.from_pretrained(
        name, folders[name], device="cpu", dtype=half, calibration=path
    )
    pipeline(["a chair"], [0], steps=6, size=SIZES[name], budget=0.5)
    policy = pipeline.session.source
    assert policy._here is policy.calibration, "so that nothing is interpolated"


@pytest.mark.parametrize("name", FAMILIES, ids=lambda name: name.name)
def test_the_parts_agree_with_the_pipeline(name, folders):
    """Encode, decode and velocity, which training uses, say what the pipeline's loop says."""
    backbone = load(name, folders[name]).backbone
    size, t = SIZES[name], torch.tensor([0.25])
    images = torch.rand(2, 3, size[1], size[0])
    latents = backbone.encode_images(images)
    assert backbone.decode(latents, size).shape == images.shape
    assert latents.shape[1] == size[0] * size[1] // backbone.multiple**2
    text = backbone.encode_prompts(["a chair"], length=64)
    assert text["prompt_embeds"].shape[1] == 64
    seen = {}

    def note(module, args, kwargs, output):
        seen.setdefault("x", kwargs["hidden_states"])
        seen.setdefault("output", output[0])
        seen.setdefault("timestep", kwargs["timestep"])

    handle = backbone.transformer.register_forward_hook(note, with_kwargs=True)
    generator = [torch.Generator().manual_seed(0)]
    arguments = backbone.guidance_arguments(3.0, 1)
    backbone.pipe(
        **text, **arguments, width=size[0], height=size[1], num_inference_steps=2, generator=generator,
        output_type="latent",
    )  # fmt: skip
    handle.remove()
    t = 1 - seen["timestep"]
    with torch.no_grad():
        found = backbone.velocity(backbone.transformer, seen["x"], t, text, size, 3.0)
    torch.testing.assert_close(found, -seen["output"], rtol=1e-4, atol=1e-5)


def test_prompts_that_are_none(folders):
    pipeline = load(BackboneName.flux, folders[BackboneName.flux])
    cases = {
        "": "is empty", "  \n": "is empty", "a\udcffb": "is no text", "a\x00": "is no text",
        "a" * 4001: "4001 characters", "chair " * 200: "tokens, expected at most 512",
        None: "is a NoneType", b"chair": "is a bytes",
    }  # fmt: skip
    for prompt, message in cases.items():
        with pytest.raises(UserError, match=message):
            pipeline([prompt], [0], steps=1, size=(16, 16))
    check_prompt("a shaking chair \U0001fae8, of Unicode 15", pipeline.backbone)
    with pytest.raises(UserError, match="size is 20x16, expected multiples of 8"):
        pipeline(["a chair"], [0], size=(20, 16))
    for wrong, message in (
        ({"size": 16}, r"size is 16, expected a list such as \[a, b\], each element an integer$"),
        ({"size": (0, 16)}, "size has 0, expected a value from 8 to 4096"),
        ({"size": (16, 16, 16)}, "size has 3 values, expected 2 to 2"),
        ({"steps": 2.5}, "steps is 2.5, expected an integer"),
    ):
        with pytest.raises(UserError, match=message):
            pipeline(["a chair"], [0], **wrong)
    with pytest.raises(UserError, match="2 seeds for 1 prompts"):
        pipeline(["a chair"], [0, 1])


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# two\r\na chair\r\n\r\na café table\r\n".encode())
    assert read_prompts(path) == ["a chair", "a café table"]


def test_one_step_where_the_schedule_has_none(folders):
    pipeline = load(BackboneName.qwen_image, folders[BackboneName.qwen_image])
    with pytest.raises(UserError, match="steps is 1, expected a value from 2 to 1000"):
        pipeline(["a chair"], [0], steps=1, size=SIZES[BackboneName.qwen_image])


def test_folders_that_are_no_such_pipeline(folders, tmp_path):
    flux, qwen = folders[BackboneName.flux], folders[BackboneName.qwen_image]
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "gone": "does not exist",
        tmp_path / "file": "is a file",
        tmp_path / "empty": "no model_index",
    }
    cases[qwen] = "is a QwenImagePipeline, expected a FluxPipeline"
    for folder, message in cases.items():
        with pytest.raises(UserError, match=message):
            load(BackboneName.flux, folder)
    broken = tmp_path / "broken"
    _copy(flux, broken)
    file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if "proj_mlp" not in k}, file)
    with pytest.raises(UserError, match="missing keys"):
        load(BackboneName.flux, broken)
    file.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="can't be loaded as a FluxPipeline"):
        load(BackboneName.flux, broken)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match="has no .safetensors file"):
        load(BackboneName.flux, broken)


def test_routers_of_another_model_and_blocks_without_a_prefix(folders, tmp_path):
    flux, qwen = folders[BackboneName.flux], folders[BackboneName.qwen_image]
    routers = mixed_routers(BackboneName.qwen_image, qwen, tmp_path / "routers")
    with pytest.raises(UserError, match="expected a FluxTransformer2DModelRouters"):
        load(BackboneName.flux, flux, routers)
    bigger = save_tiny_flux(tmp_path / "bigger", guidance_embeds=False)
    small = mixed_routers(BackboneName.flux, flux, tmp_path / "small")
    schnell = load(BackboneName.flux, bigger, small).backbone
    assert schnell.default_sampling() == (4, 1.0)
    assert schnell.encode_prompts(["a chair"])["prompt_embeds"].shape[1] == schnell.longest == 256
    state = load_file(small / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "single_transformer_blocks.1" not in k},
        small / "model.safetensors",
    )
    with pytest.raises(UserError, match=r"model.safetensors does not fit Routers: tensors \d+ missing"):
        load(BackboneName.flux, flux, small)
    from diffusers.models.attention import FeedForward

    pipeline = load(BackboneName.flux, flux)
    for part, message in (
        (FeedForward(32, 32, activation_fn="geglu"), "GEGLU"),
        (torch.nn.Identity(), "Identity"),
    ):
        pipeline.backbone.transformer.transformer_blocks[0].ff = part
        with pytest.raises(ValueError, match=message):
            attach(pipeline.backbone.pipe)
    with pytest.raises(ValueError, match="no routers"):
        detach(pipeline.backbone.pipe)


def _copy(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)
