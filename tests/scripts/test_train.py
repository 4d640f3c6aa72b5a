"""`scripts/train.py`: the documented commands, what each stage's help shows, and records of earlier versions."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import train
from _cli import CONFIG_DIR, help_text, options_of, parse

from elastic3d.errors import UserError
from elastic3d.training.checkpoint import read_record, stage_of
from elastic3d.training.export import ExportStageConfig
from elastic3d.training.options import Precision, StageName, TrainConfig
from elastic3d.training.stages import require_sizes, settle_precision, stage_config
from elastic3d.utils.options import from_dict, renamed, to_dict

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/*.md", "data/pretrained/README.md", "reports/*/README.md")
RECORDS = [
    path
    for path in sorted(ROOT.glob("data/pretrained/*/**/*.json"))
    if path.name.startswith(("training", "few_step")) and path.name != "training_free.json"
]


def commands() -> list[list[str]]:
    """Arguments of every `scripts/train.py` in a code block of the documentation."""
    return [arguments for _, arguments in launched()]


def launched() -> list[tuple[str, list[str]]]:
    """What each of them is started with, and its arguments."""
    found = []
    for page in (path for pattern in PAGES for path in sorted(ROOT.glob(pattern))):
        text = page.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            head, script, rest = line.partition("scripts/train.py ")
            if script and "`" not in head and "..." not in rest:
                found.append((head, shlex.split(rest, comments=True)))
    return found


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_documented_commands_are_understood(arguments: list[str]) -> None:
    given = train.with_own_stage(arguments)
    stage = train.chosen_stage(given)
    config = parse(stage_config(stage), "train", given)
    assert config.stage is stage
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config


def test_documented_processes_share_a_batch() -> None:
    found = {"accelerate": 0, "torchrun": 0}
    for head, arguments in launched():
        launcher = head.partition(" ")[0]
        if launcher in found:
            count = re.search(r"--(?:num_processes|nproc_per_node) (\d+)", head)
            processes = int(count[1]) if count else 8  # as the estimates beside it say
            given = train.with_own_stage(arguments)
            config = parse(stage_config(train.chosen_stage(given)), "train", given)
            assert isinstance(config, TrainConfig)
            assert config.micro_batch(processes) >= 1
            found[launcher] += 1
    assert all(found.values())


def test_there_are_commands_of_every_stage() -> None:
    assert {train.chosen_stage(train.with_own_stage(each)) for each in commands()} == set(StageName)


@pytest.mark.parametrize("stage", list(StageName))
def test_a_stage_has_at_most_sixty_options_and_shows_them(stage: StageName) -> None:
    config_class = stage_config(stage)
    chosen, options = f"stage={stage.name}", options_of(config_class)
    assert len(options) <= 60
    shown = help_text(train.main, config_class, "train", CONFIG_DIR, [chosen])
    everything = help_text(train.main, config_class, "train", CONFIG_DIR, [chosen, "all"])
    for option in options.values():
        assert f"  {option.name}=" in everything
        assert (f"  {option.name}=" in shown) != option.advanced
    if stage is StageName.dit:
        assert "(1 to 65536)" in shown and "image.model" not in everything
        assert "  batch=16 " in shown  # as configs/stage/dit.yaml has it


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ("few_step block_router image_block_router", "sample_every compile"),
        ("vae image image_router", "gradient_checkpointing"),
        ("image image_router image_block_router sensitivity calibrate cache", "data.preload"),
        ("cache", "seed data.limit"),
        ("export", "seed precision"),
        ("image", "image.size image.text_length image.model.steps image.model.guidance image.model.shift"),
        ("router image_router block_router image_block_router sensitivity", "router.scope router.variant"),
    ],
)
def test_what_has_no_effect_in_a_stage_is_no_option_of_it(stages: str, names: str) -> None:
    for stage in stages.split():
        with_effect = options_of(stage_config(StageName[stage]))
        for name in names.split():
            assert name not in with_effect, stage
            with pytest.raises(UserError, match=f"unknown option '{name}'"):
                parse(stage_config(StageName[stage]), "train", [f"stage={stage}", f"{name}=1"])


@pytest.mark.parametrize(("stage", "scope"), [("router", "step"), ("block_router", "block")])
def test_what_kind_of_router_a_stage_trains_is_in_its_file(stage: str, scope: str) -> None:
    config: Any = parse(stage_config(StageName[stage]), "train", [f"stage={stage}"])
    assert config.router.scope.name == scope
    assert config.router.branches.name == {"step": "shared", "block": "separate"}[scope]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stage=dit", "dit.model.widht=3"], "did you mean dit.model.width"),
        (
            ["stage=router", "branches=shared"],
            "'branches': router.branches is no option of its own, but part of router=block.reuse",
        ),
        (["stage=rooter"], "^stage=rooter: did you mean stage=router\\? expected one of block_router, "),
        (["stage=dit", "kl_weight=3"], "unknown option 'kl_weight': it is an option of stage=vae; "),
        (
            ["stage=vae", "image.cache=x"],
            "stage=image, stage=image_router, stage=image_block_router, stage=sensitivity, stage=calibrate;",
        ),
        (
            ["stage=vae", "vae.model.include_pi=true"],
            "unknown option 'vae.model.include_pi': .* is no option of its own, but saved with a model",
        ),
        (["stage=dit", "dit.model.width=0"], "^dit.model.width is 0, expected a value from 1 to 65536"),
        (["stage=dit", "dit.model.mlp_ratio=0"], "^dit.model.mlp_ratio is 0"),
        (["stage=dit", "dit.model.double_blocks=100000000000"], "^dit.model.double_blocks is 100000000000"),
        (["stage=vae", "batch=1000000000000"], "^batch is 1000000000000, expected a value from 1 to"),
        (["stage=vae", "vae.model.neighbours_in=-1"], "^vae.model.neighbours_in is -1"),
        (["stage=image", "image.model.patch=0"], "^image.model.patch is 0"),
        (["stage=dit", "learning_rate=nan"], "^learning_rate is nan"),
        (["stage=image_router"], "^image.weights is required"),
    ],
)
def test_mistakes_are_said_in_a_sentence(arguments: list[str], message: str) -> None:
    stage = train.chosen_stage(arguments)
    with pytest.raises(UserError, match=message) as caught:
        parse(stage_config(stage), "train", arguments, elsewhere=train.options_of_stages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["stage=dit", "dit.model.width=65536"],
            r"[\d,]+ parameters, their gradients .* at least [\d.e+,]+ GB",
        ),
        (
            ["stage=vae", "batch=16777216"],
            r"16,777,216 samples in each process need at least .* GB of memory",
        ),
        (["stage=vae", "vae.near_queries=1048576", "batch=65536"], "65,536 samples in each process need"),
        (["stage=image", "image.model.width=65536"], "parameters, their gradients"),
    ],
)
def test_what_no_machine_holds_is_refused_before_anything_is_allocated(
    arguments: list[str], message: str
) -> None:
    stage = train.chosen_stage(arguments)
    config = parse(stage_config(stage), "train", arguments)
    assert isinstance(config, TrainConfig)
    with pytest.raises(UserError, match=message):
        require_sizes(config)


@pytest.mark.parametrize("stage", ["hunyuan3d_router", "triposg_router", "step1x3d_router"])
def test_a_batch_that_the_processes_cannot_share_is_refused_at_once(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    given = [f"stage={stage}"]
    config = parse(stage_config(train.chosen_stage(given)), "train", given)
    with pytest.raises(UserError, match="batch is 8, expected a multiple of 4 processes x 8 micro-batches"):
        require_sizes(config)
    require_sizes(parse(stage_config(train.chosen_stage(given)), "train", [*given, "accumulate=2"]))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: str(path.relative_to(ROOT / "data/pretrained")))
def test_records_of_shipped_models_are_read(path: Path) -> None:
    """They were written when one configuration had the options of all stages."""
    written = json.loads(path.read_text())["config"]
    stage = stage_of(written, path)
    config = read_record(written, stage_config(StageName[stage]), path)
    saved = renamed(type(config), written)
    assert isinstance(config, TrainConfig) and config.stage is StageName[stage]
    for name in ("steps", "learning_rate", "seed", "batch", "name"):
        assert getattr(config, name) == saved[name]
    own = {"block_router": "blocks", "image_block_router": "blocks"}
    part = stage if stage in ("vae", "dit", "image", "few_step") else own.get(stage, "routing")
    found = getattr(config, part)
    for name, value in renamed(type(found), saved[part]).items():
        if name in to_dict(found) and not isinstance(value, dict):
            assert to_dict(found)[name] == value, name


def test_a_router_run_with_options_that_are_gone_is_read() -> None:
    gone = {"gate": "straight_through", "cost": "paper", "cost_weight": 20.0, "slack": 0.1, "rho_gate": 0.6}
    gone |= {"rho_width": 0.5, "distillation": 1.0}
    written = {"stage": "router", "steps": 7, "routing": {**gone, "flow": 0.3, "late_weight": 0.5}}
    config = read_record(written, stage_config(StageName.router), "a.json")
    assert config.steps == 7  # type: ignore[attr-defined]
    assert (config.routing.flow, config.routing.late_weight) == (0.3, 0.5)  # type: ignore[attr-defined]
    assert not gone.keys() & to_dict(config.routing).keys()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("fast", "chosen"), [(False, Precision.fp32), (True, Precision.bf16_master)])
def test_precision_is_what_the_device_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, fast: bool, chosen: Precision
) -> None:
    monkeypatch.setattr("elastic3d.training.stages.fast_bfloat16", lambda device: fast)
    for stage in (StageName.dit, StageName.sensitivity):
        config = stage_config(stage)()
        settle_precision(config)
        assert config.precision is chosen  # type: ignore[attr-defined]
    for given in (Precision.fp32, Precision.bf16_autocast):
        config.precision = given  # type: ignore[attr-defined]
        with warnings.catch_warnings(record=True) as caught:
            settle_precision(config)
        assert config.precision is given  # type: ignore[attr-defined]
        emulated = given is Precision.bf16_autocast and not fast
        assert [str(w.message).split(",")[0] for w in caught] == ["precision is bf16_autocast"] * emulated
    settle_precision(stage_config(StageName.export)())  # which has none


def test_packages_that_are_not_needed_are_not_warned_of() -> None:
    """transformers does when it is imported, as for `stage=export`, before the options are read."""
    quiet = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    command = [sys.executable, str(ROOT / "scripts/train.py"), "stage=export", "--help"]
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=True)
    assert "export.output" in done.stdout and not done.stderr


def test_a_broken_record_is_named() -> None:
    with pytest.raises(UserError, match="^a.json has no configuration of a training"):
        read_record(None, ExportStageConfig, "a.json")
    with pytest.raises(UserError, match="^a.json: steps is 0, expected a value from 1"):
        read_record({"stage": "vae", "steps": 0}, stage_config(StageName.vae), "a.json")
