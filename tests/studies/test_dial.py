"""The dial of a benchmark's results: which settings stay, and that the bundled one is reproduced."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_dial import save_dialled
from tiny_pipeline import tiny_pipeline

from elastic3d.benchmark.config import MeshBenchmarkConfig
from elastic3d.benchmark.meshes import load_models
from elastic3d.diffusion.dial import Row, choose, parse_dial
from elastic3d.diffusion.options import PipelineConfig, Quality, SamplingGrid
from elastic3d.elastic.config import ElasticOptions, RouterConfig
from elastic3d.errors import UserError
from elastic3d.models.weights import find_weights
from elastic3d.pipelines import runtime
from elastic3d.studies.config import DialConfig
from elastic3d.studies.dial import dial_values, frontier, make_dial
from elastic3d.utils.files import file_sha256, load_json, save_json
from elastic3d.utils.options import from_dict

ROOT = Path(__file__).resolve().parents[2]
MODEL, REPORT = ROOT / "data/pretrained/shape-small", "reports/elastic-3d/results.json"


def test_what_stays_is_never_beaten() -> None:
    draw = random.Random(0)
    entries = [
        {
            "cost": draw.randint(1, 9) / 10,
            "iou": draw.random(),
            "speedup": {"1": draw.random(), "4": draw.random()},
        }
        for _ in range(60)
    ]
    kept = frontier(entries)
    assert kept and max(entries, key=lambda e: e["iou"]) in kept
    for entry in kept:
        assert all(e is entry or e["cost"] > entry["cost"] or e["iou"] <= entry["iou"] for e in entries)
        dearer = [e for e in kept if e["cost"] > entry["cost"]]
        assert all(entry["speedup"][b] >= e["speedup"][b] for e in dearer for b in ("1", "4"))


def _bundled() -> tuple[PipelineConfig, RouterConfig]:
    routers = load_json(MODEL / "routers/config.json")
    del routers["_class_name"]
    return from_dict(PipelineConfig, load_json(MODEL / "pipeline.json")), from_dict(RouterConfig, routers)


def test_the_bundled_dial_is_that_of_the_report_and_of_the_bundled_weights() -> None:
    found = load_json(MODEL / "dial.json")
    assert found == dial_values(load_json(ROOT / REPORT), *_bundled(), REPORT)
    files = [find_weights(MODEL / part) for part in ("vae", "dit", "routers")]
    assert found["measured"]["weights_sha256"] == file_sha256(*files), "measure anew: scripts/make_dial.py"


def test_the_default_of_the_bundled_dial_by_the_report_itself() -> None:
    rows = [r for r in load_json(ROOT / REPORT)["rows"] if r["batch"] == 1]
    dense = next(r for r in rows if r["method"] == "dense")
    dial = parse_dial(load_json(MODEL / "dial.json"), "dial.json")
    close = []
    for row in dial.rows:
        method = "training_free" if row.planned else "few_step_lora" if row.few_step_lora else "elastic"
        method = "dense" if row.router_budget is None else method
        of = [r for r in rows if (r["method"], r["steps"]) == (method, row.steps)]
        (measured,) = [r for r in of if row.few_step_lora or r["budget"] == (row.router_budget or 1)]
        assert row.cost == pytest.approx(measured["flops_ratio_to_baseline"], abs=0.005)
        scores = ("f_score@0.02", "f_score@0.05")
        if all(measured[name] >= 0.99 * dense[name] for name in scores):
            close.append((measured["dit_speedup"], row))
    assert dial.named(Quality.default) is max(close, key=lambda pair: pair[0])[1]


def _table(page: str, first: str, columns: tuple[int, ...]) -> dict[str, list[str]]:
    """Some cells of each row of the table whose first heading is `first`, by the row's first cell."""
    table = (ROOT / page).read_text().partition(f"| {first} |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: [row[i] for i in columns] for row in rows}


def _says(cells: list[str], row: Row) -> bool:
    """Whether cells are a row's speed-ups of 1 and 4 images, IoU and F-scores, rounded."""
    values = (row.speedup["1"], row.speedup["4"], row.fidelity, *row.scores)
    pairs = zip(cells, values, strict=True)
    return all(abs(float(c) - value) <= 0.51 * 10 ** -len(c.partition(".")[2]) for c, value in pairs)


def test_the_tables_of_the_pages_are_the_bundled_dial() -> None:
    dial = parse_dial(load_json(MODEL / "dial.json"), "dial.json")
    report = _table("reports/elastic-3d/README.md", "cost", (4, 5, 8, 9, 10))
    assert list(report) == [f"{row.cost:.2f}" for row in dial.rows]
    assert all(_says(*pair) for pair in zip(report.values(), dial.rows, strict=True))
    readme = _table("README.md", "setting", (1, 2, 3, 4, 5))
    assert len(readme) == 4
    for setting, cells in readme.items():
        option, value = setting.partition(":")[0].strip("`").split("=")
        row: Row | None = dial.rows[-1]  # elastic=false
        if option == "quality":
            row = dial.named(Quality[value])
        elif option == "budget":
            row = choose(dial, ElasticOptions(budget=float(value)), None, None, None)
        assert row is not None and _says(cells, row), setting


def test_other_results_are_refused(tmp_path: Path) -> None:
    report = load_json(ROOT / REPORT)
    model, routers = _bundled()
    with pytest.raises(
        UserError, match="r.json has a dense model in 25 steps at guidance None, expected .*: 30 steps"
    ):
        dial_values(report, PipelineConfig(steps=30, guidance=2.0), routers, "r.json")
    rows = [row for row in report["rows"] if row["method"] != "dense"]
    with pytest.raises(UserError, match="r.json has no dense row in 25 steps"):
        dial_values({**report, "rows": rows}, model, routers, "r.json")
    without = dial_values(report, model, None, "r.json")["rows"]
    assert not any(row["few_step_lora"] for row in without)
    folder = save_dialled(tmp_path / "model")
    before = (folder / "dial.json").read_bytes()
    (tmp_path / "r.json").write_text(json.dumps(report))
    measured = report["about"]["models"]["model"]
    with pytest.raises(UserError, match=f"r.json has measured the weights {measured[:8]}"):
        make_dial(DialConfig(model=folder, results=tmp_path / "r.json"))
    assert (folder / "dial.json").read_bytes() == before


def test_rows_of_the_few_step_lora_are_told_by_the_moves_of_the_sampler() -> None:
    """Where N steps are N - 1 moves, the LoRA is used in a step more."""
    report, (model, routers) = load_json(ROOT / REPORT), _bundled()
    routers = replace(routers, few_step_nfe=5.0, few_step_max_steps=5)
    for row in report["rows"]:
        row |= {"flops_ratio_to_baseline": row["steps"] / 1000, "dit_speedup": 1}
        row["iou_paired"] = row["steps"] / 1000
    with_lora = []
    for grid in (SamplingGrid.uniform, SamplingGrid.endpoint):
        rows = dial_values(report, replace(model, grid=grid), routers, "r.json")["rows"]
        with_lora.append(max(row["steps"] for row in rows if row["few_step_lora"]))
    assert with_lora == [5, 6]


def test_a_dial_that_does_not_fit_is_not_written(tmp_path: Path) -> None:
    """Planned rows need the calibration beside them."""
    shutil.copytree(MODEL, tmp_path / "own", ignore=shutil.ignore_patterns("training_free.json", "per_block"))
    before = (tmp_path / "own/dial.json").read_bytes()
    with pytest.raises(UserError, match="planned is true, but there is no training_free.json here"):
        make_dial(DialConfig(model=tmp_path / "own", results=ROOT / REPORT))
    assert (tmp_path / "own/dial.json").read_bytes() == before


def test_a_bundled_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dial goes beside its weights, and into no folder of that name in the current one."""
    monkeypatch.setattr(runtime, "_PACKAGE", tmp_path / "elastic3d")
    folder = tmp_path / "data" / "pretrained" / "mine"
    tiny_pipeline().save_pretrained(folder)
    save_json(load_json(folder / "pipeline.json") | {"steps": 25}, folder / "pipeline.json")
    report = load_json(ROOT / REPORT)
    report["about"]["models"]["model"] = file_sha256(
        *(find_weights(folder / part) for part in ("vae", "dit"))
    )
    report["rows"] = [
        row for row in report["rows"] if row["method"] != "training_free"
    ]  # it has no calibration
    save_json(report, tmp_path / "r.json")
    monkeypatch.chdir(tmp_path)
    assert make_dial(DialConfig(model="mine", results=tmp_path / "r.json"))
    assert (folder / "dial.json").is_file() and not (tmp_path / "mine").exists()


def test_a_benchmark_measures_without_the_dial(tmp_path: Path) -> None:
    folder = save_dialled(tmp_path / "model")
    config = MeshBenchmarkConfig(
        model=str(folder),
        images=tmp_path,
        output=tmp_path / "out",
        dense=str(folder),
        variants={"other": str(folder)},
    )
    loaded = load_models(config)
    assert set(loaded) >= {"model", "dense", "other"}
    assert all(model.pipeline.dial is None for model in loaded.values())
