"""A tuning run: the problem, its state, and its random draws."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from timetuner_core.guided_model import GuidedModel
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.samplers import (
    Past,
    SamplerStep,
    StepFn,
    adds_noise,
    history_length,
    remember,
    scaled,
    with_history,
)
from timetuner_core.tuning.gauss_newton import MEMORY

StepObjective = Literal["next_eps", "teacher_step"]


@dataclass(frozen=True)
class TuningProblem:
    """A sampler on a grid, and the population its ratios are tuned on.

    Attributes:
        timesteps: `(num_steps + 1,)`, float64, falling.
        population: what batches are drawn from, with replacement: data x0 for `tune_next_eps`, initial
            noise x_T for `tune_end_to_end`; `(P, ...)`. condition: `(P, ...)` or None.
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

    @property
    def num_steps(self) -> int:
        return len(self.timesteps) - 1

    @property
    def adds_noise(self) -> bool:
        return adds_noise(self.step_fn, self.step_kwargs.get("eta", 0))

    def ratio_bounds(self, timesteps: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Per step of a grid, the problem's own if none is given, the least and greatest ratio that keep
        conditioning within `[t_min, T]`, wherever from t to s the step calls the network."""
        timesteps = self.timesteps if timesteps is None else timesteps
        t, s = timesteps[:-1], timesteps[1:]
        calls_on_the_way = isinstance(self.step_fn, SamplerStep) and self.step_fn.sampler.calls_per_step > 1
        lowest = torch.where(s > 0, s, t) if calls_on_the_way else t
        floor = lowest.clamp(max=self.noise_schedule.t_min)
        return floor / lowest, self.noise_schedule.T / t


@dataclass(frozen=True)
class Carried:
    """The population on its way: x_t `(P, ...)`, and the earlier steps that a multistep sampler remembers."""

    x_t: Tensor
    history: tuple[Past, ...] = ()

    def rows(self, index: Tensor) -> "Carried":
        return Carried(self.x_t[index], tuple(Past(p.t, p.x[index], p.x0[index]) for p in self.history))


@dataclass
class TuningState:
    """Progress of a run, all that resuming needs: float64 tensors on the CPU, one row per step.

    Attributes:
        timesteps: `(num_steps + 1,)`, which only tuners that move the grid change. t_ratios: `(num_steps,)`.
        iterations: how many each step has had; done: whether it needs no more; `(num_steps,)`.
        memory: the optimiser's, `(num_steps, MEMORY)`.
        loss: the last iteration's; initial_loss: the first's, at `r = 1`; NaN before a step starts; `(num_steps,)`.
    """

    t_ratios: Tensor
    timesteps: Tensor
    iterations: Tensor
    memory: Tensor
    loss: Tensor
    initial_loss: Tensor
    done: Tensor

    @classmethod
    def start(cls, timesteps: Tensor) -> "TuningState":
        """Nothing tuned yet, on a grid `(num_steps + 1,)`."""
        ones = torch.ones(len(timesteps) - 1, dtype=torch.float64)
        zeros, nans = torch.zeros_like(ones), torch.full_like(ones, torch.nan)
        memory = ones.new_zeros(len(ones), MEMORY)
        done = torch.zeros(len(ones), dtype=torch.bool)
        return cls(ones, timesteps.double().cpu().clone(), zeros, memory, nans, nans.clone(), done)

    def note(self, steps: list[int], loss: Tensor, iterations: int = 1) -> None:
        """So many more iterations on `steps`, with these losses."""
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


@torch.no_grad()
def carry_forward(problem: TuningProblem, carried: Carried, i: int, t_ratio: Tensor) -> Carried:
    """The population after step `i`, in chunks of the batch size."""
    t, s = problem.timesteps[i], problem.timesteps[i + 1]
    remembers = history_length(problem.step_fn) > 0
    x_s = torch.empty_like(carried.x_t) if remembers else carried.x_t  # in place, where nothing is remembered
    x0 = torch.empty_like(carried.x_t) if remembers else None
    for rows in whole_batches(problem):
        batch = carried.rows(rows)
        condition = None if problem.condition is None else problem.condition[rows]
        noise = _noise(problem, batch.x_t, keyed_generator(problem.seed, i + 1, -1 - int(rows[0])))
        kwargs = step_kwargs_for(problem, condition, noise) | with_history(problem.step_fn, batch.history)
        result = problem.step_fn(batch.x_t, t, s, t_ratio=t_ratio, **kwargs)
        size = min(len(rows), len(x_s) - int(rows[0]))  # the last batch is filled up with rows that had their turn
        x_s[rows[:size]] = result[0][:size]
        if x0 is not None:
            x0[rows[:size]] = result[1][:size]
    if x0 is None:
        return Carried(x_s)
    return Carried(x_s, remember(problem.step_fn, carried.history, Past(t, carried.x_t, x0)))


@dataclass(frozen=True)
class Batch:
    """What one iteration on one step sees."""

    x_t: Tensor
    condition: Tensor | None
    noise: Tensor | None
    history: tuple[Past, ...]


def draw_batch(problem: TuningProblem, i: int, carried: Carried | None, iteration: int) -> Batch:
    """One batch of step `i`: x_t from the carried population, or else from data and fresh noise."""
    generator = keyed_generator(problem.seed, i + 1, iteration)
    index = draw_rows(problem, generator)
    condition = None if problem.condition is None else problem.condition[index]
    if carried is None:
        x0 = problem.population[index]
        z = torch.randn(x0.shape, generator=generator).to(x0)
        rows = Carried(diffuse(problem, x0, z, problem.timesteps[i]))
    else:
        rows = carried.rows(index)
    return Batch(rows.x_t, condition, _noise(problem, rows.x_t, generator), rows.history)


def draw_rows(problem: TuningProblem, generator: torch.Generator) -> Tensor:
    index = torch.randint(len(problem.population), (problem.batch_size,), generator=generator)
    return index.to(problem.population.device)


def diffuse(problem: TuningProblem, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    schedule = problem.noise_schedule
    return scaled(schedule.marginal_alpha(t), x0) + scaled(schedule.marginal_std(t), z)


def _noise(problem: TuningProblem, x: Tensor, generator: torch.Generator) -> Tensor | None:
    """What a stochastic step adds; None for a deterministic one."""
    if not problem.adds_noise:
        return None
    return torch.randn(x.shape, generator=generator).to(x)


def step_kwargs_for(problem: TuningProblem, condition: Tensor | None, noise: Tensor | None) -> dict[str, Any]:
    """Only what there is: a user's own `step_fn` need not know of noise or conditions."""
    given = {"condition": condition, "noise": noise}
    return {**problem.step_kwargs, **{name: value for name, value in given.items() if value is not None}}


def keyed_generator(seed: int, step: int, iteration: int) -> torch.Generator:
    """A CPU generator keyed by its three arguments."""
    key = (seed * 1_000_003 + step) * 1_000_003 + iteration
    return torch.Generator().manual_seed(key % 2**63)
