"""A many-step teacher's x_t at the times of a grid of few steps, for rivals that follow it step by step."""

import itertools
import math
from dataclasses import replace

import torch
from torch import Tensor

from timetuner_core.grids import EDM_RHO
from timetuner_core.guided_model import Prediction
from timetuner_core.rivals.candidates import check_at_least_1, fixed_steps
from timetuner_core.samplers import Past, Sampler, Step, latest, sample_steps
from timetuner_core.tuning.problem import TuningProblem, whole_batches
from timetuner_core.tuning.solver import sampler_of


def table_sampler_of(problem: TuningProblem) -> Sampler:
    """The problem's sampler, if a few-step path can be compared with a teacher's step by step.

    Raises:
        ValueError: a step function that is no sampler's; noise, or more calls of the network than one per step.
    """
    sampler = sampler_of(problem)
    if not sampler.facts.is_table_of_steps:
        raise ValueError(f"sampler is {sampler.name!r}; accepted: one that calls the network once per step")
    return sampler


def substeps_of(num_hops: int, teacher_num_steps: int) -> int:
    """The teacher's steps for each step of the sampler: as many make `teacher_num_steps` or a few more."""
    return math.ceil(teacher_num_steps / max(num_hops, 1))


@torch.no_grad()
def teacher_trajectory(problem: TuningProblem, teacher_num_steps: int, num_samples: int) -> list[Tensor]:
    """The teacher's x `(P, ...)` at each of the problem's times, of which there are `num_steps + 1`.

    The teacher is the problem's own sampler, each of whose steps is divided evenly in time (for EDM, whose t is sigma,
    in `sigma ** (1 / 7)`) into `substeps_of` smaller ones. A step to time 0 stays whole.

    The population is initial noise, of which at most the first `num_samples` are used.

    Raises:
        ValueError: a number below 1, or samples that are not finite.
    """
    check_at_least_1(teacher_num_steps=teacher_num_steps, num_samples=num_samples, batch_size=problem.batch_size)
    num_hops = problem.num_steps - fixed_steps(problem)
    substeps = substeps_of(num_hops, teacher_num_steps)
    rho = EDM_RHO if problem.noise_schedule.default_grid == "edm" else 1.0
    times = problem.timesteps.double().cpu()
    divided = [times[:1]]
    for start, end in itertools.pairwise(times[: num_hops + 1]):
        shares = torch.arange(1, substeps, dtype=torch.float64) / substeps
        divided += [torch.lerp(start ** (1 / rho), end ** (1 / rho), shares) ** rho, end[None]]
    grid = torch.cat([*divided, times[num_hops + 1 :]])
    size = min(len(problem.population), num_samples)
    passed = {k * substeps for k in range(1, num_hops + 1)} | {len(grid) - 1}
    parts = []
    for rows in whole_batches(problem, size):
        x_T = problem.population[rows]
        kwargs = problem.step_kwargs_with(problem.condition_of(rows), None)
        steps = sample_steps(problem.step_fn, x_T, grid, torch.ones(len(grid) - 1), **kwargs)
        parts.append([x_T, *(x_s for number, (x_s, _) in enumerate(steps, 1) if number in passed)])
    trajectory = [torch.cat(at_a_time)[:size] for at_a_time in zip(*parts, strict=True)]
    if not bool(torch.isfinite(trajectory[-1]).all()):
        raise ValueError("the teacher's samples are not finite; accepted: a network that gives numbers")
    return trajectory


def step_of(
    problem: TuningProblem, prediction: Prediction, x: Tensor, t: Tensor, s: Tensor, history: tuple[Past, ...]
) -> Step:
    """A step from x at t to s, for which the network has answered already."""

    def no_noise() -> Tensor:
        raise AssertionError("a sampler that is a table draws noise")

    return Step(lambda _x, _t: prediction, problem.noise_schedule, x, t, s, history, no_noise, 0.0)


def as_remembered(sampler: Sampler, step: Step) -> Step:
    """The step with as much of the past as the sampler remembers."""
    return replace(step, history=latest(step.history, sampler.history_length))


def predict_all(problem: TuningProblem, sampler: Sampler, x: Tensor, t: Tensor) -> Prediction:
    """The network's answer for the first rows of the population, which are at x `(P, ...)`, in whole batches."""
    uncond, parts = problem.step_kwargs.get("uncond_condition"), []
    for rows in whole_batches(problem, len(x)):
        condition = problem.condition_of(rows)
        parts.append(problem.model_fn.predict_for(sampler.name, x[rows], t, 1.0, condition, uncond))
    x0, eps = (torch.cat(answers)[: len(x)] for answers in zip(*parts, strict=True))
    return Prediction(x0, eps)
