"""A tuning run: its problem and its state."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from timetuner_core.guided_model import GuidedModel
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.samplers import SamplerStep, StepFn, adds_noise
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.tuning.gauss_newton import MEMORY

StepObjective = Literal["next_eps", "teacher_step"]


@dataclass(frozen=True)
class TuningProblem:
    """A sampler on a grid, and the population its ratios are tuned on.

    Attributes:
        timesteps: `(num_steps + 1,)`, float64, falling.
        population: what batches are drawn from, with replacement: data x0 for `tune_next_eps`, initial
            noise x_T for `tune_end_to_end`; `(P, ...)`. condition: `(P, ...)` or None.
        guidance_scales: `(P,)`, the guidance scale of each of the population, where the schedule is for an interval of
            them; None: that of `model_fn`.
        network_dtype: of the network's weights, whose rounding a difference quotient has to exceed.
        step_kwargs: handed to every `step_fn` call (eta, uncond_condition, ...).
    """

    model_fn: GuidedModel
    noise_schedule: NoiseSchedule
    step_fn: StepFn
    timesteps: Tensor
    population: Tensor
    condition: Tensor | None = None
    batch_size: int = 16
    seed: int = 0
    step_kwargs: Mapping[str, Any] = field(default_factory=dict)
    guidance_scales: Tensor | None = None
    network_dtype: torch.dtype = torch.float32

    @property
    def num_steps(self) -> int:
        return len(self.timesteps) - 1

    @property
    def adds_noise(self) -> bool:
        return adds_noise(self.step_fn, self.step_kwargs.get("eta", 0))

    def starting_factor(self, t: Tensor) -> float:
        """The factor that makes the population's initial noise that of a grid which starts at another time."""
        return self.noise_schedule.starting_std(t) / self.noise_schedule.starting_std(self.timesteps[0])

    def condition_of(self, index: Tensor) -> Tensor | None:
        """The condition of some of the population."""
        return None if self.condition is None else self.condition[index]

    def model_fn_of(self, index: Tensor) -> GuidedModel:
        """The model as it is guided for some of the population, `(B,)`."""
        if self.guidance_scales is None:
            return self.model_fn
        return replace(self.model_fn, guidance_scale=self.guidance_scales[index])

    def step_fn_of(self, index: Tensor) -> StepFn:
        """The step function as it is guided for some of the population, `(B,)`."""
        if self.guidance_scales is None:
            return self.step_fn
        if not isinstance(self.step_fn, SamplerStep):
            raise ValueError("the step function is no sampler's; accepted, with guidance_scales: one of a Sampler")
        return replace(self.step_fn, model_fn=self.model_fn_of(index))

    def check_one_scale(self, tuner: str) -> None:
        """Refuse an interval of guidance scales for a tuner that guides all samples alike. Raises: ValueError."""
        if self.guidance_scales is not None:
            raise ValueError(f"guidance_scales are given; accepted by the tuner {tuner}: one guidance_scale")

    def step_kwargs_with(self, condition: Tensor | None, noise: Tensor | None) -> dict[str, Any]:
        """`step_kwargs`, with condition and noise if there are any: a user's own `step_fn` need not take them."""
        given = {"condition": condition, "noise": noise}
        return {**self.step_kwargs, **{name: value for name, value in given.items() if value is not None}}

    def ratio_bounds(self, timesteps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Per step of a grid, the problem's own if none is given, the least and greatest ratio that keep
        conditioning within `[t_min, T]`, wherever from t to s the step calls the network."""
        timesteps = self.timesteps if timesteps is None else timesteps
        calls_on_the_way = isinstance(self.step_fn, SamplerStep) and self.step_fn.sampler.calls_per_step > 1
        return ratio_bounds(self.noise_schedule, timesteps, calls_on_the_way=calls_on_the_way)


def ratio_bounds(
    noise_schedule: NoiseSchedule, timesteps: Tensor, *, calls_on_the_way: bool = False
) -> tuple[Tensor, Tensor]:
    """Per step of a grid, the least and greatest ratio that keep conditioning within `[t_min, T]`.

    Args:
        calls_on_the_way: whether the network is called between t and s, too.
    """
    t, s = timesteps[:-1], timesteps[1:]
    lowest = torch.where(s > 0, s, t) if calls_on_the_way else t
    floor = lowest.clamp(max=noise_schedule.t_min)
    return floor / lowest, noise_schedule.T / t


@dataclass
class TuningState:
    """Progress of a run, all that resuming needs: float64 tensors on the CPU, one row per step.

    Attributes:
        timesteps: `(num_steps + 1,)`, which only tuners that move the grid change. t_ratios: `(num_steps,)`.
        iterations: how many each step has had; done: whether it needs no more; `(num_steps,)`.
        memory: the optimiser's, `(num_steps, MEMORY)`.
        solver_table: the learned solver, which only tuners of solvers make; None is the sampler's own.
        loss: the last iteration's; initial_loss: the first's, at `r = 1`; NaN before a step starts; `(num_steps,)`.
    """

    t_ratios: Tensor
    timesteps: Tensor
    iterations: Tensor
    memory: Tensor
    loss: Tensor
    initial_loss: Tensor
    done: Tensor
    solver_table: SolverTable | None = None

    @classmethod
    def start(cls, timesteps: Tensor) -> "TuningState":
        """Nothing tuned yet, on a grid `(num_steps + 1,)`."""
        ones = torch.ones(len(timesteps) - 1, dtype=torch.float64)
        zeros, nans = torch.zeros_like(ones), torch.full_like(ones, torch.nan)
        memory = ones.new_zeros(len(ones), MEMORY)
        done = torch.zeros(len(ones), dtype=torch.bool)
        return cls(ones, timesteps.double().cpu().clone(), zeros, memory, nans, nans.clone(), done)

    def note(self, steps: list[int], loss: Tensor, iterations: int = 1) -> None:
        """Count iterations on `steps`, with their last losses."""
        first = [i for i in steps if self.iterations[i] == 0]
        self.iterations[steps] += iterations
        self.loss[steps] = loss.detach().double().cpu()
        self.initial_loss[first] = self.loss[first]


def check_numbers(problem: TuningProblem, **numbers: float) -> None:
    for name, value in (("batch_size", problem.batch_size), *numbers.items()):
        at_least_one = isinstance(value, int) and name != "lr"
        if at_least_one and value < 1:
            raise ValueError(f"{name} is {value}; accepted: 1 or more")
        if not value > 0:
            raise ValueError(f"{name} is {value}; accepted: above 0")


def whole_batches(problem: TuningProblem, size: int | None = None) -> Iterator[Tensor]:
    """The population's first `size` rows, default all, by batch, the last filled up from the start: a condition among
    `step_kwargs` may have as many rows as a batch."""
    size = len(problem.population) if size is None else size
    for start in range(0, size, problem.batch_size):
        yield (torch.arange(start, start + problem.batch_size) % size).to(problem.population.device)
