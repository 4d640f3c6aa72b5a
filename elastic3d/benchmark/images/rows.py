"""From pictures, scores and times to the rows of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from elastic3d.benchmark.images.place import ImagePlace
from elastic3d.benchmark.images.references import References, category_accuracy
from elastic3d.benchmark.images.scores import ANCHORS, METRICS, SAME_STEPS, Scores
from elastic3d.benchmark.methods import FAMILY, Case, Run
from elastic3d.benchmark.options import Method
from elastic3d.benchmark.rows import as_trained, batches_of, compute_of, opponents, sample_means, times_of
from elastic3d.benchmark.timing import Round
from elastic3d.evaluation.fidelity import Rival, compare_metric
from elastic3d.evaluation.items import Row
from elastic3d.evaluation.sets import frechet_distance, kernel_distance
from elastic3d.evaluation.statistics import bootstrap_mean

FEWER = (Method.dense.value, Method.fewer_steps.value)
EQUAL_TIME = 1.02  # a rival is compared with the elastic row that takes at most so much of its time


def build_rows(
    place: ImagePlace,
    cases: Sequence[Case],
    scores: Scores,
    rounds: Sequence[Round],
    references: References | None,
) -> list[Row]:
    """A row for each case and batch size. What was not measured is None."""
    floors = {
        f"{metric}_{anchor}_floor": _mean(sample_means(scores.floors.get(anchor, []), metric))
        for anchor in ANCHORS
        for metric in METRICS
    }
    rows, known = [], dict[str, dict[str, Any]]()
    for case in cases:
        run = case.run
        if run.name not in known:
            known[run.name] = _fidelity(place, run, scores) | _realism(place, run, scores, references)
        compute = compute_of(place, run)
        compute = {"pictures" if name == "meshes" else name: value for name, value in compute.items()}
        for batch in batches_of(case, place.config.batches):
            head = {
                "method": case.method,
                "note": case.note,
                "budget": case.budget,
                "steps": run.steps,
                "batch": batch,
                "as_trained": as_trained(place, case),
            }
            times = times_of(place, run, rounds, batch, compute)
            if run.foreign is not None:  # it leaves no trace in the timed rounds
                speedup, share = times["dit_speedup_same_steps"], compute["executed_flops_ratio"]
                times["efficiency"] = None if speedup is None or share is None else speedup * share
                if share is None:
                    times |= dict.fromkeys(
                        ("executed_flops_ratio", "flops_ratio_to_baseline", "flop_speedup")
                    )
            rows.append(head | compute | times | known[run.name] | floors | {"run": run.name})
    return rows


def _fidelity(place: ImagePlace, run: Run, scores: Scores) -> dict[str, Any]:
    """Mean scores against both anchors, with an interval over prompts for the feature distance."""
    found: dict[str, Any] = {}
    for anchor in ANCHORS:
        rows = scores.rows.get((run.name, anchor), [])
        for metric in METRICS:
            found[f"{metric}_{anchor}"] = _mean(sample_means(rows, metric))
        values = sample_means(rows, "feature")
        interval = bootstrap_mean(values, place.config.bootstrap) if values else None
        found[f"feature_{anchor}_low"] = interval.low if interval else None
        found[f"feature_{anchor}_high"] = interval.high if interval else None
    return found


def _realism(
    place: ImagePlace, run: Run, scores: Scores, references: References | None
) -> dict[str, float | None]:
    """Distances to held-out renders, and whether a classifier finds what the prompt names."""
    features = scores.pooled.get(run.name)
    found: dict[str, float | None] = {"frechet": None, "kernel": None, "category_accuracy": None}
    if features is not None and references is not None:
        if len(features) > 1:
            found["frechet"] = frechet_distance(features, references.features)
            found["kernel"] = kernel_distance(features, references.features)
        prompts = place.prompts * len(place.config.seeds)
        found["category_accuracy"] = category_accuracy(references.probe, features, prompts)
    return found


def compare_rivals(
    place: ImagePlace, cases: Sequence[Case], scores: Scores, rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """The routers beside controls of the same FLOPs, and beside every rival at equal time, prompt by prompt.

    At equal time: the slowest elastic row of the smallest batch that takes no longer than the rival (2 % tolerance).
    """
    found = []
    for rival in cases:
        if rival.run.donor is not None:
            pairs = [(case, "equal FLOPs") for case in opponents(rival, cases)]
        elif rival.method in FAMILY or rival.method == Method.dense.value:
            continue
        else:
            pairs = [(case, "equal time") for case in _as_fast(rival, cases, rows)]
        for case, matched in pairs:
            for anchor in ANCHORS:
                for metric in METRICS:
                    sides = [scores.rows.get((run.name, anchor), []) for run in (case.run, rival.run)]
                    compared = compare_metric(
                        metric, sides[0], [sides[1]], Rival.baseline, place.config.bootstrap
                    )
                    if compared is not None:
                        asked = {"budget": case.budget, "steps": case.run.steps, "matched": matched}
                        who = {"routers": case.method, "rival_method": rival.method}
                        which = {"rival_run": rival.run.name, "rival_note": rival.note, "against": anchor}
                        found.append(who | which | asked | compared.as_dict())
    return found


def _as_fast(rival: Case, cases: Sequence[Case], rows: Sequence[Row]) -> list[Case]:
    smallest = min((row["batch"] for row in rows), default=None)
    times = {row["run"]: row["dit_ms_median"] for row in rows if row["batch"] == smallest}
    limit = times.get(rival.run.name)
    fast = [
        case
        for case in cases
        if limit is not None and case.method in FAMILY and times.get(case.run.name) is not None
        if times[case.run.name] <= EQUAL_TIME * limit
    ]
    return [max(fast, key=lambda case: times[case.run.name])] if fast else []


def within_floor(row: Row, anchor: str = SAME_STEPS) -> bool | None:
    """Whether a row is nearer to the dense pictures than another seed of them is, by all three scores."""
    pairs = [(row[f"{m}_{anchor}"], row[f"{m}_{anchor}_floor"], m == "feature") for m in METRICS]
    pairs = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
    if not pairs:
        return None
    return all(value < floor if lower else value > floor for value, floor, lower in pairs)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
