"""A learned solver started in the middle: the distance to 100 steps from there, from noised data.

    python -m benchmarks.solver_midway [--models mixture-ring …] [--samplers ddim dpmpp_2m] [--num-steps 5]

Three ways go on from the grid's k-th time: as many untuned uniform steps; the sampler's own coefficients on what is
left of the learned grid, with its ratios; and these with the learned offsets, where those of the predictions that are
missing are added to the first one's. For k = 0, the last is the learned solver itself.
"""

import argparse

import torch
from torch import Tensor

from timetuner_core.grids import grid_between, make_timesteps
from timetuner_core.models.loading import load_builtin
from timetuner_core.samplers import Sampler, get_sampler, sample
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.sampling.generate import Guidance
from timetuner_core.tuners import SolverTuner
from timetuner_core.tuning.problem import TuningProblem, TuningState
from timetuner_core.tuning_setup import Experiment

NUM_SAMPLES = 256
TEACHER_NUM_STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mixture-ring", "mixture-gratings"])
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpmpp_2m"])
    parser.add_argument("--num-steps", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | sampler | k | t | uniform | own coefficients | learned offsets |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for model in options.models:
        for sampler in options.samplers:
            measure(model, get_sampler(sampler), options.num_steps)


def measure(model: str, sampler: Sampler, num_steps: int) -> None:
    loaded = load_builtin(model)
    schedule = loaded.noise_schedule
    tuner = SolverTuner(objective="solver", start="best")
    grid = make_timesteps(schedule, num_steps)
    experiment = Experiment(loaded, Guidance("uncond", 1.0), sampler)
    problem = experiment.problem("noise", grid, tuner.population_size, tuner.batch_size)
    state = TuningState.start(grid)
    for _ in tuner.run(problem, state):
        pass
    assert state.solver_table is not None
    assert loaded.draw_data is not None
    own = SolverTable.of_sampler(sampler, schedule, state.timesteps)
    changed_a, changed_b = state.solver_table.a - own.a, state.solver_table.b - own.b
    x0 = loaded.draw_data(NUM_SAMPLES, torch.Generator().manual_seed(5))[0]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(6)).to(x0)
    for k in range(num_steps - 1):
        t, left = state.timesteps[k], state.timesteps[k:]
        x_t = schedule.marginal_alpha(t).to(x0) * x0 + schedule.marginal_std(t).to(x0) * noise
        if k == 0:
            x_t = schedule.starting_std(t) * noise
        b = changed_b[k:, k:].clone()
        b[:, 0] += changed_b[k:, :k].sum(dim=1)
        offsets = torch.cat([changed_a[k:, None], b], dim=1)
        rebuilt = SolverTable.of_sampler(sampler, schedule, left).plus(offsets).sampler(sampler.name)
        ends = left[[0, -1]]
        taught = run(problem, sampler, x_t, grid_between(schedule, ends, TEACHER_NUM_STEPS, "uniform"))
        found = [
            run(problem, sampler, x_t, grid_between(schedule, ends, num_steps - k, "uniform")),
            run(problem, sampler, x_t, left, state.t_ratios[k:]),
            run(problem, rebuilt, x_t, left, state.t_ratios[k:]),
        ]
        distances = [float((x - taught).flatten(1).norm(dim=1).mean()) for x in found]
        figures = " | ".join(f"{distance:.3g}" for distance in distances)
        print(f"| {model} | {sampler.name} | {k} | {float(t):.3f} | {figures} |", flush=True)


@torch.no_grad()
def run(
    problem: TuningProblem, sampler: Sampler, x_t: Tensor, timesteps: Tensor, t_ratios: Tensor | None = None
) -> Tensor:
    """Samples from x_t on, untuned without ratios."""
    ratios = torch.ones(len(timesteps) - 1, dtype=torch.float64) if t_ratios is None else t_ratios
    return sample(sampler.step_fn(problem.model_fn, problem.noise_schedule), x_t, timesteps, ratios)


if __name__ == "__main__":
    main()
