"""Whole diffusers pipelines: many runs that share the calls of their denoiser, and the tuning of their schedules."""
