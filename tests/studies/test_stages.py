import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_pipeline import image, tiny_pipeline

from elastic3d.errors import UserError
from elastic3d.studies import stage_worker, stages
from elastic3d.studies.config import StagesConfig
from elastic3d.studies.stages import HERE, OTHER, measure_stages, printed, table


def test_ratios_are_taken_within_a_round():
    rounds = [
        {HERE: {"decode": [10.0, 20.0, 30.0]}, OTHER: {"decode": [40.0]}},
        {HERE: {"decode": [100.0]}, OTHER: {"decode": [300.0, 100.0, 500.0]}},
        {HERE: {"decode": [1.0]}, OTHER: {"decode": [9.0]}},
    ]
    (row,) = table(rounds)
    assert row["ratio"] == 3.0, "the median of 2, 3 and 9"
    assert row[HERE] == {"median": 20.0, "least": 1.0, "most": 100.0}
    assert printed([row]).splitlines()[2] == "| decode | 100 (9 to 500) | 20 (1 to 100) | 3.0 |"
    alone = table([{HERE: {"decode": [1.0]}}])
    assert "ratio" not in alone[0] and printed(alone).splitlines()[0] == "|  | this |"


def test_a_fresh_process_times_every_stage(tmp_path: Path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    image().save(tmp_path / "image.png")
    config = StagesConfig(
        image=tmp_path / "image.png", model=tmp_path / "model", output=tmp_path / "stages.json",
        rounds=1, repeats=2, commands=False, resolution=16, elastic=False, threads=1, cpu=True, batch=2,
    )  # fmt: skip
    found = measure_stages(config)
    rows = {row["row"]: row[HERE]["median"] for row in found["table"]}
    stages = ["condition", "dit", "decode", "surface", "cleanup", "write"]
    assert all(rows[f"warm, {stage}"] > 0 and rows[f"first mesh, {stage}"] > 0 for stage in stages)
    each = "batch of 2, a mesh"
    assert rows[f"{each}, total"] > max(rows[f"{each}, {stage}"] for stage in stages)
    assert rows["import"] > 0 and rows["load"] > 0 and rows["peak memory, MB"] > 50
    assert sum(rows[f"first mesh, {stage}"] for stage in stages) <= rows["first mesh, total"] + 1
    assert json.loads(config.output.read_text())["table"] == found["table"]


def test_a_bundled_model_is_found_by_its_name_and_cpu_is_for_the_commands_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commands, run = [], stages._run

    def noted(arguments, *more):
        commands.append(arguments)
        return ("", 1.0) if Path(arguments[0]).name == "gen_mesh.py" else run(arguments, *more)

    monkeypatch.setattr(stages, "_run", noted)
    image().save(tmp_path / "image.png")
    config = StagesConfig(
        image=tmp_path / "image.png", model=Path("shape-small"), output=tmp_path / "stages.json",
        rounds=1, repeats=1, resolution=16, threads=1, cpu=True,
    )  # fmt: skip
    measure_stages(config)
    assert "device=cpu" in commands[-1] and any(
        text.endswith("pretrained/shape-small") for text in commands[-1]
    )


def test_options_that_do_not_go_together():
    with pytest.raises(ValueError, match="cpu is true and threads is 0, expected threads=1"):
        StagesConfig(cpu=True)


def test_a_folder_that_is_no_checkout_is_told(tmp_path: Path):
    with pytest.raises(UserError, match="expected the root of a checkout"):
        measure_stages(StagesConfig(against=tmp_path, output=tmp_path / "stages.json"))


def test_the_worker_imports_nothing_but_the_standard_library_before_its_clock():
    code = f"import runpy, sys; runpy.run_path({stage_worker.__file__!r}, run_name='x'); print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
    )
