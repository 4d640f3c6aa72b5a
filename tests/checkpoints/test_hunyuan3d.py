"""Loading published Hunyuan3D-2 checkpoints: every variant of the layout, and every way in which a file is wrong."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from hunyuan_tiny import (
    DINOV2,
    dinov2_shapes,
    random_tensor,
    tiny_config,
    tiny_state,
    vae_shapes,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

from elastic3d.checkpoints.dinov2 import build_network
from elastic3d.checkpoints.hunyuan3d import WEIGHTS_NAMES, find_checkpoint, load_hunyuan3d, part_sizes
from elastic3d.checkpoints.options import check_weights
from elastic3d.errors import UserError
from elastic3d.pipelines.options import GenerateConfig
from elastic3d.pipelines.published import calibration_home

SUBFOLDER = "hunyuan3d-dit-v2-0"
WEIGHTS = "model.fp16.safetensors"
PREFIX = "conditioner.main_image_encoder.model."


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("published"))


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def change(root: Path, **parts: dict[str, Any]) -> None:
    """Change parameters of parts in config.yaml."""
    path = root / SUBFOLDER / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for part, params in parts.items():
        config[part]["params"].update(params)
    path.write_text(yaml.safe_dump(config))


# ------------------------------------------------------------------------------------------------------ what works


def test_every_tensor_arrives_unchanged(written: Path) -> None:
    bundle = load_hunyuan3d(written)
    state = load_file(written / SUBFOLDER / WEIGHTS)
    for prefix, model in (("model.", bundle.dit), ("vae.", bundle.vae)):
        own = model.state_dict()
        assert {prefix + name for name in own} == {name for name in state if name.startswith(prefix)}
        assert all(torch.equal(value, state[prefix + name]) for name, value in own.items())
    assert not bundle.dit.training and bundle.config.pipeline.resolution == 384 and not bundle.note


def test_half_precision(written: Path) -> None:
    bundle = load_hunyuan3d(written, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in bundle.dit.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        condition = bundle.conditioner(torch.rand(1, 3, 40, 40))  # type: ignore[misc]
        velocity = bundle.dit(torch.randn(1, 6, 8), torch.rand(1), condition)
        field = bundle.vae.query(torch.rand(1, 9, 3), bundle.vae.decode(velocity))
    assert field.shape == (1, 9) and field.dtype == torch.float32 and field.isfinite().all()


def test_without_the_image_encoder_it_says_so(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, conditioner=False)
    with pytest.warns(UserWarning, match="holds no image encoder"):
        bundle = load_hunyuan3d(tmp_path)
    assert bundle.conditioner is None and "dinov2=" in bundle.note


def test_image_encoder_from_elsewhere(tmp_path: Path, written: Path) -> None:
    write_checkpoint(tmp_path, conditioner=False)
    network = build_network(DINOV2, "test")
    shapes = dinov2_shapes(DINOV2, old_names=False)
    network.load_state_dict({name: random_tensor(name, shape) for name, shape in shapes.items()})
    network.save_pretrained(tmp_path / "dinov2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundle = load_hunyuan3d(tmp_path, dinov2=tmp_path / "dinov2")
    assert bundle.conditioner is not None and bundle.conditioner.channels == 24
    assert bundle.weights[-1] == tmp_path / "dinov2/model.safetensors"
    with pytest.raises(UserError, match="there is no file .*config.json"):
        load_hunyuan3d(tmp_path, dinov2=tmp_path / "none")
    fields = {name: value for name, value in DINOV2.items() if name != "use_swiglu_ffn"}
    build_network({**fields, "num_register_tokens": 4}, "test").save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="is a DINOv2 with registers, expected one without$"):
        load_hunyuan3d(tmp_path, dinov2=tmp_path / "other")


def test_both_generations_of_names(tmp_path: Path, written: Path) -> None:
    images = torch.rand(1, 3, 40, 40)
    network = load_hunyuan3d(written).conditioner
    assert network is not None
    state = tiny_state(tiny_config(), conditioner=False)
    state |= {PREFIX + name: value.clone() for name, value in network.network.state_dict().items()}
    assert PREFIX + "encoder.layer.0.attention.q_proj.weight" in state
    write_checkpoint(tmp_path)
    save_file(state, tmp_path / SUBFOLDER / WEIGHTS)
    again = load_hunyuan3d(tmp_path).conditioner
    assert again is not None and torch.equal(again(images), network(images))


def test_ckpt(written: Path, root: Path) -> None:
    path = root / SUBFOLDER / WEIGHTS
    nested: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path).items():
        part, _, rest = name.partition(".")
        nested.setdefault(part, {})[rest] = tensor
    sizes = part_sizes(path)
    path.unlink()
    torch.save(nested, path.with_name("model.fp16.ckpt"))
    assert part_sizes(path.with_name("model.fp16.ckpt")) == sizes and all(sizes.values())
    first, second = load_hunyuan3d(written), load_hunyuan3d(root)
    assert second.weights[0].suffix == ".ckpt"
    for name, value in first.dit.state_dict().items():
        assert torch.equal(value, second.dit.state_dict()[name])


def test_where_it_is_looked_for(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HY3DGEN_MODELS", str(written.parent))
    assert load_hunyuan3d(written.name).weights[0].parent == written / SUBFOLDER
    assert load_hunyuan3d(written / SUBFOLDER).weights[0].parent == written / SUBFOLDER
    named = GenerateConfig(model="hunyuan3d2", weights=written.name, image="a.png", output="a.glb")
    assert calibration_home(named) == written / SUBFOLDER


@pytest.mark.parametrize(("sharp", "read_there"), [(0, 0), (32, 2), (64, 3)])
def test_another_vae(root: Path, sharp: int, read_there: int) -> None:
    config = tiny_config()["vae"]
    config["params"] |= {"num_encoder_layers": 2, "point_feats": 4, "pc_size": 64, "pc_sharpedge_size": sharp}
    folder = root / "hunyuan3d-vae-v2-0-withencoder"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    shapes = vae_shapes(config["params"], encoder_layers=2)
    save_file({name: random_tensor(name, shape) for name, shape in shapes.items()}, folder / WEIGHTS)
    vae = load_hunyuan3d(root, vae_subfolder=folder.name).vae
    surface = torch.nn.functional.normalize(torch.randn(1, 40, 3), dim=-1).repeat(1, 1, 2)
    assert vae.encode(surface).mean.shape == vae.encode(surface, surface).mean.shape == (1, 6, 8)
    assert vae.config.sharp_latents == read_there
    encoder = vae.encoder  # constants of the original
    assert (encoder.ln_post.eps, encoder.self_attn.resblocks[0].ln_1.eps) == (1e-5, 1e-6)
    vae.pre_kl.bias.data[8:] = torch.tensor([-99.0, 99.0]).repeat(4)
    logvar = vae.encode(surface).logvar
    assert (logvar.min(), logvar.max()) == (-30, 20)


# --------------------------------------------------------------------------------------------------- on paper


def test_wrong_subfolder(written: Path) -> None:
    with pytest.raises(UserError, match=f"no folder hunyuan3d-dit-v9, it has {SUBFOLDER}"):
        load_hunyuan3d(written, "hunyuan3d-dit-v9")


def test_another_checkpoint_than_asked_for(written: Path) -> None:
    with pytest.raises(UserError, match="is not hunyuan3d-dit-v2-mini: .* or subfolder=hunyuan3d-dit-v2-0"):
        load_hunyuan3d(written / SUBFOLDER, "hunyuan3d-dit-v2-mini")


def test_nothing_there_and_no_network(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        load_hunyuan3d(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no folder .*someone/something can't be downloaded"):
        load_hunyuan3d("someone/something")
    with pytest.raises(
        UserError, match=r"there is no folder nowhere nor \S+nowhere$"
    ):  # never a name on the Hub
        load_hunyuan3d("./nowhere")


def test_weights_that_can_be_nowhere_are_told_without_looking_on_the_hub(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HY3DGEN_MODELS", str(written.parent))
    for there in ("", written.name, str(written), "someone/something", "tencent/Hunyuan3D-2.1"):
        check_weights(there)
    for gone in ("nowhere", "./nowhere", "/nowhere/at.all", "a/b/c", "models/model.safetensors", "a\\b"):
        with pytest.raises(
            UserError, match=re.escape(f"there is no folder {gone} for weights=, expected one")
        ):
            check_weights(gone)


@pytest.mark.parametrize(
    "published", [WEIGHTS_NAMES, WEIGHTS_NAMES[1:3], WEIGHTS_NAMES[3:]], ids=lambda names: names[0]
)
def test_one_file_of_weights_is_downloaded(
    published: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repositories have the same weights in several formats, beside other models."""
    listed = [f"{folder}/{name}" for folder in (SUBFOLDER, "another") for name in ("config.yaml", *published)]

    # what the Hub's client does with a repository's list of files
    def snapshot_download(repository: str, allow_patterns: list[str]) -> str:
        for name in filter_repo_objects(listed, allow_patterns=allow_patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = find_checkpoint("someone/something", SUBFOLDER)
    assert found == (tmp_path / SUBFOLDER / "config.yaml", tmp_path / SUBFOLDER / published[0])
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(found)
    with pytest.raises(UserError, match="someone/something has no folder third"):
        find_checkpoint("someone/something", "third")


@pytest.mark.parametrize("kept", [0, 5, 3000])
def test_truncated(root: Path, kept: int) -> None:
    path = root / SUBFOLDER / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=f"{WEIGHTS} is (truncated|empty)"):
        load_hunyuan3d(root)


def test_truncated_ckpt(root: Path) -> None:
    path = root / SUBFOLDER / "model.fp16.ckpt"
    torch.save({"model": {"a": torch.rand(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    (root / SUBFOLDER / WEIGHTS).unlink()
    with pytest.raises(UserError, match="ckpt is truncated or no checkpoint"):
        load_hunyuan3d(root)


class Malicious:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


def test_code_in_a_ckpt_is_not_run(root: Path, tmp_path: Path) -> None:
    torch.save({"model": {"a": Malicious(tmp_path / "ran")}}, root / SUBFOLDER / "model.fp16.ckpt")
    (root / SUBFOLDER / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"ckpt holds code \((?!GLOBAL)[\w.]+\)"):
        load_hunyuan3d(root)
    assert not (tmp_path / "ran").exists()


def test_a_ckpt_as_written_before_torch_1_6(root: Path, tmp_path: Path) -> None:
    path = root / SUBFOLDER / "model.ckpt"
    torch.save(load_file(root / SUBFOLDER / WEIGHTS), path, _use_new_zipfile_serialization=False)
    (root / SUBFOLDER / WEIGHTS).unlink()
    assert load_hunyuan3d(root).weights == (path,)
    assert part_sizes(path) == {"condition": 0, "dit": path.stat().st_size // 2, "decode": 0}
    torch.save({"a": Malicious(tmp_path / "ran")}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="ckpt holds code"):
        load_hunyuan3d(root)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        ("model.latent_in.weight", None, "missing.*latent_in.weight"),
        ("vae.post_kl.bias", None, "missing.*post_kl.bias"),
        (PREFIX + "layernorm.bias", None, "missing.*layernorm.bias"),
        (None, "model.extra.weight", "unknown.*extra.weight"),
        (None, "texture.weight", "has a tensor texture.weight"),
        (None, "conditioner.clip.weight", "has a tensor conditioner.clip.weight"),
    ],
)
def test_tensors_that_do_not_fit(root: Path, removed: str | None, added: str | None, message: str) -> None:
    path = root / SUBFOLDER / WEIGHTS
    state = load_file(path)
    if removed:
        del state[removed]
    if added:
        state[added] = torch.rand(3)
    save_file(state, path)
    with pytest.raises(UserError, match=message) as caught:
        load_hunyuan3d(root)
    assert WEIGHTS in str(caught.value)


def test_what_does_not_fit_is_told_before_it_is_converted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "to", None)
    change(root, model={"hidden_size": 64, "axes_dim": [32]})
    with pytest.raises(UserError, match="mis-shaped"):
        load_hunyuan3d(root)


def test_weights_of_another_size(root: Path) -> None:
    change(root, model={"hidden_size": 64, "axes_dim": [32]})
    with pytest.raises(UserError, match=r"mis-shaped.*\(32, 8\) instead of \(64, 8\)"):
        load_hunyuan3d(root)


@pytest.mark.parametrize(
    ("part", "params", "message"),
    [
        ("model", {"rope": True}, "model: unknown parameter 'rope'"),
        ("model", {"depth": "many"}, "double_blocks is 'many'"),
        ("model", {"context_in_dim": 48}, "48 condition channels.* 24"),
        ("model", {"ckpt_path": "x.pt"}, "ckpt_path is 'x.pt'"),
        ("vae", {"label_type": "sdf"}, "label_type is 'sdf'"),
        ("vae", {"embed_dim": 4}, "8 latent channels.* 4"),
        ("scheduler", {"use_dynamic_shifting": True}, "use_dynamic_shifting is true"),
        ("scheduler", {"sigma": 1}, "unknown parameter 'sigma'"),
        ("scheduler", {"shift": 0}, "shift is 0, expected a number above zero"),
        ("image_processor", {"mode": 1}, "unknown parameter 'mode'"),
        ("image_processor", {"size": "big"}, "size is 'big'"),
        ("image_processor", {"border_ratio": 0.3}, "border_ratio is 0.3, expected 0.15"),
        ("conditioner", {"main_image_encoder": "clip"}, "main_image_encoder is 'clip', expected a mapping"),
        ("conditioner", {"main_image_encoder": {"kwargs": None}}, "kwargs is None, expected a mapping"),
    ],
)
def test_unknown_values_are_named(root: Path, part: str, params: dict[str, Any], message: str) -> None:
    change(root, **{part: params})
    with pytest.raises(UserError, match=message) as caught:
        load_hunyuan3d(root)
    assert "config.yaml" in str(caught.value)


def test_a_broken_config(root: Path) -> None:
    path = root / SUBFOLDER / "config.yaml"
    path.write_text("model: [")
    with pytest.raises(UserError, match="config.yaml is broken"):
        load_hunyuan3d(root)
    path.write_text("just text")
    with pytest.raises(UserError, match="holds text"):
        load_hunyuan3d(root)
    path.unlink()
    with pytest.raises(UserError, match="config.yaml"):
        load_hunyuan3d(root)


def test_no_weights(root: Path) -> None:
    (root / SUBFOLDER / WEIGHTS).unlink()
    with pytest.raises(UserError, match="has no weights, expected one of"):
        load_hunyuan3d(root)
