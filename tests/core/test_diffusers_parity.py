"""Each sampler that diffusers also has gives its samples on the bundled model; where conventions differ, their map.

DDIM is compared in `test_samplers.py`.
"""

from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor

from tests.core.conftest import Network, normals, predicting
from tests.core.test_convergence import measured_order
from timetuner_core import model_wrapper
from timetuner_core.coefficients import NoiseLevel
from timetuner_core.grids import make_timesteps
from timetuner_core.guided_model import expand_like
from timetuner_core.models.loading import BUNDLED, load_builtin
from timetuner_core.noise_schedule import NoiseSchedule, NoiseScheduleEDM, NoiseScheduleFlow
from timetuner_core.samplers import SAMPLERS, Sampler, Step, sample

# diffusers computes its sigmas by what NumPy and itself deprecate.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`algorithm_types:FutureWarning")]

NUM_STEPS = 8
DIGITS = load_builtin("digits8")
VP = DIGITS.noise_schedule
SIGMA_DATA = 0.5


class Case(NamedTuple):
    """A diffusers scheduler, its options, our name for it, and whether its x is x_t / alpha_t."""

    scheduler: str
    options: dict[str, Any]
    sampler: str
    divided_by_alpha: bool = False


# diffusers lowers the order of the last steps on its own; a final sigma of `sigma_min` is our t_min = 1 / N.
TO_T_MIN = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
TO_ZERO = {"lower_order_final": False, "final_sigmas_type": "zero"}
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
TRAILING = {"timestep_spacing": "trailing"}
CASES = {
    "ddpm": Case("DDPMScheduler", {"variance_type": "fixed_small"}, "ddpm"),
    "euler": Case("EulerDiscreteScheduler", TRAILING, "euler", True),
    "euler as ddim": Case("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, "ddim", True),
    "euler to t_min": Case("EulerDiscreteScheduler", {**TRAILING, "final_sigmas_type": "sigma_min"}, "euler", True),
    "heun": Case("HeunDiscreteScheduler", TRAILING, "heun", True),
    "dpmpp_2m": Case("DPMSolverMultistepScheduler", {"solver_order": 2, **TO_T_MIN}, "dpmpp_2m"),
    "dpmpp_2m to zero": Case("DPMSolverMultistepScheduler", {"solver_order": 2, **TO_ZERO}, "dpmpp_2m"),
    "dpmpp_2m_sde": Case("DPMSolverMultistepScheduler", {**SDE, **TO_T_MIN}, "dpmpp_2m_sde"),
    "dpmpp_2m_sde to zero": Case("DPMSolverMultistepScheduler", {**SDE, **TO_ZERO}, "dpmpp_2m_sde"),
    "unipc_2": Case("UniPCMultistepScheduler", {"solver_order": 2, **TO_T_MIN}, "unipc_2"),
    "unipc_3": Case("UniPCMultistepScheduler", {"solver_order": 3, **TO_T_MIN}, "unipc_3"),
    # UniPC of diffusers cannot step to zero at full order; at order 2, it is only that step that is lowered.
    "unipc_2 to zero": Case("UniPCMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero"}, "unipc_2"),
    "deis": Case("DEISMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, "deis"),
}


def initial_x() -> Tensor:
    return normals(4, *DIGITS.sample_shape).float()


def scheduler_of(name: str, **options: Any) -> Any:
    """A diffusers scheduler with the betas of the bundled model."""
    scheduler_class = getattr(diffusers, name)
    config = diffusers.DDPMScheduler.load_config(BUNDLED / "digits8" / "scheduler")
    return scheduler_class.from_config(config, clip_sample=False, **options)


@torch.no_grad()
def theirs(scheduler: Any, network: Network, x: Tensor, **step_kwargs: Any) -> Tensor:
    for t in scheduler.timesteps:
        scaled_x = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(scaled_x, t.float().expand(len(x)))
        x = scheduler.step(output, t, x, **step_kwargs).prev_sample
    return x


@torch.no_grad()
def ours(
    sampler: Sampler, network: Network, schedule: NoiseSchedule, x: Tensor, grid: Tensor, model_type: Any = "noise"
) -> Tensor:
    step_fn = sampler.step_fn(model_wrapper(network, schedule, model_type, sigma_data=SIGMA_DATA), schedule)
    return sample(step_fn, x, grid, torch.ones(len(grid) - 1), generator=torch.Generator().manual_seed(1))


def their_grid(scheduler: Any, schedule: NoiseSchedule, end: float) -> Tensor:
    """The times that a scheduler's `timesteps` stand for, which Heun's has twice; float64."""
    t_input = scheduler.timesteps.double().unique_consecutive()
    return torch.cat([schedule.time_of_model_input(t_input), torch.tensor([end], dtype=torch.float64)])


def assert_same_samples(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_sampler_is_that_of_diffusers_on_its_own_grid(case: Case) -> None:
    scheduler, x_T = scheduler_of(case.scheduler, **case.options), initial_x()
    scheduler.set_timesteps(NUM_STEPS)
    to_t_min = case.options.get("final_sigmas_type") == "sigma_min" or case.sampler == "deis"
    grid = their_grid(scheduler, VP, VP.t_min if to_t_min else 0.0)
    alphas = VP.marginal_alpha(grid[[0, -1]]).float() if case.divided_by_alpha else torch.ones(2)
    noise = {"generator": torch.Generator().manual_seed(1)} if SAMPLERS[case.sampler].stochastic else {}
    expected = alphas[1] * theirs(scheduler, DIGITS.network, x_T / alphas[0], **noise)
    assert len(grid) == NUM_STEPS + 1
    assert_same_samples(ours(SAMPLERS[case.sampler], DIGITS.network, VP, x_T, grid), expected)


def on_grid(scheduler: Any, grid: Tensor) -> Any:
    """A scheduler made to run over any times: its options know no such grid."""
    scheduler.set_timesteps(len(grid) - 1)
    scheduler.sigmas = torch.exp(-VP.marginal_lambda(grid)).float()
    scheduler.timesteps = VP.model_input_time(grid[:-1]).float()
    scheduler.set_begin_index(0)
    return scheduler


def with_points_between(grid: Tensor, count: int) -> Tensor:
    """`count - 1` more times in each step, equally far in lambda: where a singlestep solver calls the network."""
    lambdas = VP.marginal_lambda(grid)
    fractions = torch.arange(count, dtype=torch.float64) / count
    between = lambdas[:-1, None] + fractions * lambdas.diff()[:, None]
    return torch.cat([VP.inverse_lambda(between.flatten()), grid[-1:]])


def dpm_3_of_diffusers(step: Step) -> tuple[Tensor, Tensor]:
    """DPM-Solver-3 whose second stage is DPM-Solver-2's, as a list of single steps makes it."""
    x0, eps = step.predict(step.x_t, step.t)
    t1, t2 = step.time_between(1 / 3), step.time_between(2 / 3)

    def stage(s: Tensor, slope: Tensor) -> Tensor:
        level = step.noise_level(s)
        growth = (level.lambda_ - step.lambda_t).expm1()
        return level.alpha / step.alpha_t * step.x_t - level.sigma * growth * slope

    eps_1 = step.predict(stage(t1, eps), t1).eps
    eps_2 = step.predict(stage(t2, eps_1), t2).eps
    curve = step.sigma_s * (step.h.expm1() / step.h - 1) * (3 / 2)
    return stage(step.s, eps) - curve * (eps_2 - eps), x0


DPM_3 = Sampler("dpm_3 of diffusers", dpm_3_of_diffusers, order=3, calls_per_step=3)


@pytest.mark.parametrize(
    ("sampler", "algorithm", "order"),
    [(SAMPLERS["dpm_2"], "dpmsolver", 2), (DPM_3, "dpmsolver", 3), (SAMPLERS["dpmpp_2s"], "dpmsolver++", 2)],
    ids=["dpm_2", "dpm_3", "dpmpp_2s"],
)
def test_a_singlestep_solver_is_that_of_diffusers_with_its_stages_as_steps(
    sampler: Sampler, algorithm: str, order: int
) -> None:
    grid, x_T = make_timesteps(VP, NUM_STEPS, "log_snr"), initial_x()
    options = {"algorithm_type": algorithm, "solver_order": order, **TO_T_MIN}
    scheduler = on_grid(scheduler_of("DPMSolverSinglestepScheduler", **options), with_points_between(grid, order))
    assert_same_samples(ours(sampler, DIGITS.network, VP, x_T, grid), theirs(scheduler, DIGITS.network, x_T))


def test_dpm_3_is_of_third_order_with_the_second_stage_of_diffusers_too() -> None:
    assert measured_order(DPM_3, "linear", warm=True) == pytest.approx(3, abs=0.15)


def dpmpp_3m_of_diffusers(step: Step) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(3M) with half of the second-derivative term: a divided difference taken for a derivative."""
    x_s, x0 = SAMPLERS["dpmpp_3m"].update(step)
    if len(step.history) < 2 or step.to_clean_data:
        return x_s, x0
    lambda_t, lambda_1, lambda_2 = step.lambda_t, step.past_lambda(1), step.past_lambda(2)
    x0_1, x0_2 = step.past_x0(1), step.past_x0(2)
    slope, slope_1 = 1 / (lambda_t - lambda_1) * (x0 - x0_1), 1 / (lambda_1 - lambda_2) * (x0_1 - x0_2)
    half_curve = 1 / (lambda_t - lambda_2) * (slope - slope_1)
    phi_3 = step.h**2 - 2 * (step.h + (-step.h).expm1())
    return x_s - step.alpha_s * phi_3 / 2 * half_curve, x0


DPMPP_3M = Sampler("dpmpp_3m of diffusers", dpmpp_3m_of_diffusers, order=2, history_length=2)


@pytest.mark.parametrize("options", [TO_T_MIN, TO_ZERO], ids=["to t_min", "to zero"])
def test_dpmpp_3m_of_diffusers_has_half_of_the_second_derivative_term(options: dict[str, Any]) -> None:
    scheduler, x_T = scheduler_of("DPMSolverMultistepScheduler", solver_order=3, **options), initial_x()
    scheduler.set_timesteps(NUM_STEPS)
    grid = their_grid(scheduler, VP, 0.0 if options is TO_ZERO else VP.t_min)
    expected = theirs(scheduler, DIGITS.network, x_T)
    assert_same_samples(ours(DPMPP_3M, DIGITS.network, VP, x_T, grid), expected)
    whole = ours(SAMPLERS["dpmpp_3m"], DIGITS.network, VP, x_T, grid)
    assert float((whole - expected).abs().max()) > 1e-3


def test_half_of_the_second_derivative_term_leaves_second_order() -> None:
    assert measured_order(DPMPP_3M, "linear", warm=True) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("end", [0.0, VP.t_min], ids=["to zero", "to t_min"])
def test_ipndm_is_that_of_diffusers_on_our_noise_levels(end: float) -> None:
    """The scheduler keeps alpha and sigma as `alphas` and `betas`, and takes v."""
    network, x_T = predicting(DIGITS.network, VP, "v"), initial_x()
    grid = torch.linspace(1.0, end, NUM_STEPS + 1, dtype=torch.float64)
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(NUM_STEPS)
    scheduler.alphas, scheduler.betas = VP.marginal_alpha(grid).float(), VP.marginal_std(grid).float()
    scheduler.timesteps = VP.model_input_time(grid[:-1]).float()
    assert_same_samples(ours(SAMPLERS["ipndm"], network, VP, x_T, grid, "v"), theirs(scheduler, network, x_T))


def at_other_levels(schedule: NoiseSchedule, model_type: str) -> Network:
    """The bundled network under another noise schedule, asked at the time of its own with the same signal-to-noise
    ratio, and answering as networks of `model_type` do."""

    def x0_of(x: Tensor, t: Tensor) -> Tensor:
        alpha_t, sigma_t = schedule.marginal_alpha(t), schedule.marginal_std(t)
        t_vp = VP.inverse_lambda(schedule.marginal_lambda(t)).clamp(max=VP.T)
        x_vp = expand_like(1 / torch.sqrt(alpha_t**2 + sigma_t**2), x) * x
        eps = DIGITS.network(x_vp, VP.model_input_time(t_vp))
        level = NoiseLevel.at(VP, t_vp, x)
        return 1 / level.alpha * (x_vp - level.sigma * eps)

    def flow(x: Tensor, t_input: Tensor) -> Tensor:
        t = schedule.time_of_model_input(t_input)
        return 1 / NoiseLevel.at(schedule, t, x).sigma * (x - x0_of(x, t))

    def edm(x: Tensor, t_input: Tensor) -> Tensor:
        t = schedule.time_of_model_input(t_input)
        sigma = expand_like(t, x)
        norm = torch.sqrt(sigma**2 + SIGMA_DATA**2)
        x = norm * x  # the network is given c_in x
        return norm / (sigma * SIGMA_DATA) * (x0_of(x, t) - (SIGMA_DATA / norm) ** 2 * x)

    return {"flow": flow, "edm": edm}[model_type]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["euler", "ddim"])
def test_flow_matching_pipelines_are_a_uniform_grid_with_our_shift(name: str, shift: float) -> None:
    schedule, x_T = NoiseScheduleFlow(shift), initial_x()
    network = at_other_levels(schedule, "flow")
    grid = torch.linspace(1.0, 0.0, NUM_STEPS + 1, dtype=torch.float64)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=grid[:-1].tolist())
    assert_same_samples(ours(SAMPLERS[name], network, schedule, x_T, grid, "flow"), theirs(scheduler, network, x_T))


def test_a_flow_matching_scheduler_left_to_itself_shifts_its_last_sigma_twice() -> None:
    """The grid ends at the shifted 1 / N, and is shifted once more."""
    schedule, x_T = NoiseScheduleFlow(3.0), initial_x()
    network = at_other_levels(schedule, "flow")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(NUM_STEPS)
    last = schedule.marginal_std(torch.tensor(1e-3, dtype=torch.float64))
    grid = torch.cat([torch.linspace(1.0, float(last), NUM_STEPS, dtype=torch.float64), torch.zeros(1)])
    assert_same_samples(ours(SAMPLERS["euler"], network, schedule, x_T, grid, "flow"), theirs(scheduler, network, x_T))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_for_flow_matching_is_that_of_diffusers(shift: float) -> None:
    schedule, x_T = NoiseScheduleFlow(shift), initial_x()
    network = at_other_levels(schedule, "flow")
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(NUM_STEPS)
    grid = their_grid(scheduler, schedule, 0.0)
    assert_same_samples(ours(SAMPLERS["heun"], network, schedule, x_T, grid, "flow"), theirs(scheduler, network, x_T))


def test_edm_is_that_of_diffusers_on_our_edm_grid() -> None:
    schedule = NoiseScheduleEDM(sigma_min=0.01, sigma_max=80.0)
    network, x_T = at_other_levels(schedule, "edm"), schedule.prior_std * initial_x()
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.01, sigma_max=80.0, sigma_data=SIGMA_DATA)
    scheduler.set_timesteps(NUM_STEPS)
    grid = torch.cat([make_timesteps(schedule, NUM_STEPS - 1, "edm"), torch.zeros(1, dtype=torch.float64)])
    expected = theirs(scheduler, network, x_T)
    assert_same_samples(ours(SAMPLERS["euler"], network, schedule, x_T, grid, "edm"), expected)
