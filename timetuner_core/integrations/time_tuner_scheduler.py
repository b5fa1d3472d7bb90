"""A diffusers scheduler that samples by a tuned schedule, in any `DiffusionPipeline`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.import_utils import DummyObject
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from timetuner_core.clipping import Clipping
from timetuner_core.coefficients import Coefficient, NoiseLevel
from timetuner_core.grids import check_t_ratios, check_timesteps
from timetuner_core.guided_model import GuidedModel
from timetuner_core.models.schedulers import EDM_SCHEDULERS, FLOW_SCHEDULERS, VP_SCHEDULERS, read_scheduler_config
from timetuner_core.noise_schedule import NoiseScheduleFlow
from timetuner_core.samplers import SAMPLERS, Generators, Past, Sampler, get_sampler, remember
from timetuner_core.samplers.solver_table import SolverTable, solver_of

# Saved pipelines name this module for the class; see its docstring.
MODULE = "timetuner_core.integrations.diffusers"

# Flow pipelines start from noise of standard deviation 1, so a grid has to start where sigma is nearly 1.
MIN_FLOW_START = 0.99

# Half precision rounds what a pipeline passes back to `step` by up to this share of the largest time.
TIMESTEP_TOLERANCE = 1 / 256


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
    keep everything; a process that loads a saved pipeline has to `import timetuner_core` first.

    The configuration repeats the fields of `base_scheduler`, so that pipelines find what they read there
    (`num_train_timesteps`, say), and `DDIMScheduler.from_config(pipeline.scheduler.config)` goes back to a scheduler
    of diffusers with the right betas.

    Args:
        base_scheduler: the configuration of the scheduler that the pipeline came with.
        sampler: one without noise, or one that calls the network once per step. With several calls per step, a
            pipeline goes through `timesteps` as it does with diffusers' Heun, of which each call has one, and the
            sampler's own coefficients are taken from its `SolverTable`. eta: for DDIM.
        timesteps: `num_steps + 1` falling times in `[0, T]`. t_ratios: one per step; None is untuned.
        clipping: how x0 is clipped, as `clipping_text` writes it; None is as `base_scheduler` says.
        solver_table: a learned solver's coefficients, as `SolverTable.to_dict` writes them, in place of the sampler's
            own. They hold from the first step on. An image-to-image pipeline of a `strength` below 1 starts later, and
            takes the sampler's own coefficients on the schedule's grid, with its ratios.

    Attributes:
        order: the sampler's calls of the network per step.
        timesteps: what the network is told at each call, `(num_calls,)`, float32. A step to time 0 has one call.
        sigmas: noise levels, `(num_calls + 1,)`, float32: sigma_t of flow models, else sigma_t / alpha_t.
        init_noise_sigma: the standard deviation of the noise to start from.

    Raises:
        ValueError: a sampler with noise and several calls per step, times, ratios or a table that do not fit, or a flow
            model's grid that starts below the noise that its pipelines start from.
        ModelFormatError: a base scheduler whose noise schedule is not supported.
    """

    __module__ = MODULE
    order = 1
    _compatibles = [*VP_SCHEDULERS, *FLOW_SCHEDULERS, *EDM_SCHEDULERS]  # noqa: RUF012 (diffusers' own name)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        base_scheduler: dict[str, Any],
        timesteps: list[float],
        t_ratios: list[float] | None = None,
        sampler: str = "ddim",
        eta: float = 0.0,
        clipping: str | None = None,
        solver_table: dict[str, Any] | None = None,
    ) -> None:
        repeated = {k: v for k, v in base_scheduler.items() if k not in self.config and not k.startswith("_")}
        # diffusers lists arguments that it takes to be left at their defaults, those given by position among them, and
        # from_config drops what is listed: list none.
        self.register_to_config(**repeated, _use_default_values=[])  # type: ignore[no-untyped-call]
        self._spec = read_scheduler_config(base_scheduler)
        if clipping is not None:
            self._spec = self._spec._replace(clipping=Clipping.parse(clipping))
        self.noise_schedule = self._spec.noise_schedule
        self._sampler, self._eta = get_sampler(sampler), eta
        if self._sampler.calls_per_step != 1 and not self._sampler.facts.is_table:
            accepted = "one without noise, or with one call per step"
            raise ValueError(
                f"sampler is {sampler!r}; accepted in a pipeline: {accepted}, such as {', '.join(SAMPLERS)}"
            )
        self.order = self._sampler.calls_per_step
        self._steps = check_timesteps(self.noise_schedule, timesteps)
        ratios = check_t_ratios(self.noise_schedule, self._steps, t_ratios)
        self._solver = self._own_from(0)
        if solver_table is not None:
            if eta:
                raise ValueError(f"eta is {eta}; accepted, with a solver_table: 0")
            self._solver = solver_of(sampler, SolverTable.from_dict(solver_table), self._steps)
        self._grid, self._ratios = self._solver.in_calls(self._steps, ratios)
        self.init_noise_sigma = self.noise_schedule.starting_std(self._grid[0])
        if self._is_flow and self.init_noise_sigma < MIN_FLOW_START:
            raise ValueError(
                f"timesteps starts at noise level {self.init_noise_sigma:.4g}; accepted: {MIN_FLOW_START} to 1, "
                "as pipelines of flow models start from noise of standard deviation 1"
            )
        self.num_inference_steps = len(ratios)
        self.set_timesteps(self.num_inference_steps)

    @classmethod
    def from_schedule(cls, base_scheduler: Any, schedule: Mapping[str, Any]) -> "TimeTunerScheduler":
        """The scheduler for a pipeline, from the scheduler it has and a schedule as the service's API gives it."""
        names = ("timesteps", "t_ratios", "sampler", "eta", "clipping", "solver_table")
        # The configuration as it would be saved: `config` itself marks fields that its class has left at its own
        # defaults, and other classes would then take their own.
        config = json.loads(base_scheduler.to_json_string())
        if isinstance(base_scheduler, cls):  # The new schedule takes its place.
            config = config["base_scheduler"]
        scheduler: TimeTunerScheduler = cls(config, **{name: schedule[name] for name in names if name in schedule})
        return scheduler

    @property
    def compatibles(self) -> list[type]:
        """The diffusers classes that accept this configuration: the base scheduler's, without those that cannot run."""
        base: Any = getattr(diffusers, self.config["base_scheduler"].get("_class_name", "DDPMScheduler"))
        return [each for each in base._get_compatibles() if not isinstance(each, DummyObject)]

    def save_pretrained(
        self,
        save_directory: str | PathLike[Any],
        push_to_hub: bool = False,
        *,
        with_loader: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the configuration, as every scheduler does.

        Args:
            with_loader: also write a file of Python, which makes a pipeline's folder load with
                `trust_remote_code=True` instead of `import timetuner_core`; without that argument it no longer loads.
        """
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if with_loader:
            loader = Path(save_directory) / f"{MODULE}.py"
            loader.write_text(f"from {MODULE} import {type(self).__name__}  # noqa: F401\n", encoding="utf-8")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,
    ) -> None:
        """Start over.

        Args:
            num_inference_steps: the schedule's number of steps.
            timesteps: `(num_calls,)`. Alone, they have to be the schedule's own.
            sigmas: `(num_calls,)`, or of flow models `(num_steps,)`. Pipelines of flow models always pass some; they
                are counted and not followed, as the schedule has placed its steps. Any others have to be the
                schedule's own.
            mu: the shift that pipelines of flow models compute from the size of the image; it places steps, too.
                Pipelines that pass `timesteps` and `sigmas` (CogView4) tell the network the time before that shift.
            original_inference_steps: not looked at; LCM's pipeline passes it.

        Raises:
            ValueError: another number of steps than the schedule has, or a user's own `timesteps` or `sigmas`.
        """
        self._check_count("num_inference_steps", num_inference_steps)
        # A flow model's pipeline that passes sigmas places steps, and does not know of calls.
        count = self.num_inference_steps if self._is_flow and sigmas is not None else self._num_calls
        self._check_count("timesteps", None if timesteps is None else len(timesteps), count)
        self._check_count("sigmas", None if sigmas is None else len(sigmas), count)
        told = self.noise_schedule.model_input_time(self._grid[:-1] * self._ratios)
        if timesteps is not None and sigmas is not None:
            told = self._before_shift(told, mu)
        elif timesteps is not None:
            _check_own("timesteps", timesteps, told, tolerance=0.5)  # A list of integers is rounded.
        elif sigmas is not None and not self._is_flow:
            _check_own("sigmas", sigmas, self._noise_levels()[:-1], tolerance=1e-3)
        self.timesteps = told.to(device, torch.float32)
        self._told = told.float().tolist()
        self._tolerance = TIMESTEP_TOLERANCE * max(abs(t) for t in self._told)
        self.sigmas = self._noise_levels().float()
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._history: tuple[Past, ...] = ()
        self._running = self._solver

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start in the middle, as image-to-image pipelines do.

        Raises:
            ValueError: no step is left, or a call within a step.
        """
        if not 0 <= begin_index < self._num_calls:
            least = 1 / self.num_inference_steps
            raise ValueError(
                f"begin_index is {begin_index}; accepted: 0 to {self._num_calls - 1}; "
                f"an image-to-image `strength` of {least:.3g} or more leaves a step"
            )
        if begin_index % self.order:
            accepted = f"a multiple of {self.order}, as a step of {self.config['sampler']} has so many calls"
            raise ValueError(f"begin_index is {begin_index}; accepted: {accepted}")
        self._begin_index, self._step_index = begin_index, None

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input for x_t: x_t itself, but for EDM's networks."""
        if self._spec.model_type != "edm":
            return sample
        t = self._grid[self._next_step(timestep)]
        return Coefficient(self._model(sample).input_scale(t)) * sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators | Literal["not passed"] = "not passed",
        return_dict: bool = True,
        *,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
    ) -> TimeTunerSchedulerOutput | tuple[Tensor, Tensor]:
        """One step from x_t to x_s, given the network's output at `timesteps[i]`; steps go in order.

        With a sampler of several calls per step, it is from one call to the next.

        The arithmetic is in float32 at least, whatever the dtype of the pipeline.

        Args:
            model_output: `(B, C, ...)`, or `(B, 2C, ...)` if the network was trained to predict a variance as well,
                which no sampler here uses.
            timestep: `timesteps[i]`. The first call finds its step by it, unless `set_begin_index` was called.
            sample: x_t, `(B, C, ...)`.
            generator: for samplers that add noise, one, or one per sample; None is torch's global one.
            eta: pipelines pass 0 unless told otherwise, and the schedule's own is used; another one is refused.
            use_clipped_model_output: not supported.

        Raises:
            ValueError: a step past the end, or another one than is next; `eta` or `use_clipped_model_output` that the
                schedule does not have; a sampler that adds noise in a pipeline that passes no `generator`.
        """
        if eta not in (None, 0, self._eta):
            raise ValueError(f"eta is {eta}; accepted: {self._eta}, that of the schedule, for which 0 stands too")
        if use_clipped_model_output:
            raise ValueError("use_clipped_model_output is True; accepted: False")
        i = self._next_step(timestep)
        output, x_t = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (model_output, sample))
        if output.shape[1] == 2 * x_t.shape[1]:
            output = output.chunk(2, dim=1)[0]
        if self._step_index is None:
            # A learned solver's later rows mix in predictions of all calls before, which a start in the middle lacks.
            self._running = self._own_from(i // self.order) if i > 0 else self._solver
        step_fn = self._running.step_fn(self._model(output), self.noise_schedule)
        if generator == "not passed":
            if step_fn.adds_noise(self._eta):
                raise ValueError(
                    f"the sampler {self.config['sampler']!r} adds noise, and step was given no generator, so that no "
                    "seed would reproduce it; accepted: generator=..., or in pipelines that pass none, a sampler "
                    "without noise, such as 'ddim' with eta 0"
                )
            generator = None
        t, s = self._grid[i], self._grid[i + 1]
        x_s, x0 = step_fn(x_t, t, s, t_ratio=self._ratios[i], eta=self._eta, generator=generator, history=self._history)
        self._history = remember(step_fn, self._history, Past(t, x_t, x0))
        self._step_index = i + 1
        x_s, x0 = x_s.to(sample.dtype), x0.to(sample.dtype)
        return TimeTunerSchedulerOutput(x_s, x0) if return_dict else (x_s, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t from x0 `(B, ...)` and noise, at entries of `timesteps`, `(B,)`, not before the step that is next.

        Raises:
            ValueError: a timestep that is none of them, or no timestep at all.
        """
        if timesteps.numel() == 0:
            least = 1 / self.num_inference_steps
            raise ValueError(f"timesteps is empty; a `strength` of {least:.3g} or more leaves a step")
        first = self._step_index or self._begin_index or 0
        index = [self._index_of(timestep, first) for timestep in timesteps.flatten()]
        t = self._grid[index].to(original_samples.device)
        level = NoiseLevel.at(self.noise_schedule, t, original_samples)
        return level.alpha * original_samples + level.sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` by the name and in the order of pipelines of flow models."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.num_inference_steps

    @property
    def _is_flow(self) -> bool:
        return isinstance(self.noise_schedule, NoiseScheduleFlow)

    @property
    def _num_calls(self) -> int:
        return len(self._ratios)

    def _own_from(self, first: int) -> Sampler:
        """The sampler with its own coefficients, from a step on: by a table, if a step has several calls."""
        if self.order == 1:
            return self._sampler
        table = SolverTable.of_sampler(self._sampler, self.noise_schedule, self._steps[first:], self._spec.clipping)
        return table.sampler(self._sampler.name)

    def _noise_levels(self) -> Tensor:
        """`sigmas` in float64."""
        sigma_t = self.noise_schedule.marginal_std(self._grid)
        return sigma_t if self._is_flow else sigma_t / self.noise_schedule.marginal_alpha(self._grid)

    def _before_shift(self, told: Tensor, mu: float | None) -> Tensor:
        """Times `(num_steps,)` of which diffusers' shift makes `told`: s shifted by m is m s / (1 + (m - 1) s)."""
        shift = float(self.config.get("shift", 1.0))
        if self.config.get("use_dynamic_shifting") and mu is not None:
            shift = mu if self.config.get("time_shift_type") == "linear" else math.exp(mu)
        num_train_timesteps: int = self.config["num_train_timesteps"]
        return told / (shift - (shift - 1) * told / num_train_timesteps)

    def _check_count(self, field: str, count: int | None, expected: int | None = None) -> None:
        expected = self.num_inference_steps if expected is None else expected
        if count not in (None, expected):
            counted = "steps" if expected == self.num_inference_steps else "network calls"
            raise ValueError(f"{field} is {count}; accepted: {expected}, the schedule's {counted}")

    def _next_step(self, timestep: Any) -> int:
        """The index of the step that is next. Raises: ValueError, if it is none, or if `timestep` is another's."""
        if self._step_index is None and self._begin_index is None:
            return self._index_of(timestep, 0, self.order)
        index = self._step_index if self._step_index is not None else self._begin_index
        assert index is not None
        if index >= self._num_calls:
            raise ValueError(f"all {self.num_inference_steps} steps are done; accepted: set_timesteps to start over")
        expected, given = self._told[index], _number(timestep)
        if abs(given - expected) > self._tolerance:
            raise ValueError(f"timestep is {given:.6g}; accepted: {expected:.6g}, that of step {index}, which is next")
        return index

    def _index_of(self, timestep: Any, first: int, every: int = 1) -> int:
        """The call, from `first` on, at which the network is told `timestep`. Raises: ValueError, if there is none."""
        given, calls = _number(timestep), range(first, self._num_calls, every)
        index = min(calls, key=lambda i: abs(self._told[i] - given), default=None)
        if index is None or abs(self._told[index] - given) > self._tolerance:
            raise ValueError(f"timestep is {given:.6g}; accepted: {self._told[first::every]}")
        return index

    def _model(self, output: Tensor) -> GuidedModel:
        """A network that has already answered."""
        return GuidedModel(
            lambda *_: output,
            self.noise_schedule,
            self._spec.model_type,
            sigma_data=self._spec.sigma_data,
            clipping=self._spec.clipping,
        )


def _number(timestep: Any) -> float:
    """A timestep as pipelines pass it: a number, a tensor of one element, or one element per sample, all equal."""
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)


def _check_own(field: str, given: Any, own: Tensor, tolerance: float) -> None:
    """Raises: ValueError, if `given` are not the schedule's own values, `own`."""
    values = torch.as_tensor(given, dtype=torch.float64).flatten()
    if bool(((values - own).abs() > tolerance).any()):
        accepted = [round(value, 3) for value in own.tolist()]
        raise ValueError(f"{field} is {values.tolist()}; accepted: none, or the schedule's own, {accepted}")
