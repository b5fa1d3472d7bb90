"""One setting of a model, from the noise and data a tuner sees to its result's evaluation on other noise."""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from timetuner_core.evaluation.distances import mean_estimate, sampler_kl, teacher_l2
from timetuner_core.evaluation.teacher_check import TeacherError, TeacherSamples
from timetuner_core.evaluation.verdict import BestUntuned, Evaluation, bootstrap, evaluate, of_scales
from timetuner_core.evaluation.worth import UntunedCurve, Worth
from timetuner_core.grids import LOWEST_LAMBDA, make_timesteps, named_grids, teacher_timesteps
from timetuner_core.models.loading import DiffusionModel
from timetuner_core.samplers import Sampler, initial_noise, sample
from timetuner_core.samplers.solver_table import SolverTable, solver_of
from timetuner_core.sampling.generate import Guidance, generate
from timetuner_core.tuners import (
    EVALUATED_SCALES,
    MAX_KL_SAMPLES,
    MAX_WORTH_SAMPLES,
    TEACHER_CHECK_SAMPLES,
    WORTH_STEP_FACTORS,
    Population,
)
from timetuner_core.tuning.problem import TuningProblem

# Seeds of the noise that tuning and evaluation see: two ranges that neither meet each other nor, being
# above 2**31, the seeds of users' samples.
TUNING_SEEDS = 2**31
EVALUATION_SEEDS = 2**31 + 2**30
SEED_RANGE = 2**29
# The seed that guidance scales are drawn by is apart from that of conditions, so that no class gets certain scales.
GUIDANCE_SEEDS = EVALUATION_SEEDS + SEED_RANGE

CHECKED_DATA = 512  # A teacher's samples are compared with as many data.

# Half the log signal-to-noise ratio by which the teacher's other starting time is lower: a factor of 2 in
# sigma_t / alpha_t. It has to be mostly noise, since sampling starts from noise alone.
LATER_START = math.log(2)
MAX_LAMBDA_OF_START = -2.0


def drawn_scales(scales: tuple[float, float], count: int, seed: int) -> Tensor:
    """Guidance scales, `(count,)`, uniform between the lowest and the highest."""
    low, high = scales
    generator = torch.Generator().manual_seed(GUIDANCE_SEEDS + seed % SEED_RANGE)
    return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)


def evaluated_scales(scales: tuple[float, float]) -> list[float]:
    """The guidance scales at which a schedule for an interval is judged: both ends, and the middle."""
    evenly: list[float] = torch.linspace(*scales, EVALUATED_SCALES, dtype=torch.float64).tolist()
    return evenly


def _worth_samples(num_samples: int) -> int:
    """The noises that an untuned sampler's curve is measured on, of those that an evaluation begins with."""
    return min(num_samples, MAX_WORTH_SAMPLES)


@dataclass
class HeldOut:
    """Noise that no tuner has seen, by its seeds and conditions, and the samples that were made from it so far."""

    seeds: list[int]
    condition: Tensor | None
    samples: dict[Hashable, Tensor] = field(default_factory=dict)

    def first(self, count: int, key: Hashable, make: Callable[[list[int], Tensor | None], Tensor]) -> Tensor:
        """The samples of the first `count` noises by `make`, of which those known by `key` are not made again."""
        known = self.samples.get(key)
        start = 0 if known is None else len(known)
        if start < count:
            condition = None if self.condition is None else self.condition[start:count]
            made = make(self.seeds[start:count], condition)
            self.samples[key] = made if known is None else torch.cat([known, made])
        return self.samples[key][:count]


@dataclass(frozen=True)
class Experiment:
    """A model, guided, sampled by one sampler; everything drawn is fixed by `seed`.

    Attributes:
        guidance_scales: the lowest and the highest scale, where one schedule is tuned for an interval of them; then
            the scale of `guidance` has no bearing. Each of the population has a scale drawn from it.
        rows_at_once: samples per network batch, while teaching and evaluating.
        after_step: called after each step of each batch; may raise to stop.
    """

    model: DiffusionModel
    guidance: Guidance
    sampler: Sampler
    eta: float = 0.0
    seed: int = 0
    rows_at_once: int = 64
    device: torch.device | str = "cpu"
    after_step: Callable[[], None] = lambda: None
    guidance_scales: tuple[float, float] | None = None

    @property
    def adds_noise(self) -> bool:
        return self.sampler.adds_noise(self.eta)

    def problem(
        self,
        population: Population,
        timesteps: Tensor,
        population_size: int,
        batch_size: int,
        *,
        data: Literal["auto", "model", "generated"] = "auto",
        teacher_num_steps: int = 50,
    ) -> TuningProblem:
        """The problem that a tuner is given, on a grid `(num_steps + 1,)`.

        Args:
            population: what the tuner needs.
            data: where data come from, if they are needed: the model's own, or else samples of a teacher of
                `teacher_num_steps`.
        """
        if population == "data":
            samples, condition = self._data(population_size, data, teacher_num_steps)
        else:
            size = population_size if population == "noise" else 1
            samples, condition = self._noise(size, timesteps[0]), self.conditions(size, TUNING_SEEDS)
        model_fn, scales = self.guidance.model_fn(self.model), self.guidance_scales
        conditions = self.model.conditions(self.guidance.type, None if condition is None else condition.to(self.device))
        step_kwargs = {"uncond_condition": conditions["uncond_condition"], "eta": self.eta}
        return TuningProblem(
            model_fn,
            self.model.noise_schedule,
            self.sampler.step_fn(model_fn, self.model.noise_schedule),
            timesteps,
            samples.to(self.device),
            conditions["condition"],
            batch_size=batch_size,
            seed=self.seed,
            step_kwargs={name: value for name, value in step_kwargs.items() if value is not None},
            guidance_scales=None if scales is None else drawn_scales(scales, len(samples), self.seed).to(self.device),
            network_dtype=self.model.dtype,
        )

    def at_scales(self) -> dict[float, "Experiment"]:
        """The same at each guidance scale that an interval's schedule is judged at: both ends, and the middle.

        Of one scale, it is itself.
        """
        if self.guidance_scales is None:
            return {self.guidance.scale: self}
        return {
            scale: replace(self, guidance=replace(self.guidance, scale=scale), guidance_scales=None)
            for scale in evaluated_scales(self.guidance_scales)
        }

    def check_teacher(self, teacher_num_steps: int) -> None:
        """Refuse a teacher that nothing can be judged by: see `TeacherSamples`. Raises: TeacherError."""
        if self.guidance_scales is not None:
            for scale, experiment in self.at_scales().items():
                try:
                    experiment.check_teacher(teacher_num_steps)
                except TeacherError as error:
                    raise TeacherError(f"at guidance scale {scale:g} {error}") from None
            return
        seeds = self.seeds(TEACHER_CHECK_SAMPLES, EVALUATION_SEEDS)
        condition = self.conditions(TEACHER_CHECK_SAMPLES, EVALUATION_SEEDS)
        samples = {
            name: self._teach(seeds, condition, grid, decode=True).cpu()
            for name, grid in self._checked_grids(teacher_num_steps).items()
        }
        TeacherSamples(**samples, data=self._checked_data()).check()

    def check_calls(self, teacher_num_steps: int) -> int:
        """The network calls, each of a batch, of `check_teacher`."""
        calls = sum(map(self._teacher_calls, self._checked_grids(teacher_num_steps).values()))
        return len(self.at_scales()) * self._batches(TEACHER_CHECK_SAMPLES) * calls

    def _checked_grids(self, teacher_num_steps: int) -> dict[str, Tensor]:
        """The grids whose samples are compared, by their names in `TeacherSamples`."""
        schedule = self.model.noise_schedule
        grid = teacher_timesteps(schedule, teacher_num_steps)
        num_steps = len(grid) - 1
        grids = {
            "samples": grid,
            "by_half": make_timesteps(schedule, num_steps // 2) if num_steps > 1 else None,
            "from_later": self._later_grid(num_steps),
            "by_stock": self.model.stock_timesteps(num_steps),
        }
        return {name: grid for name, grid in grids.items() if grid is not None}

    def with_solver(self, table: SolverTable | None, timesteps: Tensor) -> "Experiment":
        """The same with a learned solver in the sampler's place; None is the sampler's own. Raises: `solver_of`'s."""
        return self if table is None else replace(self, sampler=solver_of(self.sampler.name, table, timesteps))

    def evaluate(
        self,
        timesteps: Tensor,
        t_ratios: Tensor,
        num_samples: int,
        teacher_num_steps: int = 100,
        *,
        solver_table: SolverTable | None = None,
        max_num_samples: int | None = None,
        measures_worth: bool = False,
        curves: Mapping[float, UntunedCurve] = {},
        on_curve: Callable[[float, UntunedCurve], None] = lambda _scale, _curve: None,
        before_more: Callable[[float, int, int], None] = lambda _scale, _from, _to: None,
        served: DiffusionModel | None = None,
        held_out: dict[float, HeldOut] | None = None,
    ) -> Evaluation:
        """A schedule against the sampler's default grid, untuned, on `num_samples` noises that no tuner has seen.

        The grid that diffusers takes by default for the model is measured, too, as no worse schedule is accepted.
        While the verdict is undecided, the noises are doubled, up to `max_num_samples`, after a call of `before_more`
        with the guidance scale, their number so far and the next.
        Guided samples are compared with the teacher's: their distance to the data is information.
        Of an interval of guidance scales, all this is done at each of `at_scales`: see `of_scales`.

        Args:
            measures_worth: The untuned sampler takes all named grids and more steps besides: see `UntunedCurve`. The
                schedule has to be nearer to the teacher than the best named grid. Samplers that add noise have no
                such curve.
            curves: those of this setting that were measured before, by the guidance scale.
            on_curve: told of one that was measured now, with its guidance scale.
            served: the model in a lesser precision, in which the schedule is to serve. The schedule is sampled with it;
                the untuned sampler and the teacher keep `model`, and so does the schedule that it is compared with,
                which must not be nearer to the teacher by more than a margin.
            held_out: samples by the guidance scale, which another evaluation of the same schedule can share.
        """
        samples = {} if held_out is None else held_out
        if self.guidance_scales is not None:
            return of_scales(
                {
                    scale: experiment.evaluate(
                        timesteps,
                        t_ratios,
                        num_samples,
                        teacher_num_steps,
                        solver_table=solver_table,
                        max_num_samples=max_num_samples,
                        measures_worth=measures_worth,
                        curves=curves,
                        on_curve=on_curve,
                        before_more=before_more,
                        served=served,
                        held_out=samples,
                    )
                    for scale, experiment in self.at_scales().items()
                }
            )
        most = num_samples if max_num_samples is None else max(num_samples, max_num_samples)
        exact = self.with_solver(solver_table, timesteps)
        tuned = exact if served is None else replace(exact, model=served)
        mixture = self.model.mixture if self.guidance.type == "uncond" else None
        kl_terms: dict[bool, Tensor] = {}  # They are of as many samples, whatever `count` is.
        num_steps, schedule, scale = len(t_ratios), self.model.noise_schedule, self.guidance.scale
        if scale not in samples:
            samples[scale] = HeldOut(self.seeds(most, EVALUATION_SEEDS), self.conditions(most, EVALUATION_SEEDS))
        noises = samples[scale]
        untuned, stock = make_timesteps(schedule, num_steps), self.model.stock_timesteps(num_steps)

        def sample_first(
            number: int, timesteps: Tensor, ratios: Tensor | None, experiment: Experiment = tuned
        ) -> Tensor:
            sampled = self if ratios is None else experiment
            key = (ratios is not None, sampled.model.dtype, *timesteps.tolist())
            return noises.first(number, key, lambda s, c: sampled.sample(s, c, timesteps, ratios).cpu())

        def sample(timesteps: Tensor, ratios: Tensor | None) -> Tensor:
            return sample_first(count, timesteps, ratios)

        def taught(number: int) -> Tensor:
            return noises.first(number, "teacher", lambda s, c: self.teach(s, c, teacher_num_steps).cpu())

        def distances(number: int, timesteps: Tensor, ratios: Tensor | None = None) -> Tensor:
            return teacher_l2(sample_first(number, timesteps, ratios), taught(number))

        def measured_curve() -> UntunedCurve:
            number = _worth_samples(num_samples)
            starts = {
                name: float(distances(number, grid).mean()) for name, grid in named_grids(schedule, num_steps).items()
            }
            best = min(starts, key=lambda name: starts[name])
            more = self._compared_steps(num_steps, teacher_num_steps)
            of_steps = {steps: float(distances(number, make_timesteps(schedule, steps, best)).mean()) for steps in more}
            return UntunedCurve(best, of_steps, number)

        def kl(timesteps: Tensor, ratios: Tensor | None) -> Tensor:
            is_tuned = ratios is not None
            if is_tuned not in kl_terms:
                kl_terms[is_tuned] = (tuned if is_tuned else self).kl_terms(timesteps, ratios)
            return kl_terms[is_tuned]

        def evaluated() -> Evaluation:
            evaluation = evaluate(
                sample,
                timesteps,
                t_ratios,
                taught(count),
                None if self.guidance.guides else self.model.reference,
                data=self.model.reference if self.guidance.guides else None,
                untuned_timesteps=untuned,
                stock_timesteps=stock,
                features=self.model.features,
                mixture=mixture,
                kl=kl if self._measures_kl else None,
                adds_noise=self.adds_noise,
                in_float32=None if served is None else sample_first(count, timesteps, t_ratios, exact),
            )
            if curve is None:
                return evaluation
            rival = mean_estimate(distances(count, make_timesteps(schedule, num_steps, curve.grid)))
            after = mean_estimate(distances(count, timesteps, t_ratios))
            best = BestUntuned(self.sampler.name, curve.grid, rival.value, bootstrap(rival, after))
            of_schedule = float(distances(curve.num_samples, timesteps, t_ratios).mean())
            return replace(evaluation, best_untuned=best, worth=Worth(of_schedule, curve))

        count = num_samples
        # All that is sampled from all noises comes first: what the curve needs of it is not sampled by itself.
        taught(count)
        for grid in self._grids_of_all_noises(num_steps):
            sample(grid, None)
        curve = curves.get(scale)
        if curve is None and measures_worth and not self.adds_noise:
            curve = measured_curve()
            on_curve(scale, curve)
        while True:
            evaluation = evaluated()
            if evaluation.verdict != "undecided" or count == most:
                return evaluation
            before_more(scale, count, min(2 * count, most))
            count = min(2 * count, most)

    def _compared_steps(self, num_steps: int, teacher_num_steps: int) -> list[int]:
        """The numbers of untuned steps that a schedule is compared with: its own, and more below the teacher's."""
        limit = self.model.noise_schedule.max_num_steps
        most = max(num_steps, min(teacher_num_steps - 1, limit or teacher_num_steps))
        steps = {math.ceil(factor * num_steps) for factor in WORTH_STEP_FACTORS}
        return sorted(count for count in steps if count <= most)

    def evaluation_calls(
        self, num_steps: int, teacher_num_steps: int, start: int, end: int, curve: UntunedCurve | None = None
    ) -> int:
        """The network calls, each of a batch, of `evaluate` for noises from number `start` to `end`, at one scale.

        Args:
            curve: that of the untuned sampler, if it is known. The calls that measure it are `curve_calls`.
        """
        sampled = self._grids_of_all_noises(num_steps)
        # The tuned grid ends where the default one does.
        calls = self.teacher_calls(teacher_num_steps) + sum(map(self.sampler.network_calls, [sampled[0], *sampled]))
        calls *= self._batches(end - start)
        if curve is not None and self._is_other(rival := self._rival(num_steps, curve), sampled):
            calls += self._batches(end - start) * self.sampler.network_calls(rival)
        has_kl = start == 0 and self._measures_kl
        return calls + (2 * self.sampler.network_calls(sampled[0]) if has_kl else 0)

    def precision_calls(self, timesteps: Tensor, num_samples: int) -> int:
        """The network calls by which an evaluation tries a schedule in another precision, after that in float32."""
        return len(self.at_scales()) * self._batches(num_samples) * self.sampler.network_calls(timesteps)

    def curve_calls(self, num_steps: int, teacher_num_steps: int, num_samples: int) -> int:
        """The network calls of `evaluate` that measure the untuned sampler's curve, of `num_samples` noises."""
        if self.adds_noise:
            return 0
        schedule, sampled = self.model.noise_schedule, self._grids_of_all_noises(num_steps)
        grids = [grid for grid in named_grids(schedule, num_steps).values() if self._is_other(grid, sampled)]
        more = self._compared_steps(num_steps, teacher_num_steps)
        grids += [make_timesteps(schedule, steps) for steps in more if steps != num_steps]
        return self._batches(_worth_samples(num_samples)) * sum(map(self.sampler.network_calls, grids))

    def rest_of_rival_calls(self, num_steps: int, num_samples: int, curve: UntunedCurve) -> int:
        """The network calls of `evaluate` on the best named grid, but those that `curve_calls` holds."""
        rival = self._rival(num_steps, curve)
        if not self._is_other(rival, self._grids_of_all_noises(num_steps)):
            return 0
        return self._batches(num_samples - curve.num_samples) * self.sampler.network_calls(rival)

    def _grids_of_all_noises(self, num_steps: int) -> list[Tensor]:
        """The untuned grids that are sampled from all noises: the default one, and diffusers' own where it differs."""
        default, stock = make_timesteps(self.model.noise_schedule, num_steps), self.model.stock_timesteps(num_steps)
        return [default] if stock is None or torch.equal(stock, default) else [default, stock]

    def _rival(self, num_steps: int, curve: UntunedCurve) -> Tensor:
        return make_timesteps(self.model.noise_schedule, num_steps, curve.grid)

    @staticmethod
    def _is_other(grid: Tensor, sampled: list[Tensor]) -> bool:
        return not any(torch.equal(grid, each) for each in sampled)

    def teacher_calls(self, teacher_num_steps: int) -> int:
        """The network calls of a teacher for one batch."""
        return self._teacher_calls(teacher_timesteps(self.model.noise_schedule, teacher_num_steps))

    def _teacher_calls(self, grid: Tensor) -> int:
        return len(grid) - 1 if self.sampler.stochastic else self.sampler.network_calls(grid)

    def _batches(self, num_samples: int) -> int:
        return math.ceil(num_samples / self.rows_at_once)

    @property
    def _measures_kl(self) -> bool:
        """Whether an evaluation has the KL divergence to a mixture."""
        return self.model.mixture is not None and self.guidance.type == "uncond" and not self.adds_noise

    def sample(
        self,
        seeds: list[int],
        condition: Tensor | None,
        timesteps: Tensor,
        t_ratios: Tensor | None = None,
        *,
        decode: bool = True,
    ) -> Tensor:
        """`(len(seeds), *image_shape)`, or not decoded, `(len(seeds), *sample_shape)`; on the device."""
        return self._generate(seeds, condition, self.sampler, timesteps, t_ratios, self.eta, decode)

    def teach(
        self, seeds: list[int], condition: Tensor | None, teacher_num_steps: int, *, decode: bool = True
    ) -> Tensor:
        """A many-step teacher's samples: the same sampler without noise, or DDIM for those that always add it."""
        return self._teach(
            seeds, condition, teacher_timesteps(self.model.noise_schedule, teacher_num_steps), decode=decode
        )

    def _teach(self, seeds: list[int], condition: Tensor | None, timesteps: Tensor, *, decode: bool) -> Tensor:
        name = "ddim" if self.sampler.stochastic else self.sampler.name
        return self._generate(seeds, condition, name, timesteps, None, 0.0, decode)

    def _later_grid(self, num_steps: int) -> Tensor | None:
        """A teacher's grid from a lower starting time; None where sampling cannot start lower."""
        schedule = self.model.noise_schedule
        start = float(schedule.marginal_lambda(torch.tensor(schedule.t_start, dtype=torch.float64)))
        lambda_t = max(start, LOWEST_LAMBDA) + LATER_START
        if lambda_t > MAX_LAMBDA_OF_START or num_steps < 2:
            return None
        later = float(schedule.inverse_lambda(torch.tensor(lambda_t, dtype=torch.float64)))
        return make_timesteps(schedule.starting_at(later), num_steps)

    def _checked_data(self) -> Tensor | None:
        """Data that the teacher's samples should be like; None where there are none, or guidance changes samples."""
        reference = self.model.reference
        if reference is None or self.guidance.guides or self.guidance.type == "classifier":
            return None
        drawn = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))[:CHECKED_DATA]
        return reference[drawn]

    def seeds(self, count: int, base: int) -> list[int]:
        start = base + self.seed % SEED_RANGE
        return list(range(start, start + count))

    def conditions(self, count: int, base: int) -> Tensor | None:
        """Conditions drawn for guided sampling: classes uniformly, tensors from the model's own."""
        if self.guidance.type == "uncond":
            return None
        if self.model.draw_conditions is None:
            raise ValueError("the model came without conditions to draw; accepted: guidance_type 'uncond'")
        return self.model.draw_conditions(count, torch.Generator().manual_seed(base + self.seed % SEED_RANGE))

    def _noise(self, size: int, t: Tensor) -> Tensor:
        std = self.model.noise_schedule.starting_std(t)
        return initial_noise(self.model.sample_shape, self.seeds(size, TUNING_SEEDS), std)[0]

    def _data(self, size: int, data: str, teacher_num_steps: int) -> tuple[Tensor, Tensor | None]:
        if self.model.draw_data is not None and data != "generated":
            x0, condition = self.model.draw_data(size, torch.Generator().manual_seed(self.seed))
            return x0, condition if self.guidance.type != "uncond" else None
        condition = self.conditions(size, TUNING_SEEDS)
        return self.teach(self.seeds(size, TUNING_SEEDS), condition, teacher_num_steps, decode=False), condition

    def kl_terms(self, timesteps: Tensor, t_ratios: Tensor | None = None) -> Tensor:
        """The terms of the exact KL divergence to a mixture, unguided, `(MAX_KL_SAMPLES,)`."""
        assert self.model.mixture is not None
        model_fn = self.guidance.model_fn(self.model)
        step_fn = self.sampler.step_fn(model_fn, self.model.noise_schedule)
        ratios = torch.ones(len(timesteps) - 1, dtype=torch.float64) if t_ratios is None else t_ratios
        std = self.model.noise_schedule.starting_std(timesteps[0])
        x_T, _ = initial_noise(self.model.sample_shape, self.seeds(MAX_KL_SAMPLES, EVALUATION_SEEDS), std)
        return sampler_kl(
            lambda x: sample(step_fn, x, timesteps, ratios), x_T.to(self.device), self.model.mixture, std=std
        )

    def _generate(
        self,
        seeds: list[int],
        condition: Tensor | None,
        sampler: str | Sampler,
        timesteps: Tensor,
        t_ratios: Tensor | None,
        eta: float,
        decode: bool,
    ) -> Tensor:
        return generate(
            self.model,
            self.guidance,
            seeds,
            condition,
            timesteps,
            t_ratios,
            eta,
            sampler=sampler,
            decode=decode,
            batch_size=self.rows_at_once,
            device=self.device,
            after_step=lambda *_: self.after_step(),
        )
