"""The objectives of single steps: the published one, and a teacher's step."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from timetuner_core.samplers import (
    Past,
    sample,
    with_history,
)
from timetuner_core.tuning.problem import Carried, StepObjective, TuningProblem, draw_batch, step_kwargs_for


@dataclass(frozen=True)
class StepResiduals:
    """The residuals of the per-step objectives, drawn batch by batch."""

    problem: TuningProblem
    objective: StepObjective
    substeps: int
    carried: Carried | None

    def draw(self, drawn: list[tuple[int, int]]) -> "ResidualBatch":
        """`batch_size` samples for each pair of a step and an iteration, in one network batch, and the targets of
        their residuals."""
        problem = self.problem
        batches = [draw_batch(problem, i, self.carried, iteration) for i, iteration in drawn]
        steps = [i for i, _ in drawn]
        x_t, condition = _cat([b.x_t for b in batches]), _cat([b.condition for b in batches])
        noise = _cat([b.noise for b in batches])
        assert x_t is not None
        history = batches[0].history  # multistep samplers are tuned one step at a time
        rows = torch.arange(len(steps)).repeat_interleave(problem.batch_size)
        grid = problem.timesteps[torch.tensor(steps)], problem.timesteps[torch.tensor(steps) + 1]
        t, s = (times[rows].to(x_t.device) for times in grid)
        batch = ResidualBatch(self, x_t, t, s, rows.to(x_t.device), condition, noise, history)
        with torch.no_grad():
            return dataclasses.replace(batch, target=batch.targets())


@dataclass(frozen=True)
class ResidualBatch:
    """Some batches in one: `rows` `(B,)` says to which of them a sample belongs."""

    of: StepResiduals
    x_t: Tensor
    t: Tensor
    s: Tensor
    rows: Tensor
    condition: Tensor | None
    noise: Tensor | None
    history: tuple[Past, ...]
    target: Tensor | None = None

    def targets(self) -> Tensor:
        if self.of.objective == "next_eps":
            return self._eps(self.x_t, self.t)
        problem, x = self.of.problem, self.x_t
        kwargs = step_kwargs_for(problem, self.condition, self.noise)
        part = torch.arange(self.of.substeps + 1, dtype=torch.float64, device=x.device) / self.of.substeps
        times = torch.lerp(self.t[None], self.s[None], part[:, None])  # (substeps + 1, B)
        return sample(problem.step_fn, x, times, torch.ones(self.of.substeps), **kwargs)

    def residuals(self, ratios: Tensor) -> Tensor:
        """At one ratio per batch, `(len(ratios), batch_size, ...)`."""
        problem = self.of.problem
        kwargs = step_kwargs_for(problem, self.condition, self.noise) | with_history(problem.step_fn, self.history)
        t_ratio = ratios.to(self.x_t.device)[self.rows]
        x_s, _ = problem.step_fn(self.x_t, self.t, self.s, t_ratio=t_ratio, **kwargs)
        value = self._eps(x_s, self.s) if self.of.objective == "next_eps" else x_s
        assert self.target is not None
        return (self.target - value).reshape(len(ratios), problem.batch_size, *value.shape[1:])

    def losses(self, ratios: Tensor) -> Tensor:
        """The mean squared residual of each batch, `(len(ratios),)`."""
        return self.residuals(ratios).flatten(2).square().sum(dim=2).mean(dim=1)

    def _eps(self, x: Tensor, t: Tensor) -> Tensor:
        problem = self.of.problem
        guidance = {name: value for name, value in problem.step_kwargs.items() if name == "uncond_condition"}
        return problem.model_fn(x, t, self.condition, **guidance)


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None
