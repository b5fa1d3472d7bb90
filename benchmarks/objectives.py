"""Which objective tunes best: the evidence for the default (`make bench`).

    python benchmarks/objectives.py                # reduced, a few minutes on two cores
    python benchmarks/objectives.py --published    # the published number of iterations, most of an hour

Tunes DDIM on a trained network and on a closed-form mixture, with and without classifier-free guidance, by each
objective, and prints one Markdown table per setting: distance to a 100-step teacher and Fréchet distance to
the data, on noise that no objective has seen, and the samples put through the network while tuning (forward;
end_to_end counts its recomputed steps too).
"""

import argparse
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timetuner_core import TimeTuner
from timetuner_core.evaluation import frechet_distance, paired_comparison, teacher_l2
from timetuner_core.loading import DiffusionModel, load_builtin
from timetuner_core.model_wrapper import GuidanceType
from timetuner_core.samplers import initial_noise

MODELS = ("digits8", "mixture-gratings")
GUIDANCES: tuple[tuple[GuidanceType, float], ...] = (("uncond", 1.0), ("classifier-free", 2.0))
NUM_STEPS = (5, 10)
TEACHER_NUM_STEPS = 100
TUNING_SEEDS, EVALUATION_SEEDS = 1_000_000, 2_000_000


@dataclass(frozen=True)
class Effort:
    """How much to spend. Adam's `lr * iterations` is 1 for `next_eps`, as published (2e-3 * 500)."""

    next_eps_iters: int
    end_to_end_iters: int
    num_samples: int


REDUCED = Effort(next_eps_iters=100, end_to_end_iters=60, num_samples=256)
PUBLISHED = Effort(next_eps_iters=500, end_to_end_iters=100, num_samples=512)


@dataclass(frozen=True)
class Setting:
    """What is sampled, and from which seed everything is drawn."""

    model: str
    guidance_type: GuidanceType
    guidance_scale: float
    num_steps: int
    seed: int

    def __str__(self) -> str:
        scale = "" if self.guidance_type == "uncond" else f" x{self.guidance_scale:g}"
        return f"{self.model}, {self.guidance_type}{scale}, {self.num_steps} steps"


class Bench:
    """One setting: its model with a counted network, held-out noise and the teacher's samples from it."""

    def __init__(self, setting: Setting, effort: Effort) -> None:
        self.setting, self.effort = setting, effort
        self.network_calls = 0
        self.model = self._counted(load_builtin(setting.model))
        model_fn = self.model.model_fn(setting.guidance_type, setting.guidance_scale)
        self.tuner = TimeTuner(model_fn, self.model.noise_schedule)
        self.x_T, self.conditions = self._noise(effort.num_samples, EVALUATION_SEEDS)
        self.teacher_samples = self._sample(TEACHER_NUM_STEPS, None)

    def report(self) -> str:
        """The setting's Markdown table."""
        objectives: dict[str, Callable[[], Tensor | None]] = {
            "untuned": lambda: None,
            "next_eps, parallel": lambda: self._tune_next_eps("parallel"),
            "next_eps, sequential": lambda: self._tune_next_eps("sequential"),
            "end_to_end": self._tune_end_to_end,
        }
        reference = self.model.reference
        assert reference is not None
        untuned = teacher_l2(self._sample(self.setting.num_steps, None), self.teacher_samples)
        lines = [
            f"**{self.setting}** (Fréchet distance of the teacher: "
            f"{frechet_distance(self.teacher_samples, reference):.3f})",
            "",
            "| objective | teacher L2 | change, 95 % interval | Fréchet | network calls |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for name, tune in objectives.items():
            self.network_calls = 0
            t_ratios = tune()
            calls = self.network_calls
            samples = self._sample(self.setting.num_steps, t_ratios)
            error = teacher_l2(samples, self.teacher_samples)
            change = paired_comparison(untuned, error)
            interval = "" if t_ratios is None else f"{change.low:+.3f} to {change.high:+.3f}"
            frechet = frechet_distance(samples, reference)
            lines.append(f"| {name} | {error.mean():.3f} | {interval} | {frechet:.3f} | {calls / 1000:.0f} k |")
        return "\n".join(lines) + "\n"

    def _tune_next_eps(self, tune_type: Any) -> Tensor:
        assert self.model.draw_data is not None
        x0, labels = self.model.draw_data(1024, torch.Generator().manual_seed(self.setting.seed))
        batch = {"image": x0} if self.setting.guidance_type == "uncond" else {"image": x0, "label": labels}
        iters = self.effort.next_eps_iters
        return self.tuner.optimize_timesteps(
            [batch],
            self.tuner.ddim_step_fn,
            num_steps=self.setting.num_steps,
            tune_type=tune_type,
            lr=1 / iters,
            total_iters=iters,
            batch_size=16,
            seed=self.setting.seed,
            **self._without_condition(self.conditions),
        )

    def _tune_end_to_end(self) -> Tensor:
        x_T, conditions = self._noise(256, TUNING_SEEDS)
        return self.tuner.optimize_end_to_end(
            x_T,
            self.tuner.ddim_step_fn,
            num_steps=self.setting.num_steps,
            teacher_num_steps=50,
            total_iters=self.effort.end_to_end_iters,
            condition=conditions.get("condition"),
            seed=self.setting.seed,
            **self._without_condition(conditions),
        )

    def _sample(self, num_steps: int, t_ratios: Tensor | None) -> Tensor:
        return self.tuner.ddim_sample(self.x_T, num_steps, t_ratios=t_ratios, **self.conditions)

    def _noise(self, count: int, base: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Initial noise and, if guided, uniformly drawn classes; ranges of `base` do not meet."""
        first = base + self.setting.seed * 10_000
        x_T, _ = initial_noise(self.model.sample_shape, list(range(first, first + count)))
        if self.setting.guidance_type == "uncond":
            return x_T, {}
        labels = torch.randint(self.model.num_classes, (count,), generator=torch.Generator().manual_seed(first))
        conditions = self.model.conditions(self.setting.guidance_type, labels)
        return x_T, {name: value for name, value in conditions.items() if value is not None}

    @staticmethod
    def _without_condition(conditions: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in conditions.items() if name != "condition"}

    def _counted(self, model: DiffusionModel) -> DiffusionModel:
        network: Callable[..., Tensor] = model.network

        def counting(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.network_calls += len(x)
            return network(x, *args, **kwargs)

        return dataclasses.replace(model, network=counting)


def run(setting: Setting, effort: Effort) -> str:
    """One setting, in a process of its own."""
    torch.set_num_threads(1)  # the same figures on any number of cores
    return Bench(setting, effort).report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", action="store_true", help="the published number of iterations: 500 per step")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--num-steps", nargs="+", type=int, default=NUM_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    effort = PUBLISHED if args.published else REDUCED
    settings = [
        Setting(model, *guidance, num_steps, args.seed)
        for model, guidance, num_steps in itertools.product(args.models, GUIDANCES, args.num_steps)
    ]
    started = time.monotonic()
    print(f"`{' '.join(['python', *sys.argv])}`: {effort}\n")
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for report in pool.map(run, settings, itertools.repeat(effort)):
            print(report, flush=True)
    print(f"{time.monotonic() - started:.0f} s in all, one thread per setting, {os.cpu_count()} at once")


if __name__ == "__main__":
    main()
