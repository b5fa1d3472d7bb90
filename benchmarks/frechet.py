"""Whether what a comparison accepted holds from many more noises: the Fréchet distance, untuned and tuned.

    timetuner compare --out comparison
    python benchmarks/frechet.py comparison/results.csv --sampler ddim --num-steps 5 10

For every setting chosen, the schedule that `--entrant` had accepted there (or, with `best`, the accepted one closest to
the teacher) and the untuned sampler, each from the same 10,000 noises, which neither tuning nor the comparison has
seen. One process per core, one thread each. The distance is to the data, or with `--to teacher` to the samples of a
teacher of 100 steps at the same guidance.
"""

import argparse
import csv
import json
import os
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from timetuner_core.compare import parse_guidance
from timetuner_core.compare.processes import workers
from timetuner_core.evaluation.distances import frechet_distance
from timetuner_core.grids import make_timesteps
from timetuner_core.models.loading import load_builtin
from timetuner_core.samplers import get_sampler
from timetuner_core.samplers.solver_table import SolverTable
from timetuner_core.tuning_setup import Experiment

SEEDS = 3_000_000_000  # Seeds start here, beside those of experiments, which start at 2**31 and at 2**31 + 2**30.
TEACHER_NUM_STEPS = 100
Row = dict[str, str]


@dataclass(frozen=True)
class Change:
    """Fréchet distances of one setting, in pixels and, if there are any, in features."""

    before: float
    after: float
    features_before: float | None
    features_after: float | None


def measure(row: Row, num_samples: int, to: str) -> Change:
    """Measure one row, in a process of one thread."""
    model = load_builtin(row["model"])
    experiment = Experiment(model, parse_guidance(row["guidance"]), get_sampler(row["sampler"]), rows_at_once=250)
    seeds = list(range(SEEDS, SEEDS + num_samples))
    generator = torch.Generator().manual_seed(SEEDS)
    guided = experiment.guidance.type != "uncond"
    condition = model.draw_conditions(num_samples, generator) if guided and model.draw_conditions else None

    reference = model.reference if to == "data" else experiment.teach(seeds, condition, TEACHER_NUM_STEPS)
    assert reference is not None

    def distances(timesteps: Tensor, t_ratios: Tensor | None, table: SolverTable | None) -> list[float | None]:
        samples = experiment.with_solver(table, timesteps).sample(seeds, condition, timesteps, t_ratios)
        in_pixels = frechet_distance(samples, reference)
        if model.features is None:
            return [in_pixels, None]
        return [in_pixels, frechet_distance(model.features(samples), model.features(reference))]

    timesteps, t_ratios = (
        torch.tensor(json.loads(row[name]), dtype=torch.float64) for name in ("timesteps", "t_ratios")
    )
    table = SolverTable.from_dict(json.loads(row["solver_table"])) if row.get("solver_table") else None
    (before, features_before), (after, features_after) = (
        distances(make_timesteps(model.noise_schedule, int(row["num_steps"])), None, None),
        distances(timesteps, t_ratios, table),
    )
    assert before is not None and after is not None
    return Change(before, after, features_before, features_after)


def chosen(rows: list[Row], entrant: str) -> list[Row]:
    """One accepted row per setting."""
    settings: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["verdict"] != "accepted" or entrant not in {"best", row["entrant"]}:
            continue
        key = tuple(row[name] for name in ("model", "guidance", "sampler", "num_steps"))
        if key not in settings or float(row["teacher_l2"]) < float(settings[key]["teacher_l2"]):
            settings[key] = row
    return list(settings.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", help="a comparison's results.csv")
    parser.add_argument("--entrant", default="end_to_end_grid")
    parser.add_argument("--sampler", nargs="+", default=["ddim"])
    parser.add_argument("--num-steps", nargs="+", type=int, default=[5, 10])
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--to", choices=("data", "teacher"), default="data")
    parser.add_argument("--num-samples", type=int, default=10_000)
    args = parser.parse_args()
    with open(args.results, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["sampler"] in args.sampler]
    rows = [row for row in rows if int(row["num_steps"]) in args.num_steps]
    rows = chosen([row for row in rows if not args.model or row["model"] in args.model], args.entrant)
    print("| model | guidance | sampler | steps | entrant | Fréchet, untuned | tuned | change | of features | |")
    print("| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    with workers(os.cpu_count() or 1) as in_workers:
        each = in_workers.pool.map if in_workers.pool else map
        for row, change in zip(
            rows, each(partial(measure, num_samples=args.num_samples, to=args.to), rows), strict=True
        ):
            setting = " | ".join(row[name] for name in ("model", "guidance", "sampler", "num_steps", "entrant"))
            features = f"{change.features_before:.3f} | {change.features_after:.3f}" if change.features_after else " | "
            relative = change.after / change.before - 1
            print(
                f"| {setting} | {change.before:.4f} | {change.after:.4f} | {relative:+.0%} | {features} |", flush=True
            )


if __name__ == "__main__":
    main()
