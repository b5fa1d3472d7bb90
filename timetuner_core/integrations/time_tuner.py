"""Installed as the top-level module `time_tuner`, the import name of the original code."""

from timetuner_core.guided_model import model_wrapper
from timetuner_core.noise_schedule import NoiseScheduleVP
from timetuner_core.time_tuner import TimeTuner

__all__ = ["NoiseScheduleVP", "TimeTuner", "model_wrapper"]
