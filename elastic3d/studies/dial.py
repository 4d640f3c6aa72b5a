"""The dial of a model from its benchmark: the rows that no cheaper or equally cheap one beats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from elastic3d.checkpoints.folders import INDEX_NAME
from elastic3d.diffusion.dial import (
    IMAGES,
    MESHES,
    Dial,
    Kind,
    Routers,
    Row,
    check_dial,
    named_row,
    parse_dial,
    save_dial,
)
from elastic3d.diffusion.options import PipelineConfig, Quality
from elastic3d.diffusion.sampler import moves
from elastic3d.elastic.few_step import coarseness
from elastic3d.errors import UserError
from elastic3d.pipelines.image_to_3d import ImageTo3DPipeline
from elastic3d.pipelines.runtime import find_model
from elastic3d.pipelines.text_to_image import TextToImagePipeline
from elastic3d.studies.config import DialConfig
from elastic3d.utils.files import Maybe, Number, check_shape, load_json, printable
from elastic3d.utils.old_names import todays_results

FEWER, LORA, ROUTERS = ("dense", "fewer_steps"), "few_step_lora", "elastic"  # methods of a call
PLAN = "training_free", "planned"  # method and note of what keeps a budget without routers
_COST, _SPEEDUP = "flops_ratio_to_baseline", "dit_speedup"
_COLUMNS = {
    "iou": "iou_paired",
    "psnr": "psnr_dense",
    "ssim": "ssim_dense",
}  # of a benchmark, where not of that name
_MEASURED = Maybe(Number(low=-1e9, high=1e9))
SHAPE = {
    "about": {
        "date": str,
        "machine": {"processor": str, "cores": int},
        "models": {"model": Maybe(str)},
        "baseline_steps": Number(1, 1000, whole=True),
        "config": {"seeds": [int], "guidance": Maybe(Number(0, 100))},
    },
    "rows": [
        {
            "method": str,
            "note": str,
            "budget": Maybe(Number(0, 1)),
            "steps": Number(1, 1000, whole=True),
            "batch": Number(1, 4096, whole=True),
            "as_trained": bool,
            _COST: _MEASURED,
            _SPEEDUP: _MEASURED,
        }
    ],
}


def make_dial(config: DialConfig) -> Dial:
    """Write `dial.json` beside the weights, of a model of meshes or of the small one of images.

    Raises:
        UserError: results of another model, or without what a dial needs.
    """
    folder = find_model(config.model)
    pipeline: ImageTo3DPipeline | TextToImagePipeline
    if (folder / INDEX_NAME).is_file():  # of a pipeline of diffusers
        pipeline = TextToImagePipeline.from_pretrained(folder, device="cpu", dtype="float32", dial=False)
        steps, guidance = pipeline.backbone.default_sampling()
        model, kind = PipelineConfig(steps=steps, guidance=guidance), IMAGES
    else:
        pipeline = ImageTo3DPipeline.from_pretrained(folder, "cpu", "float32", dial=False)
        model, kind = pipeline.config, MESHES
    report, source = load_json(config.results, SHAPE), printable(config.results)
    measured = report["about"]["models"]["model"]
    if measured != pipeline.weights_sha256:
        raise UserError(
            f"{source} has measured the weights {measured}, expected {pipeline.weights_sha256}, those of {config.model}"
        )
    routers = None if pipeline.session is None else pipeline.session.router_config
    dial = parse_dial(dial_values(report, model, routers, source, kind), source, kind)
    check_dial(dial, folder, model, routers)
    save_dial(dial, folder)
    return dial


def dial_values(
    report: Mapping[str, Any], model: PipelineConfig, routers: Routers, source: str, kind: Kind = MESHES
) -> dict[str, Any]:
    """What `dial.json` holds, of a benchmark's results.

    Of all settings that a call can ask for, those stay that have a higher fidelity than every cheaper one and are at
    least as fast as every dearer one. Costs are rounded to 0.01: what routers execute differs more between samples.

    Raises:
        UserError: naming `source`: results at another guidance or number of steps, or with nothing to choose from.
    """
    about = report["about"]
    guidance = about["config"]["guidance"]
    if about["baseline_steps"] != model.steps or guidance not in (None, model.guidance):
        raise UserError(
            f"{source} has a dense model in {about['baseline_steps']} steps at guidance {guidance}, expected the"
            f" model's default: {model.steps} steps at guidance {model.guidance:g}"
        )
    names = (kind.fidelity, *kind.scores)
    for number, row in enumerate(report["rows"]):
        check_shape(row, {_column(name): _MEASURED for name in names}, f"{source}: rows[{number}]")
    entries = _entries(report["rows"], model, routers, kind)
    dense = [e for e in entries if e["router_budget"] is None and e["steps"] == model.steps]
    if not dense:
        raise UserError(f"{source} has no dense row in {model.steps} steps with {', '.join(names)} and times")
    rows, noun = frontier(entries, kind.fidelity), "images" if kind is MESHES else "prompts"
    values: dict[str, Any] = {
        "dense": {"steps": model.steps, "guidance": model.guidance, **{n: dense[0][n] for n in kind.scores}},
        "names": {},
        "rows": rows,
        "measured": {
            "results": source,
            "date": about["date"],
            "processor": about["machine"]["processor"],
            "cores": about["machine"]["cores"],
            noun: todays_results(about).get(noun),
            "seeds": len(about["config"]["seeds"]),
            "weights_sha256": about["models"]["model"],
        },
    }
    scores = [values["dense"][name] for name in kind.scores]
    typed = [Row.of(row, kind) for row in rows]
    named = {quality.name: named_row(typed, quality, scores) for quality in Quality}
    values["names"] = {name: row.cost for name, row in named.items() if row is not None}
    return values


def frontier(entries: Iterable[dict[str, Any]], fidelity: str = "iou") -> list[dict[str, Any]]:
    """Those with a higher fidelity than all that cost no more, and no slower than any dearer one; the cheapest
    first."""
    better: list[dict[str, Any]] = []
    for entry in sorted(entries, key=lambda e: (e["cost"], -e[fidelity])):
        if not better or entry[fidelity] > better[-1][fidelity]:
            better.append(entry)
    kept: list[dict[str, Any]] = []
    for entry in reversed(better):
        if not kept or all(entry["speedup"][b] >= kept[-1]["speedup"][b] for b in kept[-1]["speedup"]):
            kept.append(entry)
    return kept[::-1]


def _entries(
    rows: Iterable[dict[str, Any]], model: PipelineConfig, routers: Routers, kind: Kind
) -> list[dict[str, Any]]:
    """The settings, as rows of a dial, that a call can ask for by steps, budget and `elastic=`, where all was
    measured."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    names = (kind.fidelity, *kind.scores)
    needed = [_COST, _SPEEDUP, *map(_column, names)]
    for row in rows:
        routed = row["method"] == ROUTERS and row["as_trained"] and row["budget"] is not None
        plan = kind.plans and (row["method"], row["note"]) == PLAN
        if plan or (not row["note"] and (routed or row["method"] in (*FEWER, LORA))):
            groups.setdefault((row["method"], row["budget"], row["steps"]), []).append(row)
    found = []
    for (method, requested, steps), group in groups.items():
        budget = None if method in FEWER else 1.0 if method == LORA else float(requested)
        lora, planned = False, method == PLAN[0]
        if budget is not None and routers is not None and not planned:
            lora = coarseness(routers, moves(model, steps), budget, model.guidance) is not None
        beyond = method == LORA and not lora  # a generation of more steps runs without it
        if beyond or any(row[name] is None for row in group for name in needed):
            continue
        first = group[0]
        found.append({
            "cost": round(first[_COST], 2), "steps": steps, "router_budget": budget, "few_step_lora": lora,
            **({"scope": routers.scope.name} if routers is not None and routers.trained_steps and lora else {}),
            **({"planned": True} if planned else {}),
            "speedup": {str(row["batch"]): round(row[_SPEEDUP], 4) for row in group},
            **{name: round(first[_column(name)], 4) for name in names},
        })  # fmt: skip
    return found


def _column(name: str) -> str:
    """The column of a benchmark's results that has a score of the dial."""
    return _COLUMNS.get(name, name)
