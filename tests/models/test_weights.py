"""Models on disk: strict loading, whole files, one sentence for every broken folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from elastic3d.errors import UserError
from elastic3d.models.weights import PretrainedMixin, read_weights, save_weights
from elastic3d.utils.files import file_sha256


@dataclass(kw_only=True)
class TinyConfig:
    width: int = 4


class Tiny(PretrainedMixin, nn.Module):
    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.width, config.width)
        self.register_buffer("order", torch.tensor([2, 1]))
        self.register_buffer("count", torch.tensor(3))


class Other(Tiny):
    pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Tiny(TinyConfig(width=3)).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_round_trip(tmp_path: Path) -> None:
    model = Tiny(TinyConfig(width=5))
    model.save_pretrained(tmp_path / "m")
    loaded = Tiny.from_pretrained(tmp_path / "m")
    assert loaded.config == model.config and not loaded.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_matrices_in_eight_bits(tmp_path: Path) -> None:
    """Every value within half a step of its row; vectors in bf16; rows of zeros; weights that are named `_scale`."""
    path = tmp_path / "w.safetensors"
    state = {
        "a": torch.randn(5, 64) * torch.logspace(-6, 6, 5)[:, None],
        "zeros": torch.zeros(2, 3),
        "bias": torch.randn(7),
        "norm_scale": torch.randn(4),
        "b_scale": torch.randn(3, 3),
        "count": torch.tensor([[1, 2]]),
    }
    save_weights(state, path, torch.int8)
    stored, found = load_file(path), read_weights(path)
    assert found.keys() == state.keys() and stored["a"].dtype is torch.int8
    for name in ("a", "zeros", "b_scale"):
        step = state[name].abs().amax(1, keepdim=True) / 127
        assert found[name].dtype is torch.float32
        assert ((found[name] - state[name]).abs() <= 0.501 * step).all()
    assert torch.equal(found["bias"], state["bias"].bfloat16())
    assert torch.equal(found["count"], state["count"])
    save_weights(found, path, torch.int8)  # what is read stays as it is
    torch.testing.assert_close(read_weights(path), found, rtol=1e-6, atol=0)
    save_file({**stored, "a_scale": stored["a_scale"][:3]}, path)
    with pytest.raises(UserError, match=r"has scales of a of the shape \[3, 1\] in torch.float32, expected"):
        read_weights(path)
    del stored["a_scale"]
    save_file(stored, path)  # numbers of 8 bits as such
    assert read_weights(path)["a"].dtype is torch.int8


def test_dtypes(tmp_path: Path) -> None:
    Tiny(TinyConfig()).save_pretrained(tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["linear.weight"].dtype == torch.bfloat16 and stored["count"].dtype == torch.int64
    assert Tiny.from_pretrained(tmp_path).linear.weight.dtype == torch.float32
    half = Tiny.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert half.linear.weight.dtype == torch.bfloat16
    assert half.order.dtype == torch.int64 and half.order.tolist() == [2, 1]


def _edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def _pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "there is no file .*config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is broken"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is broken"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), "is a list, expected a JSON object"),
    "unknown field": (lambda f: _edit_config(f, witdh=3), "unknown field 'witdh'"),
    "another class": (lambda f: _edit_config(f, _class_name="Big"), "describes a Big, expected a Tiny"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "there is no file .*model.safetensors"),
    "pickle": (_pickle_instead, "has pytorch_model.bin, a pickle .* expected model.safetensors"),
    "disguised pickle": (
        lambda f: torch.save({"linear.weight": torch.ones(1)}, f / "model.safetensors"),
        "is a pickle, expected a safetensors file",
    ),
    "lfs pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
    "truncated": (_truncate, "truncated or no safetensors file"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is empty, expected a safetensors file"),
    "garbage": (
        lambda f: (f / "model.safetensors").write_bytes(b"x" * 99),
        "truncated or no safetensors file",
    ),
    "missing key": (lambda f: _edit_weights(f, lambda s: s.pop("linear.bias")), r"1 missing \(linear.bias\)"),
    "unknown keys": (
        lambda f: _edit_weights(f, lambda s: s.update({k: torch.ones(1) for k in "abc"})),
        r"3 unknown \(a, b, ...\)",
    ),
    "another size": (
        lambda f: _edit_config(f, width=6),
        r"2 mis-shaped \(linear.weight \(3, 3\) instead of \(6, 6\), linear.bias",
    ),
    "nan": (
        lambda f: _edit_weights(f, lambda s: s["linear.bias"].fill_(torch.nan)),
        "1 tensors, first in linear.bias",
    ),
    "inf": (lambda f: _edit_weights(f, lambda s: s["linear.bias"].fill_(torch.inf)), "NaN or infinite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused_in_one_sentence(folder: Path, name: str) -> None:
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        Tiny.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_folders_that_are_none(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        Tiny.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="config.json is a file, expected a folder"):
        Tiny.from_pretrained(folder / "config.json")
    with pytest.raises(UserError, match="describes a Tiny, expected a Other"):
        Other.from_pretrained(folder)
    with pytest.raises(UserError, match="is a pickle"):
        (tmp_path / "x.ckpt").write_bytes(b"anything")
        read_weights(tmp_path / "x.ckpt")


def test_a_failed_save_leaves_the_old_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("elastic3d.models.weights.save_file", full)
    with pytest.raises(UserError, match="can't write .*no space left|No space left"):
        Tiny(TinyConfig(width=3)).save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_sha256(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    digests = [hashlib.sha256(name.encode()) for name in "ab"]
    assert file_sha256(tmp_path / "a") == digests[0].hexdigest()
    joined = hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
    assert file_sha256(tmp_path / "a", tmp_path / "b") == joined
