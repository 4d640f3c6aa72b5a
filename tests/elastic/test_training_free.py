"""The policy of models without routers: forecast and plan, by oracles; on stock pipelines, one line on and off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic3d import disable, enable
from elastic3d.benchmark.config import PolicyName
from elastic3d.benchmark.rivals import policy_named
from elastic3d.elastic import attach, session_of
from elastic3d.elastic.config import ElasticConfig, RouterConfig
from elastic3d.elastic.trace import trace_share
from elastic3d.elastic.training_free import (
    CALIBRATION_NAME,
    Calibration,
    StepPolicy,
    check_budget,
    early_steps,
    planned_steps,
    put_policy,
)
from elastic3d.errors import UserError
from elastic3d.pipelines.calibration import Notes, calibrate, recorded
from elastic3d.pipelines.training_free import describe, load_calibration, save_calibration, series_of
from tests.elastic.test_diffusers_routing import flux, flux_pipeline, image_to_image, qwen_pipeline

STEPS = 8


def lines(times: np.ndarray, count: int = 40) -> np.ndarray:
    """Values (S,d) of random lines over time."""
    rng = np.random.default_rng(0)
    return rng.normal(size=count) + times[:, None] * rng.normal(size=count)


def calibration_of(values: np.ndarray, times: np.ndarray) -> Calibration:
    moment = values @ values.T
    return Calibration(times, {(0, 0): moment}, moment, np.ones(len(times)))


def qwen(
    pipe: Any, seeds: tuple[int, ...] = (0, 1), steps: int = STEPS, true_cfg: float = 3.0
) -> torch.Tensor:
    torch.manual_seed(1)
    mask = torch.ones(2, 5, dtype=torch.long)
    embeds, negative = torch.randn(2, 5, 6)[list(seeds)], torch.randn(2, 3, 6)[list(seeds)]
    mask = mask[: len(seeds)]
    return pipe(
        prompt_embeds=embeds, prompt_embeds_mask=mask, negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=mask[:, :3], true_cfg_scale=true_cfg, height=48, width=48,
        num_inference_steps=steps, generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip


def flux_guided(pipe: Any, seeds: tuple[int, ...] = (0, 1), steps: int = STEPS) -> torch.Tensor:
    return flux(pipe, seeds, true_cfg=3.0, steps=steps)


PIPELINES = pytest.mark.parametrize(
    ("build", "run", "branches"),
    [
        (flux_pipeline, lambda pipe, seeds=(0, 1), steps=STEPS: flux(pipe, seeds, steps=steps), 1),
        (flux_pipeline, flux_guided, 2),
        (qwen_pipeline, qwen, 2),
    ],
    ids=["flux", "flux with true guidance", "qwen"],
)

# -------------------------------------------------------------------------------------------- forecast and plan


@pytest.mark.parametrize(("older", "newest", "step"), [(0, 1, 2), (2, 5, 9), (3, 4, 8)])
def test_a_linear_series_is_continued_exactly(older: int, newest: int, step: int) -> None:
    times = np.linspace(0, 0.9, 10)
    values = lines(times)
    found = calibration_of(values, times).weights(0, 0, step, newest, older)
    np.testing.assert_allclose(found[0] * values[newest] + found[1] * values[older], values[step], atol=1e-3)


def test_other_steps_are_interpolated_and_lines_stay_lines() -> None:
    times = np.linspace(0, 0.9, 10)
    calibration = calibration_of(lines(times), times)
    assert calibration.at(times.tolist()) is calibration
    finer = np.linspace(0, 0.9, 16)
    here, values = calibration.at(finer.tolist()), lines(finer)
    np.testing.assert_allclose(here.moments[0, 0], values @ values.T, rtol=1e-6, atol=1e-6)
    newest, older = here.weights(0, 0, 12, 7, 4)
    np.testing.assert_allclose(newest * values[7] + older * values[4], values[12], atol=1e-3)


def test_what_differs_from_step_to_step_costs_its_error() -> None:
    """Steps that nothing predicts: their whole moment is lost, times the squared step size."""
    times = np.array([0.0, 0.2, 0.5, 0.6])
    calibration = Calibration(times, {(0, 0): np.eye(4)}, 3 * np.eye(4), np.ones(4))
    errors = calibration.errors
    assert errors[0, 1, 2] == errors[0, 0, 2] == pytest.approx(3 * 0.1**2, rel=1e-5)
    assert errors[0, 1, 3] == pytest.approx(3 * 0.4**2, rel=1e-5) and errors[1, 0].max() == 0


@pytest.mark.parametrize("count", range(1, 8))
def test_the_plan_is_the_best_of_all(count: int) -> None:
    steps = 7
    errors = np.random.default_rng(count).random((steps, steps, steps))
    errors *= np.arange(steps) > np.arange(steps)[:, None]  # of what comes after the last computed step

    def cost(chosen: tuple[int, ...]) -> float:
        total = 0.0
        for step in set(range(steps)) - set(chosen):
            before = [each for each in chosen if each < step][-2:]
            total += errors[before[0], before[-1], step]
        return total

    everyone = [(0, *rest) for rest in combinations(range(1, steps), count - 1)]
    found = planned_steps(errors, count)
    assert len(found) == count and cost(found) == pytest.approx(min(map(cost, everyone)))


def test_early_steps() -> None:
    assert early_steps(10, 4) == (0, 2, 5, 9) and early_steps(5, 1) == (0,)
    assert early_steps(25, 12) == (0, 1, 2, 3, 5, 7, 10, 12, 15, 18, 21, 24)
    for steps in range(2, 60):
        for count in range(2, steps + 1):
            chosen = early_steps(steps, count)
            assert len(set(chosen)) == count and chosen == tuple(sorted(chosen))
            assert (chosen[0], chosen[-1]) == (0, steps - 1)


@pytest.mark.parametrize(("steps", "schedule"), [(10, "planned"), (6, "planned"), (16, "early")])
def test_a_plan_is_for_no_more_steps_than_were_calibrated(steps: int, schedule: str) -> None:
    times = np.linspace(0, 0.9, 10)
    policy = StepPolicy(calibration_of(lines(times), times))
    forecast = policy.begin(steps, np.linspace(0, 0.9, steps).tolist(), [0.5])
    assert policy.about["schedule"] == schedule and forecast is not None
    chosen = {"planned": planned_steps(policy.calibration.at(policy._times).errors, steps // 2)}
    assert policy.chosen(steps // 2) == chosen.get(schedule, early_steps(steps, steps // 2))


def test_errors_are_found_where_a_plan_needs_them_alone() -> None:
    """(S,S,S) of 1,000 steps would take 8 GB."""
    times = np.linspace(0, 0.9, 10)
    policy = StepPolicy(calibration_of(lines(times), times))
    policy.begin(1000, np.linspace(0, 0.999, 1000).tolist(), [0.5])
    assert policy.schedule == "early" and "errors" not in vars(policy._here)


def test_budgets_that_a_policy_covers() -> None:
    assert [check_budget(budget, 25) for budget in (1.0, 0.5, 0.35, 0.3)] == [25, 12, 9, 8]
    for budget, steps, told in (
        (0.2, 25, "budget is 0.2, expected a value from 0.3 to 1"),
        (0.3, 4, "budget is 0.3, expected at least 0.38 in 4 steps"),
        (0.9, 1, "budget is 0.9, expected at least 1.00 in 1 steps"),
    ):
        with pytest.raises(UserError, match=told):
            check_budget(budget, steps)


# -------------------------------------------------------------------------------------------- stock pipelines


@PIPELINES
def test_one_line_on_and_one_line_off(build: Callable, run: Callable, branches: int) -> None:
    pipe = build()
    dense, keys = run(pipe), list(pipe.transformer.state_dict())
    session = enable(pipe, budget=0.5)
    both = run(pipe)
    assert trace_share(session.trace).tolist() == pytest.approx([0.5, 0.5], abs=0.03)
    ran = session.trace.actions == 1
    assert ran[:, :branches].any(-1).sum() == STEPS // 2 * 2 * branches
    assert (ran[:, 0] == ran[:, branches - 1]).all()  # both branches at the same steps
    assert not torch.equal(both, dense) and torch.equal(run(pipe), both)  # reset between calls
    for seed in (0, 1):
        torch.testing.assert_close(run(pipe, (seed,))[0], both[seed], rtol=1e-3, atol=1e-4)
    enable(pipe, budget=1.0)
    assert torch.equal(run(pipe), dense)
    disable(pipe)
    assert torch.equal(run(pipe), dense) and list(pipe.transformer.state_dict()) == keys
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks
    with pytest.raises(ValueError, match="has no routers"):
        disable(pipe)


def test_another_budget_leaves_pipelines_that_share_the_transformer_followed() -> None:
    first = flux_pipeline()
    parts = dict(first.components)
    parts["scheduler"] = type(first.scheduler).from_config(first.scheduler.config)
    other = type(first)(**parts)
    session = enable(first, budget=0.5)
    attach(other)
    for changed, budget in ((first, 0.75), (other, 1.0)):
        assert enable(changed, budget=budget) is session
        for pipe in (other, first):
            flux(pipe, (0,), steps=STEPS)
            assert trace_share(session.trace).tolist() == pytest.approx([budget], abs=1e-6)
    disable(other)
    with pytest.raises(ValueError, match="has no routers"):
        disable(first)


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 28), (0.6, 17), (0.4, 12)])
def test_an_image_to_start_from_leaves_the_budget_to_the_steps_that_run(strength: float, steps: int) -> None:
    pipe, run = image_to_image(28)
    session = enable(pipe, budget=0.5)
    first = run(0, strength)
    assert session.trace is not None and session.trace.steps == steps
    assert trace_share(session.trace).tolist() == pytest.approx([round(steps / 2) / steps], abs=1e-6)
    assert torch.equal(run(0, strength), first)


@PIPELINES
def test_a_calibration_is_measured_kept_and_used(
    build: Callable, run: Callable, branches: int, tmp_path: Path
) -> None:
    pipe = build()
    dense = run(pipe)
    found = calibrate(pipe.transformer, lambda number: run(pipe, (number,)), 2, guidance=3.0)
    assert torch.equal(run(pipe), dense)
    assert found.times.shape == (STEPS,) and found.times[0] < 0.01 and (np.diff(found.times) > 0).all()
    for moment in found.moments.values():
        assert np.linalg.eigvalsh(moment).min() > -1e-6 * np.trace(moment)
    save_calibration(found, tmp_path / CALIBRATION_NAME)
    again = load_calibration(tmp_path / CALIBRATION_NAME, pipe.transformer)
    assert again.about["samples"] == 2 and again.moments.keys() == found.moments.keys()
    latents = {}
    for name in PolicyName:
        session = enable(pipe, 0.5, tmp_path)
        session.source = policy_named(name, again)
        latents[name] = run(pipe)
        shares = trace_share(session.trace)
        slack = 0.2 if name is PolicyName.online else 0.03
        assert shares.tolist() == pytest.approx([0.5, 0.5], abs=slack)
        for seed in (0, 1):
            torch.testing.assert_close(run(pipe, (seed,))[0], latents[name][seed], rtol=1e-3, atol=1e-4)
    run(pipe, steps=STEPS + 3)  # other steps than were calibrated
    disable(pipe)


def test_moments_are_those_of_what_the_blocks_add() -> None:
    """By hand: the difference of the hidden states before the first and after the last double block."""
    pipe = flux_pipeline()
    block, seen = pipe.transformer.transformer_blocks[0], []
    inner = block.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        text, image = inner(*args, **kwargs)
        seen.append((image - kwargs["hidden_states"]).flatten(1))
        return text, image

    block.forward = watched
    with recorded(pipe.transformer) as notes:
        flux(pipe, steps=4)
    values = torch.stack(seen).double()
    expected = torch.einsum("sbd,tbd->st", values, values) / 2
    np.testing.assert_allclose(notes.moments()[0, 0], expected.numpy(), rtol=1e-4)


def test_times_are_the_scheduler_s_where_bf16_makes_two_of_them_equal() -> None:
    """For a calibration, and for routers."""
    pipe, steps, seen = flux_pipeline(), 30, list[float]()
    pipe.scheduler = type(pipe.scheduler)(shift=30.0)
    pipe.transformer.to(torch.bfloat16)

    def run(number: int) -> torch.Tensor:
        return flux(pipe, (number,), steps=steps, dtype=torch.bfloat16)

    handle = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["timestep"].item()), with_kwargs=True
    )
    found = calibrate(pipe.transformer, run, 1, scheduler=pipe.scheduler)
    handle.remove()
    expected = [1 - time / 1000 for time in pipe.scheduler.timesteps.tolist()]
    assert found.times.tolist() == expected and len(set(seen)) < len(seen) == steps
    session = attach(pipe, RouterConfig())
    assert session.conditioner is not None
    seen.clear()
    session.conditioner.register_forward_hook(lambda _, args, out: seen.append(args[0].item()))
    run(0)
    assert seen == torch.tensor(expected).tolist()


def test_what_is_recorded_leaves_settings_as_they_were() -> None:
    """Those of before come back; those that a generation brings along are not written to."""
    pipe, brought = flux_pipeline(), ElasticConfig(elastic=False)
    session = put_policy(pipe)
    session.settings = before = ElasticConfig(budget=0.5)
    with recorded(pipe.transformer):
        session.settings = brought
    assert session.settings is before and before.elastic and not brought.elastic


def test_the_result_is_what_guidance_makes_of_both_branches() -> None:
    """Streams that do not become the result count nothing; branches in one pass or in two are the same."""
    generator = torch.Generator().manual_seed(0)
    lists = {series: torch.randn(STEPS, 2, 6, generator=generator) for series in [(0, 0), (0, 1), (2, 0)]}
    together, apart = Notes(), Notes()
    for step in range(STEPS):
        rows = {series: values[step] for series, values in lists.items()}
        together.note(step / STEPS, rows, torch.zeros(1))
        for branch in range(2):
            one = {series: values[branch : branch + 1] for series, values in rows.items()}
            apart.note(step / STEPS, one, torch.zeros(1))
    guided = [
        3 * lists[series][:, 0].numpy() - 2 * lists[series][:, 1].numpy() for series in [(0, 0), (2, 0)]
    ]
    expected = sum(values @ values.T for values in guided)
    for notes in (together, apart):
        np.testing.assert_allclose(notes.result(3.0), expected, rtol=1e-5)


def test_no_other_weights_have_a_smaller_error() -> None:
    """Along the generations of the calibration: of a constant, lines with any damping, and random weights."""
    pipe = flux_pipeline()
    found = calibrate(pipe.transformer, lambda number: flux(pipe, (number,), steps=6), 2)
    rng, known, step = np.random.default_rng(0), [1, 3], 4
    for moment in found.moments.values():
        best = found.forecasts(moment, known)[1][step]
        others = [(0.0, 1.0), *((-d / 2, 1 + d / 2) for d in (0.3, 0.7, 1.0)), *rng.normal(size=(20, 2))]
        for weights in others:
            w = np.array(weights)
            lost = moment[step, step] - 2 * w @ moment[known, step] + w @ moment[np.ix_(known, known)] @ w
            assert best <= lost * (1 + 1e-3)


def test_what_is_wrong_is_one_sentence(tmp_path: Path) -> None:
    pipe = flux_pipeline()
    times = np.linspace(0, 0.9, 4)
    about = {"model": describe(pipe.transformer), "samples": 1}
    moments = dict.fromkeys(series_of(pipe.transformer), np.eye(4))
    good = Calibration(times, moments, np.eye(4), np.ones(4), about)
    path = tmp_path / CALIBRATION_NAME
    for changed, told in (
        ({"about": {**about, "model": {"family": "ShapeDiT"}}}, "is of another model: .*ShapeDiT"),
        ({"times": times[:0]}, "is empty, expected at least two steps"),
        ({"moments": {}}, "is empty, expected at least two steps"),
        ({"times": times[::-1]}, "expected ascending ones"),
        ({"moments": {(0, 0): np.eye(3)}}, "moments has no 4 x 4 numbers"),
        ({"moments": {(0, 0): np.eye(4)}}, r"has moments of \[\(0, 0\)\], expected \[\(0, 0\), \(0, 1\)"),
        ({"result": np.eye(3)}, "result has no 4 x 4 numbers"),
        ({"changes": np.ones(2)}, "changes has 2 values, expected 4"),
    ):
        save_calibration(replace(good, **changed), path)
        with pytest.raises(UserError, match=told):
            enable(pipe, 0.5, tmp_path)
    path.write_text('{"times": [')
    with pytest.raises(UserError, match=CALIBRATION_NAME):
        enable(pipe, 0.5, path)
    with pytest.raises(UserError, match="there is no calibration .*: write one with elastic3d calibrate"):
        enable(pipe, 0.5, tmp_path / "gone")
    with pytest.raises(ValueError, match="budget"):
        enable(pipe, 0.1)
    assert "_elastic" not in vars(pipe.transformer)
    enable(pipe, 0.3)
    with pytest.raises(UserError, match="budget is 0.3, expected at least 0.38 in 4 steps"):
        flux(pipe, steps=4)
    with pytest.raises(UserError, match="a generation has 2 steps, expected at least 3"):
        calibrate(pipe.transformer, lambda number: flux(pipe, (number,), steps=2), 1)
    disable(pipe)
    attach(pipe, RouterConfig())
    with pytest.raises(ValueError, match="the pipeline has routers, which take a budget"):
        enable(pipe, 0.5)
    assert session_of(pipe.transformer).router_config == RouterConfig()
