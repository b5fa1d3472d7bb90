"""PAS (Wang et al., ICML 2025): the sampling direction is corrected in a basis of the directions before.

The basis is each sample's own, so that no table of coefficients holds the correction: it takes part in comparisons
alone, and no schedule can carry it.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timetuner_core.rivals.trajectory import as_remembered, predict_all, step_of, table_sampler_of, teacher_trajectory
from timetuner_core.samplers import Past, Sampler, Step
from timetuner_core.tuning.problem import TuningProblem

NUM_BASIS = 4  # The direction itself, and three principal components.
LR = 0.01
NUM_ITERS = 1000
UNCHANGED_ITERS, UNCHANGED = 10, 1e-5  # It stops when so many losses in a row differ by less.
LEAST_GAIN = 1e-4  # A step is corrected only if that lowers its loss by more.
LEAST_LENGTH = 1e-6  # A shorter part of a unit vector is rounding.


@dataclass(frozen=True)
class PasCorrection:
    """The corrected steps by their numbers from 0, each with its coordinates `(NUM_BASIS,)`."""

    coordinates: Mapping[int, tuple[float, ...]]

    def sampler(self, sampler: Sampler, num_steps: int) -> Sampler:
        """A sampler that takes its own steps, and these ones in the corrected direction. Without any, it is itself."""

        def update(step: Step) -> tuple[Tensor, Tensor]:
            x_s, x0 = sampler.update(as_remembered(sampler, step))
            coordinates = self.coordinates.get(len(step.history))
            return (x_s if coordinates is None else _Direction(step, x_s).corrected(coordinates)), x0

        return Sampler(sampler.name, update, order=1, history_length=num_steps)


@torch.no_grad()
def pas_correction(problem: TuningProblem, teacher_num_steps: int = 100, num_samples: int = 128) -> PasCorrection:
    """The steps to correct and their coordinates, by the authors' adaptive search.

    One step after the other, coordinates that all samples share are learned by Adam, from the direction's mean length
    and 0, so that the mean absolute difference from the teacher (see `teacher_trajectory`) falls. Where it falls by
    more than `LEAST_GAIN` the step is corrected, and the path goes on from there. The first step is not. All is in
    `x_t / alpha_t`, as in EDM.

    The population is initial noise, of which at most the first `num_samples` are used.

    Raises:
        ValueError: a sampler that is no table, a noise schedule that starts without signal, or what
            `teacher_trajectory` raises.
    """
    problem.check_one_scale("pas")
    sampler = table_sampler_of(problem)
    if problem.noise_schedule.starts_without_signal:
        raise ValueError(
            "the noise schedule starts without signal, alpha_T = 0; accepted by PAS: one with x_T / alpha_T"
        )
    trajectory = teacher_trajectory(problem, teacher_num_steps, num_samples)
    timesteps = problem.timesteps.double().cpu()
    coordinates: dict[int, tuple[float, ...]] = {}
    x, history = trajectory[0], tuple[Past, ...]()
    for i, (t, s) in enumerate(itertools.pairwise(timesteps)):
        step = step_of(problem, predict_all(problem, sampler, x, t), x, t, s, history)
        x_s, x0 = sampler.update(as_remembered(sampler, step))
        if i > 0:
            direction = _Direction(step, x_s)
            learned = direction.nearest_coordinates(trajectory[i + 1])
            if learned is not None:
                coordinates[i] = learned
                x_s = direction.corrected(learned)
        history, x = (*history, Past(t, x, x0)), x_s
    return PasCorrection(coordinates)


class _Direction:
    """A sampler's step from z to z_s in `z = x / alpha`, over `sigma / alpha`, and each sample's basis, in float64.

    Attributes:
        basis: `(B, NUM_BASIS, D)`, orthonormal: the direction d of the step, and the principal components of z_T and of
            all directions up to d, by Schmidt's method, each on the side of `z - z_T`. It is 0 where the dimension, or
            the number of directions, leaves no further component.
    """

    def __init__(self, step: Step, x_s: Tensor) -> None:
        self.step, self.like = step, x_s
        schedule = step.noise_schedule
        times = torch.stack([*(past.t for past in step.history), step.t, step.s]).double()
        self.alpha = schedule.marginal_alpha(times)
        noise = schedule.marginal_std(times) / self.alpha
        path = [*(past.x for past in step.history), step.x_t, x_s]
        z = torch.stack([x.flatten(1).double() / float(a) for x, a in zip(path, self.alpha, strict=True)], dim=1)
        hops = noise.diff()
        directions = z.diff(dim=1) / hops.to(z.device)[:, None]
        self.z, self.hop, self.d = z[:, -2], float(hops[-1]), directions[:, -1]
        self.basis = _basis(torch.cat([z[:, :1], directions], dim=1), self.z - z[:, 0])

    def corrected(self, coordinates: Sequence[float]) -> Tensor:
        """x_s by the direction of these coordinates in the basis."""
        z_s = self._ended(torch.tensor(coordinates, dtype=torch.float64))
        return (float(self.alpha[-1]) * z_s).reshape(self.like.shape).to(self.like)

    def nearest_coordinates(self, x_star: Tensor) -> tuple[float, ...] | None:
        """Coordinates by which the step ends nearest to `x_star` `(B, ...)`; None if they do not gain enough."""
        z_star = x_star.flatten(1).double() / float(self.alpha[-1])
        start = [float(self.d.norm(dim=1).mean()), *[0.0] * (NUM_BASIS - 1)]
        coordinates = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([coordinates], lr=LR)
        losses: list[float] = []
        for _ in range(NUM_ITERS):
            with torch.enable_grad():
                loss = (self._ended(coordinates) - z_star).abs().mean()
                (coordinates.grad,) = torch.autograd.grad(loss, [coordinates])
            optimizer.step()
            losses.append(float(loss))
            last = losses[-UNCHANGED_ITERS:]
            if len(last) == UNCHANGED_ITERS and all(abs(a - b) <= UNCHANGED for a, b in itertools.pairwise(last)):
                break
        before = float((self.z + self.hop * self.d - z_star).abs().mean())
        after = float((self._ended(coordinates.detach()) - z_star).abs().mean())
        return tuple(coordinates.tolist()) if after + LEAST_GAIN < before else None

    def _ended(self, coordinates: Tensor) -> Tensor:
        return self.z + self.hop * torch.einsum("k,bkd->bd", coordinates.to(self.basis.device), self.basis)


def _basis(rows: Tensor, side: Tensor) -> Tensor:
    """`_Direction.basis` of z_T and the directions `(B, R, D)`, the newest last; `side` `(B, D)` is `z - z_T`."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    components = torch.linalg.svd(centred, full_matrices=False).Vh[:, : rows.shape[1] - 1]
    first = rows[:, -1]
    basis = [first / first.norm(dim=1, keepdim=True)]
    for component in components[:, : NUM_BASIS - 1].unbind(dim=1):
        vector = component
        for unit in basis:
            vector = vector - (vector * unit).sum(dim=1, keepdim=True) * unit
        length = vector.norm(dim=1, keepdim=True)
        is_new = length > LEAST_LENGTH
        unit = torch.where(is_new, vector, 0) / torch.where(is_new, length, 1)
        basis.append(torch.where((side * unit).sum(dim=1, keepdim=True) > 0, unit, -unit))
    missing = [torch.zeros_like(first)] * (NUM_BASIS - len(basis))
    return torch.stack([*basis, *missing], dim=1)
