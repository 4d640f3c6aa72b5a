"""Each kind of file of our own, cut off, with keys dropped and types swapped: read, or told in one sentence."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors.torch import save, save_file
from tiny_dial import ROUTERS
from tiny_dial import values as dial_values
from torch import nn

from elastic3d.diffusion.dial import load_dial
from elastic3d.diffusion.options import PipelineConfig
from elastic3d.elastic.config import RouterConfig
from elastic3d.errors import UserError
from elastic3d.evaluation.html import load_frontier
from elastic3d.evaluation.report import load_gate
from elastic3d.evaluation.runner import read_journal
from elastic3d.evaluation.summary import load_report
from elastic3d.geometry.mesh_io import save_mesh
from elastic3d.models.images import read_metadata, save_image
from elastic3d.models.options import DiTConfig, ForegroundConfig, ImageEncoderConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.weights import PretrainedMixin, load_config, open_tensors, read_weights, tensor_heads
from elastic3d.pipelines.training_free import describe, load_calibration, series_of
from elastic3d.preparation.shards import Shard, read_sidecar, write_shard
from elastic3d.training.checkpoint import (
    WEIGHTS,
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from elastic3d.training.datasets import PreparedShapes
from elastic3d.training.image_data import ImageCache
from elastic3d.training.journal import read_metrics
from elastic3d.training.latents import LatentInfo
from elastic3d.utils.files import load_json, save_json
from elastic3d.utils.options import from_dict, to_dict


@dataclass(kw_only=True)
class TinyConfig:
    width: int = 4
    layers: int = 1


class Tiny(PretrainedMixin, nn.Module):
    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.linears = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.layers))


ROW = {"name": "chair", "status": "ok", "chamfer_l1": 0.1, "f_score@0.02": 0.5, "watertight": True}
LATENTS = {
    "settings": {
        **{"vae": "vae", "vae_sha256": "0", "encoder": to_dict(ImageEncoderConfig())},
        "foreground": to_dict(ForegroundConfig()),
    },
    **{"latents": [64, 8], "tokens": [49, 32], "mean": [0.0, 0.1], "std": [1.0, 1.1]},
}
SIDECAR = {
    "settings": {"seed": 0},
    "items": [{"id": "a", "source": "s", "category": "chair", "licence": "none"}],
    "failures": [{"id": "b", "reason": "no faces"}],
}


def _latents(path: Path) -> object:
    info = LatentInfo.load(path.parent)
    return info.vae, info.encoder, info.foreground


def _images(path: Path) -> object:
    return len(ImageCache(path.parent, "train"))


def _state(path: Path) -> object:
    """With a manifest that agrees: a hostile checkpoint, not a damaged one."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "manifest.json").write_text(json.dumps({"state.json": digest, **_weights(path.parent)}))
    return load_checkpoint(path.parent)


def _manifest(path: Path) -> object:
    (path.parent / "state.json").write_text('{"step": 1}')
    _weights(path.parent)
    return load_checkpoint(path.parent)


def _weights(folder: Path) -> dict[str, str]:
    """Those of a checkpoint, and their hashes."""
    content = save({"w": torch.zeros(1)})
    for name in WEIGHTS:
        (folder / name).write_bytes(content)
    return dict.fromkeys(WEIGHTS, hashlib.sha256(content).hexdigest())


SHAPE_DIT = ShapeDiT(DiTConfig(width=16, heads=2, double_blocks=1, single_blocks=1))

# name of the file -> its content, what reads it
DOCUMENTS: dict[str, tuple[Any, Callable[[Path], object]]] = {
    "config.json": (
        {"_class_name": "ShapeRouters", **to_dict(RouterConfig())},
        lambda path: load_config(path.parent, RouterConfig, "ShapeRouters"),
    ),
    "pipeline.json": (
        to_dict(PipelineConfig()),
        lambda path: from_dict(PipelineConfig, load_json(path), str(path)),
    ),
    "training_free.json": (
        {
            "about": {"model": describe(SHAPE_DIT), "samples": 2},
            **{"times": [0.0, 0.5], "changes": [0.0, 0.1]},
            "moments": [
                {"span": span, "stream": stream, "values": [[2.0, 1.0], [1.0, 2.0]]}
                for span, stream in sorted(series_of(SHAPE_DIT))
            ],
        },
        lambda path: load_calibration(path, SHAPE_DIT).at([0.1, 0.3]).errors(),
    ),
    "dial.json": (
        dial_values(),
        lambda path: load_dial(path.parent, PipelineConfig(steps=3, guidance=2.0), ROUTERS),
    ),
    "shard-00000.json": (SIDECAR, read_sidecar),
    "latents.json": (LATENTS, _latents),
    "cache.json": ({"settings": {"size": 64}, "counts": {"train": 3}}, _images),
    "state.json": ({"step": 3, "config": {}}, _state),
    "manifest.json": (
        {
            "state.json": hashlib.sha256(b'{"step": 1}').hexdigest(),
            **dict.fromkeys(WEIGHTS, hashlib.sha256(save({"w": torch.zeros(1)})).hexdigest()),
        },
        _manifest,
    ),
    "report.json": ({"protocol": {"points": 9}, "items": [ROW]}, load_report),
    "results.json": ({"rows": [{"name": "dense"}]}, load_frontier),
    "gate.yaml": ({"chamfer_l1": {"max": 0.03}, "f_score@0.02": {"min": 0.9, "max": 1.0}}, load_gate),
}
LINES: dict[str, tuple[Any, Callable[[Path], object]]] = {
    "metrics.jsonl": ({"step": 1, "time": 2.5, "loss": 0.1}, read_metrics),
    "report.rows.jsonl": ({"key": "k", "row": ROW}, read_journal),
}
SWAPS = (None, True, -1, 0.5, 10**400, "x", [], [[]], {}, {"x": 1}, float("nan"), float("inf"))


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside, of long lists the first few alone."""
    if at:
        yield at
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    for key, item in inner:
        yield from _places(item, (*at, key))


def _changed(value: Any) -> Iterator[Any]:
    """The value with each key dropped, and with each value swapped for one of another type."""
    yield from SWAPS
    for place in _places(value):
        for swap in ("drop", *SWAPS):
            result = copy.deepcopy(value)
            parent = result
            for key in place[:-1]:
                parent = parent[key]
            if swap == "drop":
                del parent[place[-1]]
            else:
                parent[place[-1]] = swap
            yield result


def _read(path: Path, data: bytes, read: Callable[[Path], object]) -> bool:
    """Whether such a file is refused; the refusal is one sentence with its name."""
    path.write_bytes(data)
    try:
        read(path)
    except UserError as error:
        assert path.name in str(error) and "\n" not in str(error) and len(str(error)) < 1500, str(error)
        return True
    return False


def _cuts(data: bytes) -> list[bytes]:
    return [data[:length] for length in range(0, len(data), 97)]


@pytest.mark.parametrize("name", [*DOCUMENTS, *LINES])
def test_json_and_yaml(tmp_path: Path, name: str) -> None:
    value, read = (DOCUMENTS | LINES)[name]
    end = "\n" if name in LINES else ""
    whole = json.dumps(value).encode() + end.encode()
    refused = [_read(tmp_path / name, whole[:length], read) for length in range(0, len(whole) - 1, 97)]
    assert name in LINES or all(refused), "a file that was cut off was taken for a whole one"
    variants = list(_changed(value))
    chosen = random.Random(0).sample(variants, min(len(variants), 500))
    refused = [_read(tmp_path / name, (json.dumps(v) + end).encode(), read) for v in chosen]
    assert sum(refused) > len(SWAPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DOCUMENTS, *LINES])
def test_a_thousand_inputs(tmp_path: Path, name: str) -> None:
    """Bytes that are changed, inserted and dropped at random, in files that are cut off anywhere."""
    value, read = (DOCUMENTS | LINES)[name]
    rng = random.Random(name)
    for _ in range(1000):
        data = bytearray(json.dumps(value).encode() + b"\n")
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data))
            data[place : place + rng.randint(0, 3)] = rng.choice(
                (b"", b"\x00", b"\xff", b"[", b"}", b'"', b"-", b"9" * 40)
            )
        _read(tmp_path / name, bytes(data[: rng.choice((len(data), rng.randrange(len(data) + 1)))]), read)


def _shard(path: Path) -> object:
    save_file({"whole/surface": torch.zeros(1)}, path.with_name("shard-00009.safetensors"))
    source = path.parent.name
    shapes = PreparedShapes(path.parent.parent, [f"{source}/a", f"{source}/whole"])
    return [shapes.read(id, "surface") for id in shapes.ids]


def _cached(path: Path) -> object:
    (path.parent / "train").mkdir(exist_ok=True)
    (path.parent / "cache.json").write_text('{"settings": {}, "counts": {"train": 1}}')
    moved = path.parent / "train" / path.name
    moved.write_bytes(path.read_bytes())
    return ImageCache(path.parent, "train").read(0, 0)


TENSORS: dict[str, tuple[dict[str, torch.Tensor], Callable[[Path], object]]] = {
    "model.safetensors": (
        {f"linears.0.{name}": value for name, value in nn.Linear(4, 4).state_dict().items()},
        lambda path: Tiny.from_pretrained(path.parent),
    ),
    "shard-00000.safetensors": ({"a/surface": torch.rand(40, 6).half()}, _shard),
    "shard-00001.safetensors": (
        {"latents": torch.rand(1, 9, 3), "caption": torch.zeros(1, 1, dtype=torch.int32)},
        _cached,
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_safetensors(tmp_path: Path, name: str) -> None:
    tensors, read = TENSORS[name]
    (tmp_path / "config.json").write_text("{}")
    whole = save(tensors)
    assert not _read(tmp_path / name, whole, read)
    assert all(_read(tmp_path / name, data, read) for data in _cuts(whole))
    first, *_ = tensors
    assert _read(
        tmp_path / name, save({**tensors, first: tensors[first].float().to(torch.float8_e4m3fn)}), read
    )
    for changed in ({k: v for k, v in tensors.items() if k != first}, {}):
        refused = _read(tmp_path / name, save(changed), read)
        assert refused or name == "shard-00000.safetensors", "a shard may have any shapes, or none"
    for data in (
        b"\xff" * 64,
        b"\x00" * 64,
        (1 << 62).to_bytes(8, "little") + b"{}",
        b"PK\x03\x04" + bytes(99),
    ):
        assert _read(tmp_path / name, data, read)
    head = b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}'
    assert _read(tmp_path / name, len(head).to_bytes(8, "little") + head + bytes(16), read)


def test_weights_of_another_shape_than_the_header_promise_nothing(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "x.safetensors")
    assert tensor_heads(tmp_path / "x.safetensors")["a"].shape == (2, 3)
    with pytest.raises(UserError, match=r"x.safetensors has no tensor 'b', expected b"):
        open_tensors(tmp_path / "x.safetensors", ("b",))
    with pytest.raises(UserError, match="x.safetensors has tensors of type C64, first a"):
        save_file({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "x.safetensors")
        read_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "values", [{"width": 1 << 20}, {"width": 1 << 40}, {"layers": 10**11}, {"width": -1}]
)
def test_a_size_that_the_weights_do_not_have_costs_nothing(tmp_path: Path, values: dict[str, int]) -> None:
    Tiny(TinyConfig()).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="config.json describes|does not fit"):
        Tiny.from_pretrained(tmp_path)


def test_metadata_of_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save_image(Image.new("RGB", (8, 8)), path, {"seed": 1})
    whole = path.read_bytes()
    assert read_metadata(path) == {"seed": 1}
    assert any(_read(path, data, read_metadata) for data in _cuts(whole)[:-1])
    for broken in (b'{"seed": NaN ', b"[" * 12, b'{"seed":"x"', b"null"):
        assert _read(path, whole.replace(b'{"seed": 1}', broken.ljust(11)[:11]), read_metadata)


# ------------------------------------------------------------------------------------------------ full disk


def _full_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of a file ends in the middle, for want of space."""

    def full(self: Path, data: Any, *args: Any, **kwargs: Any) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2] if isinstance(data, bytes) else b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_tensors(tensors: Any, path: Path, metadata: Any = None) -> None:
        full(Path(path), save(tensors))

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("elastic3d.models.weights.save_file", full_tensors)


def _full_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)


def _full_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)


def _write_shard(folder: Path, size: float) -> None:
    arrays = {"a/surface": np.full((9, 6), size, np.float16)}
    write_shard(Shard(folder / "shard-00000.safetensors", []), arrays, SIDECAR)


WRITERS: dict[str, Callable[[Path, float], object]] = {
    "glb": lambda folder, size: save_mesh(trimesh.creation.box((size, 1, 1)), folder / "a.glb"),
    "obj": lambda folder, size: save_mesh(trimesh.creation.box((size, 1, 1)), folder / "a.obj"),
    "checkpoint": lambda folder, size: save_checkpoint(
        folder, Checkpoint(1, {"model": {"w": torch.full((9,), size)}}), keep=2
    ),
    "shard": _write_shard,
    "report": lambda folder, size: save_json({"items": [], "size": size}, folder / "a.json"),
    "model": lambda folder, size: Tiny(TinyConfig()).save_pretrained(folder),
}


def _contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "full", [_full_writes, _full_replace, _full_flush], ids=["write", "replace", "flush"]
)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_leaves_what_was_there_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, full: Callable[[pytest.MonkeyPatch], None]
) -> None:
    WRITERS[kind](tmp_path / "old", 1.0)
    before = _contents(tmp_path)
    with monkeypatch.context() as patch:
        full(patch)
        for folder in ("old", "new"):
            with pytest.raises(UserError, match="(?i)can't write .*no space left on device") as caught:
                WRITERS[kind](tmp_path / folder, 2.0)
            assert "\n" not in str(caught.value)
    assert _contents(tmp_path) == before
    WRITERS[kind](tmp_path / "new", 2.0)
    assert len(_contents(tmp_path)) == 2 * len(before), "and with space again it works"
