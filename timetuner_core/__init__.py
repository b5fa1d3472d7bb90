"""Timestep tuning for frozen diffusion models: schedules, model wrapper, samplers, tuners."""

import timetuner_core.integrations.diffusers  # DiffusionPipeline.from_pretrained finds it among imported modules only
from timetuner_core.model_wrapper import model_wrapper
from timetuner_core.noise_schedule import NoiseScheduleVP
from timetuner_core.time_tuner import TimeTuner

__all__ = ["NoiseScheduleVP", "TimeTuner", "model_wrapper"]
