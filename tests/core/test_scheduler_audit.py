"""Every argument of every diffusers scheduler that we accept, against that scheduler itself.

Each argument is set to another value than its default, and the configuration is read as a file would be. What we make
of it (alphas, what the network is fed at each noise level, what its answer means) must be what the class computes, or
the refusal must name the argument. A class or an argument that a newer diffusers adds fails here until somebody
decides what to do with it. `python -m tests.core.test_scheduler_audit` prints what was tried and what was left out.
"""

import ast
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.core.conftest import normals
from timetuner_core.guided_model import model_wrapper
from timetuner_core.models import schedulers
from timetuner_core.models.folder_files import ModelFormatError
from timetuner_core.models.schedulers import (
    ACCEPTED_SCHEDULERS,
    EDM_SCHEDULERS,
    FLOW_SCHEDULERS,
    SAMPLING_ONLY,
    STAND_INS,
    SchedulerSpec,
    constructor_defaults,
    read_scheduler_config,
)

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")]

# Schedulers whose folders are refused: other processes, other network inputs, or for one pipeline only.
NOT_ACCEPTED = {
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "CosineDPMSolverMultistepScheduler",
    "DDPMWuerstchenScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeliosDMDScheduler",
    "HeliosScheduler",
    "IPNDMScheduler",
    "KarrasVeScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
    "PiflowScheduler",
    "RFD4ProteinaScheduler",
    "RePaintScheduler",
    "SCMScheduler",
    "ScoreSdeVeScheduler",
    "UnCLIPScheduler",
    "VQDiffusionScheduler",
}
REFUSED_ARGUMENTS = {"interpolation_type", "invert_sigmas", "timestep_scaling", "timestep_type"}
# Arguments that no configuration file can hold: a function and a scheduler.
NOT_IN_A_FILE = {"tau_func", "solver_p"}

# A step towards noise takes the network's answer for that of the time before.
INVERSE = {"DDIMInverseScheduler"}

OTHER_VALUES: dict[str, list[Any]] = {
    "algorithm_type": ["dpmsolver", "sde-dpmsolver++", "noise_prediction"],
    "base_image_seq_len": [64],
    "base_shift": [0.7],
    "beta_end": [0.03],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "exp", "laplace"],
    "beta_start": [0.0003],
    "clip_sample": [True, False],
    "clip_sample_range": [3.0],
    "corrector_order": [1],
    "disable_corrector": [[0]],
    "dynamic_thresholding_ratio": [0.9],
    "euler_at_final": [True],
    "final_sigmas_type": ["sigma_min"],
    "flow_shift": [5.0],
    "interpolation_type": ["log_linear"],
    "invert_sigmas": [True],
    "lambda_min_clipped": [-5.1],
    "lower_order_final": [True, False],
    "max_image_seq_len": [1024],
    "max_shift": [2.0],
    "num_train_timesteps": [50, 3],
    "original_inference_steps": [20],
    "predict_x0": [False],
    "prediction_type": ["sample", "v_prediction", "flow_prediction"],
    "predictor_order": [3],
    "rescale_betas_zero_snr": [True],
    "rho": [3.0],
    "sample_max_value": [2.0],
    "set_alpha_to_one": [True, False],
    "shift": [3.0],
    "shift_terminal": [0.1],
    "sigma_data": [1.0],
    "sigma_max": [20.0],
    "sigma_min": [0.05],
    "sigma_schedule": ["exponential"],
    "skip_prk_steps": [True],
    "solver_order": [3],
    "solver_type": ["heun", "bh1"],
    "steps_offset": [1],
    "stochastic_sampling": [True],
    "thresholding": [True],
    "time_shift_type": ["linear"],
    "timestep_scaling": [1.0],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "timestep_type": ["continuous"],
    "trained_betas": [[0.001, 0.01, 0.1]],
    "use_beta_sigmas": [True],
    "use_dynamic_shifting": [True],
    "use_exponential_sigmas": [True],
    "use_flow_sigmas": [True],
    "use_karras_sigmas": [True],
    "use_lu_lambdas": [True],
    "variance_type": ["fixed_large", "learned"],
}
# A value that needs another argument to be of use.
COMPANIONS: dict[str, dict[str, Any]] = {
    "trained_betas": {"num_train_timesteps": 3},
    "lambda_min_clipped": {"beta_schedule": "squaredcos_cap_v2"},
}
FLOW_BY_VP = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
NUM_TRAIN_TIMESTEPS = 100  # a few constructors take seconds for a thousand
NUM_STEPS = 4  # spaced by thirds of 99, so that most times are whole numbers
PREDICTS_EPS = ("dpmsolver", "sde-dpmsolver", "noise_prediction", "deis")


def scheduler_class(name: str) -> Any:
    return getattr(diffusers, STAND_INS.get(name, name))


def other_configs(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Each argument, with configurations that set it to something else; "" is the class as it comes."""
    defaults = constructor_defaults(scheduler_class(name))
    bases: list[dict[str, Any]] = [{"num_train_timesteps": NUM_TRAIN_TIMESTEPS}]
    if "use_flow_sigmas" in defaults:
        bases.append({**bases[0], **FLOW_BY_VP})
    if "rescale_betas_zero_snr" in defaults:
        bases.append({**bases[0], "prediction_type": "v_prediction"})
    configs = [("", base) for base in bases]
    for argument in defaults.keys() - NOT_IN_A_FILE:
        for value in OTHER_VALUES[argument]:
            if value != defaults[argument]:
                extra = {argument: value, **COMPANIONS.get(argument, {})}
                configs += [(argument, {**base, **extra}) for base in bases]
    return configs


def refused_word(name: str, config: dict[str, Any]) -> str | None:
    """The word that a refusal of this configuration must name, if it is one to refuse."""
    prediction = config.get("prediction_type", "epsilon")
    beside = [key for key in config if key in schedulers.SIGMAS_BESIDE_FLOW]
    by_flow = bool(config.get("use_flow_sigmas"))
    accepted = ("epsilon", "sample", "v_prediction")
    if name in EDM_SCHEDULERS:
        accepted = ("epsilon", "v_prediction")
    elif name in FLOW_SCHEDULERS or by_flow:
        accepted = ("flow_prediction",)
    refusals = {
        **dict.fromkeys(REFUSED_ARGUMENTS & config.keys(), True),
        "prediction_type": name not in FLOW_SCHEDULERS and prediction not in accepted,
        "exp is not implemented": config.get("beta_schedule") == "exp" and not by_flow,
        "rescale_betas_zero_snr": bool(config.get("rescale_betas_zero_snr"))
        and not by_flow
        and prediction == "epsilon",
        **{key: by_flow and not ("UniPC" in name and key == "use_karras_sigmas") for key in beside},
    }
    return next((word for word, is_refused in refusals.items() if is_refused), None)


def in_a_file(name: str, scheduler: Any) -> dict[str, Any]:
    """The scheduler's configuration, as it is read back from the file it is saved to."""
    content: dict[str, Any] = json.loads(scheduler.to_json_string())
    return content | {"_class_name": name}


def prepared(scheduler: Any) -> Any:
    """The scheduler with its grid of `NUM_STEPS` times."""
    shifting = {"mu": 0.7} if scheduler.config.get("use_dynamic_shifting") else {}
    steps = min(NUM_STEPS, scheduler.config.num_train_timesteps)
    if "original_inference_steps" in scheduler.config:
        shifting["original_inference_steps"] = steps
    scheduler.set_timesteps(steps, **shifting)
    return scheduler


def is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__ in FLOW_SCHEDULERS or bool(scheduler.config.get("use_flow_sigmas"))


def divides_by_alpha(scheduler: Any) -> bool:
    """Whether the scheduler's x is x_t / alpha_t, as in k-diffusion."""
    name = type(scheduler).__name__
    return name.startswith(("Euler", "Heun", "KDPM2", "LMS"))


def noise_levels(scheduler: Any) -> tuple[Tensor, Tensor]:
    """A grid's times as the network is fed them, and sigma / alpha there; float64."""
    every = 2 if type(scheduler).__name__.startswith("KDPM2") else 1  # The times between are those of its midpoints.
    times = scheduler.timesteps[::every].double()
    if not hasattr(scheduler, "sigmas") or len(scheduler.sigmas) < len(times):
        alphas_cumprod = scheduler.alphas_cumprod.double()[times.long()]
        return times, ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    sigmas = scheduler.sigmas[::every][: len(times)].double()
    return times, sigmas / (1 - sigmas) if is_flow(scheduler) else sigmas


def assert_the_network_is_fed_the_same(scheduler: Any, spec: SchedulerSpec) -> None:
    """Compare the times at each noise level of the scheduler's grid, up to the rounding of its times."""
    schedule = spec.noise_schedule
    times, noise_to_signal = noise_levels(scheduler)
    inside = torch.isfinite(noise_to_signal) & (noise_to_signal > 0) & (noise_to_signal < 4000)
    assert inside.sum() >= min(len(times), 2) - 1
    ours = schedule.model_input_time(schedule.inverse_lambda(-torch.log(noise_to_signal[inside])))
    # diffusers rounds times to whole numbers (down, for flow matching), or interpolates between them otherwise.
    rounding = 0.01 if spec.model_type == "edm" else 1.001 if is_flow(scheduler) else 0.9
    torch.testing.assert_close(ours, times[inside], rtol=0, atol=rounding)


def assert_the_same_alphas(scheduler: Any, spec: SchedulerSpec) -> None:
    alphas_cumprod = scheduler.alphas_cumprod.double()
    n = len(alphas_cumprod)
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    # Each class clips the last rescaled alpha in its own way; what networks were trained on is 0.
    atol = 2.5e-4 if scheduler.config.get("rescale_betas_zero_snr") else 1e-6
    torch.testing.assert_close(spec.noise_schedule.marginal_alpha(t), alphas_cumprod.sqrt(), rtol=1e-5, atol=atol)
    torch.testing.assert_close(spec.noise_schedule.model_input_time(t), torch.arange(n, dtype=torch.float64))


def assert_the_same_meaning(scheduler: Any, spec: SchedulerSpec) -> None:
    """Compare one step in the middle of the grid: x0 (or eps, or a later x) is what the scheduler takes it to be."""
    schedule = spec.noise_schedule
    k = min(2, len(scheduler.timesteps) - 2)
    _, noise_to_signal = noise_levels(scheduler)
    level = noise_to_signal[k // 2 if type(scheduler).__name__.startswith("KDPM2") else k]
    t = schedule.inverse_lambda(-torch.log(level.clamp(min=1e-6, max=1e6)))
    # x0 is small enough for no class to clip it.
    x, output = 0.05 * normals(2, 1, 4, 4), 0.05 * normals(2, 1, 4, 4, seed=1)
    model = model_wrapper(lambda x, t_input: output, schedule, spec.model_type, sigma_data=spec.sigma_data)
    x0, eps = model.predict(x, t)
    alpha_t = schedule.marginal_alpha(t)
    theirs_x = x / alpha_t if divides_by_alpha(scheduler) else x
    scheduler.set_begin_index(k) if hasattr(scheduler, "set_begin_index") else None
    time = scheduler.timesteps[k]
    if divides_by_alpha(scheduler) or spec.model_type == "edm":
        torch.testing.assert_close(
            scheduler.scale_model_input(theirs_x, time), model.input_scale(t) * x, rtol=1e-4, atol=1e-5
        )
    expected, actual = theirs(scheduler, theirs_x, output, k), {"x0": x0, "eps": eps}
    for name, value in expected.items():
        if name == "later":
            s_sigma = value[0]
            ours = schedule_step(schedule, x0, eps, s_sigma, is_flow(scheduler))
            torch.testing.assert_close(ours, value[1], rtol=1e-3, atol=1e-4)
        else:
            torch.testing.assert_close(actual[name], value, rtol=1e-3, atol=1e-4)


def schedule_step(schedule: Any, x0: Tensor, eps: Tensor, s: Tensor, flow: bool) -> Tensor:
    alpha, sigma = (1 - s, s) if flow else (s.sqrt(), (1 - s).sqrt())
    return alpha * x0 + sigma * eps


def theirs(scheduler: Any, x: Tensor, output: Tensor, k: int) -> dict[str, Any]:
    """x0 or eps as the scheduler takes them, or a later x with the sigma (flow) or alphas_cumprod it is at."""
    name, time = type(scheduler).__name__, scheduler.timesteps[k]
    if name == "LCMScheduler":  # The boundary condition matters at the last few times only, so our reading has none.
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(time)
        return {"x0": (scheduler.step(output, time, x).denoised - c_skip * x) / c_out}
    if name == "PNDMScheduler":
        previous = scheduler.timesteps[k] // 2
        later = scheduler._get_prev_sample(x, time, previous, output)
        return {"later": (scheduler.alphas_cumprod[previous].double(), later)}
    if name == "TCDScheduler":
        later = scheduler.step(output, time, x, eta=1.0).pred_noised_sample
        return {"later": (scheduler.alphas_cumprod[0].double(), later)}
    if name in FLOW_SCHEDULERS:
        next_sigma = scheduler.sigmas[k + 1]
        if scheduler.config.get("stochastic_sampling"):
            scheduler.sigmas[k + 1] = next_sigma = 0.0 * next_sigma  # else the later x has new noise
        return {"later": (next_sigma.double(), scheduler.step(output, time, x).prev_sample)}
    if hasattr(scheduler, "convert_model_output"):
        scheduler._step_index = k
        converted = scheduler.convert_model_output(output, sample=x)
        algorithm = scheduler.config.get("algorithm_type")
        predicts_eps = algorithm in PREDICTS_EPS or not scheduler.config.get("predict_x0", True)
        return {"eps" if predicts_eps else "x0": converted}
    if scheduler.config.get("variance_type") == "learned":
        output = torch.cat([output, output], dim=1)  # the second half is the variance
    return {"x0": scheduler.step(output, time, x).pred_original_sample}


def audit(name: str, argument: str, config: dict[str, Any]) -> str:
    """Tell what became of one configuration; raises AssertionError if it is neither right nor refused by name."""
    try:
        scheduler = scheduler_class(name)(**config)
    except Exception as error:  # diffusers' constructors raise anything
        return f"diffusers refuses it: {error}"
    try:
        spec = read_scheduler_config(in_a_file(name, scheduler))
    except ModelFormatError as refusal:
        word = refused_word(name, config)
        assert word is not None, f"{name} {config}: {refusal}"
        assert word in refusal.message, f"{name} {config}: {refusal}"
        return f"refused: {refusal.message}"
    assert refused_word(name, config) is None, f"{name} {config} was accepted"
    if hasattr(scheduler, "alphas_cumprod") and not is_flow(scheduler):
        assert_the_same_alphas(scheduler, spec)
    try:
        prepared(scheduler)
    except Exception as error:
        return f"alphas are the same; diffusers makes no grid of it: {error}"
    assert_the_network_is_fed_the_same(scheduler, spec)
    if name in INVERSE:
        return "alphas and inputs are the same"
    try:
        assert_the_same_meaning(scheduler, spec)
    except (NotImplementedError, ValueError) as error:
        return f"alphas and inputs are the same; diffusers' own step refuses it: {error}"
    return "honoured" if argument not in SAMPLING_ONLY else "bears on sampling only"


def audited(name: str) -> list[tuple[str, dict[str, Any], str]]:
    return [(argument, config, audit(name, argument, config)) for argument, config in other_configs(name)]


@pytest.mark.parametrize("name", ACCEPTED_SCHEDULERS)
def test_every_argument_is_honoured_or_refused_by_name(name: str) -> None:
    for argument, config in other_configs(name):
        try:
            audit(name, argument, config)
        except AssertionError as error:
            raise AssertionError(f"{name} with {config}: {error}") from None


@pytest.mark.parametrize("name", ACCEPTED_SCHEDULERS)
def test_a_field_that_the_file_leaves_out_has_the_default_of_its_class(name: str) -> None:
    given = {"num_train_timesteps": NUM_TRAIN_TIMESTEPS}
    spec, scheduler = read_scheduler_config({"_class_name": name, **given}), scheduler_class(name)(**given)
    if name not in (*FLOW_SCHEDULERS, *EDM_SCHEDULERS):
        assert_the_same_alphas(scheduler, spec)
    assert_the_network_is_fed_the_same(prepared(scheduler), spec)
    assert read_scheduler_config({"_class_name": name}).noise_schedule.max_num_steps in (None, 1000)


def test_every_scheduler_and_argument_of_the_installed_diffusers_is_decided() -> None:
    classes = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    assert classes == set(ACCEPTED_SCHEDULERS) | NOT_ACCEPTED
    honoured = schedulers.HONOURED_BY_VP | schedulers.HONOURED_BY_FLOW | schedulers.HONOURED_BY_EDM
    arguments = {key for name in ACCEPTED_SCHEDULERS for key in constructor_defaults(scheduler_class(name))}
    assert arguments == honoured | SAMPLING_ONLY | REFUSED_ARGUMENTS
    assert arguments == OTHER_VALUES.keys() | NOT_IN_A_FILE


def test_the_stand_in_for_a_scheduler_that_needs_torchsde_has_its_defaults() -> None:
    file = Path(inspect.getfile(diffusers)).parent / "schedulers/scheduling_dpmsolver_sde.py"
    (constructor,) = (
        node
        for parent in ast.parse(file.read_text()).body
        if isinstance(parent, ast.ClassDef) and parent.name == "DPMSolverSDEScheduler"
        for node in parent.body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    names = [argument.arg for argument in constructor.args.args][1:]
    theirs = dict(zip(names, map(ast.literal_eval, constructor.args.defaults), strict=True))
    heuns = constructor_defaults(diffusers.HeunDiscreteScheduler)
    assert {key: heuns[key] for key in theirs.keys() & heuns.keys()} | {"noise_sampler_seed": None} == theirs


def report() -> str:
    lines = [f"{name} {config}: {outcome}" for name in ACCEPTED_SCHEDULERS for _, config, outcome in audited(name)]
    return "\n".join([*lines, *(f"{name}: left out, folders with it are refused" for name in sorted(NOT_ACCEPTED))])


if __name__ == "__main__":
    print(report())
