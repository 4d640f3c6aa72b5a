"""Published folders of TripoSG and Step1X-3D: every way to find one, and every way in which one is wrong."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hunyuan_tiny import write_checkpoint, write_checkpoint_21
from open_models import CONTEXT, DINOV2, WEIGHTS, states, write_folder
from safetensors.torch import load_file, save_file

from elastic3d.checkpoints.bundle import Bundle
from elastic3d.checkpoints.dinov2 import build_network
from elastic3d.checkpoints.hunyuan3d import load_hunyuan3d
from elastic3d.checkpoints.options import ImportConfig
from elastic3d.checkpoints.step1x3d import load_step1x3d
from elastic3d.checkpoints.tensors import to_published
from elastic3d.checkpoints.tiny import write_tiny
from elastic3d.checkpoints.triposg import dit_rows, load_triposg, load_triposg_vae, vae_rows
from elastic3d.errors import UserError
from elastic3d.models.options import SkipDiTConfig
from elastic3d.pipelines.options import GenerateConfig
from elastic3d.pipelines.published import calibration_home, import_checkpoint

LOADERS: dict[str, Callable[..., Bundle]] = {"triposg": load_triposg, "step1x3d": load_step1x3d}
MODELS = tuple(LOADERS)
DIT, VAE, SCHEDULER = "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"
EXTRACTOR = "feature_extractor_dinov2/preprocessor_config.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {model: write_folder(tmp_path_factory.mktemp(model) / "folder", model) for model in MODELS}


@pytest.fixture
def root(written: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may spoil."""
    return lambda model: Path(shutil.copytree(written[model], tmp_path / model))


def change(path: Path, **values: Any) -> None:
    """Set fields of a JSON file; a field set to ... is taken out."""
    fields = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


# ------------------------------------------------------------------------------------------------------ what works


def test_names_lead_back(written: dict[str, Path]) -> None:
    bundle = load_triposg(written["triposg"])
    dit, vae = states("triposg")
    assert isinstance(bundle.dit.config, SkipDiTConfig)
    for wanted, model, rows in (
        (dit, bundle.dit, dit_rows(bundle.dit.config)),
        (vae, bundle.vae, vae_rows(bundle.vae.config)),
    ):
        found = to_published(model.state_dict(), rows)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_vae_alone(root: Callable[[str], Path]) -> None:
    """Other models have TripoSG's VAE beside a transformer of their own."""
    folder = root("triposg")
    shutil.rmtree(folder / "transformer")
    change(folder / "model_index.json", _class_name="PartCrafterPipeline")
    assert load_triposg_vae(folder).config.encoder_width == 16


@pytest.mark.parametrize("model", MODELS)
def test_null_encoders_load_and_say_so(tmp_path: Path, model: str) -> None:
    folder = write_folder(tmp_path / "bare", model, encoder=False)
    with pytest.warns(
        UserWarning, match=r"holds no image encoder \(\w+\): give the folder of a DINOv2 as dinov2="
    ):
        bundle = LOADERS[model](folder)
    assert bundle.conditioner is None and "holds no image encoder" in bundle.note
    latents = bundle.sample(torch.zeros(1, 5, CONTEXT), torch.randn(1, 6, 8), 3, 2.0)
    assert bundle.vae.query(torch.zeros(1, 4, 3), bundle.vae.decode(latents)).shape == (1, 4)


def test_a_dinov2_from_elsewhere(written: dict[str, Path], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "bare", "triposg", encoder=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        bundle = load_triposg(folder, dinov2=written["triposg"] / "image_encoder_dinov2")
    assert bundle.conditioner is not None and bundle.conditioner.channels == CONTEXT
    assert bundle.weights[-1].parent == written["triposg"] / "image_encoder_dinov2"


def test_a_dinov2_of_the_other_kind(written: dict[str, Path], tmp_path: Path) -> None:
    """As wide as the family's own, whose tokens are others."""
    plain, other = written["triposg"] / "image_encoder_dinov2", tmp_path / "registers"
    build_network({**DINOV2, "num_register_tokens": 4}, "test").save_pretrained(other)
    for load, model, wrong in ((load_triposg, "triposg", other), (load_step1x3d, "step1x3d", plain)):
        kinds = ("with", "without") if wrong is other else ("without", "with")
        with pytest.raises(UserError, match=f"is a DINOv2 {kinds[0]} registers, expected one {kinds[1]}$"):
            load(written[model], dinov2=wrong)
    assert load_step1x3d(written["step1x3d"], dinov2=other).conditioner is not None


@pytest.mark.parametrize("model", MODELS)
def test_a_vae_without_its_encoder(root: Callable[[str], Path], model: str) -> None:
    folder = root(model)
    state = load_file(folder / "vae" / WEIGHTS)
    kept = {
        name: value for name, value in state.items() if not name.startswith(("encoder.", "pre_kl", "quant"))
    }
    save_file(kept, folder / "vae" / WEIGHTS)
    vae = LOADERS[model](folder).vae
    assert vae.config.encoder_layers == 0 and vae.decode(torch.zeros(1, 6, 8)).shape == (1, 6, 32)


def test_the_folder_above(root: Callable[[str], Path], tmp_path: Path) -> None:
    above = tmp_path / "Step1X-3D"
    above.mkdir()
    root("step1x3d").rename(above / "Step1X-3D-Geometry-1300m")
    assert load_step1x3d(above).config.pipeline.guidance == 7.5


def test_shards(root: Callable[[str], Path]) -> None:
    folder = root("triposg") / "transformer"
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, half = sorted(state), len(state) // 2
    parts = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for file, kept in parts.items():
        save_file({name: state[name] for name in kept}, folder / file)
    places = {name: file for file, kept in parts.items() for name in kept}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert load_triposg(folder.parent).dit.config.width == 32


def test_the_cache_of_the_hub(
    written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Hub's client leaves it below $HF_HOME; nothing is asked of a network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    repository, commit = tmp_path / "hub" / "models--VAST-AI--TripoSG", "0" * 40
    shutil.copytree(written["triposg"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert load_triposg("VAST-AI/TripoSG").dit.config.width == load_triposg().dit.config.width == 32
    beside = calibration_home(GenerateConfig(model="triposg", image="a.png", output="a.glb"))
    assert beside == repository / "snapshots" / commit
    with pytest.raises(
        UserError, match=r"stepfun-ai/Step1X-3D.* can't be downloaded .*: give its folder as weights="
    ):
        load_step1x3d("stepfun-ai/Step1X-3D")


@pytest.mark.parametrize("model", MODELS)
def test_tiny_weights_are_in_the_published_layout(tmp_path: Path, model: str) -> None:
    state = torch.get_rng_state()
    write_tiny(model, tmp_path / "a", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    bundle = LOADERS[model](tmp_path / "a")
    assert bundle.conditioner is not None and bundle.vae.config.encoder_layers
    latents = torch.randn(1, 16, 8)
    inside, outside = bundle.vae.query(
        torch.tensor([[[0.0, 0, 0], [1.0, 1.0, 1.0]]]), bundle.vae.decode(latents)
    )[0].tolist()
    assert inside > 0 > outside


def test_only_a_tiny_model_is_written_over(tmp_path: Path) -> None:
    """The name of the folder may be that of a download."""
    real = write_folder(tmp_path / "TripoSG", "triposg")
    before = {path: path.stat().st_mtime_ns for path in real.rglob("*")}
    with pytest.raises(UserError, match="TripoSG, which holds files of no tiny model"):
        write_tiny("triposg", real)
    with pytest.raises(UserError, match="TripoSG, which is a published model: choose another folder"):
        import_checkpoint(ImportConfig(model="triposg", weights=str(real), output=str(real)))
    assert {path: path.stat().st_mtime_ns for path in real.rglob("*")} == before
    (tmp_path / "empty").mkdir()
    for seed in (0, 1):
        write_tiny("triposg", tmp_path / "empty", seed)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("model", "file", "values", "told"),
    [
        ("triposg", DIT, {"depth": 3}, "unknown parameter 'depth'"),
        ("triposg", DIT, {"use_cross_attention_2": True}, "use_cross_attention_2 is True, expected False"),
        ("triposg", DIT, {"_class_name": "PartCrafterDiTModel"}, "describes a PartCrafterDiTModel, expected a TripoSG"),
        ("triposg", DIT, {"width": "wide"}, "width is 'wide', expected"),
        ("triposg", DIT, {"cross_attention_dim": 32}, "has 32 condition channels, but its partner has 64"),
        ("triposg", VAE, {"embedding_type": "triplane"}, "embedding_type is 'triplane', expected 'frequency'"),
        ("triposg", SCHEDULER, {"shift": 3.0}, "shift is 3.0, expected 1"),
        ("triposg", EXTRACTOR, {"resample": 2}, "resample is 2, expected 3"),
        ("step1x3d", DIT, {"use_label_condition": True}, "use_label_condition is True, expected False"),
        ("step1x3d", DIT, {"width": ...}, "there is no 'width'"),
        ("step1x3d", VAE, {"include_pi": ...}, "there is no 'include_pi', and the original's default differs"),
        ("step1x3d", VAE, {"qkv_bias": ...}, "there is no 'qkv_bias'"),
        ("step1x3d", VAE, {"query_type": "fps"}, "unknown parameter 'query_type'"),
        ("step1x3d", "visual_encoder/config.json", {"dino_type": "openai/clip"}, "'openai/clip', expected a DINOv2"),
        ("step1x3d", SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas is True"),
    ],
)  # fmt: skip
def test_configurations_that_are_not_understood(
    root: Callable[[str], Path], model: str, file: str, values: dict[str, Any], told: str
) -> None:
    folder = root(model)
    change(folder / file, **values)
    with pytest.raises(UserError, match=told):
        LOADERS[model](folder)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_truncated_weights(root: Callable[[str], Path], model: str, part: str) -> None:
    path = root(model) / part / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{part}/{WEIGHTS} is truncated"):
        LOADERS[model](path.parent.parent)


def test_tensors_that_do_not_fit(root: Callable[[str], Path]) -> None:
    path = root("step1x3d") / "transformer" / WEIGHTS
    state = load_file(path)
    missing, wrong = "dit_model.proj_out.bias", "dit_model.single_transformer_blocks.0.proj_mlp.weight"
    state["dit_model.extra"] = state.pop(missing)
    state[wrong] = state[wrong][:-1].contiguous()
    save_file(state, path)
    with pytest.raises(UserError) as caught:
        load_step1x3d(path.parent.parent)
    text = str(caught.value)
    assert f"1 missing ({missing})" in text and "1 unknown (dit_model.extra)" in text
    assert f"1 mis-shaped ({wrong} (127, 32) instead of (128, 32))" in text


def test_weights_that_are_not_finite(root: Callable[[str], Path]) -> None:
    path = root("triposg") / "vae" / WEIGHTS
    state = load_file(path)
    state["decoder.proj_out.weight"][0, 0] = torch.nan
    save_file(state, path)
    with pytest.raises(UserError, match="NaN or infinite values in 1 tensors"):
        load_triposg(path.parent.parent)


def test_missing_parts(root: Callable[[str], Path], tmp_path: Path) -> None:
    folder = root("triposg")
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="names vae, but there is no folder .*/vae"):
        load_triposg(folder)
    change(folder / "model_index.json", vae=None)
    with pytest.raises(UserError, match=r"model_index.json has no vae, expected one"):
        load_triposg(folder)
    with pytest.raises(
        UserError, match="there is no folder .*nowhere, expected one with model_index.json of TripoSG"
    ):
        load_triposg(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no model_index.json, expected that of Step1X-3D"):
        load_step1x3d(tmp_path / "empty")


def test_folders_of_other_models(written: dict[str, Path], tmp_path: Path) -> None:
    write_checkpoint_21(tmp_path / "hunyuan21")
    write_checkpoint(tmp_path / "hunyuan2")
    for load in LOADERS.values():
        with pytest.raises(UserError, match="this is Hunyuan3D-2.1, say model=hunyuan3d2_1$"):
            load(tmp_path / "hunyuan21")
        with pytest.raises(UserError, match="this is Hunyuan3D-2.1, say model=hunyuan3d2_1$"):
            load(tmp_path / "hunyuan21" / "hunyuan3d-dit-v2-1")
        with pytest.raises(UserError, match="this is Hunyuan3D-2, say model=hunyuan3d2$"):
            load(tmp_path / "hunyuan2")
    with pytest.raises(UserError, match="this is Hunyuan3D-2.1, say model=hunyuan3d2_1$"):
        load_hunyuan3d(tmp_path / "hunyuan21")
    with pytest.raises(UserError, match="this is TripoSG, say model=triposg$"):
        load_step1x3d(written["triposg"])
    with pytest.raises(UserError, match="this is Step1X-3D, say model=step1x3d$"):
        load_triposg(written["step1x3d"])
    with pytest.raises(UserError, match="this is TripoSG, say model=triposg$"):
        load_hunyuan3d(written["triposg"])
    with pytest.raises(
        UserError, match=r"this is a text-to-image model \(PixelFluxPipeline\), expected one of meshes$"
    ):
        load_triposg(Path(__file__).parents[2] / "data" / "pretrained" / "image-small")
    for name in ("PartCrafter", "HoloPart", "TripoSGScribble"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model_index.json").write_text(json.dumps({"_class_name": f"{name}Pipeline"}))
        with pytest.raises(UserError, match=f"this is {name}, which elastic3d can't load"):
            load_triposg(folder)
