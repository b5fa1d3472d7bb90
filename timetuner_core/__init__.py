"""Timestep tuning for frozen diffusion models: schedules, model wrapper, samplers, tuners."""

import timetuner_core.integrations.diffusers  # noqa: F401 (saved pipelines name it, and find it only if it is imported)
from timetuner_core.model_wrapper import model_wrapper
from timetuner_core.noise_schedule import NoiseScheduleVP
from timetuner_core.time_tuner import TimeTuner

__all__ = ["NoiseScheduleVP", "TimeTuner", "model_wrapper"]
