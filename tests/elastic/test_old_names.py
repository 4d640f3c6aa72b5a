"""Files that older versions saved are read under today's names; the bundled models are such files."""

import json
from pathlib import Path

import pytest

from elastic3d.elastic.config import BlockCacheConfig, Branches, ElasticConfig, RouterConfig, Scope
from elastic3d.models.options import ImageEncoderConfig
from elastic3d.training.checkpoint import read_record
from elastic3d.training.dit import DiTTrainConfig
from elastic3d.training.few_step import FewStepTrainConfig
from elastic3d.utils.options import from_dict

SHIPPED = Path(__file__).parents[2] / "data" / "pretrained"
RENAMED = {
    "trend": "damping",
    "asked": "requested_budgets",
    "told": "calibrated_budgets",
    "urgency": "gate_bias",
    "trends": "dampings",
}


@pytest.mark.parametrize("model", ["shape-small", "image-small"])
def test_every_value_of_the_bundled_routers_is_kept(model: str) -> None:
    saved = json.loads((SHIPPED / model / "routers" / "config.json").read_text())
    del saved["_class_name"]
    config = from_dict(RouterConfig, saved, "routers")
    assert config.scope is Scope.step and config.branches is Branches.shared
    for old, new in RENAMED.items():
        assert getattr(config, new) == saved[old if old in saved else new]
    rank = saved.get("updates", saved.get("few_step_rank", 0))
    assert config.few_step_rank == rank and (rank == 48) is (model == "shape-small")
    assert config.few_step_nfe == saved.get("updates_calls", saved.get("few_step_nfe", 8.0))


def test_saved_caches_encoders_and_defaults() -> None:
    cache = from_dict(BlockCacheConfig, {"closed_reuse": True, "trend": 0.5, "drift": 0.1}, "cache")
    assert cache == BlockCacheConfig(skipped_reuse=True, damping=0.5)
    assert from_dict(ElasticConfig, {"updates": False}, "elastic") == ElasticConfig(few_step=False)
    saved = json.loads((SHIPPED / "shape-small" / "image_encoder" / "config.json").read_text())
    saved.pop("_class_name", None)
    assert from_dict(ImageEncoderConfig, saved, "encoder").prepared_size == 0


def test_an_earlier_record_of_the_bundled_few_step_lora_is_a_configuration_of_today() -> None:
    saved = json.loads((SHIPPED / "shape-small" / "routers" / "few_step-fifth.json").read_text())
    saved = saved.get("config", saved)
    config = read_record(saved, FewStepTrainConfig, "record")
    old = saved["updates"]
    assert (config.few_step.rank, config.few_step.max_nfe) == (old["rank"], old["max_calls"]) == (48, 8)


def test_a_record_with_an_option_that_is_gone_is_read_without_it() -> None:
    saved = json.loads((SHIPPED / "shape-small" / "dit" / "training.json").read_text())["config"]
    assert "routes" in saved["dit"]
    config = read_record(saved, DiTTrainConfig, "record")
    assert config.dit.anchor_weight == saved["dit"]["anchor_weight"] and not hasattr(config.dit, "routes")
