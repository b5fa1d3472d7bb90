"""The noise schedule and prediction type that a diffusers scheduler's configuration describes."""

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timetuner_core.catalog import ModelType
from timetuner_core.clipping import Clipping
from timetuner_core.models.folder_files import SCHEDULER_CONFIG, ModelFormatError
from timetuner_core.noise_schedule import NoiseSchedule, NoiseScheduleEDM, NoiseScheduleFlow, NoiseScheduleVP

MODEL_TYPES: dict[str, ModelType] = {"epsilon": "noise", "sample": "x_start", "v_prediction": "v"}

VP_SCHEDULERS = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
ACCEPTED_SCHEDULERS = (*VP_SCHEDULERS, *FLOW_SCHEDULERS, *EDM_SCHEDULERS)

# DPMSolverSDEScheduler exists only where torchsde is installed. Its arguments and their defaults are those of Heun's.
STAND_INS = {"DPMSolverSDEScheduler": "HeunDiscreteScheduler"}

# Every argument of a scheduler's constructor is in one of these sets; any other must have its default.
BETAS = frozenset(
    {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}
)
CLIPPING = frozenset(
    {"clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
)
HONOURED_BY_VP = BETAS | CLIPPING | {"prediction_type", "use_flow_sigmas", "flow_shift"}
HONOURED_BY_FLOW = frozenset({"num_train_timesteps", "shift", "use_dynamic_shifting"})
HONOURED_BY_EDM = CLIPPING | {"prediction_type", "sigma_min", "sigma_max", "sigma_data"}
SAMPLING_ONLY = frozenset(
    {
        # These place the steps, or say where the last one ends. The time grid is ours.
        "base_image_seq_len",
        "base_shift",
        "final_sigmas_type",
        "lambda_min_clipped",
        "max_image_seq_len",
        "max_shift",
        "num_train_timesteps",  # EDM's networks know no such number
        "original_inference_steps",
        "rho",
        "set_alpha_to_one",
        "shift_terminal",
        "sigma_max",
        "sigma_min",
        "sigma_schedule",
        "steps_offset",
        "time_shift_type",
        "timestep_spacing",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
        # These choose the solver's update. The sampler is chosen with each request.
        "algorithm_type",
        "corrector_order",
        "disable_corrector",
        "euler_at_final",
        "lower_order_final",
        "predict_x0",
        "predictor_order",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "stochastic_sampling",
        "tau_func",
        "variance_type",
    }
)

# diffusers takes one of these before use_flow_sigmas, with sigmas of another scale. Only UniPC's knows how to
# bring Karras' sigmas to the scale of flow matching.
SIGMAS_BESIDE_FLOW = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")

# These tell of the network, so a file of another class, to which they mean nothing, has them at their defaults too.
REFUSED_IN_ANY_CLASS = {"timestep_type": "discrete", "invert_sigmas": False}

# rescale_betas_zero_snr leaves no signal at the last step, where log alpha would be infinite.
MIN_ALPHA_CUMPROD = 1e-12


class SchedulerSpec(NamedTuple):
    """The part of a scheduler's configuration that describes the network.

    Attributes:
        sigma_data: for `model_type` `edm`; negative where the network predicts -F, which turns c_out's sign only.
        clipping: of x0; None for none.
    """

    noise_schedule: NoiseSchedule
    model_type: ModelType
    sigma_data: float = 0.5
    clipping: Clipping | None = None


# These take several calls per step, or run from data to noise. The others place the steps as they do.
GRID_STAND_INS = STAND_INS | {
    "DDIMInverseScheduler": "DDIMScheduler",
    "DPMSolverMultistepInverseScheduler": "DPMSolverMultistepScheduler",
    "KDPM2AncestralDiscreteScheduler": "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler": "HeunDiscreteScheduler",
    "PNDMScheduler": "DDIMScheduler",
}


def stock_timesteps(config: Mapping[str, Any], num_steps: int) -> Tensor | None:
    """The grid that diffusers takes by default for a configuration that `read_scheduler_config` reads.

    Returns:
        `(num_steps + 1,)`, float64, falling; None where the class has none of so many steps, or needs to know the size
        of the image (`use_dynamic_shifting`).
    """
    scheduler = stock_scheduler(config)
    if scheduler is None or scheduler.config.get("use_dynamic_shifting"):
        return None
    try:
        scheduler.set_timesteps(num_steps)
    except (ValueError, TypeError, IndexError):
        return None
    return grid_of(scheduler, read_scheduler_config(config).noise_schedule, num_steps)


def stock_scheduler(config: Mapping[str, Any]) -> Any:
    """A scheduler of diffusers for a configuration that `read_scheduler_config` reads, with one call per step.

    Returns:
        None where the class cannot be built.
    """
    if config.get("_class_name") == "TimeTunerScheduler":
        config = config["base_scheduler"]
    name = config.get("_class_name", "DDPMScheduler")
    read_scheduler_config(config)
    try:
        stand_in = _class_of(GRID_STAND_INS.get(name, name))
        if name not in GRID_STAND_INS:
            return stand_in.from_config(dict(config))
        # It clips x0 as the class itself does, and not by a default of its own, nor by a field that the class ignores.
        own = constructor_defaults(_class_of(name)).keys()
        unclipped = dict.fromkeys({"clip_sample"} & constructor_defaults(stand_in).keys(), False)
        return stand_in.from_config(unclipped | {key: value for key, value in config.items() if key in own})
    except (ValueError, TypeError, ImportError):
        return None


def grid_of(scheduler: Any, noise_schedule: NoiseSchedule, num_steps: int) -> Tensor | None:
    """The times of a scheduler of diffusers whose `set_timesteps` was called, on its own noise schedule.

    Returns:
        `(num_steps + 1,)`, float64, falling; None where they are not so many.
    """
    sigmas: Tensor | None = getattr(scheduler, "sigmas", None)
    if sigmas is None or isinstance(noise_schedule, NoiseScheduleVP):
        times = noise_schedule.time_of_model_input(scheduler.timesteps.double())
    elif isinstance(noise_schedule, NoiseScheduleFlow):
        times = noise_schedule.time_of_model_input(noise_schedule.num_train_timesteps * sigmas[:-1].double())
    else:
        times = sigmas[:-1].double()
    times = times.clamp(max=noise_schedule.T).unique().flip(0)  # type: ignore[no-untyped-call]
    ends_clean = scheduler.config.get("set_alpha_to_one", True) if sigmas is None else float(sigmas[-1]) == 0
    end = 0.0 if ends_clean or times[-1] <= noise_schedule.t_min else noise_schedule.t_min
    grid = torch.cat([times, times.new_tensor([end])])
    return grid if len(grid) == num_steps + 1 and bool((grid[1:] < grid[:-1]).all()) else None


def read_scheduler_config(config: Mapping[str, Any]) -> SchedulerSpec:
    """Read what the network was trained on from the configuration of a diffusers scheduler.

    A field that the file leaves out has the default of its own class, and one that the class does not know is
    ignored, as diffusers does. `SAMPLING_ONLY` fields are ignored too: they bear on how diffusers samples, not on
    what the network is fed at a given noise level, nor on what its answer means. A field that is neither of those
    nor honoured must have its default.

    Raises:
        ModelFormatError: a scheduler that is not known, values that give no noise schedule, or a field that
            cannot be honoured.
    """
    name = config.get("_class_name", "DDPMScheduler")
    if name == "TimeTunerScheduler" and isinstance(config.get("base_scheduler"), Mapping):
        return read_scheduler_config(config["base_scheduler"])  # The pipeline was tuned before.
    if name not in ACCEPTED_SCHEDULERS:
        accepted = ", ".join(ACCEPTED_SCHEDULERS)
        raise ModelFormatError(SCHEDULER_CONFIG, f"_class_name is {name!r}; accepted: {accepted}")
    for key, accepted_value in REFUSED_IN_ANY_CLASS.items():
        if config.get(key, accepted_value) != accepted_value:
            raise ModelFormatError(SCHEDULER_CONFIG, f"{key} is {config[key]!r}; accepted: {accepted_value!r}")
    defaults = constructor_defaults(_class_of(name))
    values = {key: config.get(key, default) for key, default in defaults.items()}
    if name in FLOW_SCHEDULERS:
        _refuse_unknown(values, defaults, HONOURED_BY_FLOW)
        return _flow(values, 1.0 if values.get("use_dynamic_shifting") else _positive(values, "shift"))
    if name in EDM_SCHEDULERS:
        _refuse_unknown(values, defaults, HONOURED_BY_EDM)
        spec = _edm(values)
    else:
        _refuse_unknown(values, defaults, HONOURED_BY_VP)
        spec = _flow_of_vp(name, values) if values.get("use_flow_sigmas") else _vp(values)
    return spec if name in STAND_INS else spec._replace(clipping=_clipping(values))  # the stand-in alone clips


def constructor_defaults(scheduler_class: Any) -> dict[str, Any]:
    """The arguments of a scheduler's constructor with their defaults."""
    parameters = list(inspect.signature(scheduler_class.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}


def _class_of(name: str) -> Any:
    import diffusers  # It takes seconds, which built-in mixtures do not need.

    return getattr(diffusers, STAND_INS.get(name, name))


def _refuse_unknown(values: Mapping[str, Any], defaults: Mapping[str, Any], honoured: frozenset[str]) -> None:
    for key, default in defaults.items():
        if key not in honoured | SAMPLING_ONLY and values[key] != default:
            raise ModelFormatError(SCHEDULER_CONFIG, f"{key} is {values[key]!r}; accepted: {default!r}")


def _vp(values: Mapping[str, Any]) -> SchedulerSpec:
    from diffusers import DDPMScheduler

    rescaled = bool(values.get("rescale_betas_zero_snr"))
    prediction = _choice(values, "prediction_type", tuple(MODEL_TYPES))
    if rescaled and prediction == "epsilon":
        message = "prediction_type is 'epsilon' with rescale_betas_zero_snr; accepted: v_prediction, sample"
        raise ModelFormatError(SCHEDULER_CONFIG, f"{message}, as eps does not tell x0 where there is no signal")
    _num_train_timesteps(values)
    try:
        # It makes the same of these arguments as all other classes do, some of which take memory by N squared.
        betas = {key: value for key, value in values.items() if key in BETAS}
        scheduler: Any = DDPMScheduler(**betas)  # type: ignore[no-untyped-call]
        alphas_cumprod = scheduler.alphas_cumprod.double()
        if rescaled:
            alphas_cumprod[-1] = MIN_ALPHA_CUMPROD
        return SchedulerSpec(NoiseScheduleVP("discrete", alphas_cumprod=alphas_cumprod), MODEL_TYPES[prediction])
    except Exception as error:  # The constructor may raise anything.
        raise ModelFormatError(SCHEDULER_CONFIG, f"no noise schedule can be built from it ({error})") from None


def _flow_of_vp(name: str, values: Mapping[str, Any]) -> SchedulerSpec:
    """Flow matching by a scheduler that can do both."""
    _choice(values, "prediction_type", ("flow_prediction",))
    for key in SIGMAS_BESIDE_FLOW:
        if values.get(key) and (name, key) != ("UniPCMultistepScheduler", "use_karras_sigmas"):
            message = f"{key} is {values[key]!r} with use_flow_sigmas; accepted: one of them"
            raise ModelFormatError(SCHEDULER_CONFIG, message)
    return _flow(values, 1.0 if values.get("use_dynamic_shifting") else _positive(values, "flow_shift"))


def _flow(values: Mapping[str, Any], shift: float) -> SchedulerSpec:
    return SchedulerSpec(NoiseScheduleFlow(shift, _num_train_timesteps(values)), "flow")


def _edm(values: Mapping[str, Any]) -> SchedulerSpec:
    # F_theta of EDM is diffusers' "epsilon" here; its "v_prediction" is -F_theta.
    prediction = _choice(values, "prediction_type", ("epsilon", "v_prediction"))
    sigma_min, sigma_max = _positive(values, "sigma_min"), _positive(values, "sigma_max")
    if sigma_min >= sigma_max:
        message = f"sigma_min is {sigma_min}, sigma_max is {sigma_max}; accepted: sigma_min below sigma_max"
        raise ModelFormatError(SCHEDULER_CONFIG, message)
    sigma_data = _positive(values, "sigma_data")
    signed = sigma_data if prediction == "epsilon" else -sigma_data
    return SchedulerSpec(NoiseScheduleEDM(sigma_min, sigma_max), "edm", signed)


def _clipping(values: Mapping[str, Any]) -> Clipping | None:
    clips, thresholds = bool(values.get("clip_sample")), bool(values.get("thresholding"))
    if not clips and not thresholds:
        return None
    quantile = _positive(values, "dynamic_thresholding_ratio") if thresholds else None
    if quantile is not None and quantile > 1:
        message = f"dynamic_thresholding_ratio is {quantile}; accepted: above 0, up to 1"
        raise ModelFormatError(SCHEDULER_CONFIG, message)
    return Clipping(
        _positive(values, "clip_sample_range") if clips else None,
        quantile,
        _positive(values, "sample_max_value") if thresholds else 1.0,
    )


def _choice(values: Mapping[str, Any], key: str, accepted: tuple[Any, ...]) -> Any:
    value = values[key]
    if value not in accepted:
        raise ModelFormatError(SCHEDULER_CONFIG, f"{key} is {value!r}; accepted: {', '.join(map(str, accepted))}")
    return value


def _positive(values: Mapping[str, Any], key: str) -> float:
    value = values[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelFormatError(SCHEDULER_CONFIG, f"{key} is {value!r}; accepted: a number above 0")
    return float(value)


def _num_train_timesteps(values: Mapping[str, Any]) -> int:
    num_steps = values["num_train_timesteps"]
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or not 1 <= num_steps <= 100_000:
        raise ModelFormatError(SCHEDULER_CONFIG, f"num_train_timesteps is {num_steps!r}; accepted: 1 to 100000")
    return num_steps
