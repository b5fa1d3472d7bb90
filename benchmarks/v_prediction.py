"""The published objective, end-to-end tuning and the learned solver on mixtures that predict v (decision 17).

    python -m benchmarks.v_prediction

The schedule is a cosine of 400 steps; 10 steps of DDIM and of DPM-Solver++(2M), each tuner with its defaults. The
figures are mean distances to a teacher of 100 steps on 512 noises that no tuner has seen.
"""

import argparse
from dataclasses import replace

import torch
from torch import Tensor

from tests.core.conftest import normals, predicting, tuner_of
from tests.core.test_grids import cosine_alphas_cumprod
from timetuner_core import NoiseScheduleVP
from timetuner_core.grids import make_timesteps, start_grids
from timetuner_core.models.mixtures import gratings_mixture, ring_mixture
from timetuner_core.samplers import SAMPLERS, sample
from timetuner_core.samplers.solver_table import solver_of
from timetuner_core.tuners import EndToEndTuner, NextEpsTuner, SolverTuner
from timetuner_core.tuning.problem import TuningProblem, TuningState

NUM_STEPS, TEACHER_NUM_STEPS = 10, 100
NUM_TUNED, NUM_DATA, NUM_HELD_OUT = 128, 256, 512
MIXTURES = {"ring": ring_mixture, "gratings": gratings_mixture}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixtures", nargs="+", choices=list(MIXTURES), default=list(MIXTURES))
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpmpp_2m"])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    schedule = NoiseScheduleVP("discrete", alphas_cumprod=cosine_alphas_cumprod(400))
    grid = make_timesteps(schedule, NUM_STEPS)
    for name in options.mixtures:
        mixture = replace(MIXTURES[name](), noise_schedule=schedule)
        model_fn = tuner_of(predicting(mixture, schedule, "v"), schedule, model_type="v").model_fn
        shape = mixture.sample_shape
        for sampler in options.samplers:
            step_fn = SAMPLERS[sampler].step_fn(model_fn, schedule)
            sequential = "sequential" if SAMPLERS[sampler].history_length else "parallel"
            tuners = [
                NextEpsTuner(objective="next_eps", tune_type=sequential),  # type: ignore[arg-type]
                EndToEndTuner(start="best"),
                SolverTuner(objective="solver", start="best"),
            ]
            for seed in range(options.seeds):
                noise = normals(NUM_TUNED, *shape, seed=seed).float()
                data = mixture.sample(NUM_DATA, torch.Generator().manual_seed(seed))[0].float()
                held_out = normals(NUM_HELD_OUT, *shape, seed=100 + seed).float()
                teacher = make_timesteps(schedule, TEACHER_NUM_STEPS)
                with torch.no_grad():
                    taught = sample(step_fn, held_out, teacher, torch.ones(TEACHER_NUM_STEPS, dtype=torch.float64))

                def distance(state: TuningState, x_T: Tensor = held_out, taught: Tensor = taught) -> float:
                    solver = solver_of(sampler, state.solver_table, state.timesteps)  # noqa: B023 (it is called here)
                    x = x_T * schedule.starting_std(state.timesteps[0])
                    with torch.no_grad():
                        x0 = sample(solver.step_fn(model_fn, schedule), x, state.timesteps, state.t_ratios)  # noqa: B023
                    return float((x0 - taught).flatten(1).norm(dim=1).mean())

                starts = [TuningState.start(start) for start in start_grids(schedule, NUM_STEPS)]
                ends = {"untuned": distance(TuningState.start(grid)), "best grid": min(map(distance, starts))}
                for tuner in tuners:
                    population = noise if tuner.population == "noise" else data
                    problem = TuningProblem(
                        model_fn, schedule, step_fn, grid, population, batch_size=tuner.batch_size, seed=seed
                    )
                    state = TuningState.start(grid)
                    for _ in tuner.run(problem, state):
                        pass
                    ends[tuner.objective] = distance(state)
                figures = ", ".join(f"{key} {value:.4f}" for key, value in ends.items())
                print(f"{name}, {sampler}, seed {seed}: {figures}", flush=True)


if __name__ == "__main__":
    main()
