"""From a diffusers scheduler's configuration to a noise schedule and what the network predicts."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from timetuner_core.catalog import ModelType
from timetuner_core.models.diffusers_import import diffusers_class
from timetuner_core.models.folder_files import SCHEDULER_CONFIG, ModelFormatError, read_json
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

# rescale_betas_zero_snr leaves no signal at the last step, where log alpha would be infinite.
MIN_ALPHA_CUMPROD = 1e-12


class SchedulerSpec(NamedTuple):
    """What a scheduler's configuration says of the network.

    Attributes:
        sigma_data: for `model_type` `edm`; negative where the network predicts -F, which turns c_out's sign only.
    """

    noise_schedule: NoiseSchedule
    model_type: ModelType
    sigma_data: float = 0.5


def read_scheduler(path: Path) -> SchedulerSpec:
    """`read_scheduler_config` of a folder's `scheduler/scheduler_config.json`. Raises: ModelFormatError."""
    return read_scheduler_config(read_json(path, SCHEDULER_CONFIG))


def read_scheduler_config(config: Mapping[str, Any]) -> SchedulerSpec:
    """From the configuration of a diffusers scheduler, what the network was trained on.

    What only places the steps of sampling is ignored, as the time grid is ours: `steps_offset`,
    `timestep_spacing`, `use_karras_sigmas` and its like. None of them moves what the network is fed for a
    given noise level. The same holds of dynamic shifting.

    Raises:
        ModelFormatError: a scheduler that is not known, or values that give no noise schedule.
    """
    name = config.get("_class_name", "DDPMScheduler")
    if name == "TimeTunerScheduler" and isinstance(config.get("base_scheduler"), Mapping):
        return read_scheduler_config(config["base_scheduler"])  # of a pipeline that was tuned before
    if name in FLOW_SCHEDULERS or (name in VP_SCHEDULERS and config.get("use_flow_sigmas")):
        return _flow(config)
    if name in EDM_SCHEDULERS:
        return _edm(config)
    if name not in VP_SCHEDULERS:
        accepted = ", ".join((*VP_SCHEDULERS, *FLOW_SCHEDULERS, *EDM_SCHEDULERS))
        raise ModelFormatError(SCHEDULER_CONFIG, f"_class_name is {name!r}; accepted: {accepted}")
    return _vp(config)


def _vp(config: Mapping[str, Any]) -> SchedulerSpec:
    prediction = _choice(config, "prediction_type", "epsilon", tuple(MODEL_TYPES))
    _choice(config, "timestep_type", "discrete", ("discrete",))
    _num_train_timesteps(config)
    try:
        # DDPMScheduler knows every beta schedule, and saved configurations have every value.
        scheduler = diffusers_class("DDPMScheduler").from_config(dict(config))
        alphas_cumprod = scheduler.alphas_cumprod.double()
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod[-1] = MIN_ALPHA_CUMPROD
        return SchedulerSpec(NoiseScheduleVP("discrete", alphas_cumprod=alphas_cumprod), MODEL_TYPES[prediction])
    except Exception as error:  # diffusers raises whatever its constructor meets
        raise ModelFormatError(SCHEDULER_CONFIG, f"no noise schedule can be built from it ({error})") from None


def _flow(config: Mapping[str, Any]) -> SchedulerSpec:
    _choice(config, "prediction_type", "flow_prediction", ("flow_prediction",))
    _choice(config, "invert_sigmas", False, (False,))
    shift = 1.0 if config.get("use_dynamic_shifting") else _positive(config, "shift", config.get("flow_shift", 1.0))
    return SchedulerSpec(NoiseScheduleFlow(shift, _num_train_timesteps(config)), "flow")


def _edm(config: Mapping[str, Any]) -> SchedulerSpec:
    # F_theta of EDM is diffusers' "epsilon" here; its "v_prediction" is -F_theta.
    prediction = _choice(config, "prediction_type", "epsilon", ("epsilon", "v_prediction"))
    sigma_min, sigma_max = _positive(config, "sigma_min", 0.002), _positive(config, "sigma_max", 80.0)
    if sigma_min >= sigma_max:
        message = f"sigma_min is {sigma_min}, sigma_max is {sigma_max}; accepted: sigma_min below sigma_max"
        raise ModelFormatError(SCHEDULER_CONFIG, message)
    sigma_data = _positive(config, "sigma_data", 0.5)
    signed = sigma_data if prediction == "epsilon" else -sigma_data
    return SchedulerSpec(NoiseScheduleEDM(sigma_min, sigma_max), "edm", signed)


def _choice(config: Mapping[str, Any], key: str, default: Any, accepted: tuple[Any, ...]) -> Any:
    value = config.get(key, default)
    if value not in accepted:
        raise ModelFormatError(SCHEDULER_CONFIG, f"{key} is {value!r}; accepted: {', '.join(map(str, accepted))}")
    return value


def _positive(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ModelFormatError(SCHEDULER_CONFIG, f"{key} is {value!r}; accepted: a number above 0")
    return float(value)


def _num_train_timesteps(config: Mapping[str, Any]) -> int:
    num_steps = config.get("num_train_timesteps", 1000)
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or not 1 <= num_steps <= 100_000:
        raise ModelFormatError(SCHEDULER_CONFIG, f"num_train_timesteps is {num_steps!r}; accepted: 1 to 100000")
    return num_steps
