"""A sampler is one update from time `t` to `s < t`, and the loop over a grid."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

from timetuner_core.catalog import SAMPLER_FACTS, SamplerFacts
from timetuner_core.coefficients import Coefficient, NoiseLevel
from timetuner_core.guided_model import GuidedModel, Prediction
from timetuner_core.noise_schedule import NoiseSchedule

Generators = torch.Generator | list[torch.Generator] | None

# One step from time `t` to `s < t`, the network conditioned on `t * t_ratio`:
# `step_fn(x, t, s, t_ratio=..., **step_kwargs) -> (x_s, x0)`, `x` of shape `(B, ...)`, times `()` or `(B,)`.
StepFn: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


class Past(NamedTuple):
    """An earlier step, as multistep samplers remember it: its time, x_t, and the network's x0 there."""

    t: Tensor
    x: Tensor
    x0: Tensor


@dataclass(frozen=True)
class Step:
    """All that a sampler's update from x_t at `t` to x_s at `s` may use.

    The coefficients `alpha_t`, `sigma_t`, `lambda_t`, `alpha_s`, `sigma_s`, `lambda_s` and `h` multiply x as they are:
    `step.alpha_s * x0`.

    Attributes:
        predict: `(x, t) -> (x0, eps)`, guided and conditioned on `t * t_ratio`: one call of the network.
        x_t: `(B, ...)`. t, s: times, `()` or `(B,)`.
        history: the steps before, the newest last; as many as the sampler remembers, fewer at the start.
        draw_noise: gives standard normal noise like x_t.
        eta: the share of the posterior's noise to add, for samplers that leave the choice.
    """

    predict: Callable[[Tensor, Tensor], Prediction]
    noise_schedule: NoiseSchedule
    x_t: Tensor
    t: Tensor
    s: Tensor
    history: tuple[Past, ...]
    draw_noise: Callable[[], Tensor]
    eta: float

    def noise_level(self, t: Tensor) -> NoiseLevel:
        """alpha, sigma and lambda at a time, `()` or `(B,)`."""
        return NoiseLevel.at(self.noise_schedule, t, self.x_t)

    @cached_property
    def start(self) -> NoiseLevel:
        """The noise level at t."""
        return self.noise_level(self.t)

    @cached_property
    def end(self) -> NoiseLevel:
        """The noise level at s."""
        return self.noise_level(self.s)

    @property
    def alpha_t(self) -> Coefficient:
        return self.start.alpha

    @property
    def sigma_t(self) -> Coefficient:
        return self.start.sigma

    @property
    def lambda_t(self) -> Coefficient:
        return self.start.lambda_

    @property
    def alpha_s(self) -> Coefficient:
        return self.end.alpha

    @property
    def sigma_s(self) -> Coefficient:
        return self.end.sigma

    @property
    def lambda_s(self) -> Coefficient:
        return self.end.lambda_

    @cached_property
    def h(self) -> Coefficient:
        """`lambda_s - lambda_t`."""
        return self.lambda_s - self.lambda_t

    @cached_property
    def to_clean_data(self) -> bool:
        """Whether s is time 0, where lambda is infinite: samplers that work in lambda take a first-order step."""
        return bool((self.s == 0).any())

    def time_between(self, r: float) -> Tensor:
        """The time a fraction `r` of the way from lambda_t to lambda_s, of t's shape."""
        return self.noise_schedule.inverse_lambda((self.lambda_t + r * self.h).value).reshape(self.t.shape)

    def past_lambda(self, steps_back: int) -> Coefficient:
        """lambda at an earlier step, 1 for the newest."""
        return self.noise_level(self.history[-steps_back].t).lambda_

    def past_x0(self, steps_back: int) -> Tensor:
        """x0 as predicted at an earlier step, 1 for the newest."""
        return self.history[-steps_back].x0

    def past_eps(self, steps_back: int) -> Tensor:
        """eps as predicted at an earlier step, 1 for the newest: `(x_t - alpha_t x0) / sigma_t` there."""
        t, x_t, x0 = self.history[-steps_back]
        past = self.noise_level(t)
        return 1 / past.sigma * (x_t - past.alpha * x0)

    def first_order(self, prediction: Prediction) -> Tensor:
        """`x_s = alpha_s x0 + sigma_s eps`: DDIM, which is also first-order DPM-Solver and Euler."""
        x0, eps = prediction
        return self.alpha_s * x0 + self.sigma_s * eps


@dataclass(frozen=True)
class Sampler:
    """A sampler by name.

    Attributes:
        update: from a `Step` to (x_s, the x0 predicted at t).
        order: of the global error in the step size, for deterministic ones, once `history` is full.
        calls_per_step: of the network; a step to time 0 takes one.
        history_length: how many earlier steps it remembers.
        stochastic: whether every step adds noise. takes_eta: whether `eta` says how much.
        rowwise: whether the samples of a batch may be at different times: it remembers nothing, and never asks
            where all of them are.
        call_times: the times of the calls of a learned solver that has several per step. Each of its updates makes one
            of them, on the grid of `in_calls`. None where an update is a step.
    """

    name: str
    update: Callable[[Step], tuple[Tensor, Tensor]]
    order: int
    calls_per_step: int = 1
    history_length: int = 0
    stochastic: bool = False
    takes_eta: bool = False
    rowwise: bool = False
    call_times: tuple[float, ...] | None = None

    @classmethod
    def of_this_package(cls, name: str, update: Callable[[Step], tuple[Tensor, Tensor]]) -> Self:
        """The sampler of `timetuner_core.catalog.SAMPLER_FACTS` that `update` implements."""
        return cls(name, update, **asdict(SAMPLER_FACTS[name]))

    @property
    def facts(self) -> SamplerFacts:
        """All that is known of the sampler but its code."""
        return SamplerFacts(**{field.name: getattr(self, field.name) for field in fields(SamplerFacts)})

    def network_calls(self, timesteps: Tensor) -> int:
        """Number of network calls over a grid `(num_steps + 1,)`."""
        return self.facts.network_calls(timesteps.tolist())

    @property
    def updates_per_step(self) -> int:
        """How many updates make a step. A step to time 0 may have fewer."""
        return 1 if self.call_times is None else self.calls_per_step

    def in_calls(self, timesteps: Tensor, t_ratios: Tensor) -> tuple[Tensor, Tensor]:
        """Grid and ratios with an entry for each update, from those with one for each step.

        Each call has its step's ratio. Neighbours of the grid may be equal, as Heun's method calls the network twice
        at the time where two steps meet.

        Args:
            timesteps: `(num_steps + 1,)`. t_ratios: `(num_steps,)`.
        """
        if self.call_times is None:
            return timesteps, t_ratios
        times = torch.tensor(self.call_times, dtype=timesteps.dtype, device=timesteps.device)
        return torch.cat([times, timesteps[-1:]]), t_ratios.repeat_interleave(self.calls_per_step)[: len(times)]

    def adds_noise(self, eta: float) -> bool:
        """Whether a step draws noise."""
        return self.stochastic or (self.takes_eta and eta != 0)

    def step_fn(self, model_fn: GuidedModel, noise_schedule: NoiseSchedule) -> "SamplerStep":
        return SamplerStep(self, model_fn, noise_schedule)


@dataclass(frozen=True)
class SamplerStep:
    """A sampler on one model, as a `StepFn`."""

    sampler: Sampler
    model_fn: GuidedModel
    noise_schedule: NoiseSchedule

    @property
    def history_length(self) -> int:
        return self.sampler.history_length

    def adds_noise(self, eta: float) -> bool:
        return self.sampler.adds_noise(eta)

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        t_ratio: Tensor | float = 1.0,
        eta: float = 0.0,
        noise: Tensor | None = None,
        condition: Tensor | None = None,
        uncond_condition: Tensor | None = None,
        generator: Generators = None,
        history: tuple[Past, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """One step, `(x_s, x0)`; differentiable in `t_ratio`.

        Args:
            x: x_t, `(B, ...)`.
            t, s: times of shape `()` or `(B,)`, `s < t`. t_ratio: `()` or `(B,)`.
            noise: what to add if noise is added, of x's shape; else drawn by `generator` (one, or one per sample).

        Raises:
            ValueError: `eta` for a sampler that has none; what `GuidedModel.predict` and `step_noise` raise.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; accepted: 0 to 1")
        if eta != 0 and not self.sampler.takes_eta:
            raise ValueError(f"eta is {eta}; accepted: 0 for the sampler {self.sampler.name!r}")

        def predict(x: Tensor, t: Tensor) -> Prediction:
            return self.model_fn.predict_for(self.sampler.name, x, t, t_ratio, condition, uncond_condition)

        def draw_noise() -> Tensor:
            return step_noise(x, generator) if noise is None else noise

        return self.sampler.update(Step(predict, self.noise_schedule, x, t, s, history, draw_noise, eta))


def history_length(step_fn: StepFn) -> int:
    """How many earlier steps a step function wants; a user's own need not know of any."""
    return getattr(step_fn, "history_length", 0)


def adds_noise(step_fn: StepFn, eta: float) -> bool:
    """Whether a step function draws noise; of a user's own, `eta` tells."""
    return step_fn.adds_noise(eta) if isinstance(step_fn, SamplerStep) else eta != 0


def step_noise(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise like `x`, `(B, ...)`; from a list of generators, one sample by each.

    Raises:
        ValueError: another number of generators than samples.
    """
    if not isinstance(generator, list):
        device = x.device if generator is None else generator.device
        return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} samples; accepted: one, or one per sample")
    rows = [torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in generator]
    return torch.stack(rows).to(x.device)


def sample_steps(
    step_fn: StepFn,
    x: Tensor,
    timesteps: Tensor,
    t_ratios: Tensor,
    **step_kwargs: Any,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run `step_fn` over a grid, yielding `(x_s, x0)` after each step.

    Args:
        x: x_T, `(B, ...)`.
        timesteps: `(num_steps + 1,)`, falling. t_ratios: `(num_steps,)`.
    """
    history: tuple[Past, ...] = ()
    sampler: Sampler | None = getattr(step_fn, "sampler", None)  # A user's own step function has none.
    per_step = 1 if sampler is None else sampler.updates_per_step
    if sampler is not None:
        timesteps, t_ratios = sampler.in_calls(timesteps, t_ratios)
    for i, (t, s, t_ratio) in enumerate(zip(timesteps[:-1], timesteps[1:], t_ratios, strict=True), start=1):
        x_s, x0 = step_fn(x, t, s, t_ratio=t_ratio, **with_history(step_fn, history), **step_kwargs)
        if i % per_step == 0 or i == len(t_ratios):
            yield x_s, x0
        history = remember(step_fn, history, Past(t, x, x0))
        x = x_s


def with_history(step_fn: StepFn, history: tuple[Past, ...]) -> dict[str, tuple[Past, ...]]:
    """The `history` argument, for step functions that take it."""
    return {"history": history} if history_length(step_fn) else {}


def remember(step_fn: StepFn, history: tuple[Past, ...], past: Past) -> tuple[Past, ...]:
    """The history after one more step."""
    return latest((*history, past), history_length(step_fn))


def latest(history: tuple[Past, ...], length: int) -> tuple[Past, ...]:
    """The last `length` steps of a history, or all where it has fewer."""
    return history[-length:] if length else ()


def sample(
    step_fn: StepFn,
    x: Tensor,
    timesteps: Tensor,
    t_ratios: Tensor,
    **step_kwargs: Any,
) -> Tensor:
    """The x0 at which `sample_steps` ends, `(B, ...)`."""
    for x_s, _ in sample_steps(step_fn, x, timesteps, t_ratios, **step_kwargs):
        x = x_s
    return x


def initial_noise(shape: tuple[int, ...], seeds: list[int], std: float = 1.0) -> tuple[Tensor, list[torch.Generator]]:
    """One normal sample of `shape` per seed, `(len(seeds), *shape)`, and the generators that go on.

    Drawn on the CPU, so that a seed means the same noise on every device and in every batch. `std` is the noise
    schedule's `prior_std`.

    Raises:
        ValueError: a seed outside 0..2**32 - 1: torch's CPU generator would use its low 32 bits only.
    """
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}; accepted: 0 to {2**32 - 1}")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return std * torch.stack([torch.randn(shape, generator=g) for g in generators]), generators
