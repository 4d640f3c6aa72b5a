"""Every field of every configuration refuses hostile values: in one sentence, quickly, and nothing is allocated."""

from __future__ import annotations

import importlib
import json
import math
import time
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import elastic3d
from elastic3d.errors import UserError
from elastic3d.models.options import DiTConfig, SkipDiTConfig, VAEConfig
from elastic3d.models.shape_dit import ShapeDiT
from elastic3d.models.shape_vae import ShapeVAE
from elastic3d.models.skip_dit import SkipDiT
from elastic3d.utils.options import Options, from_dict, hints, to_dict, walk

HOSTILE = (
    *(0, -1, -(10**30), 1e30, 10**400, math.nan, math.inf, -math.inf, "", "x" * 10_000, True, None, b"x"),
    *([], {}, [None], {"a": 1}, [math.nan], [1e30], ["x"]),
)
REQUIRED = {"image": "a.png", "output": "a.json", "prompt": "a chair", "folders": ["a"], "weights": "w"}


def all_configs() -> list[type[Options]]:
    """Every configuration of the package."""
    root = Path(elastic3d.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if "Options):" in path.read_text() or "Config):" in path.read_text():
            importlib.import_module(".".join(("elastic3d", *path.relative_to(root).with_suffix("").parts)))
    found, left = [], [Options]
    while left:
        for each in left.pop().__subclasses__():
            left.append(each)
            if is_dataclass(each) and each.__module__.startswith("elastic3d."):
                found.append(each)
    return sorted(set(found), key=lambda each: each.__name__)


CONFIGS = all_configs()


def smallest(config_class: type[Options]) -> dict[str, Any]:
    """Values for the fields that have to be given."""
    needed = {}
    for item in fields(config_class):  # type: ignore[arg-type]
        kind = hints(config_class)[item.name]
        if item.default is MISSING and item.default_factory is MISSING:
            needed[item.name] = smallest(kind) if is_dataclass(kind) else REQUIRED.get(item.name, "x")
    if config_class.__name__ in ("GenerateConfig", "GenerateImageConfig", "SummarizeConfig", "ImportConfig"):
        own = {item.name for item in fields(config_class)}  # type: ignore[arg-type]
        needed |= {n: v for n, v in REQUIRED.items() if n in own and n != "weights"}
        if config_class.__name__ == "GenerateConfig":
            needed.pop("prompt")
        if config_class.__name__ == "GenerateImageConfig":
            needed["output"] = "a.png"
    return needed


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, told without the code under test."""
    parts = get_args(kind) if get_origin(kind) not in (list, dict) and get_args(kind) else (kind,)
    if value is None:
        return type(None) in parts
    if isinstance(value, bool):
        return bool in parts
    return any(
        isinstance(value, {float: (int, float)}.get(part, get_origin(part) or part))
        for part in parts
        if isinstance(get_origin(part) or part, type)
    ) or (isinstance(value, str) and any(part.__name__ == "Path" for part in parts if isinstance(part, type)))


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda each: each.__name__)
def test_hostile_values_are_refused_in_a_sentence(config_class: type[Options]) -> None:
    given = smallest(config_class)
    started = time.process_time()
    for item in fields(config_class):  # type: ignore[arg-type]
        kind = hints(config_class)[item.name]
        for value in HOSTILE:
            try:
                config = from_dict(config_class, {**given, item.name: value}, "f.json")
            except UserError as error:
                text = str(error)
                assert text.startswith("f.json: ") and len(text) < 2000 and "\n" not in text, text
                continue
            held = getattr(config, item.name)
            assert fits(value, kind) or is_dataclass(held), (item.name, value)
            numbers = held if isinstance(held, list) else [held]
            numbers = [n for n in numbers if isinstance(n, (int, float)) and not isinstance(n, bool)]
            assert all(math.isfinite(n) and abs(n) < 1e13 or n < 2**63 for n in numbers), (item.name, value)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("config_class", CONFIGS, ids=lambda each: each.__name__)
def test_every_number_has_a_range_and_every_field_a_meaning(config_class: type[Options]) -> None:
    for leaf in walk(config_class):
        name, kind, bounds = leaf.name, leaf.kind, leaf.bounds
        assert leaf.help, name
        parts = {kind, *get_args(kind)} | {x for part in get_args(kind) for x in get_args(part)}
        if {int, float} & parts and Any not in parts:
            low, high = (
                math.isfinite(bounds.ge) or math.isfinite(bounds.gt),
                math.isfinite(bounds.le) or math.isfinite(bounds.lt),
            )
            assert (low and high) or bounds.choices, f"{name} has no range"


def test_a_hostile_field_is_named_in_full() -> None:
    with pytest.raises(UserError, match=r"^f.json: image.model.patch is 0, expected a value from 2 to 256"):
        importlib.import_module("elastic3d.training.image")
        from elastic3d.training.image import ImageTrainConfig

        from_dict(ImageTrainConfig, {"image": {"model": {"patch": 0}}}, "f.json")


NETWORKS = [(VAEConfig, ShapeVAE), (DiTConfig, ShapeDiT), (SkipDiTConfig, SkipDiT)]


class Allocations(TorchDispatchMode):
    """Notes the shapes of large tensors that take memory. A patched function of torch would do as well, but torch keeps
    what it finds under a name: as what `torch.device("meta")` moves, for the rest of the process."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values, self.shapes = values, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta" and result.numel() > self.values:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize(("config_class", "network"), NETWORKS)
def test_a_config_far_larger_than_its_weights_allocates_nothing(
    config_class: type[Options], network: type[nn.Module], tmp_path
) -> None:
    """A `config.json` with the largest sizes that its ranges allow, beside a file of small weights."""
    small = {"width": 32, "heads": 2}
    small |= {"blocks": 2, "expert_blocks": 1} if config_class is SkipDiTConfig else {}
    with Allocations(100) as own:
        network(config_class(**small)).save_pretrained(tmp_path)
    hostile = to_dict(config_class(**small)) | {"width": 1 << 16}
    (tmp_path / "config.json").write_text(json.dumps(hostile | {"_class_name": network.__name__}))
    with (
        Allocations(1 << 20) as large,
        pytest.raises(UserError, match="config.json describes a larger model than that of model.safetensors"),
    ):
        network.from_pretrained(tmp_path)
    assert own.shapes and not large.shapes
