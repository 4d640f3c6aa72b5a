"""What older versions saved is read under today's names: the bundled models are such files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from elastic3d.elastic.attachment import load_router_config
from elastic3d.elastic.config import Branches, RouterConfig, RouterCurves, Scope
from elastic3d.errors import UserError
from elastic3d.models.options import ImageEncoderConfig
from elastic3d.training.checkpoint import read_record, stage_of
from elastic3d.training.options import StageName
from elastic3d.training.stages import stage_config
from elastic3d.utils.files import save_json
from elastic3d.utils.old_names import GROUPED, OPTIONS, WEIGHTS, todays_results
from elastic3d.utils.options import from_dict, hints, to_dict

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "data" / "pretrained"


def saved(name: str) -> dict[str, Any]:
    """A shipped configuration without its class."""
    values: dict[str, Any] = json.loads((SHIPPED / name).read_text())
    values.pop("_class_name", None)
    return values.get("config", values)


def record(values: dict[str, Any]) -> Any:
    """A configuration of the stage that a record names."""
    return read_record(values, stage_config(StageName[stage_of(values, "a.json")]), "a.json")


@pytest.mark.parametrize("model", ["shape-small", "image-small"])
def test_every_value_of_the_bundled_routers_is_kept(model: str) -> None:
    written = saved(f"{model}/routers/config.json")
    config = from_dict(RouterConfig, written, "routers")
    family = {"shape-small": "ShapeDiT", "image-small": "FluxTransformer2DModel"}[model]
    assert load_router_config(SHIPPED / model / "routers", family) == config
    assert config.scope is Scope.step and config.branches is Branches.shared
    renamed = OPTIONS["RouterConfig"]
    for old in ("asked", "told", "urgency", "trend", "trends", "forecast_times"):
        new = renamed[old]
        holder = config if new == "damping" else config.curves
        assert new and getattr(holder, new) == written.get(old, written.get(new))
    rank = written.get("few_step_rank", 0)
    assert config.few_step_rank == rank and (rank == 48) is (model == "shape-small")
    assert config.few_step_nfe == written.get("few_step_nfe", 8.0)


def test_curves_are_read_from_their_own_file_and_never_taken_for_none(tmp_path: Path) -> None:
    folder = SHIPPED / "shape-small" / "routers"
    shutil.copy(folder / "config.json", tmp_path)
    config = load_router_config(tmp_path, "ShapeDiT")
    values = {"_class_name": "ShapeDiTRouters"} | to_dict(config)
    curves = values.pop("curves")
    save_json(values, tmp_path / "config.json")
    with pytest.raises(UserError, match=r"has no curves.json, expected the routers' beside config.json"):
        load_router_config(tmp_path, "ShapeDiT")
    save_json(curves, tmp_path / "curves.json")
    assert load_router_config(tmp_path, "ShapeDiT") == config and config.curves.calibrated_budgets


def test_a_folder_mixed_of_two_versions_is_refused(tmp_path: Path) -> None:
    shutil.copy(SHIPPED / "shape-small" / "routers" / "config.json", tmp_path)
    config = load_router_config(tmp_path, "ShapeDiT")
    save_json(to_dict(config.curves), tmp_path / "curves.json")
    assert load_router_config(tmp_path, "ShapeDiT") == config
    save_json(to_dict(RouterCurves()), tmp_path / "curves.json")
    with pytest.raises(
        UserError, match=r"curves.json has other curves than config.json, expected files of one"
    ):
        load_router_config(tmp_path, "ShapeDiT")


def test_saved_values_and_encoders() -> None:
    assert from_dict(RouterConfig, {"lookahead": "step", "branches": "together"}).branches is Branches.shared
    assert from_dict(RouterConfig, {"variant": "light", "hidden": 8}) == RouterConfig(hidden=8)
    encoder = saved("shape-small/image_encoder/config.json")
    assert from_dict(ImageEncoderConfig, encoder, "encoder").prepared_size == 0


@pytest.mark.parametrize("variant", ["none", "paper"])
def test_routers_of_a_variant_that_is_gone_are_refused(variant: str) -> None:
    wanted = f"a.json: router.variant is '{variant}', expected light"
    with pytest.raises(UserError, match=wanted):
        from_dict(RouterConfig, {"variant": variant}, "a.json", "router.")


def test_records_of_trainings_that_ship() -> None:
    written = saved("shape-small/routers/few_step-fifth.json")
    assert written["stage"] == "updates"
    few_step, old = record(written).few_step, written["updates"]
    assert (few_step.rank, few_step.max_nfe, few_step.min_nfe) == (48, old["max_calls"], old["min_calls"])
    assert record(saved("image-small/training.json")).image.val_images == 128
    written = saved("image-small/routers/training.json")
    assert written["stage"] == "router"
    written["routing"] |= {"recalled": 5, "picture": {"weight": 0.25}}
    routing = record(written).routing
    assert (routing.simulated_steps, routing.image.weight) == (5, 0.25)


def test_an_option_that_is_gone_is_left_out() -> None:
    written = saved("shape-small/dit/training-first.json")
    assert "timesteps" in written["dit"]
    router = record(saved("shape-small/routers/training.json"))
    assert router.routing.guidance == 2.0 and not hasattr(router.dit, "sample_guidance")
    dit = record(written).dit
    assert dit.anchor_weight == written["dit"]["anchor_weight"] and not hasattr(dit, "timesteps")


def test_weights_and_results() -> None:
    with safe_open(SHIPPED / "shape-small" / "routers" / "model.safetensors", "pt") as file:
        names = [name.replace(*WEIGHTS) for name in list(file.keys())]
    assert any(".few_step." in name for name in names) and not any(".updates." in name for name in names)
    assert todays_results({"pictures": 3, "date": "d"}) == {"images": 3, "date": "d"}


def names_in(value: Any) -> set[str]:
    """The names of a JSON value, at any depth."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set(value if isinstance(value, dict) else ()).union(*map(names_in, inside))


def test_every_old_name_is_one_of_a_shipped_file() -> None:
    used = names_in([json.loads(path.read_text()) for path in SHIPPED.rglob("*.json")])
    assert used >= {old for renamed in OPTIONS.values() for old in renamed}


def test_every_new_name_is_an_option_of_its_class() -> None:
    classes = [RouterConfig, ImageEncoderConfig]
    waiting: list[type[Any]] = [stage_config(stage) for stage in StageName]
    while waiting:
        classes.append(each := waiting.pop())
        waiting += [kind for kind in hints(each).values() if hasattr(kind, "__dataclass_fields__")]
    for name, renamed in OPTIONS.items():
        found = {
            field for each in classes if name in (c.__name__ for c in each.__mro__) for field in hints(each)
        }
        if name in GROUPED:
            found |= hints(hints(RouterConfig)[GROUPED[name]]).keys()
        assert found >= {new for new in renamed.values() if new}, name
        assert not found & renamed.keys(), name
