"""A diffusers scheduler that samples by a tuned schedule, in any `DiffusionPipeline`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from timetuner_core.grids import check_t_ratios, check_timesteps
from timetuner_core.model_wrapper import GuidedModel
from timetuner_core.models.schedulers import read_scheduler_config
from timetuner_core.samplers import SAMPLERS, Generators, Past, get_sampler, remember, scaled


@dataclass
class TimeTunerSchedulerOutput(BaseOutput):
    """x_s and the x0 predicted on the way, both of the sample's shape."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class TimeTunerScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A stored schedule (sampler, time grid and ratios) behind diffusers' scheduler interface.

        pipeline.scheduler = TimeTunerScheduler.from_schedule(pipeline.scheduler, schedule)
        pipeline(num_inference_steps=schedule["num_steps"])

    The network's own noise schedule and prediction type are those of `base_scheduler`. Guidance is the
    pipeline's business: use the scale that the schedule was tuned for. `save_pretrained` and `from_pretrained`
    keep everything.

    Args:
        base_scheduler: the configuration of the scheduler that the pipeline came with.
        sampler: one that calls the network once per step. eta: for DDIM.
        timesteps: `num_steps + 1` falling times in `[0, T]`. t_ratios: one per step; None is untuned.

    Raises:
        ValueError: a sampler with several calls per step, or times and ratios that do not fit.
        ModelFormatError: a base scheduler whose noise schedule is not supported.
    """

    order = 1
    _compatibles: list[str] = []  # noqa: RUF012 (diffusers' own name)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        base_scheduler: dict[str, Any],
        timesteps: list[float],
        t_ratios: list[float] | None = None,
        sampler: str = "ddim",
        eta: float = 0.0,
    ) -> None:
        self._spec = read_scheduler_config(base_scheduler)
        self.noise_schedule = self._spec.noise_schedule
        self._sampler, self._eta = get_sampler(sampler), eta
        if self._sampler.calls_per_step != 1:
            accepted = ", ".join(name for name, each in SAMPLERS.items() if each.calls_per_step == 1)
            raise ValueError(f"sampler is {sampler!r}; accepted in a pipeline, one call per step: {accepted}")
        self._grid = check_timesteps(self.noise_schedule, timesteps)
        self._ratios = check_t_ratios(self.noise_schedule, self._grid, t_ratios)
        self.init_noise_sigma = self.noise_schedule.prior_std
        self.num_inference_steps = len(self._ratios)
        self.set_timesteps(self.num_inference_steps)

    @classmethod
    def from_schedule(cls, base_scheduler: Any, schedule: Mapping[str, Any]) -> "TimeTunerScheduler":
        """From the scheduler a pipeline has, and a schedule as the service's API gives it."""
        names = ("timesteps", "t_ratios", "sampler", "eta")
        config = {"_class_name": type(base_scheduler).__name__, **base_scheduler.config}
        if isinstance(base_scheduler, cls):  # another schedule takes its place
            config = config["base_scheduler"]
        scheduler: TimeTunerScheduler = cls(config, **{name: schedule[name] for name in names if name in schedule})
        return scheduler

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Start over. `timesteps` then holds what the network is fed at each step, `(num_steps,)`, float32.

        Raises:
            ValueError: another number of steps than the schedule has.
        """
        if num_inference_steps != self.num_inference_steps:
            raise ValueError(f"num_inference_steps is {num_inference_steps}; accepted: {self.num_inference_steps}")
        t_input = self.noise_schedule.model_input_time(self._grid[:-1] * self._ratios)
        self.timesteps = t_input.to(device, torch.float32)
        self.set_begin_index(0)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start in the middle, as image-to-image pipelines do."""
        self._step_index = begin_index
        self._history: tuple[Past, ...] = ()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input for x_t: x_t itself, but for EDM's networks."""
        model = self._model(sample)
        return scaled(model.input_scale(self._grid[self._step_index]), sample)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> TimeTunerSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_t to x_s, given what the network says at `timesteps[i]`; steps go in order.

        Args:
            model_output: `(B, ...)`.
            timestep: not looked at.
            sample: x_t, of `model_output`'s shape.
            generator: for samplers that add noise, one, or one per sample.
        """
        i = self._step_index
        step_fn = self._sampler.step_fn(self._model(model_output), self.noise_schedule)
        t, s = self._grid[i], self._grid[i + 1]
        x_s, x0 = step_fn(
            sample, t, s, t_ratio=self._ratios[i], eta=self._eta, generator=generator, history=self._history
        )
        self._history = remember(step_fn, self._history, Past(t, sample, x0))
        self._step_index = i + 1
        return TimeTunerSchedulerOutput(x_s, x0) if return_dict else (x_s, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t from x0 `(B, ...)` and noise, at entries of `timesteps`, `(B,)`, not before the step that is next.

        Raises:
            ValueError: a timestep that is none of them.
        """
        found = self.timesteps[self._step_index :, None] == timesteps.to(self.timesteps)
        if not bool(found.any(dim=0).all()):
            accepted = self.timesteps[self._step_index :].tolist()
            raise ValueError(f"timesteps is {timesteps.tolist()}; accepted: {accepted}")
        index = self._step_index + found.int().argmax(dim=0).cpu()
        t = self._grid[index].to(original_samples.device)
        alpha_t, sigma_t = self.noise_schedule.marginal_alpha(t), self.noise_schedule.marginal_std(t)
        return scaled(alpha_t, original_samples) + scaled(sigma_t, noise)

    def __len__(self) -> int:
        return self.num_inference_steps

    def _model(self, output: Tensor) -> GuidedModel:
        """A network that has already answered."""
        spec = self._spec
        return GuidedModel(
            lambda *_: output,
            self.noise_schedule,
            spec.model_type,
            sigma_data=spec.sigma_data,
            clipping=spec.clipping,
        )
