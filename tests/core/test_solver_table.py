"""Samplers as tables of coefficients, and solvers learned from forward calls alone."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from tests.core.conftest import Recorded, crossed, normals, small_mixture, tuner_of
from timetuner_core import NoiseScheduleVP
from timetuner_core.clipping import Clipping, clips
from timetuner_core.evaluation.distances import teacher_l2
from timetuner_core.grids import make_timesteps, start_grids, start_grids_with_free_step
from timetuner_core.integrations.diffusers import TimeTunerScheduler
from timetuner_core.models.loading import load_builtin
from timetuner_core.models.schedulers import grid_of, read_scheduler_config
from timetuner_core.noise_schedule import NoiseSchedule, NoiseScheduleEDM, NoiseScheduleFlow
from timetuner_core.samplers import SAMPLERS, Sampler, initial_noise, sample
from timetuner_core.samplers.solver_table import SolverTable, solver_of
from timetuner_core.sampling.generate import Guidance, generate
from timetuner_core.sampling.rolling_batch import RollingBatch, Row
from timetuner_core.tuning import solver as tuning_solver
from timetuner_core.tuning.end_to_end import tune_end_to_end
from timetuner_core.tuning.levenberg import Candidate
from timetuner_core.tuning.problem import TuningProblem, TuningState
from timetuner_core.tuning.solver import run_candidates, sampler_of, tune_solver
from timetuner_core.tuning.solver_columns import Column, rows_per_sample, solver_columns

SCHEDULES: dict[str, NoiseSchedule] = {
    "vp": NoiseScheduleVP("linear"),
    "cosine": NoiseScheduleVP("cosine"),
    "flow": NoiseScheduleFlow(shift=3.0),
    "edm": NoiseScheduleEDM(),
    "zero snr": read_scheduler_config(
        {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    ).noise_schedule,
}
TABLES = [name for name, known in SAMPLERS.items() if not known.stochastic]
SEVERAL_CALLS = [name for name in TABLES if SAMPLERS[name].calls_per_step > 1]
LINEAR = SCHEDULES["vp"]


@crossed(sampler=TABLES, schedule=SCHEDULES, grid=["uniform", "log_snr"])
def test_a_samplers_table_samples_as_the_sampler_does(sampler: str, schedule: NoiseSchedule, grid: Any) -> None:
    model_fn = tuner_of(small_mixture(schedule), schedule).model_fn
    timesteps = make_timesteps(schedule, 6, grid)
    t_ratios = 1 - 0.01 * torch.arange(6, dtype=torch.float64)
    table = SolverTable.of_sampler(SAMPLERS[sampler], schedule, timesteps)
    x_T = schedule.starting_std(timesteps[0]) * normals(8, 2)
    own, by_table = (
        sample(known.step_fn(model_fn, schedule), x_T, timesteps, t_ratios)
        for known in (SAMPLERS[sampler], table.sampler(sampler))
    )
    # Where alpha is 0 at the start, DPM-Solver itself divides by 1e-8 or so.
    torch.testing.assert_close(by_table, own, atol=1e-7 if schedule.starts_without_signal else 1e-9, rtol=0)
    assert table.num_calls == SAMPLERS[sampler].network_calls(timesteps)


@pytest.mark.parametrize("sampler", TABLES)
def test_tables_of_several_grids_are_those_of_each(sampler: str) -> None:
    grids = torch.stack([make_timesteps(LINEAR, 5, name) for name in ("uniform", "quadratic", "log_snr")])
    together = SolverTable.of_sampler(SAMPLERS[sampler], LINEAR, grids)
    for k, grid in enumerate(grids):
        alone = SolverTable.of_sampler(SAMPLERS[sampler], LINEAR, grid)
        torch.testing.assert_close((together.a[k], together.b[k]), (alone.a, alone.b), atol=1e-10, rtol=0)
        assert (together.times is None) == (alone.times is None) == (sampler not in SEVERAL_CALLS)
        if together.times is not None:
            torch.testing.assert_close(together.times[k], alone.times, atol=1e-12, rtol=0)


def test_heuns_table_has_a_row_for_each_call_and_calls_twice_where_steps_meet() -> None:
    table = SolverTable.of_sampler(SAMPLERS["heun"], LINEAR, torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64))
    assert table.times is not None
    assert table.times.tolist() == [0.9, 0.5, 0.5, 0.2, 0.2]
    assert float(table.a[1]) == pytest.approx(1)


def test_a_sampler_that_makes_more_calls_than_it_tells_is_no_table() -> None:
    wrong = dataclasses.replace(SAMPLERS["heun"], calls_per_step=1)
    with pytest.raises(ValueError, match="'heun' makes 10 calls; accepted: 5, as its facts"):
        SolverTable.of_sampler(wrong, LINEAR, make_timesteps(LINEAR, 5))


@pytest.mark.parametrize("clipping", [Clipping(sample_range=0.3), Clipping(quantile=0.7, max_value=1.5)])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m"])
def test_a_table_clips_x0_as_the_sampler_does(sampler: str, clipping: Clipping) -> None:
    """DDIM keeps the predicted eps, for which its table has a column; elsewhere eps follows the clipped x0."""
    network = small_mixture(LINEAR)
    model_fn = dataclasses.replace(tuner_of(network, LINEAR).model_fn, clipping=clipping)
    timesteps = make_timesteps(LINEAR, 6)
    t_ratios = 1 - 0.01 * torch.arange(6, dtype=torch.float64)
    table = SolverTable.of_sampler(SAMPLERS[sampler], LINEAR, timesteps, clipping)
    assert (table.eps is not None) == (sampler == "ddim")
    table = SolverTable.from_dict(table.to_dict())
    x_T = 2 * normals(8, 2)
    own, by_table, unclipped = (
        sample(known.step_fn(fn, LINEAR), x_T, timesteps, t_ratios)
        for known, fn in (
            (SAMPLERS[sampler], model_fn),
            (table.sampler(sampler), model_fn),
            (SAMPLERS[sampler], dataclasses.replace(model_fn, clipping=None)),
        )
    )
    torch.testing.assert_close(by_table, own, atol=1e-9, rtol=0)
    if clips(sampler, clipping):
        assert not torch.allclose(own, unclipped, atol=1e-2)


def test_where_nothing_clips_a_column_for_eps_can_be_left_out() -> None:
    grid = make_timesteps(LINEAR, 5)
    clipped = SolverTable.of_sampler(SAMPLERS["ddim"], LINEAR, grid, Clipping(1.0))
    without = clipped.where_eps_follows(LINEAR.marginal_alpha(grid[:-1]), LINEAR.marginal_std(grid[:-1]))
    plain = SolverTable.of_sampler(SAMPLERS["ddim"], LINEAR, grid)
    assert without.eps is None
    torch.testing.assert_close((without.a, without.b), (plain.a, plain.b), atol=1e-12, rtol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_clipping_ddims_table_samples_as_diffusers_does(prediction_type: str) -> None:
    base: Any = DDIMScheduler(
        clip_sample=True, clip_sample_range=0.7, prediction_type=prediction_type, timestep_spacing="trailing"
    )
    base.set_timesteps(5)
    spec = read_scheduler_config(dict(base.config) | {"_class_name": "DDIMScheduler"})
    grid = grid_of(base, spec.noise_schedule, 5)
    assert grid is not None
    table = SolverTable.of_sampler(SAMPLERS["ddim"], spec.noise_schedule, grid, spec.clipping)
    learned = {"sampler": "ddim", "timesteps": grid.tolist(), "solver_table": table.to_dict()}
    ends = []
    for scheduler in (base, TimeTunerScheduler.from_schedule(base, learned)):
        x = normals(2, 1, 4, 4).float()
        for t in scheduler.timesteps:
            x = scheduler.step(2 * torch.tanh(x + t / 1000), t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(ends[1], ends[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in TABLES])
def test_a_sampler_that_is_no_table_is_refused(sampler: str) -> None:
    with pytest.raises(ValueError, match="accepted, as a table: one without noise"):
        SolverTable.of_sampler(SAMPLERS[sampler], LINEAR, make_timesteps(LINEAR, 5))
    table = SolverTable.of_sampler(SAMPLERS["ddim"], LINEAR, make_timesteps(LINEAR, 5))
    with pytest.raises(ValueError, match="accepted, as a table"):
        solver_of(sampler, table, make_timesteps(LINEAR, 5))


def test_a_table_goes_through_json_and_back() -> None:
    table = SolverTable.of_sampler(SAMPLERS["dpmpp_3m"], LINEAR, make_timesteps(LINEAR, 5))
    again = SolverTable.from_dict(table.to_dict())
    assert torch.equal(again.a, table.a)
    assert torch.equal(again.b, table.b)


@pytest.mark.parametrize(
    ("spoil", "accepted"),
    [
        (lambda table: table["b"].pop(), "accepted: 1 to 5, one per step"),
        (lambda table: table["b"][2].pop(), "accepted: 1 to 5, one per step"),
        (lambda table: table["a"].__setitem__(0, float("nan")), "accepted: finite ones"),
        (lambda table: table.update(eps=[0.1]), "1 numbers as eps; accepted: 5, one per row"),
    ],
)
def test_a_broken_table_is_refused(spoil: Any, accepted: str) -> None:
    table = SolverTable.of_sampler(SAMPLERS["ddim"], LINEAR, make_timesteps(LINEAR, 5)).to_dict()
    spoil(table)
    with pytest.raises(ValueError, match=accepted):
        SolverTable.from_dict(table)


def test_a_table_of_another_number_of_steps_is_refused() -> None:
    table = SolverTable.of_sampler(SAMPLERS["ddim"], LINEAR, make_timesteps(LINEAR, 5))
    with pytest.raises(ValueError, match="solver_table has 5 rows; accepted: 4"):
        solver_of("ddim", table, make_timesteps(LINEAR, 4))


@pytest.mark.parametrize("times", [None, [0.9, 0.5, 0.4, 0.2, 0.2], [0.9, 0.5, 0.5, 0.2, 0.1]])
def test_a_table_with_other_times_than_the_grids_is_refused(times: list[float] | None) -> None:
    grid = torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64)
    table = SolverTable.from_dict(SolverTable.of_sampler(SAMPLERS["heun"], LINEAR, grid).to_dict() | {"times": times})
    with pytest.raises(ValueError, match="other times; accepted: one per network call"):
        solver_of("heun", table, grid)


# A solver wherever schedules are sampled


def learned(
    num_steps: int, noise_schedule: NoiseSchedule, sampler: str = "dpmpp_2m"
) -> tuple[Tensor, Tensor, SolverTable]:
    """A grid, ratios and a solver unlike any sampler's."""
    grid = make_timesteps(noise_schedule, num_steps, "quadratic")
    table = SolverTable.of_sampler(SAMPLERS[sampler], noise_schedule, grid)
    table = table.plus(0.05 * normals(table.num_calls, table.num_calls + 1))
    return grid, 1 - 0.01 * torch.arange(num_steps, dtype=torch.float64), table


def by_formula(
    predict_x0: Any, x: Tensor, grid: Tensor, t_ratios: Tensor, table: SolverTable, calls_per_step: int = 1
) -> Tensor:
    """`x_{i+1} = a_i x_i + sum_{j <= i} b_ij x0_j`, as it is written."""
    x0s: list[Tensor] = []
    for i, t in enumerate(grid[:-1] if table.times is None else table.times):
        x0s.append(predict_x0(x, t, t_ratios[i // calls_per_step]))
        x = float(table.a[i]) * x + sum(float(table.b[i, j]) * x0s[j] for j in range(i + 1))
    return x


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "dpm_3"])
def test_generate_and_rolling_batches_follow_the_formula(sampler: str) -> None:
    model = load_builtin("mixture-gratings")
    grid, t_ratios, table = learned(4, model.noise_schedule, sampler)
    seeds, guidance = [3, 4, 5], Guidance("uncond", 1.0)
    solver, calls_per_step = table.sampler(sampler), SAMPLERS[sampler].calls_per_step
    x_T, _ = initial_noise(model.sample_shape, seeds, model.noise_schedule.starting_std(grid[0]))
    model_fn = guidance.model_fn(model)
    with torch.no_grad():
        run = x_T, grid, t_ratios, table, calls_per_step
        expected = by_formula(lambda x, t, r: model_fn.predict(x, t, r).x0, *run)
        own = generate(model, guidance, seeds, None, grid, t_ratios, sampler=sampler, decode=False)
    steps: list[int] = []
    generated = generate(
        model,
        guidance,
        seeds,
        None,
        grid,
        t_ratios,
        sampler=solver,
        decode=False,
        after_step=lambda _rows, step, _x0: steps.append(step),
    )
    torch.testing.assert_close(generated, expected, atol=1e-5, rtol=0)
    assert float((own - expected).abs().max()) > 0.01
    assert steps == [1, 2, 3, 4]

    for row_table in (None, table):
        batch = RollingBatch(
            model, sampler if row_table else solver, guidance, 0.0, [1, 2, 4], learned=row_table is not None
        )
        batch.add([Row(seed, seed, grid, t_ratios, solver_table=row_table) for seed in seeds])
        made: list[int] = []
        while batch.rows:
            travelling = batch.rows[0]
            advance = batch.step()
            made.append(travelling.step)
        assert advance.images is not None
        torch.testing.assert_close(advance.images, model.decode(expected), atol=1e-5, rtol=0)
        assert len(made) == table.num_calls
        assert made[calls_per_step - 1 :: calls_per_step] == [1, 2, 3, 4][: len(made) // calls_per_step]
        assert made[-1] == 4


def test_learned_rows_of_heun_share_a_batch_with_rows_at_other_steps_and_of_other_numbers_of_steps() -> None:
    model, guidance = load_builtin("mixture-gratings"), Guidance("uncond", 1.0)
    first, second = (learned(n, model.noise_schedule, "heun") for n in (4, 2))
    batch = RollingBatch(model, "heun", guidance, 0.0, [1, 2, 4], learned=True)
    images = {}
    batch.add([Row("first", 3, first[0], first[1], solver_table=first[2])])
    batch.step()
    batch.add([Row("second", 4, second[0], second[1], solver_table=second[2])])
    while batch.rows:
        advance = batch.step()
        if advance.images is not None:
            images |= {row.owner: image for row, image in zip(advance.done, advance.images, strict=True)}
    for owner, seed, (grid, t_ratios, table) in (("first", 3, first), ("second", 4, second)):
        (alone,) = generate(model, guidance, [seed], None, grid, t_ratios, sampler=table.sampler("heun"))
        torch.testing.assert_close(images[owner], alone, atol=1e-5, rtol=0)


def test_rows_of_tables_with_and_without_a_column_for_eps_share_a_batch() -> None:
    """DDIM's schedules of earlier versions have none where x0 is clipped."""
    model, guidance = load_builtin("mixture-gratings").clipped_as("clip_sample_range=0.2"), Guidance("uncond", 1.0)
    grid, ones = make_timesteps(model.noise_schedule, 4), torch.ones(4, dtype=torch.float64)
    tables = [SolverTable.of_sampler(SAMPLERS["ddim"], model.noise_schedule, grid, c) for c in (Clipping(0.2), None)]
    batch = RollingBatch(model, "ddim", guidance, 0.0, [1, 2], learned=True)
    batch.add([Row(k, 3, grid, ones, solver_table=table) for k, table in enumerate(tables)])
    for _ in range(4):
        advance = batch.step()
    assert advance.images is not None
    own, as_before = (
        generate(model, guidance, [3], None, grid, sampler=solver) for solver in ("ddim", tables[1].sampler("ddim"))
    )
    torch.testing.assert_close(advance.images, torch.cat([own, as_before]), atol=1e-5, rtol=0)
    assert not torch.allclose(own, as_before, atol=1e-3)


def learned_scheduler(sampler: str = "dpmpp_2m") -> Any:
    base: Any = DDPMScheduler()  # type: ignore[no-untyped-call]
    grid, t_ratios, table = learned(4, read_scheduler_config(dict(base.config)).noise_schedule, sampler)
    schedule = {
        "sampler": sampler,
        "timesteps": grid.tolist(),
        "t_ratios": t_ratios.tolist(),
        "solver_table": table.to_dict(),
    }
    return TimeTunerScheduler.from_schedule(base, schedule)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "dpm_3"])
def test_a_pipelines_scheduler_follows_the_formula_also_after_saving(sampler: str, tmp_path: Path) -> None:
    learned_scheduler(sampler).save_pretrained(tmp_path)
    ends = []
    loaded: Any = TimeTunerScheduler.from_pretrained(tmp_path)
    for scheduler in (learned_scheduler(sampler), loaded):
        scheduler.set_timesteps(4)
        table = SolverTable.from_dict(scheduler.config["solver_table"])
        x, x0s = normals(2, 1, 4, 4).float(), []
        for i, t in enumerate(scheduler.timesteps):
            output = scheduler.step(torch.tanh(x + t / 1000), t, x)
            x0s.append(output.pred_original_sample)
            expected = float(table.a[i]) * x + sum(float(table.b[i, j]) * x0s[j] for j in range(i + 1))
            torch.testing.assert_close(output.prev_sample, expected, atol=1e-5, rtol=1e-5)
            x = output.prev_sample
        assert len(x0s) == table.num_calls
        ends.append(x)
    assert torch.equal(*ends)


@pytest.mark.parametrize("sampler", SEVERAL_CALLS)
def test_a_pipelines_scheduler_samples_as_a_sampler_of_several_calls_also_from_the_middle(sampler: str) -> None:
    scheduler: Any = TimeTunerScheduler.from_config({**learned_scheduler(sampler).config, "solver_table": None})
    noise_schedule, steps = scheduler.noise_schedule, torch.tensor(scheduler.config["timesteps"]).double()
    t_ratios = torch.tensor(scheduler.config["t_ratios"]).double()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t.reshape(-1, *[1] * (x.ndim - 1)) / 1000)

    model_fn = tuner_of(network, noise_schedule).model_fn
    model_fn = dataclasses.replace(model_fn, clipping=read_scheduler_config(dict(DDPMScheduler().config)).clipping)
    step_fn = SAMPLERS[sampler].step_fn(model_fn, noise_schedule)
    for first in (0, 2):
        scheduler.set_timesteps(4)
        begin = first * scheduler.order  # Image-to-image pipelines reckon so.
        scheduler.set_begin_index(begin)
        x = x_t = normals(2, 1, 4, 4).float()
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(network(x, t.expand(2)), t, x).prev_sample
        expected = sample(step_fn, x_t, steps[first:], t_ratios[first:])
        torch.testing.assert_close(x, expected, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=f"begin_index is 1; accepted: a multiple of {scheduler.order}"):
        scheduler.set_begin_index(1)


@pytest.mark.parametrize("told_by", ["begin_index", "timestep"])
def test_a_start_in_the_middle_takes_the_samplers_own_coefficients_and_the_next_from_the_first_step_the_table(
    told_by: str,
) -> None:
    def run(scheduler: Any, first: int) -> Tensor:
        scheduler.set_timesteps(4)
        if told_by == "begin_index":
            scheduler.set_begin_index(first)
        x = normals(2, 1, 4, 4).float()
        for t in scheduler.timesteps[first:]:
            x = scheduler.step(torch.tanh(x + t / 1000), t, x).prev_sample
        return x

    learned = learned_scheduler()
    config = {**learned.config, "solver_table": None}
    own: Any = TimeTunerScheduler.from_config(config)
    for first in (1, 3):
        assert torch.equal(run(learned, first), run(own, first))
    assert not torch.allclose(run(learned, 0), run(own, 0), atol=1e-3)


# Learning


def mixture_problem(num_steps: int = 4, sampler: Sampler = SAMPLERS["dpmpp_2m"]) -> TuningProblem:
    model_fn = tuner_of(Recorded(small_mixture()), LINEAR).model_fn
    grid = make_timesteps(LINEAR, num_steps)
    return TuningProblem(model_fn, LINEAR, sampler.step_fn(model_fn, LINEAR), grid, normals(96, 2), batch_size=8)


def untuned(problem: TuningProblem, t_ratio: float) -> Candidate:
    num_calls = sampler_of(problem).network_calls(problem.timesteps)
    offsets = torch.zeros(num_calls, num_calls + 1, dtype=torch.float64)
    return Candidate(problem.timesteps, torch.full((problem.num_steps,), t_ratio, dtype=torch.float64), offsets)


def rows_through(problem: TuningProblem) -> int:
    network: Any = problem.model_fn.network
    return sum(network.batch_sizes)


@pytest.mark.parametrize(
    ("sampler", "num_steps"),
    [*(("dpmpp_2m", n) for n in (1, 2, 5, 12)), ("heun", 3), ("dpm_2", 3), ("dpm_3", 2)],
)
def test_a_column_begins_where_its_number_acts(sampler: str, num_steps: int) -> None:
    """The results are those of whole runs, and the rows are counted exactly."""
    known = SAMPLERS[sampler]
    problem, per_step = mixture_problem(num_steps, known), known.calls_per_step
    num_calls = known.network_calls(problem.timesteps)
    columns = solver_columns(num_calls, calls_per_step=per_step)
    base = untuned(problem, 0.99).moved(LINEAR, columns, torch.zeros(len(columns)))
    amounts = torch.tensor([-1.0 if column.kind == "time" else 1.0 for column in columns], dtype=torch.float64)
    candidates = [base, *(base.moved(LINEAR, columns, each) for each in torch.diag(amounts))]
    rows = torch.arange(3)
    short = run_candidates(problem, known, candidates, [0, *(c.first_call for c in columns)], rows)
    counted = rows_through(problem)
    whole = run_candidates(problem, known, candidates, [0] * len(candidates), rows)
    torch.testing.assert_close(short, whole, atol=1e-12, rtol=0)
    assert all(not torch.equal(result, whole[0]) for result in whole[1:])
    assert counted == 3 * (rows_per_sample(num_calls, calls_per_step=per_step) - 8 * num_calls)


def test_moved_candidates_keep_their_grids_in_order_and_their_ratios_in_bounds() -> None:
    problem = mixture_problem(6)
    columns = solver_columns(6)
    candidate = untuned(problem, 1.0)
    for seed in range(20):
        candidate = candidate.moved(LINEAR, columns, 100 * normals(len(columns), seed=seed))
        assert bool((candidate.timesteps[1:] < candidate.timesteps[:-1]).all())
        told = candidate.timesteps[:-1] * candidate.t_ratios
        assert LINEAR.t_min * (1 - 1e-12) <= float(told.min()) <= float(told.max()) <= LINEAR.T


def held_out_distance(problem: TuningProblem, state: TuningState, teacher: Tensor) -> float:
    x_T = normals(2048, 2, seed=7)
    solver = solver_of(sampler_of(problem).name, state.solver_table, state.timesteps)
    x_start = LINEAR.starting_std(state.timesteps[0]) * x_T
    x0 = sample(solver.step_fn(problem.model_fn, LINEAR), x_start, state.timesteps, state.t_ratios)
    x0_star = sample(problem.step_fn, x_T, teacher, torch.ones(len(teacher) - 1, dtype=torch.float64))
    return float(teacher_l2(x0, x0_star).mean())


def test_a_learned_solver_beats_grid_and_ratios_by_adam_with_fewer_rows_and_no_gradient() -> None:
    teacher = make_timesteps(LINEAR, 100)
    by_adam, by_solver = mixture_problem(), mixture_problem()
    adam = TuningState.start(by_adam.timesteps)
    for _ in tune_end_to_end(by_adam, adam, teacher, "both", total_iters=100):
        pass
    solver = TuningState.start(by_solver.timesteps)
    for _ in tune_solver(by_solver, solver, teacher, total_iters=6):
        pass
    assert rows_through(by_solver) < rows_through(by_adam)
    distances = [held_out_distance(by_solver, state, teacher) for state in (solver, adam)]
    assert distances[0] < 0.7 * distances[1]


@pytest.mark.parametrize("name", ["vp", "cosine", "edm"])
def test_a_free_first_step_is_the_samplers_own_where_x0_is_0(name: str) -> None:
    """Sampling that begins where the free step ends begins with the noise that DDIM's step would have given."""
    schedule = SCHEDULES[name]
    whole = make_timesteps(schedule, 4, "quadratic")
    free = next(grid for grid in start_grids_with_free_step(schedule, 3) if torch.equal(grid, whole[1:]))
    factor = schedule.starting_std(free[0]) / schedule.starting_std(whole[0])
    assert factor == pytest.approx(float(SolverTable.of_sampler(SAMPLERS["ddim"], schedule, whole).a[0]), rel=1e-9)


def test_a_free_first_step_is_taken_where_it_brings_samples_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both by moving the first time and from grids that have such a step."""
    teacher, problem = make_timesteps(LINEAR, 100), mixture_problem(3)
    states = []
    for with_start, free_starts in ((False, []), (True, []), (True, start_grids_with_free_step(LINEAR, 3))):
        monkeypatch.setattr(tuning_solver, "solver_columns", columns_with(with_start))
        state = TuningState.start(problem.timesteps)
        tuned = tune_solver(
            problem, state, teacher, total_iters=2, starts=start_grids(LINEAR, 3), free_starts=free_starts
        )
        assert list(tuned)
        states.append(state)
    before, *after = (held_out_distance(problem, state, teacher) for state in states)
    assert float(states[0].timesteps[0]) == LINEAR.T
    assert max(float(state.timesteps[0]) for state in states[1:]) < 0.95 * LINEAR.T
    assert max(after) < before


def columns_with(with_start: bool) -> Callable[..., list[Column]]:
    """`solver_columns` with the first time among them or not, whatever the tuner asks for."""
    return lambda num_steps, **options: solver_columns(num_steps, **{**options, "with_start": with_start})


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 0.005), (torch.bfloat16, 0.04)])
def test_a_ratios_difference_quotient_exceeds_the_rounding_of_the_told_time(
    dtype: torch.dtype, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks in bfloat16 round the time by up to 1/128, so that a step of 0.005 gives 0 or a leap."""
    problem = dataclasses.replace(mixture_problem(3), network_dtype=dtype)
    tried: list[Tensor] = []

    def run(problem: TuningProblem, sampler: Sampler, candidates: list[Candidate], *rest: Any) -> Tensor:
        tried.extend(candidate.t_ratios for candidate in candidates[1:])
        return run_candidates(problem, sampler, candidates, *rest)

    monkeypatch.setattr(tuning_solver, "run_candidates", run)
    assert list(tune_solver(problem, TuningState.start(problem.timesteps), make_timesteps(LINEAR, 3), total_iters=1))
    quotients = torch.stack(tried[: len(solver_columns(3))]) - 1
    changed = quotients[quotients != 0].abs()
    torch.testing.assert_close(changed, torch.full_like(changed, step))
    assert len(changed) >= 3


def test_flow_matching_starts_where_its_pipelines_do() -> None:
    schedule = SCHEDULES["flow"]
    model_fn = tuner_of(small_mixture(schedule), schedule).model_fn
    step_fn = SAMPLERS["ddim"].step_fn(model_fn, schedule)
    problem = TuningProblem(model_fn, schedule, step_fn, make_timesteps(schedule, 3), normals(24, 2), batch_size=8)
    state = TuningState.start(problem.timesteps)
    for _ in tune_solver(problem, state, make_timesteps(schedule, 20), total_iters=1):
        pass
    assert float(state.timesteps[0]) == schedule.T
    assert not torch.equal(state.timesteps, problem.timesteps)
    assert start_grids_with_free_step(schedule, 3) == []


def test_large_samples_are_learned_from_one_at_a_time_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn() -> tuple[TuningState, int]:
        problem = mixture_problem()
        state = TuningState.start(problem.timesteps)
        for _ in tune_solver(problem, state, make_timesteps(LINEAR, 20), total_iters=2):
            pass
        return state, rows_through(problem)

    together, rows = learn()
    monkeypatch.setattr(tuning_solver, "MAX_VALUES_HELD", 1)
    one_by_one, same_rows = learn()
    assert rows == same_rows
    assert together.solver_table is not None
    assert one_by_one.solver_table is not None
    torch.testing.assert_close(one_by_one.solver_table.b, together.solver_table.b, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("sampler", "clipping"), [*((n, None) for n in SEVERAL_CALLS), ("ddim", Clipping(0.8))])
def test_a_learned_solver_beats_its_untuned_sampler(sampler: str, clipping: Clipping | None) -> None:
    """Among them DDIM that clips x0 and keeps eps, whose solver begins as the sampler itself."""
    problem, teacher = mixture_problem(3, SAMPLERS[sampler]), make_timesteps(LINEAR, 60)
    model_fn = dataclasses.replace(problem.model_fn, clipping=clipping)
    problem = dataclasses.replace(problem, model_fn=model_fn, step_fn=SAMPLERS[sampler].step_fn(model_fn, LINEAR))
    state = TuningState.start(problem.timesteps)
    before = held_out_distance(problem, state, teacher)
    for _ in tune_solver(problem, state, teacher, total_iters=2):
        pass
    assert state.solver_table is not None
    assert (state.solver_table.eps is None) == (clipping is None)
    assert held_out_distance(problem, state, teacher) < 0.8 * before


def test_learning_needs_a_deterministic_sampler() -> None:
    problem = mixture_problem()
    user_step = dataclasses.replace(problem, step_fn=lambda *args, **kwargs: (args[0], args[0]))
    for refused in (user_step, mixture_problem(sampler=SAMPLERS["ddpm"])):
        with pytest.raises(ValueError, match="accepted"):
            list(tune_solver(refused, TuningState.start(problem.timesteps), make_timesteps(LINEAR, 20)))


def test_a_network_whose_answers_are_not_finite_ends_learning_with_an_error() -> None:
    model_fn = tuner_of(lambda x, t: torch.full_like(x, torch.nan), LINEAR).model_fn
    problem = dataclasses.replace(
        mixture_problem(), model_fn=model_fn, step_fn=SAMPLERS["ddim"].step_fn(model_fn, LINEAR)
    )
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        list(tune_solver(problem, TuningState.start(problem.timesteps), make_timesteps(LINEAR, 20)))
