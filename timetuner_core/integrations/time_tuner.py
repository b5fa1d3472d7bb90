"""Installed as the top-level module `time_tuner`, the import name of the original code."""

from timetuner_core import NoiseScheduleVP, TimeTuner, model_wrapper

__all__ = ["NoiseScheduleVP", "TimeTuner", "model_wrapper"]
