"""A learned solver against grid and ratios learned by Adam: the distance to the teacher, and what it costs.

    python -m benchmarks.solver solver.jsonl [--models digits8 …] [--num-steps 5 …] [--seeds 3] [--guidance uncond …]
    python -m benchmarks.solver solver.jsonl --table
    python -m benchmarks.solver --memory [--models digits8 …]

Each tuner has its defaults, the sampler is dpmpp_2m, and both start from the best named grid. Schedules are judged by
one teacher of 100 steps on 512 noises that no tuner has seen. A row is one sample put through the network once, two
if it is guided; a backward pass counts as two, and a step that is recomputed for it as one.

`--memory` counts what PyTorch's operators return, at its peak, in one iteration of each tuner at 5 calls and in
sampling as many rows at once as the tuner puts through the network.

Results are appended to the file as they come, the cheapest settings first. A run continues where one before was cut.
"""

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gauss_newton import PeakMemory
from timetuner_core.compare.plan import parse_guidance
from timetuner_core.evaluation.distances import teacher_l2
from timetuner_core.grids import make_timesteps, start_grids
from timetuner_core.models.diffusion_model import DiffusionModel
from timetuner_core.models.loading import load_builtin
from timetuner_core.samplers import get_sampler, sample
from timetuner_core.tuners import EndToEndTuner, SolverTuner, TunedSetting
from timetuner_core.tuning.problem import TuningState
from timetuner_core.tuning_setup import EVALUATION_SEEDS, TUNING_SEEDS, Experiment

SAMPLER = "dpmpp_2m"
NUM_SAMPLES = 512
TEACHER_NUM_STEPS = 100
# Adam's step is recomputed for its backward pass, so that a row is watched twice. The pass counts as two more.
ROWS_PER_WATCHED_ROW = {"end_to_end": 2, "solver": 1}
TUNERS = {
    "end_to_end": EndToEndTuner(start="best"),
    "solver": SolverTuner(objective="solver", start="best"),
}
MODELS = ["mixture-ring", "mixture-gratings", "digits8", "digits32-ldm"]


class Setting(NamedTuple):
    model: str
    guidance: str
    num_steps: int
    seed: int


@dataclass(frozen=True)
class Result:
    """What a tuner found in a setting.

    Attributes:
        rows: rows through the network up to each iteration that was measured; the teacher and the choice of a start
            are not among them.
        distances: the held-out distances there.
        cpu_seconds: the tuner's time, with the choice of a start and without the teacher.
    """

    tuner: str
    setting: Setting
    rows: list[int]
    distances: list[float]
    cpu_seconds: float


class Bench:
    """One model and guidance with one seed, and its teachers."""

    def __init__(self, model: DiffusionModel, guidance: str, seed: int) -> None:
        self.rows = 0

        def count(num_samples: int) -> None:
            self.rows += num_samples

        self.experiment = Experiment(model.watched(count), parse_guidance(guidance), get_sampler(SAMPLER), seed=seed)
        self.schedule = model.noise_schedule
        self.seeds = self.experiment.seeds(NUM_SAMPLES, EVALUATION_SEEDS)
        self.condition = self.experiment.conditions(NUM_SAMPLES, EVALUATION_SEEDS)
        self.taught = self.experiment.teach(self.seeds, self.condition, TEACHER_NUM_STEPS, decode=False)

    @cache  # noqa: B019 (a bench lives as long as the process)
    def target(self, size: int, num_steps: int) -> Tensor:
        """What a tuner's teacher makes of its population."""
        experiment = self.experiment
        seeds, condition = experiment.seeds(size, TUNING_SEEDS), experiment.conditions(size, TUNING_SEEDS)
        return experiment.teach(seeds, condition, num_steps, decode=False)

    def distance(self, timesteps: Tensor, state: TuningState | None = None) -> float:
        """The mean distance to the teacher on held-out noise; untuned without a state."""
        experiment, t_ratios = self.experiment, None
        if state is not None:
            experiment, t_ratios = experiment.with_solver(state.solver_table, timesteps), state.t_ratios
        samples = experiment.sample(self.seeds, self.condition, timesteps, t_ratios, decode=False)
        return float(teacher_l2(samples, self.taught).mean())

    def untuned(self, setting: Setting) -> Result:
        grids = start_grids(self.schedule, setting.num_steps)
        return Result("untuned", setting, [0], [min(map(self.distance, grids))], 0.0)

    def tune(self, name: str, setting: Setting) -> Result:
        tuner, grid = TUNERS[name], make_timesteps(self.schedule, setting.num_steps)
        target = self.target(tuner.population_size, tuner.teacher_num_steps)
        problem = self.experiment.problem("noise", grid, tuner.population_size, tuner.batch_size)
        state, rows, result = TuningState.start(grid), 0, Result(name, setting, [], [], 0.0)
        measured_every = tuner.total_iters if name == "end_to_end" else 1
        before, seconds, begun = self.rows, 0.0, time.process_time()
        for _ in tuner.run(problem, state, target=target):
            seconds += time.process_time() - begun
            iteration = int(state.iterations.max())
            rows += self.rows - before if iteration else 0
            if iteration and (iteration % measured_every == 0 or bool(state.done.all())):
                result.rows.append(rows * ROWS_PER_WATCHED_ROW[name])
                result.distances.append(self.distance(state.timesteps, state))
            before, begun = self.rows, time.process_time()
        return Result(name, setting, result.rows, result.distances, seconds)


def compare_memory(name: str) -> None:
    """Print the peak memory of both tuners beside the weights and the teacher's samples, and of sampling."""
    bench, num_steps = Bench(load_builtin(name), "uncond", 0), 5
    grid = make_timesteps(bench.schedule, num_steps)
    for tuner_name, tuner in TUNERS.items():
        rows, target = tuner.batch_size, bench.target(tuner.population_size, tuner.teacher_num_steps)
        problem = bench.experiment.problem("noise", grid, tuner.population_size, rows)
        with PeakMemory() as sampling, torch.no_grad():
            sample(problem.step_fn, problem.population[:rows], grid, torch.ones(num_steps, dtype=torch.float64))
        state = TuningState.start(grid)
        with PeakMemory() as tuning:
            next(each for each in tuner.run(problem, state, target=target) if int(each.iterations.max()) == 1)
        peaks = f"{sampling.peak / 2**20:.2f} | {tuning.peak / 2**20:.2f} | {tuning.peak / sampling.peak:.2f}"
        print(f"| {name} | {tuner_name} | {rows} | {peaks} |", flush=True)


def cost(setting: Setting) -> float:
    """What a setting costs, about, for an order in which the cheap and the first seeds come first."""
    tuned = TunedSetting(setting.num_steps)
    rows = sum(tuner.network_samples(tuned) for tuner in TUNERS.values())
    per_row = (1 if setting.model.startswith("digits") else 0.04) * (1 if setting.guidance == "uncond" else 2)
    return rows * per_row * (1 + setting.seed)


def read(path: Path) -> dict[tuple[str, Setting], dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines]
    return {(result["tuner"], Setting(*result["setting"])): result for result in results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=Path("solver.jsonl"))
    parser.add_argument("--memory", action="store_true", help="only measure the memory of tuning")
    parser.add_argument("--table", action="store_true", help="only print the table of the results")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--num-steps", nargs="+", type=int, default=[3, 5, 6, 8, 10, 20])
    parser.add_argument("--guidance", nargs="+", default=["uncond", "cfg:2"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tuners", nargs="+", default=list(TUNERS), choices=list(TUNERS))
    options = parser.parse_args()
    if options.table:
        print(table(read(options.results)))
        return
    torch.set_num_threads(1)
    if options.memory:
        print("| model | tuner | rows of a call | sampling, MB | tuning, MB | ratio |")
        print("| --- | --- | ---: | ---: | ---: | ---: |")
        for name in options.models:
            compare_memory(name)
        return
    known = read(options.results)
    axes = (options.models, options.guidance, options.num_steps, range(options.seeds))
    bench = cache(lambda model, guidance, seed: Bench(load_builtin(model), guidance, seed))
    for setting in sorted(itertools.starmap(Setting, itertools.product(*axes)), key=cost):
        for name in ("untuned", *options.tuners):
            if (name, setting) in known:
                continue
            here = bench(setting.model, setting.guidance, setting.seed)
            result = here.untuned(setting) if name == "untuned" else here.tune(name, setting)
            with options.results.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")


def table(results: dict[tuple[str, Setting], dict[str, Any]]) -> str:
    """Medians over the seeds that have all results; in brackets the least and the greatest ratio of the distances."""
    lines = [
        "| model | guidance | calls | seeds | untuned | Adam | solver | distance, ratio | Adam's rows | solver's rows"
        " | rows, ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[str, str, int], list[Setting]] = defaultdict(list)
    for setting in sorted({setting for _, setting in results}):
        if all((name, setting) in results for name in ("untuned", *TUNERS)):
            groups[setting[:3]].append(setting)
    middle = statistics.median
    for (model, guidance, num_steps), settings in groups.items():
        found = {name: [results[name, setting] for setting in settings] for name in ("untuned", *TUNERS)}
        ends = {name: [result["distances"][-1] for result in found[name]] for name in found}
        rows = {name: [result["rows"][-1] for result in found[name]] for name in TUNERS}
        ratios = [solver / adam for solver, adam in zip(ends["solver"], ends["end_to_end"], strict=True)]
        shares = []
        for solver, end, whole in zip(found["solver"], ends["end_to_end"], rows["end_to_end"], strict=True):
            pairs = zip(solver["rows"], solver["distances"], strict=True)
            reached = [rows for rows, distance in pairs if distance <= end]
            shares.append(reached[0] / whole if reached else float("inf"))
        figures = " | ".join(f"{middle(ends[name]):.3g}" for name in ends)
        spread = f"{middle(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        costs = " | ".join(f"{middle(rows[name]):,.0f}" for name in rows)
        setting_text = f"{model} | {guidance} | {num_steps} | {len(settings)}"
        lines.append(f"| {setting_text} | {figures} | {spread} | {costs} | {middle(shares):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
