"""Timestep tuning for frozen diffusion models: schedules, model wrapper, samplers, tuners, whole pipelines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import timetuner_core.integrations.diffusers  # noqa: F401 (saved pipelines name it, and find it only if it is imported)

if TYPE_CHECKING:
    from timetuner_core.guided_model import model_wrapper
    from timetuner_core.noise_schedule import NoiseScheduleVP
    from timetuner_core.pipelines.schedule import PipelineSchedule
    from timetuner_core.pipelines.tuning import tune_pipeline
    from timetuner_core.time_tuner import TimeTuner

__all__ = ["NoiseScheduleVP", "PipelineSchedule", "TimeTuner", "model_wrapper", "tune_pipeline"]

_MODULES = {
    "NoiseScheduleVP": "noise_schedule",
    "PipelineSchedule": "pipelines.schedule",
    "TimeTuner": "time_tuner",
    "model_wrapper": "guided_model",
    "tune_pipeline": "pipelines.tuning",
}


def __getattr__(name: str) -> Any:
    """Import the class or function when it is first used: PyTorch takes a second, which `catalog` does not need."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
