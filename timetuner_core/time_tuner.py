"""`TimeTuner`: sampling with tuned timesteps, and tuning them, under the names of the original code."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from timetuner_core.catalog import GridName
from timetuner_core.grids import (
    Timesteps,
    check_t_ratios,
    check_timesteps,
    make_timesteps,
    start_grids,
    teacher_timesteps,
)
from timetuner_core.guided_model import GuidedModel
from timetuner_core.noise_schedule import NoiseSchedule
from timetuner_core.samplers import Generators, Sampler, SamplerStep, StepFn, get_sampler, sample_steps
from timetuner_core.samplers.solver_table import solver_of
from timetuner_core.tuners import Optimizer, TuneType
from timetuner_core.tuning.end_to_end import tune_end_to_end
from timetuner_core.tuning.per_step import tune_per_step
from timetuner_core.tuning.problem import TuningProblem, TuningState
from timetuner_core.tuning.solver import tune_solver


class TimeTuner:
    """Sampling and tuning of one model under one noise schedule (TimeTuner, Xia et al., CVPR 2024).

    Args:
        model_fn: what `model_wrapper` returns.
    """

    def __init__(self, model_fn: GuidedModel, noise_schedule: NoiseSchedule) -> None:
        self.model_fn = model_fn
        self.noise_schedule = noise_schedule

    def ddim_step_fn(
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
    ) -> tuple[Tensor, Tensor]:
        """One DDIM step, `(x_s, x0)`; see `samplers.SamplerStep`."""
        return self.step_fn("ddim")(x, t, s, t_ratio, eta, noise, condition, uncond_condition, generator)

    def step_fn(self, sampler: str | Sampler) -> SamplerStep:
        """A sampler of `samplers.SAMPLERS`, an installed one, or a given one, on this model. Raises: ValueError."""
        return get_sampler(sampler).step_fn(self.model_fn, self.noise_schedule)

    def get_timesteps(self, num_steps: int | None = None, timesteps: Timesteps | GridName | None = None) -> Tensor:
        """A grid by name (see `grids.make_timesteps`), or the given one, checked.

        Returns:
            `(num_steps + 1,)`, float64, falling.

        Raises:
            ValueError: neither `num_steps` nor a grid given, `num_steps` outside 1..N, both given and at odds, or
                a grid that does not fall within `[0, T]`.
        """
        if timesteps is not None and not isinstance(timesteps, str):
            grid = check_timesteps(self.noise_schedule, timesteps)
            if num_steps not in (None, len(grid) - 1):
                raise ValueError(f"num_steps is {num_steps}, but timesteps has {len(grid) - 1} steps")
            return grid
        if num_steps is None:
            raise ValueError("give num_steps or timesteps")
        return make_timesteps(self.noise_schedule, num_steps, timesteps or "default")

    def ddim_sample(
        self,
        x: Tensor,
        num_steps: int | None = None,
        timesteps: Timesteps | GridName | None = None,
        t_ratios: Tensor | list[float] | None = None,
        eta: float = 0.0,
        condition: Tensor | None = None,
        uncond_condition: Tensor | None = None,
        return_intermediates: bool = False,
        verbose: bool = False,
        *,
        generator: Generators = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Any:
        """`sample` with DDIM."""
        return self.sample(
            x,
            num_steps,
            timesteps,
            t_ratios,
            eta,
            condition,
            uncond_condition,
            return_intermediates,
            verbose,
            generator=generator,
            callback=callback,
        )

    @torch.no_grad()
    def sample(
        self,
        x: Tensor,
        num_steps: int | None = None,
        timesteps: Timesteps | GridName | None = None,
        t_ratios: Tensor | list[float] | None = None,
        eta: float = 0.0,
        condition: Tensor | None = None,
        uncond_condition: Tensor | None = None,
        return_intermediates: bool = False,
        verbose: bool = False,
        *,
        sampler: str | Sampler = "ddim",
        generator: Generators = None,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> Any:
        """Sampling from `x` = x_T, `(B, ...)`, to x0.

        Args:
            timesteps: a grid of `num_steps + 1` falling times, or a grid's name.
            t_ratios: one per step, `(num_steps,)`; default ones, which is the plain sampler. A step that calls
                the network more than once applies its ratio to each call.
            eta: 0 is deterministic, 1 ancestral; for DDIM only.
            sampler: a name that `samplers.get_sampler` knows, or a sampler, such as a learned one of
                `solver_table.solver_of`.
            generator: for samplers that add noise, one, or one per sample.
            callback: called with (step index, x_s, x0) after each step.

        Returns:
            x, or `(x, {"x_t": [...], "x0_pred": [...]})` with `return_intermediates`.

        Raises:
            ValueError: an unknown sampler; see `get_timesteps`; `t_ratios` of another length than the grid has
                steps, or that lead out of `(0, T]`.
        """
        step_fn = self.step_fn(sampler)
        grid = self.get_timesteps(num_steps, timesteps)
        ratios = check_t_ratios(self.noise_schedule, grid, t_ratios)
        step_kwargs = {
            "eta": eta,
            "generator": generator,
            "condition": condition,
            "uncond_condition": uncond_condition,
        }
        intermediates: dict[str, list[Tensor]] = {"x_t": [x], "x0_pred": []}
        steps = sample_steps(step_fn, x, grid, ratios, **step_kwargs)
        for i, (x_s, x0) in enumerate(tqdm(steps, step_fn.sampler.name, len(ratios), disable=not verbose)):
            x = x_s
            if return_intermediates:
                intermediates["x_t"].append(x_s)
                intermediates["x0_pred"].append(x0)
            if callback is not None:
                callback(i, x_s, x0)
        return (x, intermediates) if return_intermediates else x

    def optimize_timesteps(
        self,
        data_loader: Iterable[Mapping[str, Any]],
        step_fn: StepFn,
        encode_fn: Callable[[Tensor], Tensor] | None = None,
        num_steps: int | None = None,
        timesteps: Timesteps | GridName | None = None,
        tune_type: TuneType = "sequential",
        lr: float = 2e-3,
        total_iters: int = 500,
        verbose: bool = False,
        *,
        optimizer: Optimizer = "adam",
        batch_size: int | None = None,
        population_size: int = 1024,
        seed: int = 0,
        device: torch.device | str | None = None,
        **step_kwargs: Any,
    ) -> Tensor:
        """Learn one ratio per step, the network frozen, by the published objective: see `tuning.tune_per_step`.

        Args:
            data_loader: yields mappings with `image` `(B, ...)` and, for conditional models, `label`
                `(B, ...)`. It is read once, up to `population_size` images; iterations then draw from these
                with replacement, so a short loader does not end tuning early.
            step_fn: any one-step sampler, `step_fn(x, t, s, t_ratio=..., **step_kwargs) -> (x_s, x0)`,
                taking `t`, `s` and `t_ratio` of shape `()` or `(B,)`; `self.ddim_step_fn`, say,
                or `self.step_fn(name)`.
            encode_fn: applied to each batch of images (LDM's encoder).
            optimizer: `adam`, as in the original, or `gauss_newton`, which finds the same ratios in some
                twentieth of the time and ends by itself, after `total_iters` batches at most.
            batch_size: samples per step and iteration; default that of the loader.
            seed: fixes every draw: the same arguments give the same ratios.
            device: where to put the images; default where the loader has them.

        Returns:
            t_ratios, `(num_steps,)`, float64 on the CPU.

        Raises:
            ValueError: an empty loader, or what `get_timesteps` and `tuning.tune_per_step` raise.
        """
        grid = self.get_timesteps(num_steps, timesteps)
        x0, condition, loader_batch = _population(data_loader, encode_fn, population_size, device)
        problem = TuningProblem(
            self.model_fn,
            self.noise_schedule,
            step_fn,
            grid,
            x0,
            condition,
            batch_size=loader_batch if batch_size is None else batch_size,
            seed=seed,
            step_kwargs=step_kwargs,
        )
        groups = 1 if tune_type == "parallel" else problem.num_steps - 1
        state = TuningState.start(grid)
        tuned = tune_per_step(problem, state, "next_eps", tune_type, optimizer, lr=lr, total_iters=total_iters)
        return _last_ratios(tuned, state, groups * total_iters, verbose)

    def optimize_end_to_end(
        self,
        x: Tensor,
        step_fn: StepFn,
        num_steps: int | None = None,
        timesteps: Timesteps | GridName | None = None,
        teacher_num_steps: int = 100,
        lr: float = 1e-2,
        total_iters: int = 100,
        verbose: bool = False,
        *,
        condition: Tensor | None = None,
        batch_size: int = 16,
        seed: int = 0,
        **step_kwargs: Any,
    ) -> Tensor:
        """Learn all ratios at once by matching a many-step teacher's samples: see `tuning.tune_end_to_end`.

        Args:
            x: initial noise x_T to tune on, `(P, ...)`; condition: `(P, ...)` or None.
            teacher_num_steps: steps of the teacher, the same sampler on its default grid, untuned.

        Returns:
            t_ratios, `(num_steps,)`, float64 on the CPU.

        Raises:
            ValueError: what `get_timesteps` and `tuning.tune_end_to_end` raise.
        """
        problem = self._from_noise(
            x, step_fn, self.get_timesteps(num_steps, timesteps), condition, batch_size, seed, step_kwargs
        )
        state = TuningState.start(problem.timesteps)
        teacher = teacher_timesteps(self.noise_schedule, teacher_num_steps)
        tuned = tune_end_to_end(problem, state, teacher, lr=lr, total_iters=total_iters)
        return _last_ratios(tuned, state, total_iters + math.ceil(len(x) / batch_size), verbose)

    def optimize_schedule(
        self,
        x: Tensor,
        step_fn: StepFn,
        num_steps: int,
        teacher_num_steps: int = 100,
        lr: float = 1e-2,
        total_iters: int = 100,
        verbose: bool = False,
        *,
        condition: Tensor | None = None,
        batch_size: int = 16,
        seed: int = 0,
        **step_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Like `optimize_end_to_end`, but learn the grid too, from the best of the named ones.

        Returns:
            timesteps `(num_steps + 1,)` and t_ratios `(num_steps,)`, float64 on the CPU, to sample with together.
        """
        problem = self._from_noise(x, step_fn, self.get_timesteps(num_steps), condition, batch_size, seed, step_kwargs)
        state = TuningState.start(problem.timesteps)
        tuned = tune_end_to_end(
            problem,
            state,
            teacher_timesteps(self.noise_schedule, teacher_num_steps),
            "both",
            lr=lr,
            total_iters=total_iters,
            starts=start_grids(self.noise_schedule, num_steps),
        )
        t_ratios = _last_ratios(tuned, state, total_iters + math.ceil(len(x) / batch_size) + 1, verbose)
        return state.timesteps, t_ratios

    def optimize_solver(
        self,
        x: Tensor,
        num_steps: int,
        teacher_num_steps: int = 100,
        total_iters: int = 10,
        verbose: bool = False,
        *,
        sampler: str | Sampler = "ddim",
        condition: Tensor | None = None,
        batch_size: int = 16,
        seed: int = 0,
        **step_kwargs: Any,
    ) -> tuple[Tensor, Tensor, Sampler]:
        """Learn grid, ratios and the sampler's coefficients, without a backward pass: see `tuning.tune_solver`.

        Args:
            x: initial noise x_T to tune on, `(P, ...)`; condition: `(P, ...)` or None.
            sampler: one without noise, or its name.

        Returns:
            timesteps `(num_steps + 1,)`, t_ratios `(num_steps,)` and the learned sampler, for `sample`.

        Raises:
            ValueError: what `get_timesteps` and `tuning.tune_solver` raise.
        """
        step_fn = self.step_fn(sampler)
        problem = self._from_noise(x, step_fn, self.get_timesteps(num_steps), condition, batch_size, seed, step_kwargs)
        state = TuningState.start(problem.timesteps)
        tuned = tune_solver(
            problem,
            state,
            teacher_timesteps(self.noise_schedule, teacher_num_steps),
            total_iters=total_iters,
            with_start=False,  # `sample` is given x_T, and not noise of another level.
            starts=start_grids(self.noise_schedule, num_steps),
        )
        t_ratios = _last_ratios(tuned, state, total_iters + math.ceil(len(x) / batch_size) + 1, verbose)
        return state.timesteps, t_ratios, solver_of(step_fn.sampler.name, state.solver_table, state.timesteps)

    def _from_noise(
        self,
        x: Tensor,
        step_fn: StepFn,
        timesteps: Tensor,
        condition: Tensor | None,
        batch_size: int,
        seed: int,
        step_kwargs: dict[str, Any],
    ) -> TuningProblem:
        return TuningProblem(
            self.model_fn,
            self.noise_schedule,
            step_fn,
            timesteps,
            x,
            None if condition is None else condition.to(x.device),
            batch_size=batch_size,
            seed=seed,
            step_kwargs=step_kwargs,
        )


def _last_ratios(tuned: Iterator[TuningState], state: TuningState, total: int, verbose: bool) -> Tensor:
    """Run a tuner to its end."""
    with tqdm(tuned, "tuning", total, disable=not verbose) as progress:
        for _ in progress:
            progress.set_postfix(loss=f"{state.loss.nan_to_num().sum():.4f}")
    return state.t_ratios


@torch.no_grad()
def _population(
    data_loader: Iterable[Mapping[str, Any]],
    encode_fn: Callable[[Tensor], Tensor] | None,
    population_size: int,
    device: torch.device | str | None,
) -> tuple[Tensor, Tensor | None, int]:
    """Up to `population_size` images, their labels if any, and the loader's batch size."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    for batch in data_loader:
        image = batch["image"].to(device)
        images.append(image if encode_fn is None else encode_fn(image))
        if batch.get("label") is not None:
            labels.append(torch.as_tensor(batch["label"]).to(images[-1].device))
        count += len(image)
        if count >= population_size:
            break
    if not images:
        raise ValueError("data_loader gave no batch; accepted: at least one image")
    condition = torch.cat(labels)[:population_size] if labels else None
    return torch.cat(images)[:population_size], condition, len(images[0])
