"""The random draws of a tuning run: batches of x_t, each keyed by (seed, step, iteration)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timetuner_core.coefficients import NoiseLevel
from timetuner_core.samplers import Past, history_length, remember, with_history
from timetuner_core.tuning.problem import TuningProblem, whole_batches


@dataclass(frozen=True)
class Carried:
    """The population on its way: x_t `(P, ...)`, and the earlier steps that a multistep sampler remembers."""

    x_t: Tensor
    history: tuple[Past, ...] = ()

    def rows(self, index: Tensor) -> "Carried":
        return Carried(self.x_t[index], tuple(Past(p.t, p.x[index], p.x0[index]) for p in self.history))


@dataclass(frozen=True)
class Batch:
    """Samples to tune some steps on, in one network batch of B: `batch_size` for each step.

    Attributes:
        x_t: `(B, ...)`. t, s: `(B,)`, where each sample's step begins and ends.
        group: `(B,)`, which of the drawn steps each sample belongs to, counted from 0.
        condition, noise: `(B, ...)`, or None if there is none.
    """

    problem: TuningProblem
    x_t: Tensor
    t: Tensor
    s: Tensor
    group: Tensor
    condition: Tensor | None
    noise: Tensor | None
    history: tuple[Past, ...]

    @property
    def step_kwargs(self) -> dict[str, Any]:
        return self.problem.step_kwargs_with(self.condition, self.noise)

    def step(self, r: Tensor) -> Tensor:
        """The sampler's x_s, the network conditioned on `t * r`; r is `(B,)`."""
        history = with_history(self.problem.step_fn, self.history)
        x_s, _ = self.problem.step_fn(self.x_t, self.t, self.s, t_ratio=r, **self.step_kwargs, **history)
        return x_s

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's guided eps, untuned."""
        given = self.problem.step_kwargs
        guidance = {name: given[name] for name in ("uncond_condition",) if name in given}
        return self.problem.model_fn(x, t, self.condition, **guidance)


def draw_batch(problem: TuningProblem, drawn: list[tuple[int, int]], carried: Carried | None) -> Batch:
    """`batch_size` samples for each pair of a step and an iteration.

    x_t is drawn from the carried population; without one, `x_t = alpha_t x0 + sigma_t z` from data and fresh noise.
    """
    parts = [_draw_step(problem, i, iteration, carried) for i, iteration in drawn]
    x_t = torch.cat([rows.x_t for rows, _, _ in parts])
    steps = torch.tensor([i for i, _ in drawn])
    group = torch.arange(len(drawn)).repeat_interleave(problem.batch_size)
    return Batch(
        problem,
        x_t,
        problem.timesteps[steps][group].to(x_t.device),
        problem.timesteps[steps + 1][group].to(x_t.device),
        group.to(x_t.device),
        _cat([condition for _, condition, _ in parts]),
        _cat([noise for _, _, noise in parts]),
        parts[0][0].history,  # Samplers with a history are tuned one step at a time.
    )


def _draw_step(
    problem: TuningProblem, i: int, iteration: int, carried: Carried | None
) -> tuple[Carried, Tensor | None, Tensor | None]:
    """x_t, the condition and the noise of one step's samples."""
    generator = keyed_generator(problem.seed, i + 1, iteration)
    index = draw_index(problem, generator)
    if carried is None:
        x0 = problem.population[index]
        z = torch.randn(x0.shape, generator=generator).to(x0)
        rows = Carried(diffuse(problem, x0, z, problem.timesteps[i]))
    else:
        rows = carried.rows(index)
    return rows, problem.condition_of(index), _step_noise(problem, rows.x_t, generator)


def first_carried(problem: TuningProblem) -> Carried:
    """The population at the grid's first time: data with noise."""
    z = torch.randn(problem.population.shape, generator=keyed_generator(problem.seed, 0, 0))
    return Carried(diffuse(problem, problem.population, z.to(problem.population), problem.timesteps[0]))


@torch.no_grad()
def carry_forward(problem: TuningProblem, carried: Carried, i: int, t_ratio: Tensor) -> Carried:
    """The population after step `i`, computed in chunks of the batch size."""
    t, s = problem.timesteps[i], problem.timesteps[i + 1]
    remembers = history_length(problem.step_fn) > 0
    # Samplers without a history need no earlier x_t, so it is overwritten.
    x_s = torch.empty_like(carried.x_t) if remembers else carried.x_t
    x0 = torch.empty_like(carried.x_t) if remembers else None
    for rows in whole_batches(problem):
        batch = carried.rows(rows)
        noise = _step_noise(problem, batch.x_t, keyed_generator(problem.seed, i + 1, -1 - int(rows[0])))
        kwargs = problem.step_kwargs_with(problem.condition_of(rows), noise)
        history = with_history(problem.step_fn, batch.history)
        result = problem.step_fn(batch.x_t, t, s, t_ratio=t_ratio, **kwargs, **history)
        # The last batch is filled up with rows that were in an earlier one: they are left out.
        size = min(len(rows), len(x_s) - int(rows[0]))
        x_s[rows[:size]] = result[0][:size]
        if x0 is not None:
            x0[rows[:size]] = result[1][:size]
    if x0 is None:
        return Carried(x_s)
    return Carried(x_s, remember(problem.step_fn, carried.history, Past(t, carried.x_t, x0)))


def draw_index(problem: TuningProblem, generator: torch.Generator) -> Tensor:
    """`batch_size` indices into the population, with replacement."""
    index = torch.randint(len(problem.population), (problem.batch_size,), generator=generator)
    return index.to(problem.population.device)


def diffuse(problem: TuningProblem, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """`x_t = alpha_t x0 + sigma_t z`."""
    level = NoiseLevel.at(problem.noise_schedule, t, x0)
    return level.alpha * x0 + level.sigma * z


def keyed_generator(seed: int, step: int, iteration: int) -> torch.Generator:
    """A CPU generator whose stream is a function of the three arguments."""
    key = (seed * 1_000_003 + step) * 1_000_003 + iteration
    return torch.Generator().manual_seed(key % 2**63)


def _step_noise(problem: TuningProblem, x: Tensor, generator: torch.Generator) -> Tensor | None:
    """The noise that a stochastic step adds; None for a deterministic one."""
    if not problem.adds_noise:
        return None
    return torch.randn(x.shape, generator=generator).to(x)


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None
