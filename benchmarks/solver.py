"""A learned solver against grid and ratios learned by Adam: the distance to the teacher, and what it costs.

    python -m benchmarks.solver [--models digits8 …] [--num-steps 5 …] [--seeds 5] [--guidance uncond …]

Each tuner has its defaults, the sampler is dpmpp_2m, and both start from the best named grid. Schedules are judged by
one teacher of 100 steps on 512 noises that no tuner has seen. A row is one sample put through the network once; a
backward pass counts as two, and a step that is recomputed for it as one.
"""

import argparse
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from timetuner_core.catalog import NAMED_GRIDS
from timetuner_core.compare.plan import parse_guidance
from timetuner_core.evaluation.distances import teacher_l2
from timetuner_core.grids import make_timesteps
from timetuner_core.models.loading import load_builtin
from timetuner_core.samplers import get_sampler
from timetuner_core.tuners import EndToEndTuner, SolverTuner
from timetuner_core.tuning.problem import TuningState
from timetuner_core.tuning_setup import EVALUATION_SEEDS, Experiment

SAMPLER = "dpmpp_2m"
NUM_SAMPLES = 512
TEACHER_NUM_STEPS = 100
# A row that Adam sends through the network is watched twice, as the step is recomputed for its backward pass. That
# pass counts as two more.
ROWS_PER_WATCHED_ROW_OF_ADAM = 2


@dataclass(frozen=True)
class Result:
    """The held-out distance after some rows through the network, once per iteration."""

    rows: list[int]
    distances: list[float]

    def rows_until(self, distance: float) -> int | None:
        """The rows after which the distance is at most so much; None if it never is."""
        reached = [rows for rows, found in zip(self.rows, self.distances, strict=True) if found <= distance]
        return reached[0] if reached else None


class Bench:
    """One model, guidance, number of steps and seed."""

    def __init__(self, model: str, guidance: str, num_steps: int, seed: int) -> None:
        self.rows = 0

        def count(num_samples: int) -> None:
            self.rows += num_samples

        loaded = load_builtin(model).watched(count)
        self.experiment = Experiment(loaded, parse_guidance(guidance), get_sampler(SAMPLER), seed=seed)
        self.num_steps = num_steps
        self.schedule = loaded.noise_schedule
        self.seeds = self.experiment.seeds(NUM_SAMPLES, EVALUATION_SEEDS)
        self.condition = self.experiment.conditions(NUM_SAMPLES, EVALUATION_SEEDS)
        self.taught = self.experiment.teach(self.seeds, self.condition, TEACHER_NUM_STEPS, decode=False)

    def distance(self, timesteps: Tensor, state: TuningState | None = None) -> float:
        """The mean distance to the teacher on held-out noise; untuned without a state."""
        experiment, t_ratios = self.experiment, None
        if state is not None:
            experiment, t_ratios = experiment.with_solver(state.solver_table, self.num_steps), state.t_ratios
        samples = experiment.sample(self.seeds, self.condition, timesteps, t_ratios, decode=False)
        return float(teacher_l2(samples, self.taught).mean())

    def untuned(self) -> float:
        return min(self.distance(make_timesteps(self.schedule, self.num_steps, grid)) for grid in NAMED_GRIDS)

    def tune(self, tuner: EndToEndTuner | SolverTuner, measured_every: int) -> Result:
        grid = make_timesteps(self.schedule, self.num_steps)
        problem = self.experiment.problem("noise", grid, tuner.population_size, tuner.batch_size)
        state, result, rows = TuningState.start(grid), Result([], []), 0
        before = None
        for _ in tuner.run(problem, state):
            iteration = int(state.iterations.max())
            if iteration == 0:
                before = self.rows  # The teacher and the choice of a start cost both tuners the same.
                continue
            assert before is not None
            rows += self.rows - before
            if iteration % measured_every == 0 or bool(state.done.all()):
                result.rows.append(rows * (ROWS_PER_WATCHED_ROW_OF_ADAM if isinstance(tuner, EndToEndTuner) else 1))
                result.distances.append(self.distance(state.timesteps, state))
            before = self.rows
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["digits8", "mixture-gratings", "mixture-ring", "digits32-ldm"])
    parser.add_argument("--num-steps", nargs="+", type=int, default=[3, 5, 10])
    parser.add_argument("--guidance", nargs="+", default=["uncond"])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| model | guidance | calls | untuned | Adam | its rows | solver | its rows | distance, ratio | rows, ratio |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for model in options.models:
        for guidance in options.guidance:
            for num_steps in options.num_steps:
                print(_row(model, guidance, num_steps, options.seeds), flush=True)


def _row(model: str, guidance: str, num_steps: int, num_seeds: int) -> str:
    """The medians over the seeds; in brackets the least and the greatest ratio of the distances."""
    untuned, adam, adam_rows, solver, solver_rows, ratios, rows_ratios = ([] for _ in range(7))
    for seed in range(num_seeds):
        bench = Bench(model, guidance, num_steps, seed)
        by_adam = bench.tune(EndToEndTuner(start="best"), 1000)
        by_solver = bench.tune(SolverTuner(objective="solver", start="best"), 1)
        untuned.append(bench.untuned())
        adam.append(by_adam.distances[-1])
        adam_rows.append(by_adam.rows[-1])
        solver.append(by_solver.distances[-1])
        solver_rows.append(by_solver.rows[-1])
        ratios.append(solver[-1] / adam[-1])
        reached = by_solver.rows_until(adam[-1])
        rows_ratios.append(float("inf") if reached is None else reached / adam_rows[-1])
    middle = statistics.median
    spread = f"{middle(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    figures = f"{middle(untuned):.3f} | {middle(adam):.3f} | {middle(adam_rows):,.0f}"
    figures += f" | {middle(solver):.3f} | {middle(solver_rows):,.0f} | {spread} | {middle(rows_ratios):.2f}"
    return f"| {model} | {guidance} | {num_steps} | {figures} |"


if __name__ == "__main__":
    main()
